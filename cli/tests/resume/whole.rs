//! Whole answers that are streams on the way, so that a lost engine costs them nothing either.

use penstock_config::proxy::Unary;
use serde_json::{Value, json};

use super::{
    PROMPTS, Pair, TOKENS,
    asked::{Asked, of_each_api, told_apart},
    config,
};

/// The request for the whole answer.
fn whole(asked: &Asked) -> Asked {
    let mut asked = asked.clone();
    let members = asked.body.as_object_mut().unwrap();
    members.remove("stream");
    members.remove("stream_options");
    asked
}

fn same(body: &str) -> String {
    told_apart(&format!("data: {body}\n\n"))
}

async fn streaming() -> Pair {
    let mut config = config();
    config.resume.unary = Unary::Stream;
    Pair::with(config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_answer_outlives_its_engine_and_is_the_engines_own() {
    let (asking, streaming) = tokio::join!(Pair::start(), streaming());
    for asked in of_each_api(PROMPTS[1]).iter().map(whole) {
        let own = asking.ask(&asked).await;
        assert_eq!(same(&streaming.ask(&asked).await), same(&own), "{}", asked.path);
        for after_tokens in 1..TOKENS {
            for kind in ["reset", "error", "abort", "freeze"] {
                // An aborted response says of itself that it is complete.
                if kind == "abort" && asked.path == "/v1/responses" {
                    continue;
                }
                let fault = json!({"kind": kind, "after_tokens": after_tokens});
                let got = streaming.ask_with(&asked, &fault).await;
                assert_eq!(same(&got), same(&own), "{} with {fault}", asked.path);
            }
        }
    }
    streaming.proxy.settles().await;
    // What a stream could not say is asked for as it is.
    let asked = whole(&of_each_api(PROMPTS[0])[0]).with(json!({"n": 2}));
    let answer: Value = serde_json::from_str(&streaming.ask(&asked).await).unwrap();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cannot_go_on_is_a_502_and_an_aborted_one_no_answer() {
    let mut config = config();
    (config.resume.unary, config.resume.attempts) = (Unary::Stream, 1);
    let pair = Pair::with(config).await;
    for engine in [&pair.first, &pair.second] {
        engine.faults(&pair.client, &json!({"kind": "reset", "after_tokens": 3, "path": "/v1/"})).await;
    }
    let asked = whole(&of_each_api(PROMPTS[0])[0]);
    let request = pair.client.post(format!("{}{}", pair.proxy.url, asked.path)).json(&asked.body);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 502);
    let body = answer.json::<Value>().await.unwrap();
    assert_eq!(body["error"]["code"], "stream_interrupted");
    for engine in [&pair.first, &pair.second] {
        engine.faults(&pair.client, &json!([])).await;
    }
    pair.proxy.settles().await;

    // Asked as it is, an answer that its engine gave up is a 200 with a part: no answer. Another engine gives one.
    let asking = Pair::start().await;
    for asked in of_each_api(PROMPTS[0]).iter().map(whole).filter(|asked| asked.path.contains("completions"))
    {
        let own = asking.ask(&asked).await;
        asking.first.faults(&asking.client, &json!({"kind": "abort", "after_tokens": 4})).await;
        assert_eq!(same(&asking.ask(&asked).await), same(&own));
        asking.first.faults(&asking.client, &json!([])).await;
    }
}
