//! The contract of `Store`, run against every implementation: adding one is adding a line to `suite!` at the end.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

mod etcd_support;

use etcd_support::Cluster;
use futures_util::StreamExt;
use penstock_config::controlplane::StoreConfig;
use penstock_controlplane::store::{
    Compare, EmbeddedStore, EtcdStore, Event, Store, StoreError, Txn, TxnOutcome, Watch, WatchError,
};

/// A store, and what lives as long as it does.
enum Guard {
    Embedded { _dir: tempfile::TempDir },
    Etcd(Box<Cluster>),
}

type Made = Option<(Arc<dyn Store>, Guard)>;

/// The embedded store keeps `history` events for watchers; etcd is compacted by [`Guard::compact`].
async fn embedded(history: usize) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("s.redb"), history).await.unwrap();
    Some((Arc::new(store), Guard::Embedded { _dir: dir }))
}

async fn etcd_of(members: usize, prefix: &str) -> Made {
    let cluster = Cluster::start(members).await?;
    let settings = StoreConfig { prefix: prefix.into(), ..cluster.settings() };
    Some((Arc::new(EtcdStore::new(settings)), Guard::Etcd(Box::new(cluster))))
}

async fn etcd(_history: usize) -> Made {
    etcd_of(1, "").await
}

async fn etcd_cluster(_history: usize) -> Made {
    etcd_of(3, "/penstock/test").await
}

impl Guard {
    /// Only the newest events are kept from now on.
    async fn compact(&self) {
        if let Self::Etcd(cluster) = self {
            cluster.compact().await;
        }
    }
}

async fn commit(store: &dyn Store, txn: Txn) -> u64 {
    match store.txn(txn).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
    }
}

async fn next(watch: &mut Watch) -> Vec<Event> {
    let batch = tokio::time::timeout(Duration::from_secs(10), watch.next()).await.expect("an event in time");
    batch.expect("open").expect("no error").events
}

fn keys(events: &[Event]) -> Vec<(String, bool)> {
    events.iter().map(|e| (e.key().to_owned(), matches!(e, Event::Put(_)))).collect()
}

async fn counts_revisions_and_versions(store: &dyn Store) {
    assert_eq!(store.get("/a").await.unwrap(), None);
    let first = commit(store, Txn::new().put("/a", "1").put("/b", "1")).await;
    let second = commit(store, Txn::new().put("/a", "2")).await;
    assert_eq!(second, first + 1, "one revision per transaction");
    let a = store.get("/a").await.unwrap().unwrap();
    assert_eq!((a.create_revision, a.mod_revision, a.version, a.lease), (first, second, 2, 0));
    assert_eq!(&a.value[..], b"2");
    let third = commit(store, Txn::new().delete("/a")).await;
    assert_eq!(third, second + 1);
    assert_eq!(commit(store, Txn::new().delete("/a")).await, third, "nothing happened: no revision");
    let again = commit(store, Txn::new().put("/a", "3")).await;
    let a = store.get("/a").await.unwrap().unwrap();
    assert_eq!((a.create_revision, a.version), (again, 1), "a new life");
}

async fn lists_by_prefix_in_order_at_one_revision(store: &dyn Store) {
    let revision =
        commit(store, Txn::new().put("/x/b", "").put("/x/a", "").put("/y", "").put("/x", "")).await;
    let listing = store.list("/x/").await.unwrap();
    let names: Vec<&str> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(names, ["/x/a", "/x/b"]);
    assert_eq!(listing.revision, revision);
    assert!(store.list("/none").await.unwrap().entries.is_empty());
}

