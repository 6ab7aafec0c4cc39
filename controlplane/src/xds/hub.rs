//! Publishes snapshots, and knows how every subscriber does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_proto::Version;
use tokio::sync::watch;

use super::{
    guard::Held, kind::Kind, peer::Peer, project::Projector, session::KindStatus, snapshot::Snapshot,
};
use crate::{core::Core, fleet::settled};

/// One subscribed proxy.
#[derive(Debug, Clone)]
pub struct Subscriber {
    /// Who it is.
    pub peer: Peer,
    /// The address it calls from; may be empty.
    pub address: String,
    /// In which protocol it is told.
    pub protocol: &'static str,
    /// When it connected.
    pub connected: Instant,
    /// Everything up to this version has been acknowledged.
    pub synced: Option<Version>,
    /// How it does with what it asked for.
    pub kinds: Vec<(Kind, KindStatus)>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Hub {
    snapshots: watch::Sender<Arc<Snapshot>>,
    subscribers: Mutex<BTreeMap<u64, Subscriber>>,
    /// Counts changes of subscribers' state; also numbers them.
    changes: watch::Sender<u64>,
    held: watch::Sender<Held>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            snapshots: watch::Sender::new(Arc::default()),
            subscribers: Mutex::default(),
            changes: watch::Sender::new(0),
            held: watch::Sender::default(),
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

    /// What is not told to proxies at the moment.
    pub fn held(&self) -> Held {
        self.held.borrow().clone()
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
    let mut projector = Projector::new(&core.config.xds);
    // The newest, published or not.
    let mut last = Arc::<Snapshot>::default();
    let mut consistent = true;
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
        let next = projector.next(&last, &view);
        note_held(&core, projector.held());
        if let Some(next) = next {
            last = Arc::new(next);
            let checked = last.check(!consistent);
            consistent = checked.is_ok();
            match checked {
                Ok(()) => {
                    core.metrics.xds_snapshots.inc();
                    core.hub.snapshots.send_replace(last.clone());
                }
                Err(reasons) => {
                    core.metrics.xds_inconsistent.inc();
                    tracing::error!(?reasons, "a snapshot refers to what is not in it and was held back");
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Tells people of what the guard holds, when that is news.
fn note_held(core: &Core, held: Held) {
    core.metrics.xds_held_endpoints.set(i64::try_from(held.endpoints()).unwrap_or(i64::MAX));
    core.metrics.xds_held_snapshot.set((!held.snapshot.is_empty()).into());
    core.hub.held.send_if_modified(|known| {
        if *known == held {
            return false;
        }
        let sentences = held.sentences();
        if sentences.is_empty() {
            tracing::info!("nothing is held back from proxies any more");
        } else {
            tracing::error!(held = ?sentences, "held back from proxies; POST /api/v2/cluster/publish lets it pass");
        }
        *known = held;
        true
    });
}
