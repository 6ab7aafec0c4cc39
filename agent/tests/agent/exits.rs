//! Why engines ended: named, with advice, in reports, JSON and metrics.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proto::v1::EngineState;

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, number},
};

#[tokio::test]
async fn what_an_engine_wrote_names_its_end() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    // One that cannot help waits for the longest pause.
    node.config.engines.backoff_max_ms = 600_000;
    let oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB.";
    let path = "OSError: /models/x does not appear to have a file named config.json.";
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--says", oom]), assignment("m-1", 8, &["--says", path])])
        .await;
    node.start().await;
    let ended = cp.hears_status("m-0", 0, |s| s.last_exit.is_some()).await;
    let exit = ended.last_exit.unwrap();
    assert_eq!((exit.cause.as_str(), exit.retry_helps), ("gpu_memory", true));
    assert!(exit.detail.contains("exited with code 1 (a GPU had too little free memory)"), "{}", exit.detail);
    assert!(exit.detail.contains(oom) && exit.advice.contains("--gpu-memory-utilization"), "{exit:?}");

    let ended = cp.hears_status("m-1", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    let exit = ended.last_exit.unwrap();
    assert_eq!((exit.cause.as_str(), exit.retry_helps), ("model", false));
    let shown = node.engine("m-1", |e| e["state"] == "failed").await;
    assert_eq!(shown["last_exit"]["cause"], "model");
    // The other is started over and over meanwhile.
    node.engine("m-0", |e| e["restarts"].as_u64() >= Some(3)).await;
    assert_eq!(node.engine("m-1", |_| true).await["restarts"], 0);
    let metrics = node.get("/metrics").await.1;
    assert!(
        metrics.lines().any(|l| l == "penstock_agent_engine_exits_total{cause=\"model\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_signal_and_a_missing_program_are_named() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let mut missing = assignment("m-1", 1, &[]);
    missing.spec.as_mut().unwrap().engine = "missing".into();
    let program = penstock_config::agent::EngineProgram {
        command: vec!["no-such-engine".into()],
        ..Default::default()
    };
    node.config.engines.programs.insert("missing".into(), program);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[]), missing]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let exit = cp.hears_status("m-0", 0, |s| s.last_exit.is_some()).await.last_exit.unwrap();
    assert_eq!(exit.cause, "signal");
    assert!(exit.detail.contains("was ended by signal 9 (SIGKILL)"), "{}", exit.detail);
    let exit = cp.hears_status("m-1", 0, |s| s.last_exit.is_some()).await.last_exit.unwrap();
    assert_eq!((exit.cause.as_str(), exit.retry_helps), ("program", false));
    assert!(
        exit.detail.contains("\"no-such-engine\" (engines.NAME.command): no such program"),
        "{}",
        exit.detail
    );
}
