//! Engines lost in the middle of streams: what the client gets is, byte for byte, what it would have got.

#![allow(clippy::unwrap_used)]

mod asked;
mod gateway;
mod refused;
mod whole;

use asked::{Asked, TOKENS, of_each_api, text_of, told_apart};
use gateway::{Engine, Proxy, config};
use serde_json::{Value, json};

const PROMPTS: [&str; 3] = ["Say something", "line\nbreak, \"quotes\" and é 🎈", "x"];

/// Two engines; sessions of this name are asked of the first, and go on at the second.
struct Pair {
    first: Engine,
    second: Engine,
    proxy: Proxy,
    client: reqwest::Client,
    session: String,
}

impl Pair {
    async fn start() -> Self {
        Self::with(config()).await
    }

    async fn with(config: penstock_config::proxy::ProxyConfig) -> Self {
        let (first, second) = tokio::join!(Engine::start(&[]), Engine::start(&[]));
        let proxy = Proxy::start(config, &[&first, &second]);
        let client = reqwest::Client::new();
        let probe = &of_each_api("x")[1];
        let mut found = None;
        for number in 0..64 {
            let session = format!("s{number}");
            let before = requests(&client, &first).await;
            probe.of(&client, &proxy, &session).await;
            if requests(&client, &first).await > before {
                found = Some(session);
                break;
            }
        }
        Self { session: found.expect("a session of the first engine"), first, second, proxy, client }
    }

    async fn ask(&self, asked: &Asked) -> String {
        asked.of(&self.client, &self.proxy, &self.session).await
    }

    /// The answer when the first engine fails so; that it did, and the stream went on.
    async fn ask_with(&self, asked: &Asked, fault: &Value) -> String {
        self.first.faults(&self.client, fault).await;
        let before = self.proxy.count("penstock_proxy_stream_losses_total");
        let answer = self.ask(asked).await;
        let losses = self.proxy.count("penstock_proxy_stream_losses_total") - before;
        let unseen = fault.get("after_tokens") == Some(&json!(0)) || fault.get("event") == Some(&json!(0));
        assert!(losses == 1 || losses == 0 && unseen, "{losses} losses by {fault}");
        self.first.faults(&self.client, &json!([])).await;
        answer
    }
}

/// Requests that an engine has had.
async fn requests(client: &reqwest::Client, engine: &Engine) -> u64 {
    let url = format!("http://{}/sim/state", engine.address);
    client.get(url).send().await.unwrap().json::<Value>().await.unwrap()["requests"].as_u64().unwrap()
}

