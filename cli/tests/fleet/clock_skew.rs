//! DR37: control planes and an agent whose dates are an hour wrong, in both directions, and then jump by two. Versions,
//! leases and the age of loads do not notice; nor does a change of leaders between two that disagree about the time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use serde_json::Value;

use crate::{
    processes::{Clocks, Fleet, LONGEST},
    support::load::{Load, none_failed, until},
};

/// Longer than the lease of a node (10 s) and of a leader (3 s).
const LEASES: Duration = Duration::from_secs(13);
/// A report that is older than this is stale to everybody; reports come four times a second.
const FRESH_MS: u64 = 10_000;

/// Replica to generation and address, as a proxy knows them.
fn endpoints(known: &[Value]) -> BTreeMap<String, (u64, String)> {
    let one = |e: &Value| {
        let text = |key: &str| e[key].as_str().unwrap().to_owned();
        (text("id"), (e["generation"].as_u64().unwrap(), text("address")))
    };
    known.iter().map(one).collect()
}

/// Seconds by which the leader's clock, as in what it writes down, is ahead of ours.
async fn ahead(fleet: &Fleet, plane: usize) -> i64 {
    let history =
        until("the revisions", LONGEST, async || fleet.ask(plane, "/api/v2/revisions/m").await).await;
    let newest = history["revisions"][0]["unix_s"].as_i64().unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    newest - i64::try_from(now).unwrap()
}

async fn leader(fleet: &Fleet, planes: &[usize]) -> usize {
    until("a leader", LONGEST, async || {
        for plane in planes {
            let status = fleet.ask(*plane, "/api/v2/cluster/status").await;
            if status.is_some_and(|status| status["leader"] == true) {
                return Some(*plane);
            }
        }
        None
    })
    .await
}

/// Looks at the fleet all the time: versions of proxies' tables only grow, and loads are known to be fresh.
struct Watch {
    stop: Arc<AtomicBool>,
    found: Arc<Mutex<Vec<String>>>,
    looks: tokio::task::JoinHandle<usize>,
}

impl Watch {
    fn start(fleet: &Arc<Fleet>) -> Self {
        let (stop, found) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (fleet, ended, wrong) = (Arc::clone(fleet), Arc::clone(&stop), Arc::clone(&found));
        let looks = tokio::spawn(async move {
            let (mut last, mut looks) = ((0, 0), 0);
            while !ended.load(SeqCst) {
                let say = |text: String| wrong.lock().unwrap().push(text);
                if let Some(state) = fleet.readyz(0).await {
                    let text = state["snapshot_version"].as_str().unwrap_or_default().to_owned();
                    let version =
                        text.split_once('.').and_then(|(t, r)| Some((t.parse().ok()?, r.parse().ok()?)));
                    match version {
                        Some(version) if version < last => say(format!("{version:?} after {last:?}")),
                        Some(version) => last = version,
                        None => say(format!("no version in {state}")),
                    }
                }
                for endpoint in fleet.endpoints(0).await.unwrap_or_default() {
                    let age = endpoint["reported"]["age_ms"].as_u64();
                    if endpoint["ejected"] == true || age.is_none_or(|age| age > FRESH_MS) {
                        say(format!("no fresh load, or ejected: {endpoint}"));
                    }
                }
                looks += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            looks
        });
        Self { stop, found, looks }
    }

    async fn end(self) {
        self.stop.store(true, SeqCst);
        assert!(self.looks.await.unwrap() > 50);
        let found = self.found.lock().unwrap();
        assert!(found.is_empty(), "{} findings: {:?}", found.len(), &found[..found.len().min(5)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_that_are_hours_apart_and_jump_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(clocks) = Clocks::new(dir.path()) else { return };
    for (process, offset) in [("controlplane-0", "+1h"), ("controlplane-1", "-1h"), ("agent", "+1h")] {
        clocks.set(process, offset);
    }
    let Some(fleet) = Fleet::start_with(Some(&clocks)) else { return };
    fleet.deploy(2).await;
    let first = leader(&fleet, &[0, 1]).await;
    let wrong = if first == 0 { 3_600 } else { -3_600 };
    let found = ahead(&fleet, first).await;
    assert!(
        (found - wrong).abs() < 120,
        "its clock is {found} s ahead, not {wrong}: nothing would be tested"
    );
    let load = Load::on(&fleet.url(0), "m", 4, 40);
    until("loads are reported", LONGEST, async || {
        fleet.endpoints(0).await?.iter().all(|e| e["reported"].is_object()).then_some(())
    })
    .await;
    let before = endpoints(&fleet.endpoints(0).await.unwrap());
    let term = fleet.ask(first, "/api/v2/cluster/status").await.unwrap()["term"].clone();

    let fleet = Arc::new(fleet);
    let watch = Watch::start(&fleet);
    let began = Instant::now();
    tokio::time::sleep(LEASES).await;
    for (process, offset) in [("controlplane-0", "-1h"), ("controlplane-1", "+1h"), ("agent", "-1h")] {
        clocks.set(process, offset);
    }
    tokio::time::sleep(LEASES).await;
    assert_eq!(endpoints(&fleet.endpoints(0).await.unwrap()), before);
    let status = fleet.ask(first, "/api/v2/cluster/status").await.unwrap();
    assert_eq!((&status["leader"], &status["term"]), (&Value::Bool(true), &term), "{status}");
    watch.end().await;

    // The other leads on, by a clock that is two hours away from the first one's.
    let mut fleet = Arc::into_inner(fleet).unwrap();
    fleet.controlplanes[first].kill();
    let second = leader(&fleet, &[1 - first]).await;
    fleet.deploy_by(second, 3).await;
    let found = ahead(&fleet, second).await;
    assert!((found + if second == 0 { 3_600 } else { -3_600 }).abs() < 120, "{found} s ahead");
    let after = endpoints(&fleet.endpoints(0).await.unwrap());
    assert!(before.iter().all(|(id, engine)| after.get(id) == Some(engine)), "{before:?} became {after:?}");
    let newest = after.values().map(|(generation, _)| *generation).max();
    assert!(newest > before.values().map(|(generation, _)| *generation).max());
    fleet.controlplanes[first].start();
    until("the first follows", LONGEST, async || {
        let status = fleet.ask(first, "/api/v2/cluster/status").await?;
        (status["leader"] == false && status["term"].as_u64() > term.as_u64()).then_some(())
    })
    .await;

    let outcomes = load.end().await;
    println!(
        "clocks two hours apart for {:.0} s: {} requests",
        began.elapsed().as_secs_f64(),
        outcomes.len()
    );
    none_failed(&outcomes);
    fleet.stop();
}
