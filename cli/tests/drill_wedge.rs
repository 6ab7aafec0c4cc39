//! DR26: engines that answer `/health` and make no tokens are found by their agent and replaced; slow ones are not.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{
    client,
    load::{Load, get, until},
    nodes::{LONGEST, Nodes, Settings},
    pid,
};

/// Half a minute takes three seconds.
const QUICK: Settings<'_> = &[
    ("ENGINES__WEDGE_S", "3"),
    ("ENGINES__CANARY_S", "1"),
    ("ENGINES__READY_POLL_MS", "50"),
    ("ENGINES__SETTLE_MS", "200"),
    ("ENGINES__ORPHAN_TERM_MS", "500"),
    ("ENGINES__BACKOFF_MIN_MS", "20"),
];
const FLEET: Settings<'_> = &[("FLEET__REPORT_INTERVAL_MS", "200")];
/// The proxy has its own eyes for engines that hang; here it is the agent's turn.
const PROXY: Settings<'_> = &[("HEALTH__HANG_MS", "60000"), ("UPSTREAM__IDLE_MS", "60000")];

async fn deployed(replicas: u32, args: &[&str]) -> (Nodes, Vec<Value>) {
    let nodes = Nodes::start(&[QUICK], FLEET, PROXY);
    nodes.deploy(json!({"engine": "sim", "model_path": "x", "replicas": replicas, "args": args})).await;
    let ready = nodes.wait_for_ready(replicas as usize).await;
    (nodes, ready)
}

fn text<'a>(of: &'a Value, key: &str) -> &'a str {
    of[key].as_str().unwrap_or_else(|| panic!("no {key} in {of}"))
}

/// Waits until the engine's process is another one, ready; gives back the dump that was made of the former.
async fn replaced(nodes: &Nodes, former: &Value) -> String {
    let id = text(former, "id");
    until("another process is ready", LONGEST, async || {
        let now = nodes.endpoints().await?.into_iter().find(|e| e["id"] == id)?;
        (now["state"] == "ready" && now["pid"] != former["pid"]).then_some(())
    })
    .await;
    let dumps = nodes.agents[0].state_dir.join("dumps");
    let mut dumps = std::fs::read_dir(dumps).unwrap().map(|entry| entry.unwrap().path());
    let dump = dumps.next().expect("one dump");
    assert_eq!(dumps.next(), None);
    std::fs::read_to_string(dump).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_whose_core_stops_in_the_middle_of_streams_is_replaced_and_they_end_with_an_error() {
    let (nodes, ready) = deployed(2, &[]).await;
    let load = Load::on(&nodes.url(), "m", 8, 40);
    until("it serves", LONGEST, async || (load.done() > 20).then_some(())).await;
    let state = get(text(&ready[0], "address"), "/sim/state").await.unwrap();
    let core = pid(u32::try_from(state["core_pid"].as_u64().unwrap()).unwrap());
    kill(core, Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    let health = client().get(format!("http://{}/health", text(&ready[0], "address"))).send().await.unwrap();
    assert!(health.status().is_success(), "its API server says that all is well");
    until("it is ended", LONGEST, async || kill(core, None).is_err().then_some(())).await;
    println!("ended {:?} after its core was stopped", stopped.elapsed());
    let dump = replaced(&nodes, &ready[0]).await;
    assert!(dump.contains("wedged: no progress") && dump.contains("State:\tT (stopped)"), "{dump}");

    let done = load.done();
    until("both serve", LONGEST, async || (load.done() > done + 40).then_some(())).await;
    for outcome in load.end().await {
        let Err(answer) = &outcome.result else { continue };
        assert!(outcome.ended >= stopped, "before anything was wrong: {answer}");
        assert!(answer.contains("\"error\"") && answer.contains("\"type\""), "not a typed end: {answer}");
    }
    nodes.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_answers_no_request_any_more_is_replaced() {
    let (nodes, ready) = deployed(1, &[]).await;
    let address = text(&ready[0], "address");
    let hang = json!({"kind": "hang"});
    let told = client().post(format!("http://{address}/sim/faults")).json(&hang).send().await.unwrap();
    assert!(told.status().is_success());
    let request = json!({"model": "m", "stream": true, "max_tokens": 40, "prompt": "hi"});
    let answer = client().post(format!("{}/v1/completions", nodes.url())).json(&request).send();
    let answer = tokio::spawn(async { answer.await.unwrap().text().await.unwrap() });
    let dump = replaced(&nodes, &ready[0]).await;
    assert!(dump.contains("=== GET /health\n200") && dump.contains("vllm:generation_tokens_total"), "{dump}");
    let answer = answer.await.unwrap();
    // The engine that follows answers it, or it ends in words.
    assert!(answer.contains("\"error\"") || answer.ends_with("data: [DONE]\n\n"), "{answer}");
    nodes.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_makes_a_token_now_and_then_is_left_alone() {
    let (nodes, ready) =
        deployed(1, &["--max-num-seqs=1", "--sim-itl-ms=1600", "--sim-jitter-percent=0"]).await;
    let load = Load::on(&nodes.url(), "m", 3, 4);
    until("requests have ended", LONGEST, async || (load.done() >= 3).then_some(())).await;
    let now = nodes.endpoints().await.unwrap();
    assert_eq!(now[0]["pid"], ready[0]["pid"]);
    let asked = nodes.agents[0].metric("penstock_agent_engine_canaries_total{outcome=\"taken_back\"}").await;
    assert!(asked >= Some(1.0), "it was doubted: {asked:?}");
    assert_eq!(nodes.agents[0].metric("penstock_agent_engine_wedges_total").await, Some(0.0));
    assert!(load.end().await.iter().all(|outcome| outcome.result.is_ok()));
    assert!(!nodes.agents[0].state_dir.join("dumps").exists());
    nodes.stop();
}
