//! P5, DR07, DR08: all control planes and etcd die under load, for a while, and come back only after every lease has run
//! out. No request fails, before, meanwhile or after; a proxy that is restarted meanwhile serves.
//!
//! `PENSTOCK_DRILL_SECONDS=600 cargo nextest run -p penstock --test fleet --no-capture outage` is the drill of docs/drills.md;
//! without it the outage is short.

use std::time::{Duration, Instant};

use crate::{
    processes::{Fleet, LONGEST, Process},
    support::load::{Load, none_failed, until},
};

/// With the default settings.
const LEASE: Duration = Duration::from_secs(10);

fn outage() -> Duration {
    let seconds = std::env::var("PENSTOCK_DRILL_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(5))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_everything_that_plans_is_gone_and_comes_back() {
    let Some(mut fleet) = Fleet::start() else { return };
    fleet.deploy(3).await;
    let load = Load::on(&fleet.url(0), "m", 8, 40);
    until("it serves", LONGEST, async || (load.done() > 20).then_some(())).await;

    let began = Instant::now();
    fleet.controlplanes.iter_mut().for_each(Process::kill);
    fleet.etcd.kill();
    fleet.proxies[1].kill();
    fleet.proxies[1].start();
    until("the restarted proxy is ready", LONGEST, async || {
        let state = fleet.readyz(1).await?;
        state["status"].as_str().is_some_and(|status| status.starts_with("degraded")).then_some(())
    })
    .await;
    let restarted = Load::on(&fleet.url(1), "m", 4, 40);
    let left = outage().saturating_sub(began.elapsed());
    tokio::time::sleep(left).await;
    assert_eq!(fleet.endpoints(0).await.unwrap().len(), 3);

    // The store is back long before anybody who renews leases: nodes and endpoints run out of it.
    fleet.etcd.start();
    tokio::time::sleep(LEASE + Duration::from_secs(3)).await;
    fleet.controlplanes.iter_mut().for_each(Process::start);
    let done = (load.done(), restarted.done());
    until("all are registered again", LONGEST, async || {
        let status = fleet.ask(0, "/api/v2/cluster/status").await?;
        (status["endpoints_ready"] == 3).then_some(())
    })
    .await;
    for proxy in 0..2 {
        until("the proxies follow again", LONGEST, async || {
            (fleet.readyz(proxy).await?["status"] == "ok").then_some(())
        })
        .await;
        assert_eq!(fleet.endpoints(proxy).await.unwrap().len(), 3);
    }
    until("it goes on", LONGEST, async || {
        (load.done() > done.0 + 50 && restarted.done() > done.1 + 25).then_some(())
    })
    .await;
    let mut outcomes = load.end().await;
    outcomes.extend(restarted.end().await);
    println!(
        "gone for {:.0} s, {} requests in {:.0} s",
        outage().as_secs_f64(),
        outcomes.len(),
        began.elapsed().as_secs_f64()
    );
    none_failed(&outcomes);
    fleet.stop();
}
