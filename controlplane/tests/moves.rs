//! What proxies are told of streams that are to go on elsewhere: an operator's drain, and a replica that leaves.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Applied, Plane, Proxy};
use penstock_proto::v1::{Departing, Departure, EndpointState};

fn departure(applied: &Applied, id: &str) -> Option<Departure> {
    let table = applied.tables.get("m")?;
    table.endpoints.iter().find(|endpoint| endpoint.id == id)?.departure
}

fn moved(after_ms: u32) -> Option<Departure> {
    Some(Departure { move_after_ms: Some(after_ms), fenced: false })
}

#[tokio::test]
async fn a_drain_says_whether_streams_are_moved_and_the_last_word_counts() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    let a = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&a, 10_814).await.accepted);
    proxy.wait("the endpoint", |p| p.state_of("m", "m-0") == Some(EndpointState::Ready)).await;
    assert_eq!(departure(&proxy.now(), "m-0"), None);
    let drain = async |query: &str, says: &str| {
        let (status, shown) = plane.call("POST", &format!("/api/v2/endpoints/m-0/{query}"), None).await;
        assert_eq!((status, shown["reason"].as_str()), (200, Some(says)), "{shown}");
    };
    drain("drain?move_streams=true", "an operator drains it and moves its streams").await;
    proxy.wait("streams to be moved", |p| departure(p, "m-0") == moved(0)).await;
    assert_eq!(proxy.now().state_of("m", "m-0"), Some(EndpointState::Draining));
    drain("drain", "an operator drains it").await;
    proxy.wait("streams to be kept", |p| departure(p, "m-0").is_none()).await;
    assert_eq!(proxy.now().state_of("m", "m-0"), Some(EndpointState::Draining));
    drain("drain?move_streams=true&dry_run=true", "an operator drains it").await;
    drain("drain?move_streams=true", "an operator drains it and moves its streams").await;
    proxy.wait("streams to be moved again", |p| departure(p, "m-0") == moved(0)).await;
    drain("undrain", "").await;
    proxy.wait("it to serve", |p| p.state_of("m", "m-0") == Some(EndpointState::Ready)).await;
    assert_eq!(departure(&proxy.now(), "m-0"), None);
    for (path, code) in [
        ("/api/v2/endpoints/m-0/drain?move_streams=yes", "invalid_parameter"),
        ("/api/v2/endpoints/m-0/undrain?move_streams=true", "unknown_parameter"),
    ] {
        let (status, error) = plane.call("POST", path, None).await;
        assert_eq!((status, error["error"]["code"].as_str()), (400, Some(code)), "{error}");
    }
    plane.stop().await;
}

#[tokio::test]
async fn a_replica_that_leaves_is_named_until_its_engine_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 2).await;
    let body = r#"{"replicas":2,"engine":"sim","rollout":{"move_streams_after_s":3}}"#;
    let (status, shown) = plane.call("PUT", "/api/v2/deployments/m", Some(body)).await;
    assert_eq!((status, shown["rollout"]["move_streams"].as_bool()), (201, Some(true)), "{shown}");
    let assigned = agent.wait_assigned(2).await;
    for (port, a) in (10_814..).zip(&assigned) {
        assert!(agent.serve(a, port).await.accepted);
    }
    proxy.wait("two endpoints", |p| p.tables.get("m").is_some_and(|t| t.endpoints.len() == 2)).await;
    plane.call("PATCH", "/api/v2/deployments/m", Some(r#"{"replicas":1}"#)).await;
    agent.wait_assigned(1).await;
    proxy.wait("its streams to be moved", |p| departure(p, "m-1") == moved(3_000)).await;
    assert_eq!(departure(&proxy.now(), "m-0"), None, "the other stays");
    let last = assigned.iter().find(|a| a.replica_id == "m-1").unwrap();
    agent.deregister(last).await;
    agent.wait_deregistered("m-1").await;
    let named = proxy.now();
    assert_eq!(named.state_of("m", "m-1"), None);
    let departing = Departing { id: "m-1".into(), generation: last.generation, departure: moved(3_000) };
    assert_eq!(named.tables["m"].departing, [departing], "with the table that it has left");
    agent.end("m-1");
    proxy.wait("it to be forgotten", |p| p.tables["m"].departing.is_empty()).await;
    plane.stop().await;
}
