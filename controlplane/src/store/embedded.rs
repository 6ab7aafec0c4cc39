//! The embedded store: one file, one process, everything in memory.
//!
//! One thread owns the file. It takes whatever has queued up, evaluates it as one group, makes it durable with a
//! single sync, shows it to readers and answers: under load the cost of a sync is shared. Reads and watches are served
//! from memory and never wait for the disk.
//!
//! A watcher holds a position in the shared, bounded history, not a queue of its own: a slow one costs nothing and is
//! told when it has fallen behind. Leases count in tokio's time; after a restart each gets its full time again, since
//! nobody could renew it meanwhile.
//!
//! A commit that fails (disk full, I/O error) may or may not have reached the disk. The store then refuses everything
//! and [`Store::failed`] resolves: the process stops, and the next start reads what is really there.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;
use futures_util::stream;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Entry, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, Watch, WatchError,
    disk::{Disk, Loaded},
    memory::{Draft, Memory},
};

/// Operations that may wait for the writer. Callers beyond it wait in line themselves.
const QUEUE: usize = 1_024;
/// Operations that share one sync.
const GROUP: usize = 256;

/// See the module's text.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    operations: mpsc::Sender<Operation>,
    stop: CancellationToken,
    tasks: TaskTracker,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    memory: RwLock<Memory>,
    leases: Mutex<HashMap<LeaseId, Lease>>,
    lease_granted: Notify,
    status: watch::Sender<Status>,
}

#[derive(Debug, Clone, Default)]
struct Status {
    revision: Revision,
    /// Why nothing more is served.
    ended: Option<String>,
    /// That reason is a failure, not a close.
    failed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: Duration,
    deadline: Instant,
}

enum Operation {
    Txn(Txn, oneshot::Sender<Result<TxnOutcome, StoreError>>),
    Grant(Duration, Instant, oneshot::Sender<Result<LeaseId, StoreError>>),
    Revoke(LeaseId, oneshot::Sender<Result<(), StoreError>>),
}

/// What an operation is answered once its group is durable.
enum Answer {
    Txn(Result<TxnOutcome, StoreError>, oneshot::Sender<Result<TxnOutcome, StoreError>>),
    Grant(LeaseId, Lease, oneshot::Sender<Result<LeaseId, StoreError>>),
    Revoke(oneshot::Sender<Result<(), StoreError>>),
}

