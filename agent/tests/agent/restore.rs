//! The restore hook (drill DR47): where it works it is the engine, and whatever goes wrong with it ends in a cold start
//! whose reason is seen.

use std::fs;

use penstock_config::warm::RestoreProgram;
use penstock_proto::v1::{self, EngineState};
use serde_json::Value;

use crate::{
    controlplane::ControlPlane,
    engine,
    node::{Node, assignment, eventually, number},
};

/// A node whose stand-in engines have this hook; its mount is a folder of the node.
fn node(cp: &ControlPlane, hook: &[&str]) -> Node {
    let mut node = Node::new(cp);
    fs::create_dir_all(node.path("mount/llama")).unwrap();
    let restore = RestoreProgram {
        command: hook.iter().map(|arg| (*arg).to_owned()).collect(),
        storage: format!("file://{}", node.path("mount/llama")),
        path: node.path("mount"),
        timeout_s: 20,
        ..RestoreProgram::default()
    };
    node.config.engines.programs.get_mut("stand-in").unwrap().restore = restore;
    node
}

/// The hook that works: it notes what it was told, and then is the engine.
fn good(node: &Node) -> Vec<String> {
    let script = format!("env | grep ^PENSTOCK_RESTORE_ > {}; exec \"$@\"", node.path("told"));
    let head = ["sh", "-c", &script, "hook"].map(str::to_owned);
    let serve = ["serve", "{path}", "--host", "{host}", "--port", "{port}", "--served-model-name", "{model}"];
    head.into_iter().chain(engine::command()).chain(serve.map(str::to_owned)).collect()
}

fn restoring(change: impl FnOnce(&mut v1::RestoreSpec)) -> v1::Assignment {
    let mut assignment = assignment("m-0", 7, &[]);
    let mut spec = v1::RestoreSpec::default();
    change(&mut spec);
    assignment.spec.as_mut().unwrap().restore = Some(spec);
    assignment
}

/// Once it serves, started cold, and the note about it; the same is reported.
async fn cold(cp: &ControlPlane, node: &Node) -> (Value, String) {
    let engine = node.registered("m-0").await;
    assert_eq!(engine["started"], "cold", "{engine:#}");
    let note = engine["start_note"].as_str().unwrap().to_owned();
    let told = cp.hears_status("m-0", 0, |s| s.started == "cold").await;
    assert_eq!(told.start_note, note);
    node.metric_reaches("penstock_agent_warm_failures_total{way=\"restored\"}", 1).await;
    (engine, note)
}

#[tokio::test]
async fn a_hook_that_works_is_the_engine_and_ends_like_one() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &[]);
    fs::create_dir_all(node.path("secrets")).unwrap();
    fs::write(node.path("secrets/s3"), "sesame").unwrap();
    node.config.warm.secrets_dir = node.path("secrets");
    let command = good(&node);
    node.config.engines.programs.get_mut("stand-in").unwrap().restore.command = command;
    cp.assign(1, 2, vec![restoring(|r| r.secret_ref = "file:s3".into())]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    assert_eq!((engine["started"].as_str(), engine["start_note"].as_str()), (Some("restored"), Some("")));
    let told = fs::read_to_string(node.path("told")).unwrap();
    for line in [
        format!("PENSTOCK_RESTORE_STORAGE=file://{}", node.path("mount/llama")),
        format!("PENSTOCK_RESTORE_SECRET_FILE={}", node.path("secrets/s3")),
        format!("PENSTOCK_RESTORE_PORT={}", engine["port"]),
        "PENSTOCK_RESTORE_GPUS=SIM-node-1-0".to_owned(),
    ] {
        assert!(told.lines().any(|l| l == line), "{line} not in\n{told}");
    }
    let shown = format!("{}{}", node.get("/engines").await.1, fs::read_to_string(node.agent_log()).unwrap());
    assert!(!shown.contains("sesame"), "the secret shows");

    // Adopted like any other, and ended to the last process.
    node.kill_agent();
    node.start().await;
    let after = node.registered("m-0").await;
    assert_eq!((number(&after, "pid"), after["started"].as_str()), (number(&engine, "pid"), Some("adopted")));
    cp.assign(1, 3, vec![]).await;
    node.no_process_is_left().await;
}

