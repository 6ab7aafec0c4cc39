//! Engines that answer and get nowhere, engines that never get ready, and what is told of both.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proto::v1::{EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

/// Times short enough for a test.
fn impatient(cp: &ControlPlane) -> Node {
    let mut node = Node::new(cp);
    (node.config.engines.canary_s, node.config.engines.wedge_s) = (1, 2);
    node
}

#[tokio::test]
async fn an_engine_that_answers_and_makes_no_token_is_dumped_ended_and_replaced() {
    for running in ["0", "3"] {
        let cp = ControlPlane::start().await;
        let mut node = impatient(&cp);
        node.config.engines.dump_command = vec!["echo".into(), "asked about {pid}".into()];
        let (frozen, load) = (node.path("frozen"), node.path("running"));
        fs::write(&load, running).unwrap();
        let args = ["--frozen-while", &frozen, "--running", &load];
        cp.assign(1, 2, vec![assignment("org/m-0", 7, &args)]).await;
        node.start().await;
        let first = number(&node.registered("org/m-0").await, "pid");
        fs::write(&frozen, "").unwrap();

        let from = cp.heard().len();
        let draining =
            cp.hears_status("org/m-0", from, |s| s.state == i32::from(EngineState::Draining)).await;
        assert!(draining.reason.starts_with("wedged: no progress for "), "{}", draining.reason);
        assert!(draining.reason.contains(&format!("{running} running")), "{}", draining.reason);
        let deregistered = |m: &Message| matches!(m, Message::Deregister(d) if d.replica_id == "org/m-0");
        cp.hears("deregistration", from, |heard| heard.iter().any(deregistered).then_some(())).await;
        let failed = cp.hears_status("org/m-0", from, |s| s.state == i32::from(EngineState::Failed)).await;
        assert!(!lives(first), "it was ended before it was told to have failed");
        assert_eq!(failed.failures, Some(1));

        let (_, path) = failed.reason.split_once("; dump: ").unwrap_or_else(|| panic!("{}", failed.reason));
        let dump = fs::read_to_string(path).unwrap();
        assert!(path.contains("/dumps/org%2Fm-0-"), "{path}");
        for word in [
            "wedged: no progress",
            "=== GET /health\n200",
            "=== end of its log\n",
            "listening on ",
            &format!("=== process {first}\n"),
            "VmRSS:",
            &format!("asked about {first}"),
            "vllm:generation_tokens_total",
        ] {
            assert!(dump.contains(word), "{word:?} is not in\n{dump}");
        }
        fs::remove_file(&frozen).unwrap();
        node.engine("org/m-0", |e| e["state"] == "ready" && number(e, "pid") != first).await;
        node.metric_reaches("penstock_agent_engine_wedges_total", 1).await;
    }
}

#[tokio::test]
async fn an_idle_engine_is_asked_for_a_token_now_and_then_and_that_is_no_load() {
    let cp = ControlPlane::start().await;
    let mut node = impatient(&cp);
    let load = node.path("running");
    fs::write(&load, "0").unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--running", &load])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    node.metric_reaches("penstock_agent_engine_canaries_total{outcome=\"answered\"}", 3).await;
    let engine = node.engine("m-0", |_| true).await;
    assert_eq!((number(&engine, "pid"), &engine["load"]["running"]), (first, &0.into()));
    assert_eq!(engine["missing_metrics"], serde_json::json!([]));
}

#[tokio::test]
async fn figures_that_an_engine_does_not_tell_are_named() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--few-metrics"])]).await;
    node.start().await;
    let told = cp.hears_status("m-0", 0, |s| s.reason.contains("its /metrics lacks")).await;
    assert!(told.reason.contains("vllm:generation_tokens_total"), "{}", told.reason);
    assert_eq!(told.state, i32::from(EngineState::Ready));
    let engine = node.registered("m-0").await;
    assert_eq!(engine["missing_metrics"].as_array().unwrap().len(), 7, "{engine}");
    node.metric_reaches("penstock_agent_engine_metric_missing{metric=\"vllm:generation_tokens_total\"}", 1)
        .await;
    let (status, body) = node.get("/engines/health").await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let all_ready = serde_json::json!({"status": "ready", "engines": 1, "not_ready": []});
    assert_eq!((status, body), (200, all_ready));
    let whole = "penstock_agent_engine_metric_missing{metric=\"vllm:num_requests_running\"} 0";
    assert!(node.get("/metrics").await.1.lines().any(|line| line == whole));
}