fn assert_same(asked: &Asked, fault: &Value, got: &str, whole: &str) {
    let (got_apart, whole_apart) = (told_apart(got), told_apart(whole));
    let differs = got_apart.lines().zip(whole_apart.lines()).find(|(got, whole)| got != whole);
    assert!(
        got_apart == whole_apart,
        "{} with {fault}\nfirst that differs, got and whole: {differs:#?}\n--- as sent\n{got}",
        asked.path
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_lost_at_any_token_costs_the_client_nothing() {
    let pair = Pair::start().await;
    for (number, prompt) in PROMPTS.iter().enumerate() {
        for asked in of_each_api(prompt) {
            let whole = pair.ask(&asked).await;
            for after_tokens in 0..TOKENS {
                let kinds: &[&str] = if number == 0 {
                    &["reset", "close", "end", "error", "abort", "freeze"]
                } else {
                    &["reset"]
                };
                // Before the first event an engine is still reading the prompt: silence is no stall yet.
                for kind in kinds.iter().filter(|kind| **kind != "freeze" || after_tokens > 0) {
                    let fault = json!({"kind": kind, "after_tokens": after_tokens});
                    let got = pair.ask_with(&asked, &fault).await;
                    assert_same(&asked, &fault, &got, &whole);
                }
            }
        }
    }
    pair.proxy.settles().await;
    assert_eq!(pair.proxy.count("penstock_proxy_resume_refusals_total"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_lost_at_any_byte_costs_the_client_nothing() {
    let pair = Pair::start().await;
    for asked in of_each_api(PROMPTS[1]) {
        let whole = pair.ask(&asked).await;
        let events: Vec<&str> = whole.split_inclusive("\n\n").collect();
        for (event, text) in events.iter().enumerate() {
            // Every byte of one event that brings text; of the first and the last events many, of those between, which are alike, a few.
            let step = match event {
                4 => 1,
                _ if event < 3 || event + 4 > events.len() => 7,
                _ => 61,
            };
            for byte in (0..text.len()).step_by(step) {
                let fault = json!({"kind": "cut", "event": event, "byte": byte});
                let got = pair.ask_with(&asked, &fault).await;
                assert_same(&asked, &fault, &got, &whole);
            }
        }
    }
    pair.proxy.settles().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_outlives_three_engines() {
    let (a, b, c) = tokio::join!(Engine::start(&[]), Engine::start(&[]), Engine::start(&[]));
    let proxy = Proxy::start(config(), &[&a, &b, &c]);
    let client = reqwest::Client::new();
    for asked in of_each_api(PROMPTS[1]) {
        let whole = asked.of(&client, &proxy, "s").await;
        for after_tokens in 1..TOKENS / 3 {
            for kind in ["reset", "error", "abort", "freeze"] {
                let fault = json!({"kind": kind, "after_tokens": after_tokens, "count": 1, "path": "/v1/"});
                for engine in [&a, &b, &c] {
                    engine.faults(&client, &fault).await;
                }
                let before = proxy.count("penstock_proxy_resumes_total");
                let got = asked.of(&client, &proxy, "s").await;
                assert_same(&asked, &fault, &got, &whole);
                let resumes = proxy.count("penstock_proxy_resumes_total") - before;
                assert!(resumes >= 2, "{resumes} resumes");
            }
        }
    }
    proxy.settles().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_strings_are_found_across_the_cut() {
    let pair = Pair::start().await;
    for asked in &of_each_api(PROMPTS[0])[..2] {
        let text = text_of(&pair.ask(asked).await);
        let at = text.char_indices().map(|(at, _)| at).nth(27).unwrap();
        let stop: String = text[at..].chars().take(9).collect();
        for members in
            [json!({"stop": [stop, "never said"]}), json!({"stop": stop, "include_stop_str_in_output": true})]
        {
            let asked = asked.with(members);
            let whole = pair.ask(&asked).await;
            assert!(whole.contains("\"stop\""), "{whole}");
            for after_tokens in 1..8 {
                let fault = json!({"kind": "reset", "after_tokens": after_tokens});
                pair.first.faults(&pair.client, &fault).await;
                let got = pair.ask(&asked).await;
                assert_eq!(text_of(&got), text_of(&whole), "after {after_tokens}: {got}");
                assert_eq!(got.matches("\"finish_reason\":\"stop\"").count(), 1, "{got}");
                let usage = |text: &str| {
                    told_apart(text)
                        .split_once("\"usage\":{")
                        .map(|(_, u)| u[..u.find('}').unwrap()].to_owned())
                };
                assert_eq!(usage(&got), usage(&whole));
            }
            pair.first.faults(&pair.client, &json!([])).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ids_cannot_say_goes_on_by_text() {
    let mut without_ids = config();
    without_ids.resume.token_ids = false;
    let (with, without) = tokio::join!(Pair::start(), Pair::with(without_ids));
    let [chat, completion, ..] = <[Asked; 4]>::try_from(of_each_api(PROMPTS[1])).unwrap();
    let cases = [
        (&without, chat.clone()),
        (&without, completion.clone()),
        (&with, chat.with(json!({"logprobs": true, "top_logprobs": 2}))),
        (&with, completion.with(json!({"logprobs": 2}))),
        (&with, chat.with(json!({"max_tokens": null}))),
        (&with, completion.with(json!({"max_tokens": null}))),
        (&with, chat.with(json!({"return_token_ids": true}))),
        (
            &with,
            completion
                .with(json!({"return_token_ids": true, "min_tokens": 6, "seed": 7, "temperature": 1.0})),
        ),
    ];
    for (pair, asked) in cases {
        let whole = pair.ask(&asked).await;
        for after_tokens in 1..8 {
            let fault = json!({"kind": "reset", "after_tokens": after_tokens});
            let got = pair.ask_with(&asked, &fault).await;
            assert_same(&asked, &json!([fault, asked.body]), &got, &whole);
        }
    }
}
