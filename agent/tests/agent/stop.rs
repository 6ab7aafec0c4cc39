//! How engines end: in order when told, together with the agent, and never because the control plane is away.

use std::fs;

use nix::sys::signal::Signal;
use penstock_proto::v1::{EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

#[tokio::test]
async fn a_stop_deregisters_then_drains_then_terminates() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let running = node.path("running");
    fs::write(&running, "3").unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--running", &running])]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    let (pid, log) = (number(&engine, "pid"), engine["log"].as_str().unwrap());

    let from = cp.heard().len();
    cp.assign(1, 3, vec![]).await;
    let deregistered = |m: &Message| matches!(m, Message::Deregister(d) if d.generation == 7);
    cp.hears("deregistration", from, |heard| heard.iter().any(deregistered).then_some(())).await;
    let draining = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Draining)).await;
    assert!(draining.reason.contains("no longer assigned"), "{}", draining.reason);

    // Five reports long it has requests, and is not touched.
    let position = cp.heard().len();
    cp.hears("five more reports", position, |heard| (heard.len() >= 5).then_some(())).await;
    assert!(lives(pid) && !fs::read_to_string(log).unwrap().contains("SIGTERM"));
    fs::write(&running, "0").unwrap();
    cp.hears_of_no("m-0", position).await;
    assert!(!lives(pid));
    assert!(fs::read_to_string(log).unwrap().contains("SIGTERM"));
    node.no_process_is_left().await;
}

#[tokio::test]
async fn an_engine_that_ignores_sigterm_is_killed_with_its_children() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.term_ms = 300;
    cp.answer_deregistrations(false);
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--ignore-term", "--orphan"])]).await;
    node.start().await;
    node.registered("m-0").await;
    let from = cp.heard().len();
    cp.assign(1, 3, vec![]).await;
    cp.hears_of_no("m-0", from).await;
    node.no_process_is_left().await;
    assert!(node.get("/metrics").await.1.contains("penstock_agent_engine_kills_total 1"));
}

#[tokio::test]
async fn sigterm_of_the_agent_ends_every_engine_and_exits_clean() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 1, &["--orphan"]), assignment("m-1", 1, &["--stray"])]).await;
    node.start().await;
    node.registered("m-0").await;
    node.registered("m-1").await;
    assert_eq!(node.get("/readyz").await.0, 200);
    node.config.engines.term_ms = 300;
    let from = cp.heard().len();
    node.signal_agent(Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    assert_eq!(node.processes(), Vec::<i32>::new());
    let told = cp.heard();
    let deregistered = told[from..].iter().filter(|m| matches!(m, Message::Deregister(_))).count();
    assert_eq!(deregistered, 2);
    let last =
        told.iter().rev().find_map(|m| if let Message::Report(r) = m { Some(r.engines.len()) } else { None });
    assert_eq!(last, Some(0), "the last report says that nothing is left");
}

#[tokio::test]
async fn a_second_sigterm_cuts_the_drain_short() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.drain_ms = 600_000;
    let running = node.path("running");
    fs::write(&running, "1").unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 1, &["--running", &running])]).await;
    node.start().await;
    node.registered("m-0").await;
    node.signal_agent(Signal::SIGTERM);
    cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Draining)).await;
    assert_eq!(node.get("/readyz").await.0, 503);
    node.signal_agent(Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    assert_eq!(node.processes(), Vec::<i32>::new());
}

#[tokio::test]
async fn engines_go_on_while_the_control_plane_is_away_and_are_registered_again_after() {
    let cp = ControlPlane::start().await;
    let address = cp.address;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    cp.stop().await;
    let lost = eventually("the lost session in the log", || {
        fs::read_to_string(node.agent_log())
            .ok()
            .filter(|log| log.contains("no session with the control plane"))
    });
    lost.await;
    node.metric_reaches("penstock_agent_session_failures_total", 5).await;
    assert_eq!(number(&node.engine("m-0", |e| e["state"] == "ready").await, "pid"), pid);

    let assignments = penstock_proto::v1::Assignments {
        term: 1,
        revision: 2,
        assignments: vec![assignment("m-0", 7, &[])],
    };
    let cp = ControlPlane::start_at(address, assignments).await;
    let registration = cp.hears_registration("m-0", 0).await;
    assert_eq!(i32::try_from(registration.pid).unwrap(), pid);
    assert!(matches!(cp.heard().first(), Some(Message::Hello(_))));
}

#[tokio::test]
async fn assignments_older_than_the_known_ones_change_nothing() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(2, 5, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    cp.assign(2, 4, vec![]).await;
    cp.assign(1, 900, vec![]).await;
    let position = cp.heard().len();
    cp.hears("five more reports", position, |heard| (heard.len() >= 5).then_some(())).await;
    assert_eq!(number(&node.engine("m-0", |e| e["state"] == "ready").await, "pid"), pid);
    assert!(node.get("/metrics").await.1.contains("penstock_agent_assignments_stale_total 2"));
}