#[tokio::test]
async fn a_start_that_never_gets_ready_is_given_up_and_tried_now_and_then() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    (node.config.engines.ready_s, node.config.engines.give_up_retry_s) = (1, 1);
    let gate = node.path("completions");
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--completions-after", &gate])]).await;
    node.start().await;
    let stuck = cp.hears_status("m-0", 0, |s| s.failures == Some(1)).await;
    assert!(!stuck.gave_up, "{stuck:?}");
    let given_up = cp.hears_status("m-0", 0, |s| s.gave_up).await;
    for reason in [&given_up.gave_up_reason, &given_up.reason] {
        assert!(reason.contains("given up here after 2 failures in a row"), "{reason}");
        assert!(
            reason.contains("not ready within 1 s (engines.ready_s); last: not ready: a completion"),
            "{reason}"
        );
    }
    node.metric_reaches("penstock_agent_engines_gave_up", 1).await;
    let (status, body) = node.get("/engines/health").await;
    assert!(status == 503 && body.contains("\"id\":\"m-0\"") && body.contains("notready"), "{status} {body}");
    // What was missing has come.
    fs::write(&gate, "").unwrap();
    let from = cp.heard().len();
    cp.hears_registration("m-0", from).await;
    let ready = cp.hears_status("m-0", from, |s| s.state == i32::from(EngineState::Ready)).await;
    assert!(!ready.gave_up && ready.gave_up_reason.is_empty(), "{ready:?}");
}

#[tokio::test]
async fn a_crash_loop_is_given_up_and_what_can_never_start_at_once() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.give_up_failures = 3;
    let mut unknown = assignment("m-1", 1, &[]);
    unknown.spec.as_mut().unwrap().engine = "sglang".into();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--ignore-term"]), unknown]).await;
    node.start().await;
    let status = cp.hears_status("m-1", 0, |s| s.gave_up).await;
    assert!(status.gave_up_reason.starts_with("no further start can help: engine \"sglang\""), "{status:?}");
    for _ in 0..3 {
        let pid = number(&node.registered("m-0").await, "pid");
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        eventually("its end", || (!lives(pid)).then_some(())).await;
        node.engine("m-0", |e| number(e, "pid") != pid).await;
    }
    let status = cp.hears_status("m-0", 0, |s| s.gave_up).await;
    assert!(status.gave_up_reason.contains("after 3 failures in a row"), "{}", status.gave_up_reason);
    assert!(status.gave_up_reason.contains("SIGKILL"), "{}", status.gave_up_reason);
}

#[tokio::test]
async fn an_engine_that_was_stopped_and_one_whose_server_was_are_ended() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    (node.config.engines.term_ms, node.config.engines.drain_ms) = (60_000, 300);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    kill(Pid::from_raw(first), Signal::SIGSTOP).unwrap();
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("liveness checks in a row failed"), "{}", failed.reason);
    let second =
        number(&node.engine("m-0", |e| e["state"] == "ready" && number(e, "pid") != first).await, "pid");
    // An order to stop is heeded by a stopped one too, long before SIGKILL.
    kill(Pid::from_raw(second), Signal::SIGSTOP).unwrap();
    cp.assign(1, 3, vec![]).await;
    eventually("its end", || (!lives(second)).then_some(())).await;
    node.no_process_is_left().await;
}

/// An engine that loads has no open port. One that has and answers nothing has its core stopped, or its server.
#[tokio::test]
async fn an_engine_that_was_never_ready_and_answers_nothing_is_started_anew() {
    let cp = ControlPlane::start().await;
    let mut node = impatient(&cp);
    node.config.engines.first_completion_ms = 700;
    let frozen = node.path("frozen");
    fs::write(&frozen, "").unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--frozen-while", &frozen])]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains("its port is open and for 7"), "{}", failed.reason);
    fs::remove_file(&frozen).unwrap();
    node.registered("m-0").await;
    cp.assign(1, 3, vec![]).await;
    node.no_process_is_left().await;
}
