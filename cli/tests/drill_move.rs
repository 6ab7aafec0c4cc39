//! Planned moves: an operator empties an engine of its long streams, and an engine that is ended while it streams has lost
//! them before. Every token of every stream is verified, and no stream is shorter for it.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_loadtest::load::{Options, Report, run};
use support::{
    Up,
    load::{get, proxy_metric, seen_by_proxy, until},
    penstock,
};
use tokio::task::JoinHandle;

/// For anything, on a machine that is busy with other tests.
const LONGEST: Duration = Duration::from_secs(120);
/// Between two tokens.
const ITL_MS: u64 = 50;
const ITL: [&str; 2] = ["--engine-arg=--sim-itl-ms=50", "--engine-arg=--sim-itl-growth-us=0"];
const MOVED: &str = "penstock_proxy_streams_leave_total{reason=\"moved\"}";
const FENCED: &str = "penstock_proxy_streams_leave_total{reason=\"fenced\"}";

fn start(engines: &str, env: &[(&str, &str)]) -> Up {
    Up::start_with_env(&[&["--engines", engines][..], &ITL].concat(), env)
}

/// So many streams of so many tokens, all at once.
fn load(up: &Up, streams: u64, tokens: u64) -> JoinHandle<Report> {
    let options = Options {
        url: up.url(),
        streams,
        tokens,
        connect_ramp_ms: 0,
        idle_timeout_s: LONGEST.as_secs_f64(),
        ..Options::default()
    };
    tokio::spawn(async move { run(options).await.unwrap() })
}

async fn in_flight(address: &str) -> u64 {
    let state = get(address, "/sim/state").await.unwrap_or_default();
    state["in_flight"].as_u64().unwrap_or_default()
}

async fn is_draining(up: &Up, id: &str, draining: bool) {
    until("the proxy knows", LONGEST, async || {
        (seen_by_proxy(up, "sim-model", id).await?["draining"] == draining).then_some(())
    })
    .await;
}

fn assert_whole(report: &Report, streams: u64, tokens: u64) {
    assert!(report.failures.is_empty() && report.good == streams, "{}", report.table());
    assert_eq!(report.tokens_verified, streams * tokens);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_long_streams_are_moved_off_an_engine_at_the_pace() {
    const STREAMS: u64 = 50;
    const TOKENS: u64 = 800;
    const PER_SECOND: f64 = 10.0;
    let up = start("3", &[("PENSTOCK_PROXY__RESUME__MOVES_PER_SECOND", "10")]);
    let engines: Vec<(String, String)> = up.json["engines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["id"].as_str().unwrap().to_owned(), e["address"].as_str().unwrap().to_owned()))
        .collect();
    let (victim, others) = engines.split_first().unwrap();
    // All of them shall be on one.
    for (id, _) in others {
        assert!(up.run(&["drain", id]).status.success());
        is_draining(&up, id, true).await;
    }
    let began = Instant::now();
    let load = load(&up, STREAMS, TOKENS);
    until("all flow", LONGEST, async || (in_flight(&victim.1).await == STREAMS).then_some(())).await;
    for (id, _) in others {
        assert!(up.run(&["undrain", id]).status.success());
        is_draining(&up, id, false).await;
    }
    assert_eq!(in_flight(&victim.1).await, STREAMS, "nothing moves by itself");

    let moving = Instant::now();
    let mut command = penstock();
    command.args(["drain", &victim.0, "--move-streams", "--wait", "--timeout-s", "100", "--data-dir"]);
    command.arg(up.data_dir());
    let emptied = tokio::task::spawn_blocking(move || command.output().unwrap());
    let all_told = until("all are told", LONGEST, async || {
        let moved = proxy_metric(&up, MOVED).await.unwrap();
        let most = PER_SECOND * moving.elapsed().as_secs_f64() + 3.0;
        assert!(moved <= most, "{moved} moved in {:?}", moving.elapsed());
        (moved >= STREAMS as f64).then(|| moving.elapsed())
    })
    .await;
    let output = emptied.await.unwrap();
    let (since_begin, took) = (began.elapsed(), moving.elapsed());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("requests left"), "{said}");
    assert_eq!(in_flight(&victim.1).await, 0, "empty");
    let natural = Duration::from_millis(TOKENS * ITL_MS);
    assert!(since_begin < natural * 3 / 4, "empty {since_begin:?} after streams of {natural:?} had begun");
    assert!(!load.is_finished(), "they still flow");
    println!("{STREAMS} told in {all_told:?}, empty after {took:?}");
    let report = load.await.unwrap();
    assert_whole(&report, STREAMS, TOKENS);
    assert_eq!(proxy_metric(&up, MOVED).await, Some(STREAMS as f64), "each once");
    assert_eq!(proxy_metric(&up, FENCED).await, Some(0.0));
    let resumed = format!("penstock_proxy_resumes_total{{endpoint=\"{}\",reason=\"moved\"}}", victim.0);
    assert_eq!(proxy_metric(&up, &resumed).await, Some(STREAMS as f64), "and each went on");
    assert!(up.run(&["undrain", &victim.0]).status.success());
    is_draining(&up, &victim.0, false).await;
    up.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_is_ended_has_lost_its_streams_before() {
    const STREAMS: u64 = 20;
    const TOKENS: u64 = 500;
    // Its agent waits far shorter than the streams are long, and shorter than they are given before a planned move.
    let up = start("2", &[("PENSTOCK_AGENT__ENGINES__DRAIN_MS", "4000")]);
    let load = load(&up, STREAMS, TOKENS);
    let leaving = up.json["engines"].as_array().unwrap()[1].clone();
    let address = leaving["address"].as_str().unwrap();
    until("all flow", LONGEST, async || {
        let mut all = 0;
        for engine in up.json["engines"].as_array().unwrap() {
            all += in_flight(engine["address"].as_str().unwrap()).await;
        }
        (all == STREAMS).then_some(())
    })
    .await;
    let here = in_flight(address).await;
    assert!(here > 0, "both have some");
    assert!(up.run(&["scale", "sim-model", "--replicas", "1"]).status.success());
    until("the engine is gone", LONGEST, async || get(address, "/sim/state").await.is_none().then_some(()))
        .await;
    assert!(!load.is_finished(), "its streams flow elsewhere");
    assert_eq!(proxy_metric(&up, FENCED).await, Some(here as f64), "told before it ended");
    let report = load.await.unwrap();
    assert_whole(&report, STREAMS, TOKENS);
    up.wait_for_ready(1);
    up.stop();
}