impl EmbeddedStore {
    /// Opens or makes the store at `path`, keeping up to `history_events` events for watchers.
    ///
    /// # Errors
    /// [`StoreError::Open`] if another process has it, or if the file is foreign or damaged; it is left alone then.
    pub async fn open(path: &Path, history_events: usize) -> Result<Self, StoreError> {
        let owned = path.to_owned();
        let opening = tokio::task::spawn_blocking(move || Disk::open(&owned)).await;
        let (disk, loaded) = opening.map_err(|e| StoreError::Open(format!("opening the store: {e}")))??;
        let Loaded { entries, revision, last_lease, leases } = loaded;
        let now = Instant::now();
        let leases = leases.into_iter().map(|(lease, ttl_ms)| {
            let ttl = Duration::from_millis(ttl_ms);
            (lease, Lease { ttl, deadline: now + ttl })
        });
        let shared = Arc::new(Shared {
            memory: RwLock::new(Memory::new(entries, revision, history_events)),
            leases: Mutex::new(leases.collect()),
            lease_granted: Notify::new(),
            status: watch::Sender::new(Status { revision, ..Status::default() }),
        });
        let (operations, queue) = mpsc::channel(QUEUE);
        let writer = Writer { disk, last_lease, shared: shared.clone() };
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(queue))
            .map_err(|e| StoreError::Open(format!("cannot start the store's thread: {e}")))?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let expiry = expire_leases(shared.clone(), operations.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(expiry));
        tasks.close();
        Ok(Self { shared, operations, stop, tasks, writer: Mutex::new(Some(writer)) })
    }

    async fn ask<T>(
        &self,
        operation: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Operation,
    ) -> Result<T, StoreError> {
        self.shared.check()?;
        let (answer, answered) = oneshot::channel();
        let closed = || StoreError::Unavailable("the store has stopped".into());
        if self.operations.send(operation(answer)).await.is_err() {
            return Err(self.shared.check().err().unwrap_or_else(closed));
        }
        match answered.await {
            Ok(result) => result,
            Err(_) => Err(self.shared.check().err().unwrap_or_else(closed)),
        }
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.shared.check()?;
        Ok(self.shared.memory().entries.get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.shared.check()?;
        Ok(self.shared.memory().list(prefix))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.ask(|answer| Operation::Txn(txn, answer)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        self.shared.check()?;
        let position = Position {
            shared: self.shared.clone(),
            status: self.shared.status.subscribe(),
            prefix: prefix.to_owned(),
            next: from.max(1),
        };
        Ok(Box::pin(stream::unfold(Some(position), |position| async move {
            let mut position = position?;
            match position.wait().await {
                Ok(batch) => Some((Ok(batch), Some(position))),
                Err(error) => Some((Err(error), None)),
            }
        })))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|answer| Operation::Grant(ttl, Instant::now() + ttl, answer)).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.check()?;
        let mut leases = self.shared.leases();
        let held = leases.get_mut(&lease).ok_or(StoreError::LeaseNotFound(lease))?;
        held.deadline = Instant::now() + held.ttl;
        Ok(())
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.leases().remove(&lease).ok_or(StoreError::LeaseNotFound(lease))?;
        self.ask(|answer| Operation::Revoke(lease, answer)).await
    }

    async fn failed(&self) -> StoreError {
        let mut status = self.shared.status.subscribe();
        let failure = status.wait_for(|status| status.failed).await.ok().and_then(|s| s.ended.clone());
        match failure {
            Some(reason) => StoreError::Unavailable(reason),
            None => std::future::pending().await,
        }
    }

    async fn close(&self) {
        self.stop.cancel();
        self.tasks.wait().await;
        let (done, finished) = oneshot::channel();
        // Behind everything that was accepted: a revocation of nothing.
        if self.operations.send(Operation::Revoke(0, done)).await.is_ok() {
            drop(finished.await);
        }
        self.shared.end("it was closed".into(), false);
        // The writer looks up at its next operation, sees the end and goes.
        let (done, finished) = oneshot::channel();
        if self.operations.send(Operation::Revoke(0, done)).await.is_ok() {
            drop(finished.await);
        }
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            drop(tokio::task::spawn_blocking(move || writer.join()).await);
        }
    }
}

impl Shared {
    fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn leases(&self) -> MutexGuard<'_, HashMap<LeaseId, Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<(), StoreError> {
        match &self.status.borrow().ended {
            Some(reason) => Err(StoreError::Unavailable(reason.clone())),
            None => Ok(()),
        }
    }

    fn end(&self, reason: String, failed: bool) {
        self.status.send_modify(|status| {
            if status.ended.is_none() {
                (status.ended, status.failed) = (Some(reason), failed);
            }
        });
    }
}

/// One watcher.
struct Position {
    shared: Arc<Shared>,
    status: watch::Receiver<Status>,
    prefix: String,
    next: Revision,
}

impl Position {
    async fn wait(&mut self) -> Result<super::EventBatch, WatchError> {
        loop {
            if let Some(reason) = self.status.borrow_and_update().ended.clone() {
                return Err(WatchError::Broken(reason));
            }
            let batch = self.shared.memory().events_from(&self.prefix, self.next)?;
            self.next = self.next.max(batch.revision + 1);
            if !batch.events.is_empty() {
                return Ok(batch);
            }
            if self.status.changed().await.is_err() {
                return Err(WatchError::Broken("the store has stopped".into()));
            }
        }
    }
}

