//! Engines' logs: on the private server and over the session.

use std::{fs, io::Write, time::Duration};

use penstock_proto::v1::{self, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, number},
};

fn append(log: &str, text: &str) {
    fs::OpenOptions::new().append(true).open(log).unwrap().write_all(text.as_bytes()).unwrap();
}

/// What came for the request so far.
fn told(cp: &ControlPlane, id: u64) -> (String, Option<String>) {
    let mut text = Vec::new();
    let mut end = None;
    for message in cp.heard() {
        if let Message::Log(chunk) = message
            && chunk.id == id
        {
            assert_eq!(end, None, "something after the end");
            text.extend(chunk.data);
            end = chunk.last.then_some(chunk.error);
        }
    }
    (String::from_utf8(text).unwrap(), end)
}

async fn hears(
    cp: &ControlPlane,
    id: u64,
    is: impl Fn(&str, &Option<String>) -> bool,
) -> (String, Option<String>) {
    cp.hears(&format!("the log of request {id}"), 0, |_| {
        let (text, end) = told(cp, id);
        is(&text, &end).then_some((text, end))
    })
    .await
}

fn request(id: u64, replica_id: &str) -> v1::LogRequest {
    v1::LogRequest { id, replica_id: replica_id.into(), lines: 100, credits: 4, ..Default::default() }
}

#[tokio::test]
async fn the_private_server_gives_a_log_and_goes_on_with_it() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    let log = engine["log"].as_str().unwrap();
    append(log, "one\ntwo\n");
    let (status, text) = node.get("/engines/m-0/logs").await;
    assert_eq!(status, 200);
    assert!(
        text.starts_with("# penstock starts m-0: ")
            && text.contains("listening on")
            && text.ends_with("one\ntwo\n")
    );
    assert_eq!(node.get("/engines/m-0/logs?lines=1").await.1, "two\n");
    for (path, status, part) in [
        ("/engines/m-0/logs?lines=10001", 400, "more than 10000"),
        ("/engines/m-0/logs?line=1", 400, "accepted are lines=0..10000"),
        ("/engines/m-9/logs", 404, "no engine of \"m-9\" is, or was, on this node"),
        ("/engines/m-0/logs?previous=true", 404, "has had one life only"),
    ] {
        let (got, text) = node.get(path).await;
        assert!(got == status && text.contains(part), "{path}: {got} {text}");
    }

    let mut following = node.follow("/engines/m-0/logs?lines=1&follow=true").await;
    assert_eq!(following.chunk().await.unwrap().unwrap(), "two\n");
    append(log, "three\n");
    assert_eq!(following.chunk().await.unwrap().unwrap(), "three\n");
    node.metric_reaches("penstock_agent_log_streams", 1).await;
    // The replica goes, and with it what follows its log.
    cp.assign(1, 3, vec![]).await;
    let mut rest = Vec::new();
    while let Some(part) = following.chunk().await.unwrap() {
        rest.extend(part);
    }
    assert!(String::from_utf8(rest).unwrap().contains("SIGTERM"));
    assert_eq!(node.get("/engines/m-0/logs?lines=1").await.0, 200, "it is there after its engine");
}

#[tokio::test]
async fn the_life_before_says_why_it_ended() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    append(engine["log"].as_str().unwrap(), "last words");
    let first = nix::unistd::Pid::from_raw(number(&engine, "pid"));
    nix::sys::signal::kill(first, nix::sys::signal::Signal::SIGKILL).unwrap();
    node.engine("m-0", |e| e["state"] == "ready" && e["restarts"] == 1).await;
    let (_, before) = node.get("/engines/m-0/logs?previous=true").await;
    assert!(before.starts_with("# penstock starts") && before.ends_with("last words\n"), "{before}");
}

#[tokio::test]
async fn over_the_session_a_part_comes_for_a_credit_and_reports_go_on() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    // 16 parts of 32 KiB, of which four may come.
    let line = "x".repeat(1_023) + "\n";
    append(engine["log"].as_str().unwrap(), &line.repeat(512));
    cp.say_of_log(v1::LogRequest { lines: 512, ..request(1, "m-0") }).await;
    hears(&cp, 1, |text, _| text.len() == 4 * (32 << 10)).await;
    let position = cp.heard().len();
    cp.hears("five more reports", position, |heard| (heard.len() >= 5).then_some(())).await;
    assert_eq!(told(&cp, 1).0.len(), 4 * (32 << 10), "no more than was asked for");
    for _ in 0..12 {
        let before = told(&cp, 1).0.len();
        cp.say_of_log(v1::LogRequest { id: 1, credits: 1, ..Default::default() }).await;
        hears(&cp, 1, |text, _| text.len() > before).await;
    }
    let (text, end) = hears(&cp, 1, |_, end| end.is_some()).await;
    assert_eq!((text, end), (line.repeat(512), Some(String::new())));
}

#[tokio::test]
async fn a_followed_log_ends_with_whoever_reads_it_and_so_many_are_read_at_once() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    node.registered("m-0").await;
    for id in 1..=8 {
        cp.say_of_log(v1::LogRequest { follow: true, ..request(id, "m-0") }).await;
        hears(&cp, id, |text, _| text.contains("listening on")).await;
    }
    cp.say_of_log(request(9, "m-0")).await;
    let refused = hears(&cp, 9, |_, end| end.is_some()).await.1.unwrap();
    assert!(refused.contains("8 logs of this node are being read already"), "{refused}");
    cp.say_of_log(v1::LogRequest { id: 3, cancel: true, ..Default::default() }).await;
    cp.say_of_log(request(10, "m-0")).await;
    hears(&cp, 10, |text, end| text.contains("listening on") && end.is_some()).await;
    cp.say_of_log(request(11, "m-9")).await;
    let unknown = hears(&cp, 11, |_, end| end.is_some()).await.1.unwrap();
    assert!(unknown.contains("no engine of \"m-9\""), "{unknown}");

    // The session ends, and every one of them with it.
    node.metric_reaches("penstock_agent_log_streams", 7).await;
    cp.stop().await;
    let deadline = std::time::Instant::now() + crate::controlplane::PATIENCE;
    while !node.get("/metrics").await.1.lines().any(|line| line == "penstock_agent_log_streams 0") {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
