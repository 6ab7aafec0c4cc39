//! Streams that do not go on: one typed error event, and never a clean end.

use serde_json::json;

use super::{PROMPTS, Pair, asked::of_each_api};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_right_ends_with_one_typed_error() {
    let pair = Pair::start().await;
    let chat = &of_each_api(PROMPTS[0])[0];
    let cases = [
        (json!({"n": 2}), "n", "several choices"),
        (json!({"frequency_penalty": 0.5}), "frequency_penalty", "penalties"),
        (json!({"response_format": {"type": "json_object"}}), "response_format", "grammar or schema"),
        (json!({"structured_outputs": {"choice": ["a"]}}), "response_format", "grammar or schema"),
        (json!({"bad_words": ["x y"]}), "", "depends on the output so far"),
    ];
    for (members, param, reason) in cases {
        let asked = chat.with(members.clone());
        for kind in ["reset", "error", "abort", "end"] {
            pair.first.faults(&pair.client, &json!({"kind": kind, "after_tokens": 5})).await;
            let got = pair.ask(&asked).await;
            let last = got.trim_end().rsplit("\n\n").next().unwrap();
            assert!(!got.contains("[DONE]"), "{members} {kind}: {got}");
            assert_eq!(got.matches("\"error\"").count(), 1, "{members} {kind}: {got}");
            assert!(
                last.contains("\"code\":\"stream_interrupted\"") && last.contains(reason),
                "{members}: {last}"
            );
            assert!(
                param.is_empty() || last.contains(&format!("\"param\":\"{param}\"")),
                "{members}: {last}"
            );
        }
    }
    pair.first.faults(&pair.client, &json!([])).await;
    // Before anything was said it is simply asked again.
    for members in [json!({"n": 2}), json!({"frequency_penalty": 0.5})] {
        let asked = chat.with(members);
        let got = pair.ask_with(&asked, &json!({"kind": "cut", "event": 1, "byte": 3})).await;
        assert!(got.ends_with("data: [DONE]\n\n"), "{got}");
    }
    pair.proxy.settles().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_api_tells_it_in_its_own_shape() {
    let mut config = super::config();
    config.resume.attempts = 1;
    let pair = Pair::with(config).await;
    for asked in of_each_api(PROMPTS[0]) {
        for engine in [&pair.first, &pair.second] {
            engine.faults(&pair.client, &json!({"kind": "reset", "after_tokens": 3})).await;
        }
        let got = pair.ask(&asked).await;
        let last = got.trim_end().rsplit("\n\n").next().unwrap();
        let shape = match asked.path {
            "/v1/messages" => "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":",
            "/v1/responses" => "event: error\ndata: {\"type\":\"error\",",
            _ => "data: {\"error\":{\"message\":",
        };
        assert!(last.starts_with(shape) && last.contains("as often as it may"), "{last}");
        for engine in [&pair.first, &pair.second] {
            engine.faults(&pair.client, &json!([])).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_wants_none_gets_none() {
    let pair = Pair::start().await;
    let asked = &of_each_api(PROMPTS[0])[0];
    pair.first.faults(&pair.client, &json!({"kind": "reset", "after_tokens": 3})).await;
    let request = pair.client.post(format!("{}{}", pair.proxy.url, asked.path)).json(&asked.body);
    let request = request.header("x-session-affinity", &pair.session).header("x-penstock-resume", "off");
    let got = request.send().await.unwrap().text().await.unwrap();
    assert!(
        got.contains("stream_interrupted") && !got.contains("[DONE]") && !got.contains("token_ids\":["),
        "{got}"
    );
    let refused = "penstock_proxy_resume_refusals_total{endpoint=\"e0\",reason=\"opted_out\"}";
    assert_eq!(pair.proxy.count(refused), 1, "it is counted as what it is");
}
