//! Sessions with agents: who is let in, what is refused, what a restart keeps, and what a lost node takes along.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, Proxy, hello, wait};
use penstock_proto::{v1, v1::EndpointState};
use tonic::Code;

#[tokio::test]
async fn wrong_hellos_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let mut old = hello("n", 1);
    old.protocol_version = 99;
    for (hello, code, part) in [
        (old, Code::FailedPrecondition, "fleet protocol 99"),
        (hello("", 1), Code::InvalidArgument, "a node id has"),
        (hello("a/b", 1), Code::InvalidArgument, "a node id has"),
    ] {
        let agent = Agent::connect_as(&plane, hello).await;
        let ended = agent.ended().await;
        assert_eq!(ended.code(), code);
        assert!(ended.message().contains(part), "{ended}");
    }
    assert_eq!(plane.get("/api/v2/nodes").await["nodes"].as_array().unwrap().len(), 0);
    plane.stop().await;
}

#[tokio::test]
async fn the_newer_session_of_a_node_wins_and_keeps_its_endpoints() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let first = Agent::connect(&plane, "n", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some("{}")).await;
    let a = first.wait_assigned(1).await.remove(0);
    assert!(first.serve(&a, 10_814).await.accepted);
    let second = Agent::connect(&plane, "n", 1).await;
    let ended = first.ended().await;
    assert_eq!(ended.code(), Code::Aborted);
    assert!(ended.message().contains("connected again"), "{ended}");
    assert_eq!(
        second.wait_assigned(1).await,
        std::slice::from_ref(&a),
        "the same assignment, of the same generation"
    );
    assert!(second.serve(&a, 10_814).await.accepted);
    plane.wait_endpoint_state("m-0", "ready").await;
    assert_eq!(plane.metric("penstock_controlplane_registrations_total{outcome=\"repeated\"}").await, 1.0);
    plane.stop().await;
}

