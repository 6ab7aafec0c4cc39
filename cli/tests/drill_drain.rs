//! DR36: an operator drains an endpoint under load. It sticks while the agent goes on reporting, nothing new comes, what
//! runs ends whole, and undrain brings it back.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::{
    Up,
    load::{Load, get, seen_by_proxy, until},
};

const LONGEST: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_endpoint_ends_what_it_has_and_stays_drained_until_it_is_undrained() {
    let up = Up::start(&["--engines", "3"]);
    let endpoint = &up.json["engines"][0];
    let (id, address) = (endpoint["id"].as_str().unwrap(), endpoint["address"].as_str().unwrap());
    let engine = async |figure: &str| get(address, "/sim/state").await.unwrap()[figure].as_u64().unwrap();
    let load = Load::start(&up, "sim-model", 12, 40);
    until("it serves", LONGEST, async || (engine("requests").await > 20 && load.done() > 60).then_some(()))
        .await;

    assert!(up.run(&["drain", id]).status.success());
    let draining = async || seen_by_proxy(&up, "sim-model", id).await.unwrap()["draining"] == true;
    until("the proxy knows", LONGEST, async || draining().await.then_some(())).await;
    until("what it had has ended", LONGEST, async || (engine("in_flight").await == 0).then_some(())).await;

    // The agent reports twice a second, probes come beside: none of it brings it back.
    let (before, done) = (completions(address).await, load.done());
    let reports = tokio::time::Instant::now() + Duration::from_secs(4);
    while tokio::time::Instant::now() < reports {
        assert!(draining().await, "it sticks");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(completions(address).await, before, "nothing new");
    assert!(load.done() > done + 20, "the others serve");

    assert!(up.run(&["undrain", id]).status.success());
    until("it serves again", LONGEST, async || (completions(address).await > before).then_some(())).await;
    let outcomes = load.end().await;
    let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), outcomes.len());
    up.stop();
}

/// Requests for tokens that an engine was ever given, probes not counted.
async fn completions(address: &str) -> u64 {
    let text = support::client()
        .get(format!("http://{address}/metrics"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let of = |line: &str| line.starts_with("http_requests_total") && line.contains("/v1/chat/completions");
    let count = |line: &str| line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or_default();
    text.lines().filter(|line| of(line)).map(count).sum::<f64>() as u64
}
