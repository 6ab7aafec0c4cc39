//! The load generator against real simulators: good runs are good, and every kind of damage is found.
#![allow(clippy::unwrap_used)]

mod engine_support;

use engine_support::Sim;
use penstock_loadtest::load::{Options, Report, run};
use serde_json::json;

async fn load(sim: &Sim, options: Options) -> Report {
    run(Options { url: sim.url(""), connect_ramp_ms: 50, ..options }).await.unwrap()
}

#[tokio::test]
async fn many_streams_every_token_verified() {
    let sim = Sim::start(&["--sim-itl-ms", "2"]);
    let report = load(&sim, Options { streams: 200, tokens: 30, requests: 400, ..Options::default() }).await;
    assert!(report.is_good(), "{}", report.table());
    assert_eq!((report.good, report.tokens_verified), (400, 12_000));
    // 29 times 2 ms less a tenth: that holds however late a busy machine brings them.
    assert!(report.ttft.count == 400 && report.total.p50_us > 50_000, "{}", report.table());
    assert_eq!(sim.state()["in_flight"], 0);
    assert_eq!(sim.state()["generated_tokens"], 12_000);
}

#[tokio::test]
async fn unary_and_unthrottled_runs() {
    let sim = Sim::start(&["--sim-speed", "0", "--sim-burst", "8", "--api-key", "k"]);
    let keyed = Options { api_key: Some("k".into()), tokens: 500, prompt_bytes: 3000, ..Options::default() };
    assert!(load(&sim, keyed.clone()).await.is_good());
    assert!(load(&sim, Options { token_ids: true, ..keyed.clone() }).await.is_good());
    assert!(load(&sim, Options { unary: true, token_ids: true, ..keyed }).await.is_good());
    let refused = load(&sim, Options { api_key: None, ..Options::default() }).await;
    assert_eq!(refused.failures["status 401"].count, 10);
}

#[tokio::test]
async fn damage_is_found_and_named() {
    let sim = Sim::start(&["--sim-itl-ms", "1"]);
    for (kind, found) in [
        ("error", "error in the stream"),
        ("abort", "lost tokens"),
        ("close", "cut"),
        ("reset", "cut"),
        ("end", "cut"),
        ("cut", "cut"),
        ("garbage_sse", "garbage"),
        ("garbage_http", "cut"),
        ("freeze", "timeout"),
    ] {
        sim.fault(json!({"kind": kind, "after_tokens": 5, "byte": 30, "count": 1}));
        let options = Options { streams: 1, tokens: 20, idle_timeout_s: 1.0, ..Options::default() };
        let report = load(&sim, options).await;
        assert!(report.failures.contains_key(found) && !report.is_good(), "{kind}: {}", report.table());
        assert_eq!(report.error_events, u64::from(kind == "error"));
    }
}

#[tokio::test]
async fn nobody_there_is_a_failure() {
    let options =
        Options { url: "http://127.0.0.1:9".into(), streams: 1, connect_ramp_ms: 0, ..Options::default() };
    assert_eq!(run(options).await.unwrap().failures["connect"].count, 1);
}

#[tokio::test]
async fn damage_to_whole_answers_is_found_too() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let whole = Options { streams: 1, tokens: 20, unary: true, idle_timeout_s: 1.0, ..Options::default() };
    for (kind, found) in
        [("close", "send"), ("reset", "send"), ("status", "status 503"), ("freeze", "timeout")]
    {
        sim.fault(json!({"kind": kind, "status": 503, "count": 1}));
        let report = load(&sim, whole.clone()).await;
        assert!(report.failures.contains_key(found) && report.failed == 1, "{kind}: {}", report.table());
    }
    assert!(load(&sim, whole).await.is_good(), "nothing is left of it");
}
