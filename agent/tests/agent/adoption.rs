//! What an agent leaves, and what the next one makes of it.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proto::v1::{EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

#[tokio::test]
async fn an_agent_killed_and_started_again_takes_its_engine_over() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let before = node.registered("m-0").await;
    node.kill_agent();
    assert!(lives(number(&before, "pid")));

    let from = cp.heard().len();
    node.start().await;
    let registration = cp.hears_registration("m-0", from).await;
    let after = node.registered("m-0").await;
    for key in ["pid", "port", "restarts", "command"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    assert_eq!(i32::try_from(registration.pid).unwrap(), number(&before, "pid"));
    assert!(
        !cp.heard()[from..].iter().any(|m| matches!(m, Message::Deregister(_))),
        "its endpoint was never given up"
    );
    assert!(node.get("/metrics").await.1.contains("penstock_agent_engine_adoptions_total 1"));

    // Its end is noticed although it is no child of this agent.
    kill(Pid::from_raw(number(&after, "pid")), Signal::SIGKILL).unwrap();
    node.engine("m-0", |e| e["state"] == "ready" && e["restarts"] == 1).await;
}

#[tokio::test]
async fn an_engine_whose_assignment_has_gone_meanwhile_is_drained_and_ended() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[]), assignment("m-1", 8, &[])]).await;
    node.start().await;
    let gone = number(&node.registered("m-0").await, "pid");
    let kept = number(&node.registered("m-1").await, "pid");
    node.kill_agent();
    cp.assign(1, 3, vec![assignment("m-1", 8, &[])]).await;
    let from = cp.heard().len();
    node.start().await;
    cp.hears_of_no("m-0", from + 1).await;
    let deregistered = |m: &Message| matches!(m, Message::Deregister(d) if d.replica_id == "m-0");
    cp.hears("deregistration", from, |heard| heard.iter().any(deregistered).then_some(())).await;
    eventually("the end of the first engine", || (!lives(gone)).then_some(())).await;
    assert_eq!(number(&node.registered("m-1").await, "pid"), kept);
}

#[tokio::test]
async fn without_a_control_plane_a_new_agent_keeps_what_runs_and_starts_what_is_missing() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--orphan"]), assignment("m-1", 8, &[])]).await;
    node.start().await;
    let dies = number(&node.registered("m-0").await, "pid");
    let stays = number(&node.registered("m-1").await, "pid");
    node.kill_agent();
    cp.stop().await;
    let orphans: Vec<i32> = node.processes().into_iter().filter(|pid| ![dies, stays].contains(pid)).collect();
    assert!(!orphans.is_empty());
    kill(Pid::from_raw(dies), Signal::SIGKILL).unwrap();

    node.start().await;
    let again = node.engine("m-0", |e| e["state"] == "ready").await;
    assert_ne!(number(&again, "pid"), dies);
    assert!(orphans.iter().all(|pid| !lives(*pid)), "orphans of the dead engine beside the new one");
    assert_eq!(number(&node.engine("m-1", |e| e["state"] == "ready").await, "pid"), stays);
    assert_eq!(node.get("/readyz").await.0, 503, "no control plane yet");
}

#[tokio::test]
async fn a_marked_process_without_a_record_is_ended_and_a_foreign_one_is_not() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let spawn = |state_dir: &str| {
        let mut command = Command::new("sleep");
        command.arg("600").env("PENSTOCK_REPLICA", "m-0").env("PENSTOCK_STATE_DIR", state_dir);
        command.stdin(Stdio::null()).process_group(0).spawn().unwrap()
    };
    let mut ours = spawn(&node.config.state_dir);
    let mut foreign = spawn("/another/agent");
    node.start().await;
    assert!(!ours.try_wait().unwrap().unwrap().success());
    assert_eq!(foreign.try_wait().unwrap(), None);
    foreign.kill().unwrap();
    foreign.wait().unwrap();
}

#[tokio::test]
async fn an_engine_that_hung_while_no_agent_looked_is_replaced_soon() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let hang = node.path("hang");
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--health-while-not", &hang])]).await;
    node.start().await;
    let hung = number(&node.registered("m-0").await, "pid");
    node.kill_agent();
    fs::write(&hang, "").unwrap();
    let from = cp.heard().len();
    node.start().await;
    let failed = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("liveness checks in a row failed"), "{}", failed.reason);
    fs::remove_file(&hang).unwrap();
    node.engine("m-0", |e| e["state"] == "ready" && number(e, "pid") != hung).await;
}

#[tokio::test]
async fn engines_kept_on_shutdown_serve_on_and_are_taken_over() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.on_shutdown = "keep".into();
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    node.signal_agent(Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    assert!(lives(pid));
    node.start().await;
    assert_eq!(number(&node.registered("m-0").await, "pid"), pid);
}

#[tokio::test]
async fn damaged_state_costs_nothing_that_runs() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    node.kill_agent();
    fs::write(format!("{}/assignments.json", node.config.state_dir), "{\"vers").unwrap();
    node.start().await;
    assert_eq!(number(&node.registered("m-0").await, "pid"), pid);
}
