//! `penstock explain` against a whole Penstock with an engine that fails: the story of a request that was saved by a retry,
//! of one that was refused, and of one that nobody knows.

#![allow(clippy::unwrap_used)]

mod support;

use std::process::Output;

use serde_json::{Value, json};
use support::{Up, client, penstock};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The id and status of one request.
async fn chat(up: &Up, model: &str, explain: bool) -> (String, u16) {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hush"}], "max_tokens": 4});
    let mut request = client().post(format!("{}/v1/chat/completions", up.url())).json(&body);
    if explain {
        request = request.header("x-penstock-explain", "1");
    }
    let answer = request.send().await.unwrap();
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let status = answer.status().as_u16();
    answer.bytes().await.unwrap();
    (id, status)
}

fn explain(up: &Up, args: &[&str]) -> Output {
    up.run(&[&["explain"], args].concat())
}

#[tokio::test]
async fn an_operator_learns_why_a_request_went_where_it_went() {
    let up = Up::start(&["--engines", "2"]);
    let sick = up.json["engines"][0].clone();
    let fault = json!({"kind": "reset"});
    let url = format!("http://{}/sim/faults", sick["address"].as_str().unwrap());
    client().post(url).json(&fault).send().await.unwrap().error_for_status().unwrap();

    // Of two idle engines either may come first; an ejected one comes again.
    let story = loop {
        let (id, status) = chat(&up, "sim-model", true).await;
        assert_eq!(status, 200, "a retry saves it");
        let output = explain(&up, &[&id]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let story = text(&output.stdout);
        assert!(story.contains(&format!("Request {id}")), "{story}");
        if story.contains("so another endpoint was tried") {
            break story;
        }
        // A kept connection that is reset may have been closed while idle: its request is sent again.
        let again = story.contains("so it was sent again: the engine never saw it");
        assert!(again || story.contains("because the client asked for it"), "{story}");
    };
    let id = sick["id"].as_str().unwrap();
    for part in [
        "Attempt 1, after",
        &format!(": {id} (least_loaded, balanced)"),
        "2 of 2 endpoints could take it",
        "failed after",
        "so another endpoint was tried",
        "Attempt 2, after",
        "1 of 2 endpoints could take it; left out: 1 tried",
        "first byte of its answer after",
        "Answered 200, after",
        "4 out",
    ] {
        assert!(story.contains(part), "{part:?} missing in\n{story}");
    }
    assert!(!story.contains("hush"), "{story}");

    let (id, status) = chat(&up, "no-such-model", false).await;
    assert_eq!(status, 404);
    let output = explain(&up, &[&id, "--json"]);
    let decision: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&decision["why"], &decision["request"]["error"]),
        (&"failed".into(), &"model_not_found".into())
    );

    let output = explain(&up, &["never-seen"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("another proxy served it"), "{}", text(&output.stderr));

    // A second proxy that is down hides nothing that the first knows, and is told where the first knows nothing.
    let (known, down) = (format!("http://{}", up.address("proxy_private")), "http://127.0.0.1:1");
    let output = explain(&up, &[&id, "--proxy", down, "--proxy", &known]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = explain(&up, &["never-seen", "--proxy", down, "--proxy", &known]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains(down), "{}", text(&output.stderr));

    let log = std::fs::read_to_string(up.data_dir().join("logs/proxy-access.log")).unwrap();
    assert!(log.contains(&id) && !log.contains("hush"), "{log}");
    up.stop();
}

#[test]
fn an_address_that_is_none_is_refused() {
    let output = penstock().args(["explain", "x", "--proxy", "localhost:1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("http://HOST:PORT"), "{}", text(&output.stderr));
}
