//! Tokens and the audit with two control planes on a real etcd: one limit for both, and who handed what on.
#![allow(clippy::unwrap_used)]

mod etcd_support;

use std::time::Duration;

use etcd_support::{Cluster, planes::Planes};
use serde_json::Value;
use tokio::time::Instant;

async fn planes(cluster: &Cluster, limit: u32) -> Planes {
    let mut planes = Planes::start(cluster, 2, |_| {
        // As the deploy guide names them.
        vec![
            ("NEBULA_AUTH_TOKENS".into(), "root:admin,guest:viewer,meter:viewer".into()),
            ("NEBULA_AUTH_RATE_LIMIT_PER_MINUTE".into(), limit.to_string()),
        ]
    })
    .await;
    planes.token = "root".into();
    planes
}

fn code(answer: &Value) -> &str {
    answer["error"]["code"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_token_has_one_limit_over_both_control_planes() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let mut planes = planes(&cluster, 120).await;
    planes.leader(&[0, 1]).await;
    planes.same_version(&[0, 1]).await;
    planes.token = "meter".into();
    // Reads that the leader answers, and such as each answers itself.
    let paths = ["/api/v2/models", "/v1/admin/cluster/status", "/api/v2/logs", "/api/v2/proxies"];
    let (mut taken, mut refused) = ([0, 0], 0);
    for n in 0..300 {
        let index = n % 2;
        let (status, answer) = planes.call(index, "GET", paths[(n / 2) % 4], None).await.unwrap();
        match status {
            200 => taken[index] += 1,
            429 => {
                assert_eq!(code(&answer), "rate_limited");
                refused += 1;
            }
            other => panic!("{other}: {answer}"),
        }
    }
    assert_eq!((taken[0] + taken[1], refused), (120, 180), "{taken:?}");
    assert!(taken[0] > 30 && taken[1] > 30, "{taken:?}");
}

#[tokio::test]
async fn roles_hold_on_followers_and_reads_without_a_leader() {
    let Some(mut cluster) = Cluster::start(1).await else { return };
    let mut planes = planes(&cluster, 0).await;
    let leader = planes.leader(&[0, 1]).await;
    let follower = 1 - leader;
    planes.write(follower, "m").await;
    let (_, audit) = planes.call(follower, "GET", "/api/v2/audit", None).await.unwrap();
    let record = &audit["records"][0];
    assert_eq!((&record["kind"], &record["name"]), (&"deployment".into(), &"m".into()), "{audit}");
    assert_eq!(record["forwarded_by"], planes.all[follower].id.as_str());
    assert!(record["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{record}");
    let body = "{\"name\":\"ci\",\"role\":\"operator\"}";
    let (status, token) = planes.call(follower, "POST", "/api/v2/tokens", Some(body)).await.unwrap();
    assert_eq!(status, 201, "{token}");
    for (token, expected) in [("guest", 403), ("wrong", 401), ("", 401)] {
        planes.token = token.into();
        for index in [leader, follower] {
            let (status, answer) = planes.call(index, "DELETE", "/api/v2/deployments/m", None).await.unwrap();
            assert_eq!(status, expected, "{answer}");
        }
    }
    let ci = token["token"].as_str().unwrap().to_owned();
    // Without a leader and without etcd: the follower knows the tokens from its view.
    planes.all[leader].kill();
    cluster.kill(0);
    let deadline = Instant::now() + Duration::from_secs(30);
    for (token, expected) in [(ci.as_str(), 200), ("guest", 200), ("wrong", 401), ("", 401)] {
        planes.token = token.into();
        loop {
            let answer = planes.call(follower, "GET", "/api/v2/deployments/m", None).await;
            if let Some((status, answer)) = answer {
                assert_eq!(status, expected, "{answer}");
                break;
            }
            assert!(Instant::now() < deadline, "the follower does not answer");
        }
    }
}
