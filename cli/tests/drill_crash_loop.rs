//! DR27: an engine that cannot start on one node is given up there, and runs on another; a version that cannot start anywhere
//! is tried on so many nodes and then held, while the former one serves.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use serde_json::json;
use support::{
    load::{Load, until},
    nodes::{LONGEST, Nodes},
};

const QUICK: [(&str, &str); 6] = [
    ("ENGINES__READY_POLL_MS", "50"),
    ("ENGINES__SETTLE_MS", "200"),
    ("ENGINES__BACKOFF_MIN_MS", "20"),
    ("ENGINES__BACKOFF_MAX_MS", "100"),
    ("ENGINES__GIVE_UP_FAILURES", "3"),
    ("ENGINES__GIVE_UP_RETRY_S", "1"),
];
const FLEET: [(&str, &str); 1] = [("FLEET__REPORT_INTERVAL_MS", "200")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_fails_on_one_node_runs_on_another() {
    let broken = json!(["sh", "-c", "echo CUDA error: no kernel image is available; exit 1"]).to_string();
    let sick = [QUICK.as_slice(), &[("ENGINES__SIM__COMMAND", broken.as_str())]].concat();
    let nodes = Nodes::start(&[&sick, &QUICK], &FLEET, &[]);
    nodes.deploy(json!({"engine": "sim", "model_path": "x", "replicas": 3})).await;
    let ready = nodes.wait_for_ready(3).await;
    assert!(ready.iter().all(|e| e["node"] == "node-1"), "{ready:#?}");
    let agent = &nodes.agents[0];
    until("nothing is left where it failed", LONGEST, async || {
        (agent.engines().await?.is_empty() && agent.processes().is_empty()).then_some(())
    })
    .await;
    nodes.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_wherever_it_is_placed_is_held_and_the_former_one_serves() {
    let nodes = Nodes::start(&[&QUICK, &QUICK, &QUICK, &QUICK], &FLEET, &[]);
    let spec = |args: &[&str]| json!({"engine": "sim", "model_path": "x", "replicas": 2, "args": args});
    nodes.deploy(spec(&[])).await;
    let before: BTreeSet<String> =
        nodes.wait_for_ready(2).await.iter().map(|e| e["id"].to_string()).collect();
    let load = Load::on(&nodes.url(), "m", 4, 20);
    nodes.deploy(spec(&["--sim-fault=crash_on_load"])).await;
    let held = until("it is held", LONGEST, async || {
        let status = nodes.status().await?;
        let sentences = status["waiting"].as_array()?.clone();
        sentences.iter().filter_map(|s| s.as_str()).find(|s| s.starts_with("is held:")).map(str::to_owned)
    })
    .await;
    assert!(held.contains("failed over and over on node-"), "{held}");
    let tried: BTreeSet<&str> =
        (0..4).map(|n| ["node-0", "node-1", "node-2", "node-3"][n]).filter(|n| held.contains(n)).collect();
    assert_eq!(tried.len(), 3, "{held}");
    let done = load.done();
    until("it serves on", LONGEST, async || (load.done() > done + 40).then_some(())).await;
    let now = nodes.endpoints().await.unwrap();
    let ready: BTreeSet<String> =
        now.iter().filter(|e| e["state"] == "ready").map(|e| e["id"].to_string()).collect();
    assert_eq!(ready, before, "{now:#?}");
    let failed = load.end().await.into_iter().filter_map(|o| o.result.err()).next();
    assert_eq!(failed, None);

    nodes.deploy(spec(&["--sim-itl-ms=1"])).await;
    until("another version is rolled out", LONGEST, async || {
        let now = nodes.endpoints().await?;
        let is_new = |e: &serde_json::Value| e["state"] == "ready" && !before.contains(&e["id"].to_string());
        (now.len() == 2 && now.iter().all(is_new)).then_some(())
    })
    .await;
    nodes.stop();
}
