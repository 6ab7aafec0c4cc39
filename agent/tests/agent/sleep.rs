//! Engines that sleep instead of ending, and are woken instead of started.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proto::v1::{self, EngineState, agent_message::Message};
use serde_json::Value;

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

/// An assignment that may sleep, on `level`.
fn sleepy(level: u32, asleep: bool, args: &[&str]) -> v1::Assignment {
    let mut assignment = assignment("m-0", 7, args);
    assignment.spec.as_mut().unwrap().sleep_level = level;
    assignment.asleep = asleep;
    assignment
}

/// A node whose only engine sleeps; its process.
async fn asleep(cp: &ControlPlane, level: u32, args: &[&str]) -> (Node, i32) {
    let mut node = Node::new(cp);
    node.config.warm.wake_ms = 1_000;
    cp.assign(1, 2, vec![sleepy(level, false, args)]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    cp.assign(1, 3, vec![sleepy(level, true, args)]).await;
    node.engine("m-0", |e| e["state"] == "asleep").await;
    (node, pid)
}

fn log(engine: &Value) -> String {
    fs::read_to_string(engine["log"].as_str().unwrap()).unwrap()
}

#[tokio::test]
async fn an_engine_sleeps_undisturbed_and_wakes_as_it_was() {
    let cp = ControlPlane::start().await;
    let from = cp.heard().len();
    let (node, pid) = asleep(&cp, 1, &[]).await;
    let told = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Asleep)).await;
    assert_eq!((told.generation, told.load), (7, None));
    let deregistered = |m: &Message| matches!(m, Message::Deregister(d) if d.replica_id == "m-0");
    assert!(cp.heard()[from..].iter().any(deregistered), "asleep and still registered");

    // Longer than every check of an engine that serves takes to notice something.
    let liveness = u64::from(node.config.engines.liveness_failures) * node.config.engines.liveness_ms;
    tokio::time::sleep(std::time::Duration::from_millis(liveness * 2)).await;
    let sleeping = node.engine("m-0", |e| e["state"] == "asleep").await;
    assert!(!log(&sleeping).contains("while asleep"), "{}", log(&sleeping));
    assert_eq!(sleeping["registration"], "");

    let from = cp.heard().len();
    cp.assign(1, 4, vec![sleepy(1, false, &[])]).await;
    let registration = cp.hears_registration("m-0", from).await;
    assert_eq!((registration.generation, i32::try_from(registration.pid).unwrap()), (7, pid));
    let awake = node.registered("m-0").await;
    assert_eq!((number(&awake, "pid"), number(&awake, "restarts")), (pid, 0));
    assert_eq!(awake["started"], "woken");
    let status = cp.hears_status("m-0", from, |s| s.started == "woken").await;
    assert!(status.ready_ms < 30_000);
    let metrics = node.get("/metrics").await.1;
    assert!(metrics.contains("penstock_agent_engine_ready_seconds_count{way=\"woken\"} 1"), "{metrics}");
    assert!(metrics.contains("penstock_agent_engine_ready_seconds_count{way=\"cold\"} 1"));
}

#[tokio::test]
async fn what_a_deep_sleep_has_dropped_is_read_again_before_the_engine_serves() {
    let cp = ControlPlane::start().await;
    let (node, pid) = asleep(&cp, 2, &[]).await;
    cp.assign(1, 4, vec![sleepy(2, false, &[])]).await;
    let awake = node.registered("m-0").await;
    assert_eq!(number(&awake, "pid"), pid);
    let log = log(&awake);
    let at = |part: &str| log.find(part).unwrap_or_else(|| panic!("{part} not in {log}"));
    assert!(at("asked /wake_up?tags=weights") < at("asked /collective_rpc {\"method\":\"reload_weights\"}"));
    assert!(at("reload_weights") < at("woken by /wake_up?tags=kv_cache"));
}

#[tokio::test]
async fn an_engine_that_cannot_sleep_is_ended_and_started_anew_when_it_is_wanted() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![sleepy(1, false, &["--sleep-fails"])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    let from = cp.heard().len();
    cp.assign(1, 3, vec![sleepy(1, true, &["--sleep-fails"])]).await;
    let failed = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("could not be put to sleep (/sleep?level=1"), "{}", failed.reason);
    eventually("its end", || (!lives(pid)).then_some(())).await;
    node.metric_reaches("penstock_agent_warm_failures_total{way=\"woken\"}", 1).await;
    // Nobody wants it: it stays ended.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert!(node.processes().is_empty());
    cp.assign(1, 4, vec![sleepy(1, false, &["--sleep-fails"])]).await;
    assert_ne!(number(&node.registered("m-0").await, "pid"), pid);
}