async fn compares_decide_all_or_nothing(store: &dyn Store) {
    let at = commit(store, Txn::new().when(Compare::Absent("/a".into())).put("/a", "1")).await;
    for holds in [
        Compare::Exists("/a".into()),
        Compare::ModRevision("/a".into(), at),
        Compare::Value("/a".into(), "1".into()),
        Compare::ModRevision("/none".into(), 0),
        Compare::Absent("/none".into()),
    ] {
        commit(store, Txn::new().when(holds)).await;
    }
    for fails in [
        Compare::Absent("/a".into()),
        Compare::ModRevision("/a".into(), at + 1),
        Compare::ModRevision("/a".into(), 0),
        Compare::Value("/a".into(), "2".into()),
        Compare::Exists("/none".into()),
        Compare::Value("/none".into(), "".into()),
    ] {
        let txn =
            Txn::new().when(Compare::Exists("/a".into())).when(fails.clone()).put("/b", "1").delete("/a");
        let outcome = store.txn(txn).await.unwrap();
        assert_eq!(outcome, TxnOutcome::Conflict { failed: fails, revision: at });
    }
    assert!(store.get("/a").await.unwrap().is_some() && store.get("/b").await.unwrap().is_none());
    let twice = store.txn(Txn::new().put("/c", "1").delete("/c")).await;
    assert!(matches!(twice, Err(StoreError::Invalid(_))), "{twice:?}");
}

async fn of_many_racing_writers_one_wins(store: Arc<dyn Store>) {
    let mut racers = tokio::task::JoinSet::new();
    for n in 0..64 {
        let store = store.clone();
        let txn = Txn::new().when(Compare::Absent("/race".into())).put("/race", n.to_string());
        racers.spawn(async move { matches!(store.txn(txn).await.unwrap(), TxnOutcome::Committed { .. }) });
    }
    let won = racers.join_all().await.into_iter().filter(|won| *won).count();
    assert_eq!(won, 1);
}

async fn watches_from_a_revision_without_gap_or_split(store: &dyn Store) {
    let before = commit(store, Txn::new().put("/w/1", "").put("/other", "")).await;
    let mut past = store.watch("/w/", before).await.unwrap();
    assert_eq!(keys(&next(&mut past).await), [("/w/1".to_owned(), true)], "from a revision that has passed");
    let mut live = store.watch("/w/", before + 1).await.unwrap();
    let mut future = store.watch("/w/", before + 3).await.unwrap();
    commit(store, Txn::new().put("/other", "")).await;
    commit(store, Txn::new().put("/w/2", "").delete("/w/1")).await;
    let third = commit(store, Txn::new().put("/w/3", "")).await;
    let mut seen = next(&mut live).await;
    assert!(seen.len() >= 2, "a transaction is not split: {seen:?}");
    while seen.len() < 3 {
        seen.extend(next(&mut live).await);
    }
    let expected = [("/w/2".to_owned(), true), ("/w/1".to_owned(), false), ("/w/3".to_owned(), true)];
    assert_eq!(keys(&seen), expected);
    assert!(seen.is_sorted_by_key(Event::revision));
    assert_eq!(next(&mut future).await.last().unwrap().revision(), third);
}

async fn a_watcher_that_fell_behind_is_told(store: &dyn Store, guard: &Guard) {
    let start = commit(store, Txn::new().put("/c", "0")).await;
    for n in 0..300 {
        commit(store, Txn::new().put("/c", n.to_string())).await;
    }
    guard.compact().await;
    let mut slow = store.watch("/c", start).await.unwrap();
    let first = slow.next().await.unwrap();
    assert!(matches!(first, Err(WatchError::Compacted { through }) if through > start), "{first:?}");
    assert!(slow.next().await.is_none(), "it ends after its error");
    let listing = store.list("/c").await.unwrap();
    let mut fresh = store.watch("/c", listing.revision + 1).await.unwrap();
    commit(store, Txn::new().put("/c", "last")).await;
    assert_eq!(next(&mut fresh).await.len(), 1, "list, then watch: no gap");
}