#[tokio::test]
async fn registrations_are_fenced_by_generation_node_and_address() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n", 2).await;
    plane.call("PUT", "/api/v2/deployments/m", Some("{}")).await;
    let a = agent.wait_assigned(1).await.remove(0);
    let other = Agent::connect(&plane, "other", 0).await;
    let mut unknown = a.clone();
    unknown.replica_id = "m-77".into();
    let good = "127.0.0.1:10814";
    for (agent, a, generation, address, outcome) in [
        (&agent, &a, a.generation - 1, good, "stale_generation"),
        (&agent, &a, a.generation + 1, good, "future_generation"),
        (&agent, &unknown, a.generation, good, "unknown_assignment"),
        (&agent, &a, a.generation, "0.0.0.0:10814", "bad_address"),
        (&agent, &a, a.generation, "nonsense", "bad_address"),
        (&other, &a, a.generation, good, "wrong_node"),
    ] {
        let result = agent.register(a, generation, address).await;
        assert!(!result.accepted && !result.reason.is_empty(), "{outcome}: {result:?}");
        let counter = format!("penstock_controlplane_registrations_total{{outcome=\"{outcome}\"}}");
        assert!(plane.metric(&counter).await >= 1.0, "{outcome}");
    }
    assert_eq!(plane.endpoint("m-0").await.unwrap()["state"], "starting");
    assert!(agent.register(&a, a.generation, good).await.accepted);
    // A scale-up leaves the generation of what is there alone.
    plane.call("PATCH", "/api/v2/deployments/m", Some(r#"{"replicas":2}"#)).await;
    let both = agent.wait_assigned(2).await;
    assert_eq!(both.iter().find(|b| b.replica_id == "m-0"), Some(&a));
    assert!(both.iter().any(|b| b.replica_id == "m-1" && b.generation > a.generation));
    plane.stop().await;
}

#[tokio::test]
async fn a_lost_node_takes_its_endpoints_along_and_its_replicas_move() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let first = Agent::connect(&plane, "a", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some("{}")).await;
    let a = first.wait_assigned(1).await.remove(0);
    assert!(first.serve(&a, 10_814).await.accepted);
    proxy.wait("the endpoint", |p| p.state_of("m", "m-0") == Some(EndpointState::Ready)).await;
    let second = Agent::connect(&plane, "b", 1).await;
    drop(first);
    let applied = proxy.wait("the endpoint to vanish", |p| p.tables["m"].endpoints.is_empty()).await;
    assert!(applied.routes.contains_key("m"), "nobody serves it, but it is known");
    let moved = second.wait_assigned(1).await.remove(0);
    assert_eq!(moved.replica_id, "m-1", "a fresh id");
    assert!(moved.generation > a.generation);
    assert!(second.serve(&moved, 10_815).await.accepted);
    proxy.wait("the new endpoint", |p| p.state_of("m", "m-1") == Some(EndpointState::Ready)).await;
    let nodes = plane.get("/api/v2/nodes").await;
    let states: Vec<_> =
        nodes["nodes"].as_array().unwrap().iter().map(|n| (&n["node_id"], &n["state"])).collect();
    assert!(states.iter().any(|(id, state)| *id == "b" && *state == "ready"), "{nodes}");
    // It comes back with an engine that nobody wants any more.
    let first = Agent::connect(&plane, "a", 1).await;
    assert!(first.assignments().is_empty());
    let stale = first.register(&a, a.generation, "127.0.0.1:10814").await;
    assert!(!stale.accepted, "{stale:?}");
    plane.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_everything_and_raises_the_term() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let agent = Agent::connect(&plane, "n", 2).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"replicas":2}"#)).await;
    let assigned = agent.wait_assigned(2).await;
    for (port, a) in (10_814..).zip(&assigned) {
        assert!(agent.serve(a, port).await.accepted);
    }
    let before = proxy.wait("both", |p| p.tables.get("m").is_some_and(|t| t.endpoints.len() == 2)).await;
    wait("an acknowledgement", async || {
        let shown = plane.get("/api/v2/proxies").await;
        (shown["proxies"][0]["version_synced"] == shown["version"]).then_some(())
    })
    .await;
    let deployment = plane.get("/api/v2/deployments/m").await;
    let first_term = agent.welcome().term;
    plane.stop().await;

    let plane = Plane::start(dir.path()).await;
    let status = plane.get("/api/v2/cluster/status").await;
    let term = status["term"].as_u64().unwrap();
    assert!(term > first_term && status["endpoints_ready"] == 2, "{status}");
    assert_eq!(plane.get("/api/v2/deployments/m").await["created_unix_s"], deployment["created_unix_s"]);
    let mut known = before.clone();
    (known.log, known.ended) = (Vec::new(), None);
    let proxy = Proxy::connect_with(&plane, "p", known).await;
    let after = proxy.wait("a version of the new term", |p| p.version.starts_with(&format!("{term}."))).await;
    assert!(after.log.is_empty(), "nothing had changed, so nothing was sent: {:?}", after.log);
    let agent = Agent::connect(&plane, "n", 2).await;
    assert_eq!(agent.welcome().term, term);
    assert_eq!(agent.assignments(), assigned);
    // Renewed by reports, the endpoints outlive the lease that the restart left them.
    tokio::time::sleep(std::time::Duration::from_millis(2_000)).await;
    assert_eq!(proxy.now().tables["m"].endpoints.len(), 2);
    assert!(proxy.now().log.is_empty(), "{:?}", proxy.now().log);
    plane.stop().await;
}

