//! An engine's core stands still while its API server answers `/health`; and one that is as silent, but busy.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use support::{
    Up, client,
    load::{Load, get, proxy_metric, seen_by_proxy, state, until},
    pid,
};
use tokio::task::JoinSet;

const LONGEST: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_whose_core_stands_still_is_left_out_until_it_makes_tokens_again() {
    let up = Up::start_with_env(
        &["--engines", "2"],
        &[
            ("PENSTOCK_PROXY__HEALTH__HANG_MS", "1000"),
            ("PENSTOCK_PROXY__HEALTH__CANARY_MS", "1500"),
            ("PENSTOCK_PROXY__UPSTREAM__IDLE_MS", "8000"),
            ("PENSTOCK_PROXY__UPSTREAM__FIRST_BYTE_MS", "8000"),
        ],
    );
    let endpoint = &up.json["engines"][0];
    let (id, address) = (endpoint["id"].as_str().unwrap(), endpoint["address"].as_str().unwrap());
    let load = Load::start(&up, "sim-model", 12, 60);
    until("there is load", LONGEST, async || (load.done() > 60).then_some(())).await;

    let core = get(address, "/sim/state").await.unwrap()["core_pid"].as_u64().unwrap();
    let core = pid(u32::try_from(core).unwrap());
    kill(core, Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    until("it is ejected", LONGEST, async || (state(&up, "sim-model", id).await == "ejected").then_some(()))
        .await;
    let ejected = Instant::now();
    println!("ejected {:?} after its core stopped", ejected - stopped);
    let seen = seen_by_proxy(&up, "sim-model", id).await.unwrap();
    assert_eq!(seen["health"]["reason"], "hang", "{seen}");
    let health = client().get(format!("http://{address}/health")).send().await.unwrap();
    assert!(health.status().is_success(), "its API server says that all is well");

    let done = load.done();
    until("the other serves", LONGEST, async || (load.done() > done + 60).then_some(())).await;
    kill(core, Signal::SIGCONT).unwrap();
    until("it is back", LONGEST, async || (state(&up, "sim-model", id).await == "admitted").then_some(()))
        .await;
    for outcome in load.end().await {
        let Err(text) = &outcome.result else { continue };
        assert!(outcome.ended >= stopped, "before anything was wrong: {text}");
        assert!(outcome.began <= ejected, "sent to an engine that was known to hang: {text}");
        assert!(
            text.contains("engine_stalled") || text.contains("engine_timeout"),
            "not a typed end: {text}"
        );
    }
    up.stop();
}

/// Ray #54070. One place to run, long whole answers, a queue behind: no byte for seconds, and a canary that has to queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_is_silent_because_it_is_busy_is_kept() {
    let mut args = vec!["--engines", "1"];
    for arg in ["--max-num-seqs=1", "--sim-itl-ms=20"] {
        args.extend(["--engine-arg", arg]);
    }
    let up = Up::start_with_env(
        &args,
        &[
            ("PENSTOCK_PROXY__HEALTH__HANG_MS", "500"),
            ("PENSTOCK_PROXY__HEALTH__HANG_WAITING_MS", "500"),
            ("PENSTOCK_PROXY__HEALTH__CANARY_MS", "500"),
        ],
    );
    let mut requests = JoinSet::new();
    for _ in 0..3 {
        let url = format!("{}/v1/chat/completions", up.url());
        let body = json!({
            "model": "sim-model", "max_tokens": 200, "ignore_eos": true,
            "messages": [{"role": "user", "content": "hi"}],
        });
        requests.spawn(async move { client().post(url).json(&body).send().await.unwrap().status().as_u16() });
    }
    let doubts = async |verdict: &str| {
        let series = format!("penstock_proxy_hang_checks_total{{verdict=\"{verdict}\"}}");
        proxy_metric(&up, &series).await.unwrap_or_default()
    };
    until("it was doubted", LONGEST, async || (doubts("alive").await >= 2.0).then_some(())).await;
    assert_eq!(requests.join_all().await, [200; 3]);
    assert_eq!(doubts("hung").await, 0.0);
    for reason in ["hang", "probe", "consecutive_failures", "success_rate", "latency"] {
        let series = format!("penstock_proxy_ejections_total{{reason=\"{reason}\"}}");
        assert_eq!(proxy_metric(&up, &series).await, Some(0.0), "{reason}");
    }
    up.stop();
}