async fn leases_take_their_keys_with_them(store: &dyn Store) {
    let ttl = Duration::from_millis(600);
    let (kept, left) = (store.lease_grant(ttl).await.unwrap(), store.lease_grant(ttl).await.unwrap());
    assert!(kept != 0 && left != 0 && kept != left);
    let txn =
        Txn::new().put_leased("/l/kept", "", kept).put_leased("/l/1", "", left).put_leased("/l/2", "", left);
    let revision = commit(store, txn).await;
    let freed = commit(store, Txn::new().put_leased("/l/freed", "", left)).await;
    commit(store, Txn::new().put("/l/freed", "")).await;
    let mut watch = store.watch("/l/", freed + 2).await.unwrap();
    let renewals = async {
        loop {
            tokio::time::sleep(ttl / 4).await;
            store.lease_keep_alive(kept).await.unwrap();
        }
    };
    let gone = tokio::select! {
        events = next(&mut watch) => events,
        () = renewals => unreachable!("it never ends"),
    };
    assert_eq!(keys(&gone), [("/l/1".to_owned(), false), ("/l/2".to_owned(), false)], "at once, by itself");
    assert!(
        store.get("/l/kept").await.unwrap().is_some_and(|e| e.lease == kept && e.mod_revision == revision)
    );
    assert!(store.get("/l/freed").await.unwrap().is_some(), "a put without lease takes it off");
    assert_eq!(store.lease_keep_alive(left).await, Err(StoreError::LeaseNotFound(left)));
    let late = store.txn(Txn::new().put_leased("/l/late", "", left)).await;
    assert_eq!(late, Err(StoreError::LeaseNotFound(left)));
    store.lease_revoke(kept).await.unwrap();
    assert!(store.get("/l/kept").await.unwrap().is_none());
    assert_eq!(store.lease_revoke(kept).await, Err(StoreError::LeaseNotFound(kept)));
}

async fn a_closed_store_says_so(store: &dyn Store) {
    let mut watch = store.watch("/", 1).await.unwrap();
    store.close().await;
    assert!(matches!(store.get("/a").await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.txn(Txn::new().put("/a", "")).await, Err(StoreError::Unavailable(_))));
    assert!(matches!(watch.next().await.unwrap(), Err(WatchError::Broken(_))));
}

async fn a_listing_of_many_keys_is_whole_and_of_one_revision(store: &dyn Store) {
    for part in 0..12 {
        let names = (0..100).map(|n| format!("/many/{:04}", part * 100 + n));
        commit(store, names.fold(Txn::new(), |txn, name| txn.put(name, "v"))).await;
    }
    let (outcome, listing) = tokio::join!(store.txn(Txn::new().delete("/many/1199")), store.list("/many/"));
    let TxnOutcome::Committed { revision } = outcome.unwrap() else { panic!("no condition was set") };
    let listing = listing.unwrap();
    let expected = if listing.revision >= revision { 1_199 } else { 1_200 };
    assert_eq!(listing.entries.len(), expected);
    assert!(listing.entries.is_sorted_by(|a, b| a.key < b.key));
}

macro_rules! suite {
    ($name:ident, $make:path) => {
        mod $name {
            use super::*;

            #[tokio::test]
            async fn keys_and_transactions() {
                let Some((store, _guard)) = $make(10_000).await else { return };
                counts_revisions_and_versions(&*store).await;
                lists_by_prefix_in_order_at_one_revision(&*store).await;
                a_listing_of_many_keys_is_whole_and_of_one_revision(&*store).await;
                store.close().await;
            }

            #[tokio::test]
            async fn compares() {
                let Some((store, _guard)) = $make(10_000).await else { return };
                compares_decide_all_or_nothing(&*store).await;
                of_many_racing_writers_one_wins(store.clone()).await;
                store.close().await;
            }

            #[tokio::test]
            async fn watches() {
                let Some((store, _guard)) = $make(10_000).await else { return };
                watches_from_a_revision_without_gap_or_split(&*store).await;
                store.close().await;
            }

            #[tokio::test]
            async fn compaction() {
                let Some((store, guard)) = $make(100).await else { return };
                a_watcher_that_fell_behind_is_told(&*store, &guard).await;
                store.close().await;
            }

            #[tokio::test]
            async fn leases() {
                let Some((store, _guard)) = $make(10_000).await else { return };
                leases_take_their_keys_with_them(&*store).await;
                store.close().await;
            }

            #[tokio::test]
            async fn close() {
                let Some((store, _guard)) = $make(10_000).await else { return };
                a_closed_store_says_so(&*store).await;
            }
        }
    };
}

suite!(on_embedded, embedded);
suite!(on_etcd, etcd);
suite!(on_three_members_of_etcd, etcd_cluster);
