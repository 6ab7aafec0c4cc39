//! Candidates on a real etcd under random pauses, partitions and kills: the log of fenced writes stays linear.
//!
//! Each candidate is the code that runs in production (store, view, elector, guard) with a writer that writes its term
//! into one key, often after a pause between its right to write and the write itself. Afterwards etcd's whole history is
//! read: every write must carry the term of the leader's key as it stood at that revision. PENSTOCK_FENCING_SEED repeats
//! a run's choices.
#![allow(clippy::unwrap_used)]

mod etcd_support;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use etcd_support::{Cluster, gate::Gate};
use futures_util::StreamExt;
use penstock_config::controlplane::StoreConfig;
use penstock_controlplane::{
    leadership::{Elector, Leader, Leadership},
    metrics::Metrics,
    store::{EtcdStore, Event, Store, Txn, TxnOutcome, keys},
    view::ViewKeeper,
};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

const TTL: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_secs(16);
const LONGEST: Duration = Duration::from_secs(90);
const LOG: &str = "/log";

/// One life of a candidate; ends with it, as abruptly as a kill.
struct Candidate {
    gate: Gate,
    leadership: Leadership,
    tasks: JoinSet<()>,
}

impl Candidate {
    async fn start(cluster: &Cluster, name: usize, seed: u64) -> Self {
        let gate = Gate::before(cluster.members[0].client_port).await;
        let settings = StoreConfig {
            endpoints: vec![format!("http://{}", gate.address)],
            request_timeout_ms: 1_000,
            member_timeout_ms: 500,
            ..cluster.settings()
        };
        let store: Arc<dyn Store> = Arc::new(EtcdStore::new(settings));
        let metrics = Arc::new(Metrics::new().unwrap());
        let keeper = ViewKeeper::new(store.clone(), metrics.clone());
        let leader = Leader { id: format!("c{name}"), ..Leader::default() };
        let (elector, leadership) =
            Elector::new(store.clone(), keeper.subscribe(), leader, TTL, true, metrics);
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper.run());
        tasks.spawn(elector.run(CancellationToken::new()));
        tasks.spawn(write(store, leadership.clone(), fastrand::Rng::with_seed(seed)));
        Self { gate, leadership, tasks }
    }
}

/// Writes as often as it may, at times long after it was allowed to.
async fn write(store: Arc<dyn Store>, leadership: Leadership, mut rng: fastrand::Rng) {
    loop {
        if let Some((term, guard)) = leadership.guard() {
            if rng.u8(..100) < 5 {
                tokio::time::sleep(TTL.mul_f64(rng.f64() * 2.5)).await;
            }
            let outcome = store.txn(Txn::new().when(guard).put(LOG, term.to_string())).await;
            if matches!(outcome, Ok(TxnOutcome::Conflict { .. })) {
                leadership.fenced(term);
            }
        }
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_leaders_the_history_of_writes_is_linear() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let seed = std::env::var("PENSTOCK_FENCING_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("PENSTOCK_FENCING_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut candidates = Vec::new();
    for name in 0..3 {
        candidates.push(Candidate::start(&cluster, name, rng.u64(..)).await);
    }
    // A slow machine is given more time, until somebody has led after somebody else.
    let (began, mut led) = (Instant::now(), BTreeSet::new());
    while began.elapsed() < RUN || (led.len() < 3 && began.elapsed() < LONGEST) {
        tokio::time::sleep(Duration::from_millis(rng.u64(100..900))).await;
        led.extend(candidates.iter().filter_map(|candidate| candidate.leadership.term()));
        let victim = rng.usize(..candidates.len());
        match rng.u8(..4) {
            0 => candidates[victim].gate.close(),
            1 | 2 => candidates.iter().for_each(|candidate| candidate.gate.open()),
            _ => {
                candidates[victim].tasks.shutdown().await;
                candidates[victim] = Candidate::start(&cluster, victim, rng.u64(..)).await;
            }
        }
    }
    for candidate in &mut candidates {
        candidate.gate.open();
    }
    // Time for what was held up to arrive, and to be refused.
    tokio::time::sleep(Duration::from_millis(500)).await;
    for candidate in &mut candidates {
        candidate.tasks.shutdown().await;
    }
    let (writes, terms) = check_history(&cluster).await;
    println!("{writes} writes in {terms} terms");
    assert!(writes >= 50 && terms >= 2, "{writes} writes in {terms} terms are too few to mean anything");
}

/// Every write of the log stands in the term whose leader's key was there at that revision.
async fn check_history(cluster: &Cluster) -> (usize, usize) {
    let store = EtcdStore::new(cluster.settings());
    let TxnOutcome::Committed { revision: last } = store.txn(Txn::new().put("/end", "")).await.unwrap()
    else {
        panic!("no condition was set")
    };
    let mut history = store.watch("/", 1).await.unwrap();
    let (mut leads, mut writes, mut terms, mut seen) = (0, 0, Vec::new(), 0);
    while seen < last {
        let batch = history.next().await.unwrap().unwrap();
        for event in batch.events {
            match event {
                Event::Put(entry) if entry.key == keys::LEADER => {
                    assert_eq!(leads, 0, "the key was free at {}", entry.mod_revision);
                    assert_eq!(entry.create_revision, entry.mod_revision, "written once per term");
                    leads = entry.mod_revision;
                    terms.push(leads);
                }
                Event::Delete { key, .. } if key == keys::LEADER => leads = 0,
                Event::Put(entry) if entry.key == LOG => {
                    let term: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                    assert_eq!(term, leads, "revision {}: not the term in force", entry.mod_revision);
                    writes += 1;
                }
                Event::Put(_) | Event::Delete { .. } => {}
            }
        }
        seen = batch.revision;
    }
    assert!(terms.is_sorted());
    store.close().await;
    (writes, terms.len())
}