#[tokio::test]
async fn a_hook_that_fails_costs_one_try_and_is_told_of() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &["sh", "-c", "echo checkpoint is torn; exit 7"]);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let (engine, note) = cold(&cp, &node).await;
    assert!(note.contains("the hook failed") && note.contains("exited with code 7"), "{note}");
    assert!(note.contains("checkpoint is torn"), "{note}");
    assert_eq!(number(&engine, "restarts"), 1);
}

#[tokio::test]
async fn a_hook_that_hangs_is_ended_with_all_its_processes() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &["sh", "-c", "sleep 600 & sleep 600"]);
    cp.assign(1, 2, vec![restoring(|r| r.timeout_s = 1)]).await;
    node.start().await;
    let (engine, note) = cold(&cp, &node).await;
    assert!(note.contains("not ready within 1 s (restore's timeout_s)"), "{note}");
    assert_eq!(node.processes(), [number(&engine, "pid")], "something of the hook is left");
}

#[tokio::test]
async fn what_cannot_run_is_not_tried() {
    type Change = fn(&mut v1::RestoreSpec);
    let told: [(&str, Change); 5] = [
        ("they must be equal", |r| r.path = "/mnt/another".into()),
        ("does not lie under the path", |r| r.storage = "file:///mnt/another/llama".into()),
        ("there is nothing at file://", |r| r.storage = "file://MOUNT/gone".into()),
        ("the secret env:PENSTOCK_NO_SUCH is missing", |r| r.secret_ref = "env:PENSTOCK_NO_SUCH".into()),
        ("the secret file:key is missing: warm.secrets_dir is not set", |r| r.secret_ref = "file:key".into()),
    ];
    for (part, change) in told {
        let cp = ControlPlane::start().await;
        let mut node = node(&cp, &["sh", "-c", "exit 7"]);
        let mut assignment = restoring(change);
        let restore = assignment.spec.as_mut().unwrap().restore.as_mut().unwrap();
        restore.storage = restore.storage.replace("MOUNT", &node.path("mount"));
        cp.assign(1, 2, vec![assignment]).await;
        node.start().await;
        let (engine, note) = cold(&cp, &node).await;
        assert!(note.starts_with("not restored: ") && note.contains(part), "{note}");
        assert_eq!(number(&engine, "restarts"), 0, "the hook was run");
    }
}

#[tokio::test]
async fn a_hook_that_is_not_there_is_a_cold_start() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &["/no/such/hook"]);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let (_, note) = cold(&cp, &node).await;
    assert!(note.contains("/no/such/hook"), "{note}");
}

#[tokio::test]
async fn a_restore_that_is_called_off_ends_by_sigterm() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &[]);
    let (begun, ended) = (node.path("begun"), node.path("ended"));
    let script = format!("trap 'echo leaving; touch {ended}; exit 0' TERM; touch {begun}; sleep 600 & wait");
    let restore = &mut node.config.engines.programs.get_mut("stand-in").unwrap().restore;
    restore.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    eventually("the hook's start", || fs::exists(&begun).unwrap().then_some(())).await;
    let loading = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Loading)).await;
    assert_eq!(loading.started, "");
    let log = node.engine("m-0", |_| true).await["log"].as_str().unwrap().to_owned();
    cp.assign(1, 3, vec![]).await;
    node.no_process_is_left().await;
    assert!(fs::exists(&ended).unwrap(), "it was not asked to end");
    assert!(fs::read_to_string(log).unwrap().contains("leaving"));
}

#[tokio::test]
async fn a_deployment_may_do_without() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, &["sh", "-c", "exit 7"]);
    cp.assign(1, 2, vec![restoring(|r| r.off = true)]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    assert_eq!((engine["started"].as_str(), engine["start_note"].as_str()), (Some("cold"), Some("")));
}
