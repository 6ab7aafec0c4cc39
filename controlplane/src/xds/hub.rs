//! Publishes snapshots, and knows how every subscriber does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_proto::Version;
use tokio::sync::watch;

use super::{session::KindStatus, snapshot::Snapshot};
use crate::{core::Core, fleet::settled};

/// One subscribed proxy.
#[derive(Debug, Clone)]
pub struct Subscriber {
    /// Its name.
    pub node_id: String,
    /// The address it calls from; may be empty.
    pub peer: String,
    /// Its zone, as it says; may be empty.
    pub zone: String,
    /// Its program and release, as it says: "penstock-proxy/0.1.0"; may be empty.
    pub agent: String,
    /// When it connected.
    pub connected: Instant,
    /// Everything up to this version has been acknowledged.
    pub synced: Option<Version>,
    /// How it does with tables.
    pub tables: KindStatus,
    /// How it does with routes.
    pub routes: KindStatus,
}

/// See the module's text.
#[derive(Debug)]
pub struct Hub {
    snapshots: watch::Sender<Arc<Snapshot>>,
    subscribers: Mutex<BTreeMap<u64, Subscriber>>,
    /// Counts changes of subscribers' state; also numbers them.
    changes: watch::Sender<u64>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            snapshots: watch::Sender::new(Arc::default()),
            subscribers: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Subscriber>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the snapshots; the first one, with sequence 0, is empty and must not be sent.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.subscribe()
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Enters a subscriber; the number is its own.
    pub fn enter(&self, subscriber: Subscriber) -> u64 {
        let mut number = 0;
        self.changes.send_modify(|count| {
            *count += 1;
            number = *count;
        });
        self.lock().insert(number, subscriber);
        number
    }

    /// Changes what is known of a subscriber.
    pub fn update(&self, number: u64, change: impl FnOnce(&mut Subscriber)) {
        if let Some(subscriber) = self.lock().get_mut(&number) {
            change(subscriber);
        }
        self.changes.send_modify(|count| *count += 1);
    }

    /// Takes a subscriber away.
    pub fn leave(&self, number: u64) {
        self.lock().remove(&number);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Every subscriber, oldest first.
    pub fn subscribers(&self) -> Vec<Subscriber> {
        self.lock().values().cloned().collect()
    }

    /// Wakes whenever something of a subscriber changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The newest store revision that every subscriber has; what was published last, if there is none.
    pub fn acknowledged(&self) -> u64 {
        let synced = |s: &Subscriber| s.synced.map_or(0, |version| version.revision);
        let least = self.lock().values().map(synced).min();
        least.unwrap_or_else(|| self.snapshot().version.revision)
    }

    /// Waits, for `patience` at most, until every subscriber has everything up to a store revision. False: not in time.
    pub async fn wait_acknowledged(&self, revision: u64, patience: Duration) -> bool {
        let mut changes = self.changes.subscribe();
        let wait = async {
            let mut snapshots = self.snapshots.subscribe();
            if snapshots.wait_for(|s| s.version.revision >= revision).await.is_err() {
                return false;
            }
            loop {
                changes.borrow_and_update();
                let all = self.lock().values().all(|s| s.synced.is_some_and(|v| v.revision >= revision));
                if all {
                    return true;
                }
                if changes.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(patience, wait).await.unwrap_or(false)
    }
}

/// Publishes a snapshot whenever the view has changed, with a pause between two. Runs for ever.
pub async fn publish(core: Arc<Core>) {
    settled::wait(&core).await;
    let mut views = core.views.clone();
    views.mark_changed();
    let pause = Duration::from_millis(core.config.xds.push_coalesce_ms);
    let mut base = core.view().term_base;
    while views.changed().await.is_ok() {
        let mut view = views.borrow_and_update().clone();
        if view.term_base != base {
            // A store that was just restored lists no endpoints yet, as after a start.
            base = view.term_base;
            settled::wait(&core).await;
            view = views.borrow_and_update().clone();
        }
        if view.revision == 0 {
            continue;
        }
        // The term as of this very revision: every control plane gives the same state the same version.
        let next = core.hub.snapshot().next(&view, view.published_term());
        match next.check() {
            Ok(()) => {
                core.metrics.xds_snapshots.inc();
                core.hub.snapshots.send_replace(Arc::new(next));
            }
            Err(models) => {
                core.metrics.xds_inconsistent.inc();
                tracing::error!(?models, "a snapshot has routes without tables and was held back");
            }
        }
        tokio::time::sleep(pause).await;
    }
}