#[tokio::test]
async fn an_engine_that_cannot_be_woken_is_started_anew_at_once() {
    let cp = ControlPlane::start().await;
    let (node, pid) = asleep(&cp, 1, &["--wake-hangs"]).await;
    let from = cp.heard().len();
    cp.assign(1, 4, vec![sleepy(1, false, &["--wake-hangs"])]).await;
    cp.hears_registration("m-0", from).await;
    let anew = node.registered("m-0").await;
    let note = anew["start_note"].as_str().unwrap();
    assert!(note.starts_with("not woken: ") && note.contains("within 1000 ms"), "{note}");
    assert_ne!(number(&anew, "pid"), pid);
    assert_eq!((anew["started"].as_str(), number(&anew, "restarts")), (Some("cold"), 1));
    assert!(!lives(pid));
}

#[tokio::test]
async fn the_next_agent_takes_a_sleeping_engine_over_asleep() {
    let cp = ControlPlane::start().await;
    let (mut node, pid) = asleep(&cp, 1, &[]).await;
    node.kill_agent();
    let from = cp.heard().len();
    node.start().await;
    let found = node.engine("m-0", |e| e["state"] == "asleep").await;
    assert_eq!(number(&found, "pid"), pid);
    assert!(!log(&found).contains("woken") && !log(&found).contains("while asleep"), "{}", log(&found));
    assert!(!cp.heard()[from..].iter().any(|m| matches!(m, Message::Register(_))));
    cp.assign(1, 4, vec![sleepy(1, false, &[])]).await;
    assert_eq!(number(&node.registered("m-0").await, "pid"), pid);
}

#[tokio::test]
async fn without_a_control_plane_a_sleeping_engine_sleeps_on_through_a_new_agent() {
    let cp = ControlPlane::start().await;
    let (mut node, pid) = asleep(&cp, 1, &[]).await;
    node.config.on_shutdown = "keep".into();
    cp.stop().await;
    node.kill_agent();
    node.start().await;
    node.engine("m-0", |e| e["state"] == "asleep").await;
    node.signal_agent(Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    assert!(lives(pid), "kept asleep");
    node.start().await;
    assert_eq!(number(&node.engine("m-0", |e| e["state"] == "asleep").await, "pid"), pid);
}

#[tokio::test]
async fn a_sleeping_engine_that_dies_is_told_of_and_not_started_until_it_is_wanted() {
    let cp = ControlPlane::start().await;
    let (node, pid) = asleep(&cp, 1, &[]).await;
    let from = cp.heard().len();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let failed = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("SIGKILL"), "{}", failed.reason);
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert!(node.processes().is_empty());
    cp.assign(1, 4, vec![sleepy(1, false, &[])]).await;
    assert_ne!(number(&node.registered("m-0").await, "pid"), pid);
}

#[tokio::test]
async fn a_sleeping_engine_is_ended_by_a_new_generation_and_by_losing_its_assignment() {
    let cp = ControlPlane::start().await;
    let (node, pid) = asleep(&cp, 1, &["--orphan"]).await;
    let newer = v1::Assignment { generation: 8, ..sleepy(1, false, &["--orphan"]) };
    cp.assign(1, 4, vec![newer.clone()]).await;
    let second = node.engine("m-0", |e| e["generation"] == 8 && e["state"] == "ready").await;
    assert!(!lives(pid));
    cp.assign(1, 5, vec![v1::Assignment { asleep: true, ..newer }]).await;
    node.engine("m-0", |e| e["state"] == "asleep").await;
    cp.assign(1, 6, vec![]).await;
    node.no_process_is_left().await;
    assert!(!lives(number(&second, "pid")));
}

#[tokio::test]
async fn an_assignment_that_should_sleep_and_does_not_run_is_not_started_for_it() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![sleepy(1, true, &[])]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("should sleep and does not run"), "{}", failed.reason);
    assert!(node.processes().is_empty());
    cp.assign(1, 3, vec![sleepy(1, false, &[])]).await;
    assert_eq!(node.registered("m-0").await["started"], "cold");
}
