//! A fleet that falls silent: what proxies are told, what operators are told, and how it ends.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, Proxy, wait};

/// Two nodes with an engine each, both registered and known to the proxy.
async fn fleet(plane: &Plane, proxy: &Proxy) -> Vec<Agent> {
    let mut agents = Vec::new();
    for node in ["n1", "n2"] {
        agents.push(Agent::connect(plane, node, 1).await);
    }
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim","replicas":2}"#)).await;
    for (agent, port) in agents.iter().zip([9_001, 9_002]) {
        let assigned = agent.wait_assigned(1).await;
        let result = agent.serve(&assigned[0], port).await;
        assert!(result.accepted, "{result:?}");
    }
    proxy.wait("both endpoints", |applied| endpoints(applied) == 2).await;
    agents
}

fn endpoints(applied: &common::Applied) -> usize {
    applied.tables.get("m").map_or(0, |table| table.endpoints.len())
}

#[tokio::test]
async fn silence_is_held_and_told_until_an_operator_lets_it_pass() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let agents = fleet(&plane, &proxy).await;
    drop(agents);
    let held = async || {
        let status = plane.get("/api/v2/cluster/status").await;
        status["publish_held"].as_array().filter(|held| !held.is_empty()).cloned()
    };
    let sentences = wait("something that is held", held).await;
    assert!(sentences[0].as_str().unwrap().starts_with("2 endpoints of m are not heard of"), "{sentences:?}");
    assert_eq!(plane.metric("penstock_controlplane_xds_held_endpoints").await, 2.0);
    assert_eq!(endpoints(&proxy.now()), 2, "the proxy goes on with what it has");
    // What somebody asks for goes its way meanwhile.
    plane.call("PUT", "/api/v2/deployments/other", Some(r#"{"engine":"sim","replicas":0}"#)).await;
    proxy.wait("another model", |applied| applied.routes.contains_key("other")).await;
    assert_eq!(endpoints(&proxy.now()), 2);
    let (status, passed) = plane.call("POST", "/api/v2/cluster/publish", None).await;
    assert_eq!(status, 200, "{passed}");
    assert_eq!(passed["passed"].as_array().unwrap().len(), 1, "{passed}");
    proxy.wait("an empty table", |applied| endpoints(applied) == 0).await;
    wait("nothing that is held", async || held().await.is_none().then_some(())).await;
    assert_eq!(plane.metric("penstock_controlplane_xds_held_endpoints").await, 0.0);
    plane.stop().await;
}

#[tokio::test]
async fn a_deletion_takes_its_way_also_out_of_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "p").await;
    drop(fleet(&plane, &proxy).await);
    let held = async || {
        let status = plane.get("/api/v2/cluster/status").await;
        status["publish_held"].as_array().is_some_and(|held| !held.is_empty()).then_some(())
    };
    wait("something that is held", held).await;
    let (status, _) = plane.call("DELETE", "/api/v2/deployments/m", None).await;
    assert_eq!(status, 200);
    proxy
        .wait("neither table nor route", |applied| applied.tables.is_empty() && applied.routes.is_empty())
        .await;
    plane.stop().await;
}
