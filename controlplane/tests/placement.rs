//! Placement through the whole process: what operators put by REST, what agents are told, and what the status says.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, wait};

async fn waits_for(plane: &Plane, model: &str, part: &str) {
    wait(part, async || {
        let read = plane.get(&format!("/api/v2/deployments/{model}")).await;
        let told = read["status"]["waiting"].as_array()?.iter().any(|s| s.as_str().unwrap().contains(part));
        told.then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_cordon_keeps_new_replicas_away_and_sticks() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n1", 2).await;
    let (status, node) = plane.call("POST", "/api/v2/nodes/n1/cordon", Some(r#"{"reason":"fan"}"#)).await;
    assert_eq!((status, node["cordoned"].as_bool(), node["reason"].as_str()), (200, Some(true), Some("fan")));
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    waits_for(&plane, "m", "of 1 node 1 is cordoned").await;
    let (status, node) = plane.call("POST", "/api/v2/nodes/n1/uncordon", None).await;
    assert_eq!((status, node["cordoned"].as_bool()), (200, Some(false)));
    assert_eq!(agent.wait_assigned(1).await[0].replica_id, "m-0");
    for (path, code) in [("/api/v2/nodes/nobody/cordon", 404), ("/api/v2/nodes/a%20b/cordon", 400)] {
        assert_eq!(plane.call("POST", path, None).await.0, code, "{path}");
    }
    for (body, field) in [(r#"{"role":"boss"}"#, "role"), (r#"{"taints":[{"key":"a"}]}"#, "taints[0].effect")]
    {
        let (status, answer) = plane.call("PATCH", "/api/v2/nodes/n1", Some(body)).await;
        assert_eq!((status, answer["error"]["field"].as_str()), (400, Some(field)));
    }
    let (_, node) = plane.call("PATCH", "/api/v2/nodes/n1", Some(r#"{"role":"control-only"}"#)).await;
    assert_eq!(node["role"], "control-only");
    plane.stop().await;
    // It outlives the process.
    let plane = Plane::start(dir.path()).await;
    assert_eq!(plane.get("/api/v2/nodes/n1").await["role"], "control-only");
    plane.stop().await;
}

#[tokio::test]
async fn maintenance_moves_a_replica_once_another_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let first = Agent::connect(&plane, "n1", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    let old = first.wait_assigned(1).await.remove(0);
    assert!(first.serve(&old, 1_001).await.accepted);
    plane.wait_endpoint_state("m-0", "ready").await;
    plane.call("POST", "/api/v2/nodes/n1/maintenance", None).await;
    waits_for(&plane, "m", "m-0 shall leave n1 (its node is in maintenance) but stays").await;
    let second = Agent::connect(&plane, "n2", 1).await;
    let new = second.wait_assigned(1).await.remove(0);
    assert_eq!(new.replica_id, "m-1");
    assert_eq!(plane.endpoint("m-0").await.unwrap()["state"], "ready", "it serves until the other does");
    assert!(second.serve(&new, 1_002).await.accepted);
    first.wait_assigned(0).await;
    plane.stop().await;
}

#[tokio::test]
async fn a_sleeping_model_wakes_and_shows_its_policy() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n1", 1).await;
    let body = r#"{"engine":"sim","replicas":0,"rollout":{"max_surge":2},
        "autoscaling":{"min":0,"max":2,"idle_to_zero_s":60}}"#;
    let (status, put) = plane.call("PUT", "/api/v2/deployments/org/m", Some(body)).await;
    assert_eq!(
        (status, put["rollout"]["max_surge"].as_u64(), put["autoscaling"]["target_waiting"].as_u64()),
        (201, Some(2), Some(4))
    );
    waits_for(&plane, "org/m", "sleeps").await;
    assert_eq!(plane.call("POST", "/api/v2/wake/nobody", None).await.0, 404);
    let (status, woken) = plane.call("POST", "/api/v2/wake/org/m", Some(r#"{"queued":2}"#)).await;
    assert_eq!((status, woken["queued"].as_u64()), (202, Some(2)));
    assert_eq!(agent.wait_assigned(1).await[0].replica_id, "org-m-0");
    wait("the number", async || {
        let read = plane.get("/api/v2/deployments/org/m").await;
        (read["status"]["wanted"] == 1).then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test]
async fn revisions_are_listed_compared_and_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let at = "/api/v2/deployments/org/m";
    assert_eq!(plane.call("GET", "/api/v2/revisions/org/m", None).await.0, 404);
    plane.call("PUT", at, Some(r#"{"engine":"sim","replicas":0}"#)).await;
    assert_eq!(plane.call("POST", "/api/v2/rollback/org/m", None).await.0, 404, "nothing to go back to");
    plane
        .call("PUT", at, Some(r#"{"engine":"sim","replicas":0,"args":["--x"],"rollout":{"max_surge":3}}"#))
        .await;
    plane.call("PATCH", at, Some(r#"{"replicas":4}"#)).await;
    let listed = plane.get("/api/v2/revisions/org/m").await;
    assert_eq!(listed["revisions"].as_array().unwrap().len(), 2, "a scale is no revision: {listed}");
    let diff = plane.get("/api/v2/diff/org/m").await;
    let fields: Vec<&str> =
        diff["changes"].as_array().unwrap().iter().map(|c| c["field"].as_str().unwrap()).collect();
    assert_eq!((diff["from"].as_u64(), fields), (Some(1), vec!["args", "rollout.max_surge"]));
    let (status, back) = plane.call("POST", "/api/v2/rollback/org/m", Some(r#"{"to":1}"#)).await;
    assert_eq!(
        (status, back["replicas"].as_u64(), back["args"].as_array().map(Vec::len)),
        (200, Some(4), Some(0))
    );
    let listed = plane.get("/api/v2/revisions/org/m").await;
    assert_eq!(listed["revisions"][0]["rolled_back_to"], 1);
    for (method, path, body, status) in [
        ("POST", "/api/v2/rollback/org/m", Some(r#"{"to":9}"#), 404),
        ("POST", "/api/v2/rollback/org/m", Some(r#"{"to":"1"}"#), 400),
        ("GET", "/api/v2/diff/org/m?from=x", None, 400),
        ("GET", "/api/v2/diff/org/m?from=7", None, 404),
    ] {
        assert_eq!(plane.call(method, path, body).await.0, status, "{method} {path}");
    }
    let (_, paused) = plane.call("PATCH", at, Some(r#"{"paused":true}"#)).await;
    assert_eq!(paused["rollout"]["paused"], true);
    plane.call("DELETE", at, None).await;
    plane.call("PUT", at, Some(r#"{"engine":"sim","replicas":0}"#)).await;
    let listed = plane.get("/api/v2/revisions/org/m").await;
    assert_eq!(listed["revisions"].as_array().unwrap().len(), 1, "a new deployment has a new history");
    plane.stop().await;
}
