//! How a PUT becomes a routed engine, and how it ends: real REST, a scripted agent, a scripted proxy.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Agent, Plane, Proxy, wait};
use penstock_proto::v1::EndpointState;

const SIM: &str = r#"{"replicas":1,"engine":"sim","model_path":"sim-model"}"#;

#[tokio::test]
async fn a_put_reaches_an_agent_and_its_engine_reaches_proxies() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 2).await;
    assert_eq!((agent.welcome().term, agent.welcome().report_interval_ms), (1, 50));

    let (status, body) = plane.call("PUT", "/api/v2/deployments/org/chat", Some(SIM)).await;
    assert_eq!((status, body["model"].as_str()), (201, Some("org/chat")), "{body}");
    let applied = proxy.wait("the route", |a| a.routes.contains_key("org/chat")).await;
    assert!(applied.tables["org/chat"].endpoints.is_empty(), "published before anything serves");
    assert_eq!(applied.log, ["T+org/chat", "R+org/chat"]);

    let assigned = agent.wait_assigned(1).await;
    let a = &assigned[0];
    let spec = a.spec.as_ref().unwrap();
    assert_eq!((a.replica_id.as_str(), a.gpu_uuids.len()), ("org-chat-0", 1));
    assert_eq!((spec.engine.as_str(), spec.served_model_name.as_str()), ("sim", "org/chat"));
    let result = agent.serve(a, 10_814).await;
    assert!(result.accepted, "{result:?}");

    let ready =
        |applied: &common::Applied| applied.state_of("org/chat", "org-chat-0") == Some(EndpointState::Ready);
    let applied = proxy.wait("the endpoint", ready).await;
    let endpoint = &applied.tables["org/chat"].endpoints[0];
    assert_eq!((endpoint.address.as_str(), endpoint.generation), ("127.0.0.1:10814", a.generation));
    assert_eq!((endpoint.zone.as_str(), endpoint.node_id.as_str()), ("z1", "node-1"));
    plane.wait_endpoint_state("org-chat-0", "ready").await;
    let loaded = async || plane.endpoint("org-chat-0").await.filter(|e| e["running"] == 3);
    let shown = wait("the engine's load", loaded).await;
    assert_eq!((shown["pid"].as_u64(), shown["kv_used_ratio"].as_f64()), (Some(4242), Some(0.5)), "{shown}");
    let deployment = plane.get("/api/v2/deployments/org%2Fchat").await;
    assert_eq!(deployment["status"]["ready"], 1, "{deployment}");
    assert!(agent.serve(a, 10_814).await.accepted, "registering again is fine");
    assert_eq!(plane.metric("penstock_controlplane_registrations_total{outcome=\"repeated\"}").await, 1.0);
    plane.stop().await;
    let ended = agent.ended().await;
    assert!(ended.message().contains("stopping"), "{ended}");
    proxy.wait("the stream's end", |a| a.ended.as_ref().is_some_and(|e| e.contains("stopping"))).await;
}

