//! Several control planes, as processes, on a real etcd: leaders killed, stopped, cut off and told to go.
//!
//! `PENSTOCK_DRILL_ROUNDS=20 cargo nextest run -p penstock-controlplane --test etcd_ha --no-capture` prints the figures
//! of docs/drills.md; without it each fault is tried a few times.
#![allow(clippy::unwrap_used)]

mod common;
mod etcd_support;

use std::time::Duration;

use common::Agent;
use etcd_support::{Cluster, planes::Planes};
use nix::sys::signal::Signal;
use penstock_proto::Version;
use tokio::time::Instant;

/// The promise; what is aimed at is 3 s.
const PROMISE: Duration = Duration::from_secs(10);

fn rounds(few: usize) -> usize {
    std::env::var("PENSTOCK_DRILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(few)
}

fn print_distribution(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[((times.len() - 1) * share).div_ceil(100)].as_millis();
    println!(
        "{what}: {} rounds, to the next leader's first write: min {} ms, median {} ms, p90 {} ms, max {} ms",
        times.len(),
        at(0),
        at(50),
        at(90),
        at(100)
    );
}

fn others(count: usize, but: usize) -> Vec<usize> {
    (0..count).filter(|index| *index != but).collect()
}

/// A newer version, in a newer term.
fn assert_newer(before: &str, after: &str) {
    let (before, after): (Version, Version) = (before.parse().unwrap(), after.parse().unwrap());
    assert!(after > before && after.term > before.term, "{before}, then {after}");
}

#[tokio::test]
async fn a_killed_leader_is_followed_within_the_promised_time() {
    let Some(cluster) = Cluster::start(3).await else { return };
    let mut planes = Planes::start(&cluster, 3, |_| Vec::new()).await;
    let mut times = Vec::new();
    for round in 0..rounds(3) {
        let leader = planes.leader(&[0, 1, 2]).await;
        let survivors = others(3, leader);
        planes.write(survivors[1], &format!("before-{round}")).await;
        let before = planes.same_version(&[0, 1, 2]).await;
        planes.all[leader].kill();
        times.push(planes.write(survivors[0], &format!("after-{round}")).await);
        assert_newer(&before, &planes.same_version(&survivors).await);
        planes.restart(leader).await;
        let (_, body) = planes.call(leader, "GET", "/api/v2/models", None).await.unwrap();
        assert!(body["models"].is_array(), "a follower reads: {body}");
    }
    let worst = times.iter().max().copied().unwrap();
    print_distribution("leader kill -9", times);
    assert!(worst <= PROMISE, "{worst:?}");
    // Everything that was acknowledged is there, on every one of them.
    planes.same_version(&[0, 1, 2]).await;
    for index in 0..3 {
        let (_, body) = planes.call(index, "GET", "/api/v2/models", None).await.unwrap();
        assert_eq!(body["models"].as_array().unwrap().len(), 2 * rounds(3), "{body}");
    }
    // Told to go, it gives its term back at once.
    let leader = planes.leader(&[0, 1, 2]).await;
    planes.all[leader].signal(Signal::SIGTERM);
    let time = planes.write(others(3, leader)[0], "resigned").await;
    assert_eq!(planes.all[leader].wait_end(), Some(0));
    println!("leader SIGTERM: next write after {} ms", time.as_millis());
    assert!(time < PROMISE, "{time:?}");
}

#[tokio::test]
async fn a_stopped_leader_and_one_cut_off_from_etcd_write_no_more() {
    let Some(cluster) = Cluster::start(3).await else { return };
    let planes = Planes::start(&cluster, 2, |_| Vec::new()).await;
    let (mut stopped, mut cut) = (Vec::new(), Vec::new());
    for round in 0..rounds(1) {
        // Stopped: it wakes with a request in its hands that it took to be the leader's to answer.
        let leader = planes.leader(&[0, 1]).await;
        let follower = 1 - leader;
        planes.write(follower, &format!("s{round}")).await;
        let before = planes.same_version(&[0, 1]).await;
        planes.all[leader].signal(Signal::SIGSTOP);
        let late = format!("/api/v2/deployments/late-{round}");
        let (late, _) = tokio::join!(planes.call(leader, "PUT", &late, Some("{}")), async {
            stopped.push(planes.write(follower, &format!("s-next-{round}")).await);
            planes.all[leader].signal(Signal::SIGCONT);
        });
        if let Some((status, body)) = late {
            // Refused, or handed to the one that leads by now; never written in the old term.
            assert!([200, 201, 503].contains(&status), "{status}: {body}");
        }
        assert_newer(&before, &planes.same_version(&[0, 1]).await);
        assert_eq!(planes.leader(&[0, 1]).await, follower, "the old leader follows");

        // Cut off from etcd, not from anybody else.
        let (leader, follower) = (follower, leader);
        let before = planes.same_version(&[0, 1]).await;
        planes.all[leader].cut_off();
        let began = Instant::now();
        let stepped_down = async {
            while planes.status(leader).await.is_none_or(|status| status["leader"] == true) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            began.elapsed()
        };
        let write = async {
            let took = planes.write(follower, &format!("c-next-{round}")).await;
            cut.push(took);
            took
        };
        let (stepped_down, written) = tokio::join!(stepped_down, write);
        println!("cut off: stepped down after {stepped_down:?}, the next leader wrote after {written:?}");
        let refused = planes.call(leader, "PUT", "/api/v2/deployments/no", Some("{}")).await;
        if let Some((status, body)) = refused {
            assert_eq!(status, 503, "{body}");
        }
        planes.all[leader].reconnect();
        assert_newer(&before, &planes.same_version(&[0, 1]).await);
        planes.write(leader, &format!("c-after-{round}")).await;
    }
    for (what, times) in [("leader SIGSTOP", stopped), ("leader cut off from etcd", cut)] {
        let worst = times.iter().max().copied().unwrap();
        print_distribution(what, times);
        assert!(worst <= PROMISE, "{what}: {worst:?}");
    }
}

#[tokio::test]
async fn an_agent_of_a_follower_keeps_its_node_over_a_change_of_leaders() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let arbitration = |index| match index {
        2 => vec![("PENSTOCK_CONTROLPLANE__ELECTION__ZONE".to_owned(), "reserved-arbitration".to_owned())],
        _ => Vec::new(),
    };
    let mut planes = Planes::start(&cluster, 3, arbitration).await;
    let leader = planes.leader(&[0, 1]).await;
    // The one in the arbitration zone serves like any other.
    let via = common::Plane::at(&planes.all[2].http, &planes.all[2].grpc);
    let agent = Agent::connect(&via, "node-1", 1).await;
    let (status, body) = via.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    assert_eq!(status, 201, "{body}");
    let assigned = agent.wait_assigned(1).await;
    assert!(agent.serve(&assigned[0], 10_814).await.accepted);
    via.wait_endpoint_state("m-0", "ready").await;
    let before = planes.status(2).await.unwrap();

    planes.all[leader].kill();
    let ended = agent.ended().await;
    assert!(!ended.message().is_empty(), "{ended}");
    let again = Agent::connect(&via, "node-1", 1).await;
    assert!(again.welcome().term > agent.welcome().term);
    assert_eq!(again.assignments(), assigned, "the same assignment, with its generation");
    assert_ne!(planes.leader(&[0, 1, 2]).await, 2, "an arbitration zone never leads");
    assert!(again.serve(&assigned[0], 10_814).await.accepted);
    via.wait_endpoint_state("m-0", "ready").await;
    let after = planes.status(2).await.unwrap();
    assert_eq!(before["endpoints_ready"], after["endpoints_ready"], "{before} {after}");
    // Nobody is left who may lead: reads are answered, writes are refused in words.
    planes.all[1 - leader].kill();
    let refusal = common::wait("a refusal", async || {
        let (status, body) = planes.call(2, "PUT", "/api/v2/deployments/x", Some("{}")).await?;
        (status == 503 && body["error"]["code"] == "no_leader").then_some(body)
    })
    .await;
    assert!(refusal["error"]["message"].as_str().unwrap().contains("no control plane leads"), "{refusal}");
    assert_eq!(via.get("/api/v2/models").await["models"][0]["model"], "m");
}
