//! Engines' logs through the control plane: from a node's session to whoever asks, part by part.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, wait};
use penstock_proto::v1::{self, agent_message::Message};

const PATH: &str = "/api/v2/models/m/replicas/m-0/logs";
const FOLLOWED: &str = "/api/v2/models/m/replicas/m-0/logs?follow=true";

/// A control plane, and an agent that is assigned `m-0`.
async fn assigned(dir: &std::path::Path) -> (Plane, Agent) {
    let plane = Plane::start(dir).await;
    let agent = Agent::connect(&plane, "n", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some("{}")).await;
    agent.wait_assigned(1).await;
    (plane, agent)
}

fn part(id: u64, text: &str) -> Message {
    Message::Log(v1::LogChunk { id, data: text.into(), ..Default::default() })
}

fn last(id: u64, error: &str) -> Message {
    Message::Log(v1::LogChunk { id, last: true, error: error.into(), ..Default::default() })
}

#[tokio::test]
async fn a_log_is_asked_of_the_replicas_node_and_comes_as_text() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, agent) = assigned(dir.path()).await;
    let path = format!("{PATH}?lines=7&previous=true");
    let asking = plane.fetch(&path);
    let answering = async {
        let asked = agent.log_requests(|all| !all.is_empty()).await.remove(0);
        assert_eq!(
            (asked.replica_id.as_str(), asked.lines, asked.previous, asked.follow),
            ("m-0", 7, true, false)
        );
        agent.send(part(asked.id, "one\n")).await;
        agent.send(part(asked.id, "two\n")).await;
        agent.send(last(asked.id, "")).await;
    };
    let (response, ()) = tokio::join!(asking, answering);
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(response.text().await.unwrap(), "one\ntwo\n");
    plane.stop().await;
}

#[tokio::test]
async fn what_cannot_be_read_is_told_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, agent) = assigned(dir.path()).await;
    for (path, status, code, part) in [
        ("/api/v2/models/m/replicas/m-9/logs", 404, "not_found", "has no replica \"m-9\""),
        ("/api/v2/models/x/replicas/m-0/logs", 404, "not_found", "the model \"x\""),
        ("/api/v2/models/m/replicas/m-0/logs?lines=20000", 400, "invalid_parameter", "from 0 to 10000"),
        ("/api/v2/models/m/replicas/m-0/logs?follow=yes", 400, "invalid_parameter", "true and false"),
    ] {
        let (got, body) = plane.call("GET", path, None).await;
        assert_eq!((got, &body["error"]["code"]), (status, &code.into()), "{path}: {body}");
        assert!(body["error"]["message"].as_str().unwrap().contains(part), "{body}");
    }
    let (refused, ()) = tokio::join!(plane.call("GET", PATH, None), async {
        let id = agent.log_requests(|all| !all.is_empty()).await[0].id;
        agent.send(last(id, "m-0 has had one life only")).await;
    });
    assert_eq!((refused.0, &refused.1["error"]["message"]), (404, &"m-0 has had one life only".into()));
    drop(agent);
    let gone = wait("the end of the session", async || {
        let (status, body) = plane.call("GET", PATH, None).await;
        (status == 503).then_some(body)
    });
    let gone = gone.await;
    assert_eq!(gone["error"]["code"], "agent_not_connected", "{gone}");
    plane.stop().await;
}

#[tokio::test]
async fn a_reader_that_stops_gets_no_more_than_its_credits_and_one_that_goes_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, agent) = assigned(dir.path()).await;
    let (mut response, id) = tokio::join!(plane.fetch(FOLLOWED), async {
        let asked = agent.log_requests(|all| !all.is_empty()).await.remove(0);
        assert!(asked.follow && asked.credits > 0);
        agent.send(part(asked.id, "first\n")).await;
        asked.id
    });
    assert_eq!(response.chunk().await.unwrap().unwrap(), "first\n");
    let more = agent.log_requests(|all| all.len() >= 2).await;
    assert_eq!((more[1].id, more[1].credits, more[1].replica_id.as_str()), (id, 1, ""));
    agent.send(part(id, "second\n")).await;
    assert_eq!(response.chunk().await.unwrap().unwrap(), "second\n");
    drop(response);
    agent.log_requests(|all| all.iter().any(|request| request.id == id && request.cancel)).await;
    // What was under way then is nobody's.
    agent.send(part(id, "late\n")).await;
    plane.wait_endpoint_state("m-0", "starting").await;
    plane.stop().await;
}

#[tokio::test]
async fn a_log_whose_agent_goes_breaks_off() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, agent) = assigned(dir.path()).await;
    let (mut response, ()) = tokio::join!(plane.fetch(FOLLOWED), async {
        let id = agent.log_requests(|all| !all.is_empty()).await[0].id;
        agent.send(part(id, "first\n")).await;
    });
    assert_eq!(response.chunk().await.unwrap().unwrap(), "first\n");
    drop(agent);
    response.chunk().await.expect_err("not the end of the log");
    plane.stop().await;
}