#[tokio::test]
async fn scaling_down_drains_in_order_and_frees_the_gpu_last() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 3).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"replicas":3,"engine":"sim"}"#)).await;
    let assigned = agent.wait_assigned(3).await;
    for (n, a) in (10_814..).zip(&assigned) {
        assert!(agent.serve(a, n).await.accepted);
    }
    proxy.wait("three endpoints", |a| a.tables.get("m").is_some_and(|t| t.endpoints.len() == 3)).await;

    let (status, body) = plane.call("PATCH", "/api/v2/deployments/m", Some(r#"{"replicas":2}"#)).await;
    assert_eq!((status, body["replicas"].as_u64()), (200, Some(2)));
    agent.wait_assigned(2).await;
    let last = assigned.iter().find(|a| a.replica_id == "m-2").unwrap();
    let draining = |a: &common::Applied| a.state_of("m", "m-2") == Some(EndpointState::Draining);
    proxy.wait("the endpoint to drain", draining).await;

    // The agent may stop the engine only when the proxy has acknowledged the table without it.
    *proxy.mute.lock().unwrap() = true;
    agent.deregister(last).await;
    let gone_from_store = async || {
        let text = plane.get("/api/v2/cluster/status").await;
        (text["endpoints_ready"] == 2).then_some(())
    };
    wait("the deregistration", gone_from_store).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!agent.deregistered("m-2"), "the proxy has not acknowledged it");
    *proxy.mute.lock().unwrap() = false;
    agent.wait_deregistered("m-2").await;
    assert_eq!(proxy.now().state_of("m", "m-2"), None);

    // Its GPU is free only when its engine is gone.
    let (_, other) = plane.call("PUT", "/api/v2/deployments/other", Some(r#"{"engine":"sim"}"#)).await;
    assert_eq!(other["replicas"], 1);
    let waits = async || {
        let d = plane.get("/api/v2/deployments/other").await;
        let sentence = d["status"]["waiting"][0].as_str().unwrap_or_default().to_owned();
        sentence.contains("waits for a GPU").then_some(sentence)
    };
    assert_eq!(wait("a sentence", waits).await, "other-0 waits for a GPU: needs 1, 0 free of 3");
    agent.end("m-2");
    let assigned = agent.wait_assigned(3).await;
    assert!(assigned.iter().any(|a| a.replica_id == "other-0" && a.gpu_uuids == last.gpu_uuids));
    assert!(!proxy.now().dangling);
    plane.stop().await;
}

#[tokio::test]
async fn deleting_withdraws_the_route_first_and_the_table_last() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(SIM)).await;
    let a = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&a, 10_814).await.accepted);
    proxy.wait("the endpoint", |p| p.state_of("m", "m-0").is_some()).await;

    let (status, last) = plane.call("DELETE", "/api/v2/deployments/m", None).await;
    assert_eq!((status, last["status"]["ready"].as_u64()), (200, Some(1)));
    assert_eq!(plane.call("GET", "/api/v2/deployments/m", None).await.0, 404);
    let drains =
        |p: &common::Applied| p.routes.is_empty() && p.state_of("m", "m-0") == Some(EndpointState::Draining);
    proxy.wait("the route to go and the endpoint to drain", drains).await;
    agent.wait_assigned(0).await;
    let late = agent.register(&a, a.generation, "127.0.0.1:10814").await;
    assert!(!late.accepted && late.reason.contains("withdrawn"), "{late:?}");
    agent.deregister(&a).await;
    agent.wait_deregistered("m-0").await;
    agent.end("m-0");
    let applied = proxy.wait("the table to go", |p| p.tables.is_empty()).await;
    assert_eq!(&applied.log[applied.log.len() - 1], "T-m");
    wait("the replica to be forgotten", async || plane.endpoint("m-0").await.is_none().then_some(())).await;
    plane.stop().await;
}

#[tokio::test]
async fn an_operators_drain_sticks_until_it_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    let agent = Agent::connect(&plane, "node-1", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(SIM)).await;
    let a = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&a, 10_814).await.accepted);
    for _ in 0..2 {
        let (status, shown) = plane.call("POST", "/api/v2/endpoints/m-0/drain", None).await;
        assert_eq!((status, shown["state"].as_str()), (200, Some("draining")), "{shown}");
    }
    proxy.wait("it to drain", |p| p.state_of("m", "m-0") == Some(EndpointState::Draining)).await;
    assert!(agent.serve(&a, 10_815).await.accepted, "a new registration does not undo it");
    proxy.wait("the new address", |p| p.tables["m"].endpoints[0].address.ends_with(":10815")).await;
    assert_eq!(proxy.now().state_of("m", "m-0"), Some(EndpointState::Draining));
    let (status, shown) = plane.call("POST", "/api/v2/endpoints/m-0/undrain", None).await;
    assert_eq!((status, shown["state"].as_str()), (200, Some("ready")), "{shown}");
    proxy.wait("it to serve", |p| p.state_of("m", "m-0") == Some(EndpointState::Ready)).await;
    plane.stop().await;
}
