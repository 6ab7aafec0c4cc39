//! A backup of one etcd goes into another, through a follower: more than a transaction of etcd holds, in keys and in
//! bytes, and a leader that dies in the middle of it.
#![allow(clippy::unwrap_used)]

mod common;
mod etcd_support;

use common::{Agent, Plane, wait};
use etcd_support::{Cluster, planes::Planes};
use nix::sys::signal::Signal;
use penstock_controlplane::backup::{Backup, GAP};
use serde_json::{Value, json};

/// Deployments that are wanted: each is two keys, and etcd takes 128 in one transaction.
const MODELS: usize = 100;
/// Bytes of each of its three variables: twice, with the revision; 100 are far more than the 1.5 MiB that etcd takes at once.
const PADDING: usize = 4_000;

fn at(planes: &Planes, index: usize) -> Plane {
    Plane::at(&planes.all[index].http, &planes.all[index].grpc)
}

async fn pair(cluster: &Cluster) -> (Planes, usize) {
    // The engine of the old site is gone: the new one waits two of these for it.
    let short = |_| vec![("PENSTOCK_CONTROLPLANE__FLEET__LEASE_TTL_MS".into(), "2000".into())];
    let planes = Planes::start(cluster, 2, short).await;
    let leader = planes.leader(&[0, 1]).await;
    (planes, leader)
}

async fn names(plane: &Plane) -> Vec<String> {
    let listed = plane.get("/api/v2/deployments?limit=1000").await["deployments"].clone();
    let name = |d: &Value| d["model"].as_str().unwrap().to_owned();
    listed.as_array().into_iter().flatten().map(name).collect()
}

/// A backup of a site with [`MODELS`] deployments and one engine, and what the site's agent knew of it.
async fn old_site() -> Option<(String, u64, u64)> {
    let cluster = Cluster::start(1).await?;
    let (planes, leader) = pair(&cluster).await;
    let leader = at(&planes, leader);
    let agent = Agent::connect(&leader, "n1", 2).await;
    let padding = "x".repeat(PADDING);
    for model in 0..MODELS {
        let body = json!({"engine": "sim", "replicas": u32::from(model == 0), "env": {"A": padding, "B": padding, "C": padding}});
        let path = format!("/api/v2/deployments/m{model:03}");
        let (status, answer) = leader.call("PUT", &path, Some(&body.to_string())).await;
        assert_eq!(status, 201, "{answer}");
    }
    let placed = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&placed, 9_001).await.accepted);
    let text = leader.fetch("/api/v2/backup").await.text().await.unwrap();
    assert!(text.len() > 6 * MODELS * PADDING, "{}", text.len());
    Some((text, placed.generation, agent.welcome().term))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_one_etcd_goes_into_another_even_if_the_leader_dies_meanwhile() {
    let Some((text, generation, term)) = old_site().await else { return };
    let kept = Backup::read(text.as_bytes()).unwrap();
    assert!(kept.entries.len() > 2 * MODELS);

    let cluster = Cluster::start(1).await.unwrap();
    let (mut planes, leader) = pair(&cluster).await;
    let follower = at(&planes, 1 - leader);
    // What is committed before the leader is stopped stays; how much that is differs from run to run.
    let restoring = tokio::spawn({
        let (follower, text) = (at(&planes, 1 - leader), text.clone());
        async move { follower.call("POST", "/api/v2/restore", Some(&text)).await }
    });
    let begun = async || !names(&at(&planes, leader)).await.is_empty() || restoring.is_finished();
    wait("the first things", async || begun().await.then_some(())).await;
    planes.all[leader].signal(Signal::SIGKILL);
    let (status, answer) = restoring.await.unwrap();
    println!("the leader died: {status}, {} of {MODELS} deployments", names(&follower).await.len());
    assert!(status == 200 || status >= 500, "{status}: {answer}");

    // The other leads. Repeated, it adds what is missing, and changes nothing else.
    planes.leader(&[1 - leader]).await;
    let (status, done) = follower.call("POST", "/api/v2/restore?only_missing=true", Some(&text)).await;
    assert_eq!(status, 200, "{done}");
    let whats: Vec<&str> =
        done["changes"].as_array().unwrap().iter().filter_map(|c| c["what"].as_str()).collect();
    assert!(
        whats.len() == MODELS && whats.iter().all(|what| ["add", "unchanged"].contains(what)),
        "{whats:?}"
    );
    assert_eq!(names(&follower).await.len(), MODELS);
    planes.restart(leader).await;
    planes.same_version(&[0, 1]).await;
    for index in [0, 1] {
        assert_eq!(names(&at(&planes, index)).await.len(), MODELS);
    }
    let shown = follower.get("/api/v2/deployments/m099").await;
    assert_eq!(shown["env"]["C"].as_str().map(str::len), Some(PADDING));

    // Terms and generations continue past what the old site can have given out.
    let agent = Agent::connect(&follower, "n1", 2).await;
    assert!(agent.welcome().term >= term + GAP, "{} after {term}", agent.welcome().term);
    let body = json!({"engine": "sim", "replicas": 1});
    let (status, answer) = follower.call("PUT", "/api/v2/deployments/new", Some(&body.to_string())).await;
    assert_eq!(status, 201, "{answer}");
    let placed =
        wait("a new engine", async || agent.assignments().into_iter().find(|a| a.model == "new")).await;
    assert!(placed.generation > generation + GAP, "{} after {generation}", placed.generation);
}