#[tokio::test]
async fn a_rollout_replaces_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n", 3).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"replicas":2,"args":["--v1"]}"#)).await;
    for (port, a) in (10_814..).zip(&agent.wait_assigned(2).await) {
        assert!(agent.serve(a, port).await.accepted);
    }
    let (_, changed) =
        plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"replicas":2,"args":["--v2"]}"#)).await;
    let is_new = |a: &v1::Assignment| a.spec.as_ref().unwrap().args == ["--v2"];
    for round in 0..2_u16 {
        let assigned = wait("a surge", async || {
            Some(agent.assignments())
                .filter(|a| a.iter().filter(|a| is_new(a)).count() == usize::from(round) + 1)
        })
        .await;
        assert_eq!(assigned.len(), 3, "one more than wanted: {assigned:?}");
        let fresh = assigned.iter().filter(|a| is_new(a)).max_by_key(|a| a.generation).unwrap();
        assert!(agent.serve(fresh, 10_820 + round).await.accepted);
        agent.wait_assigned(2).await;
        let kept: Vec<String> = agent.assignments().into_iter().map(|a| a.replica_id).collect();
        let leaving: Vec<v1::Assignment> =
            assigned.into_iter().filter(|a| !kept.contains(&a.replica_id)).collect();
        assert!(leaving.len() == 1 && !is_new(&leaving[0]), "{leaving:?}");
        agent.deregister(&leaving[0]).await;
        agent.wait_deregistered(&leaving[0].replica_id).await;
        agent.end(&leaving[0].replica_id);
    }
    let settled = async || {
        let d = plane.get("/api/v2/deployments/m").await;
        (d["status"]["waiting"].as_array().unwrap().is_empty() && d["status"]["ready"] == 2).then_some(d)
    };
    let deployment = wait("the rollout's end", settled).await;
    assert_eq!(deployment["revision"], changed["revision"], "the rollout did not write the deployment");
    plane.stop().await;
}

#[tokio::test]
async fn a_control_plane_whose_term_has_passed_cannot_write() {
    use penstock_controlplane::{
        leadership::{Leader, Leadership},
        store::{EmbeddedStore, Store, Txn, TxnOutcome, keys},
    };
    let dir = tempfile::tempdir().unwrap();
    let opened = EmbeddedStore::open(&dir.path().join("s.redb"), 1_000).await.unwrap();
    let store: std::sync::Arc<dyn Store> = std::sync::Arc::new(opened);
    // As a build of the first schema left it: a decimal term, which the new one exceeds.
    store.txn(Txn::new().put(keys::SCHEMA, "1").put(keys::LEADER, "1")).await.unwrap();
    let old = Leadership::seize(&store, &Leader::default()).await.unwrap();
    assert_eq!(&store.get(keys::SCHEMA).await.unwrap().unwrap().value[..], b"2", "migrated");
    let new = Leadership::seize(&store, &Leader::default()).await.unwrap();
    let ((first, stale), (second, guard)) = (old.guard().unwrap(), new.guard().unwrap());
    assert!(1 < first && first < second);
    let late = store.txn(Txn::new().when(stale).put("/x", "late")).await.unwrap();
    assert!(matches!(late, TxnOutcome::Conflict { failed, .. } if failed.key() == keys::LEADER));
    let present = store.txn(Txn::new().when(guard).put("/x", "present")).await.unwrap();
    assert!(matches!(present, TxnOutcome::Committed { .. }));
    store.txn(Txn::new().put(keys::SCHEMA, "999")).await.unwrap();
    let refused = Leadership::seize(&store, &Leader::default()).await.unwrap_err().to_string();
    assert!(refused.contains("schema version \"999\""), "{refused}");
    store.close().await;
}

#[tokio::test]
async fn a_zone_that_is_corrected_late_is_told_to_proxies_and_restarts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let agent = Agent::connect(&plane, "n", 1).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"replicas":1}"#)).await;
    let assigned = agent.wait_assigned(1).await;
    assert!(agent.serve(&assigned[0], 10_814).await.accepted);
    let in_zone = |zone: &'static str| {
        move |p: &common::Applied| {
            p.tables.get("m").is_some_and(|t| t.endpoints.iter().any(|e| e.zone == zone))
        }
    };
    proxy.wait("the agent's zone", in_zone("z1")).await;
    let (status, answer) = plane.call("PUT", "/api/v2/nodes/n", Some(r#"{"labels":{"zone":"z2"}}"#)).await;
    assert!(status < 300, "{answer}");
    proxy.wait("the operator's zone", in_zone("z2")).await;
    assert_eq!(plane.get("/api/v2/nodes/n").await["zone"], "z2");
    assert_eq!(agent.assignments(), assigned, "nothing else was changed");
    plane.call("PUT", "/api/v2/nodes/n", Some("{}")).await;
    proxy.wait("the agent's zone again", in_zone("z1")).await;
    plane.stop().await;
}
