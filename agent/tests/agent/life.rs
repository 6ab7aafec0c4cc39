//! From an assignment to a registered engine, and what happens when it breaks.

use std::{fs, net::TcpListener};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proto::v1::{self, EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

#[tokio::test]
async fn an_assigned_engine_is_registered_once_a_completion_has_passed_and_not_before() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let gate = node.path("completions");
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--completions-after", &gate])]).await;
    node.start().await;

    let loading = cp.hears_status("m-0", 0, |s| s.reason.contains("a completion answered 500")).await;
    assert_eq!(loading.state, i32::from(EngineState::Loading));
    assert!(!cp.heard().iter().any(|m| matches!(m, Message::Register(_))), "registered before it was ready");

    fs::write(&gate, "").unwrap();
    let registration = cp.hears_registration("m-0", 0).await;
    let engine = node.registered("m-0").await;
    assert_eq!((registration.generation, registration.model.as_str()), (7, "m"));
    assert_eq!(engine["address"], registration.address);
    assert_eq!(number(&engine, "pid"), i32::try_from(registration.pid).unwrap());
    assert!(lives(number(&engine, "pid")));
    let command: Vec<_> = engine["command"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    assert!(command.join(" ").contains("serve model --host 127.0.0.1 --port "), "{command:?}");
    assert!(fs::read_to_string(engine["log"].as_str().unwrap()).unwrap().contains("listening on"));

    let ready = cp.hears_status("m-0", 0, |s| s.load.is_some()).await;
    assert_eq!(ready.state, i32::from(EngineState::Ready));
    let hello =
        cp.heard().into_iter().find_map(|m| if let Message::Hello(h) = m { Some(h) } else { None }).unwrap();
    assert_eq!((hello.node_id.as_str(), hello.zone.as_str(), hello.gpus.len()), ("node-1", "zone-a", 4));
}

#[tokio::test]
async fn a_killed_main_process_takes_its_orphan_along_and_is_replaced() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--orphan", "--stray"])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    let before = node.processes();
    assert!(before.len() >= 3, "main process, orphan and stray: {before:?}");

    let from = cp.heard().len();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let failed = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("was ended by signal 9 (SIGKILL)"), "{}", failed.reason);
    let deregistered =
        |m: &Message| matches!(m, Message::Deregister(d) if d.replica_id == "m-0" && d.generation == 7);
    cp.hears("deregistration", from, |heard| heard.iter().any(deregistered).then_some(())).await;

    let again = cp.hears_registration("m-0", from).await;
    assert_ne!(i32::try_from(again.pid).unwrap(), first);
    assert!(before.iter().all(|pid| !lives(*pid)), "processes of the first life beside the second");
    let engine = node.registered("m-0").await;
    assert_eq!(engine["restarts"], 1);
}

#[tokio::test]
async fn an_engine_that_stops_answering_is_replaced() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let hang = node.path("hang");
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--health-while-not", &hang])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    fs::write(&hang, "").unwrap();
    let draining = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Draining)).await;
    assert!(draining.reason.contains("3 liveness checks in a row failed"), "{}", draining.reason);
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("3 liveness checks in a row failed"), "{}", failed.reason);
    fs::remove_file(&hang).unwrap();
    node.engine("m-0", |e| e["state"] == "ready" && number(e, "pid") != first).await;
    assert!(!lives(first));
}

#[tokio::test]
async fn what_cannot_be_started_is_failed_with_its_reason_and_started_once_it_can() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let mut unknown = assignment("m-0", 1, &[]);
    unknown.spec.as_mut().unwrap().engine = "sglang".into();
    let owned = assignment("m-1", 1, &["--port", "80"]);
    let mut elsewhere = assignment("m-2", 1, &[]);
    elsewhere.gpu_uuids = vec!["GPU-of-another-node".into()];
    cp.assign(1, 2, vec![unknown, owned, elsewhere]).await;
    node.start().await;
    for (id, reason) in [
        ("m-0", "engine \"sglang\" is not known on this node; known are: sim, stand-in, vllm"),
        ("m-1", "the argument \"--port\" is not accepted"),
        ("m-2", "the assigned GPU GPU-of-another-node is not on this node"),
    ] {
        let status = cp.hears_status(id, 0, |s| s.state == i32::from(EngineState::Failed)).await;
        assert!(status.reason.contains(reason), "{}", status.reason);
    }
    assert_eq!(node.engine("m-0", |_| true).await["restarts"], 0, "no retry can help");

    cp.assign(1, 3, vec![assignment("m-0", 2, &[])]).await;
    assert_eq!(number(&node.registered("m-0").await, "generation"), 2);
}

#[tokio::test]
async fn a_port_lost_to_another_program_costs_one_start() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = taken.local_addr().unwrap().port();
    node.config.engines.port_base = base;
    // The second port looks free and is not when the engine binds it.
    let second = eventually("a free port above", || {
        (base + 1..).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
    })
    .await;
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--bind-fails-on", &second.to_string()])]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("its port was taken"), "{}", failed.reason);
    assert!(failed.reason.contains("exited with code 1"), "{}", failed.reason);
    // Whoever took it keeps it.
    let _rival = TcpListener::bind(("127.0.0.1", second));
    let engine = node.registered("m-0").await;
    assert!(number(&engine, "port") > i32::from(second));
}

#[tokio::test]
async fn a_refused_registration_is_reported_and_tried_again() {
    let cp = ControlPlane::start().await;
    cp.refuse_registrations(Some("generation 7 is stale"));
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let refused = cp.hears_status("m-0", 0, |s| s.reason.contains("generation 7 is stale")).await;
    assert_eq!(refused.state, i32::from(EngineState::Ready));
    assert_eq!(node.engine("m-0", |_| true).await["registration"], "refused");
    cp.refuse_registrations(None);
    assert_eq!(node.registered("m-0").await["reason"], "");
}

#[tokio::test]
async fn a_new_generation_replaces_the_engine_and_waits_for_its_gpu() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 1, &[])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    let from = cp.heard().len();
    cp.assign(1, 3, vec![assignment("m-0", 2, &[]), assignment("m-1", 3, &[])]).await;
    let waits = cp.hears_status("m-1", from, |s| s.reason.contains("waits for m-0 to leave its GPU")).await;
    assert_eq!(waits.state, i32::from(EngineState::Starting));
    let second = cp.hears_registration("m-0", from).await;
    assert_eq!(second.generation, 2);
    assert!(!lives(first));
    assert_eq!(cp.hears_registration("m-1", from).await.generation, 3);
}

#[tokio::test]
async fn load_is_read_and_reported_with_its_age() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let running = node.path("running");
    fs::write(&running, "5").unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--running", &running])]).await;
    node.start().await;
    let status = cp.hears_status("m-0", 0, |s| s.load.is_some()).await;
    let v1::EngineLoad { running, waiting, kv_used_ratio, age_ms, .. } = status.load.unwrap();
    assert_eq!((running, waiting, kv_used_ratio), (5, 2, 0.5));
    assert!(age_ms < 10_000, "{age_ms}");
}