/// The thread that owns the file.
struct Writer {
    disk: Disk,
    last_lease: LeaseId,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Operation>) {
        let mut group = Vec::with_capacity(GROUP);
        while queue.blocking_recv_many(&mut group, GROUP) > 0 {
            if self.shared.status.borrow().ended.is_some() {
                return;
            }
            if let Err(error) = self.perform(group.drain(..)) {
                let reason = format!("a commit failed: {error}");
                tracing::error!(reason, "the store refuses everything from now on");
                self.shared.end(reason, true);
                return;
            }
        }
    }

    /// Evaluates, makes durable, shows, answers. On an error nobody is answered: the outcome is unknown.
    fn perform(
        &mut self,
        group: impl Iterator<Item = Operation>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let memory = self.shared.memory();
        let mut draft = Draft::new(&memory);
        let mut answers = Vec::new();
        for operation in group {
            match operation {
                Operation::Txn(txn, answer) => {
                    let exists = |lease| self.shared.leases().contains_key(&lease);
                    answers.push(Answer::Txn(draft.txn(&txn, exists), answer));
                }
                Operation::Grant(ttl, deadline, answer) => {
                    self.last_lease += 1;
                    draft.grant(self.last_lease, u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
                    answers.push(Answer::Grant(self.last_lease, Lease { ttl, deadline }, answer));
                }
                Operation::Revoke(lease, answer) => {
                    if lease != 0 {
                        draft.revoke(lease);
                    }
                    answers.push(Answer::Revoke(answer));
                }
            }
        }
        let changes = draft.changes;
        let revision = changes.revision;
        let changed = revision != memory.revision || !changes.leases.is_empty();
        drop(memory);
        if changed {
            self.disk.commit(&changes, self.last_lease)?;
            self.shared.memory.write().unwrap_or_else(PoisonError::into_inner).publish(changes);
            self.shared.status.send_modify(|status| status.revision = revision);
        }
        // A caller that has gone away needs no answer.
        for answer in answers {
            match answer {
                Answer::Txn(result, answer) => drop(answer.send(result)),
                Answer::Grant(id, lease, answer) => {
                    self.shared.leases().insert(id, lease);
                    self.shared.lease_granted.notify_one();
                    drop(answer.send(Ok(id)));
                }
                Answer::Revoke(answer) => drop(answer.send(Ok(()))),
            }
        }
        Ok(())
    }
}

/// How often leases are looked at, at least.
const LEASE_TICK: Duration = Duration::from_millis(500);
/// A tick this late means that this very process stood still (a stopped process, a suspended machine, a stalled host).
const STOOD_STILL: Duration = Duration::from_secs(2);

/// Revokes each lease whose time is up. A lease leaves the table first, so that no keep-alive can revive it half-way.
///
/// After a pause of our own every lease gets its full time again: nobody could renew it meanwhile, and a whole fleet
/// must not vanish from the tables because the control plane slept.
async fn expire_leases(shared: Arc<Shared>, operations: mpsc::Sender<Operation>) {
    let mut looked = Instant::now();
    loop {
        let now = Instant::now();
        if now - looked > STOOD_STILL {
            tracing::warn!(
                pause_ms = (now - looked).as_millis(),
                "this process stood still: every lease starts anew"
            );
            shared.leases().values_mut().for_each(|lease| lease.deadline = now + lease.ttl);
        }
        looked = now;
        let expired = take_expired(&mut shared.leases(), now);
        for lease in expired {
            let (answer, answered) = oneshot::channel();
            if operations.send(Operation::Revoke(lease, answer)).await.is_err() || answered.await.is_err() {
                return;
            }
            tracing::info!(lease, "a lease expired");
        }
        let next = shared.leases().values().map(|l| l.deadline).min();
        let tick = looked + LEASE_TICK;
        tokio::select! {
            () = tokio::time::sleep_until(next.map_or(tick, |next| next.min(tick))) => {}
            () = shared.lease_granted.notified() => {}
        }
    }
}

fn take_expired(leases: &mut HashMap<LeaseId, Lease>, now: Instant) -> Vec<LeaseId> {
    let expired: Vec<_> = leases.iter().filter(|(_, l)| l.deadline <= now).map(|(id, _)| *id).collect();
    for lease in &expired {
        leases.remove(lease);
    }
    expired
}
