//! The control plane's word, said twice, late, out of order and a hundred times over.

use penstock_proto::v1;

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, lives, number},
};

/// Engines of this node that run, by the pid that leads each.
fn engines(node: &Node) -> usize {
    node.processes().len()
}

#[tokio::test]
async fn a_replayed_reordered_doubled_stream_gives_one_engine_for_each_assignment() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let of = |revision: u64, ids: &[(&str, u64)]| v1::Assignments {
        term: 1,
        revision,
        assignments: ids.iter().map(|(id, generation)| assignment(id, *generation, &[])).collect(),
    };
    // One replica comes, one goes, one gets a new generation and then another.
    let history = [
        of(2, &[("m-0", 1)]),
        of(3, &[("m-0", 1), ("m-1", 2)]),
        of(4, &[("m-0", 3), ("m-1", 2), ("m-2", 4)]),
        of(5, &[("m-0", 5), ("m-2", 4)]),
    ];
    let last = history.last().unwrap().clone();
    cp.assign(1, last.revision, last.assignments.clone()).await;
    node.start().await;
    let before = [node.registered("m-0").await, node.registered("m-2").await];
    let mut rng = fastrand::Rng::with_seed(23);
    for round in 0..100 {
        let replayed = rng.choice(&history).unwrap();
        cp.replay(replayed).await;
        if round == 50 {
            // In the middle of it the agent is killed; its engines are taken over and not started again.
            node.kill_agent();
            node.start().await;
            node.metric_reaches("penstock_agent_session_connected", 1).await;
        }
        if round % 7 == 0 {
            cp.replay(&last).await;
        }
    }
    cp.replay(&last).await;
    for (id, before) in ["m-0", "m-2"].into_iter().zip(&before) {
        let after = node.registered(id).await;
        for key in ["pid", "port", "generation", "restarts"] {
            assert_eq!(before[key], after[key], "{id} {key}");
        }
    }
    assert_eq!(engines(&node), 2, "{:?}", node.processes());
    let metrics = node.get("/metrics").await.1;
    for line in ["penstock_agent_engine_starts_total 0", "penstock_agent_engine_adoptions_total 2"] {
        assert!(metrics.lines().any(|l| l == line), "{line} not in\n{metrics}");
    }
    node.metric_reaches("penstock_agent_assignments_stale_total", 10).await;
}

#[tokio::test]
async fn a_node_that_returns_after_its_replica_was_placed_elsewhere_does_not_serve_the_old_generation() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &[]), assignment("m-1", 8, &[])]).await;
    node.start().await;
    let old = number(&node.registered("m-0").await, "pid");
    let kept = number(&node.registered("m-1").await, "pid");
    node.kill_agent();
    // The replica went to another node under generation 9, and came back under 10; nobody routes to 7 any more.
    cp.refuse_registrations(Some("generation 7 is stale"));
    cp.assign(2, 3, vec![assignment("m-0", 10, &[]), assignment("m-1", 8, &[])]).await;
    let from = cp.heard().len();
    node.start().await;
    cp.hears_status("m-0", from, |s| s.generation == 10).await;
    cp.refuse_registrations(None);
    let registration = cp.hears_registration("m-0", from).await;
    let now = node.engine("m-0", |e| e["generation"] == 10 && e["state"] == "ready").await;
    assert!(registration.generation == 10 || registration.generation == 7);
    assert!(!lives(old), "two engines of one replica");
    assert_ne!(number(&now, "pid"), old);
    assert_eq!(number(&node.registered("m-1").await, "pid"), kept);
}
