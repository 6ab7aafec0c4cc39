//! The store contract: keys with revisions, transactions that compare, watches, leases.
//!
//! # What do we store? What do we not, and how is it rebuilt?
//!
//! | kept in the store | key | written by |
//! |---|---|---|
//! | what operators want | `/deployments/{model}` | REST |
//! | where each replica belongs, with its generation | `/placements/{model}` | reconcile |
//! | engines that may be routed to | `/endpoints/{model}/{replica_id}`, on the node's lease | fleet sessions |
//! | nodes that are present | `/nodes/{node_id}`, on its own lease | fleet sessions |
//! | an operator's drain of one replica | `/drains/{model}/{replica_id}` | REST |
//! | the term that may write, the generation counter | `/meta/...` | leadership, reconcile |
//!
//! Not kept: what engines say of themselves (state, load, pid) and live GPU figures: agents repeat them every report
//! interval. How long a node has been lost: counted anew after a restart, which only postpones replacement. What each
//! proxy has acknowledged: it reconnects and says so. Route tables: projected from the above.
//!
//! The semantics are etcd's, so that etcd fits without a change of this trait: one global revision that each
//! transaction with an effect raises by one; per key a create revision, a modification revision and a version.
//! Reads see a single revision. A watch delivers every later event in order and never splits a transaction; one that
//! has fallen behind the kept history is told so and must list again.
//!
//! Two implementations are held to this by one suite of contract tests: [`EmbeddedStore`], one file for one control
//! plane, and [`EtcdStore`], shared by several.

mod disk;
mod embedded;
mod etcd;
pub mod keys;
mod memory;
pub mod schema;

use std::{pin::Pin, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdStore, members};

/// The store's global counter of effective transactions.
pub type Revision = u64;

/// Names a lease; never 0.
pub type LeaseId = u64;

/// Why the store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was read; whether a write took place is unknown.
    #[error("the store is not available: {0}")]
    Unavailable(String),
    /// The store's members cannot agree on anything: too few are up. As with [`StoreError::Unavailable`], whether a write
    /// took place is unknown.
    #[error("the store has no quorum: {0}")]
    NoQuorum(String),
    /// The store does not accept who asks, or what it may do. Nothing was written.
    #[error("the store refuses us: {0}")]
    Denied(String),
    /// The store is not the one that was followed so far: it went back in time. Nothing was written.
    #[error("the store was replaced: {0}")]
    Rewound(String),
    /// Another control plane leads, or none. Nothing was written.
    #[error("this control plane does not lead: {0}")]
    NotLeading(String),
    /// The lease has expired, was revoked, or never existed. Nothing was written.
    #[error("lease {0} does not exist (any more)")]
    LeaseNotFound(LeaseId),
    /// The transaction makes no sense, for example by writing one key twice. Nothing was written.
    #[error("impossible transaction: {0}")]
    Invalid(String),
    /// The store cannot be opened. What it found is left as it was.
    #[error("{0}")]
    Open(String),
}

/// A key as it stands at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// Revision at which the key came to exist.
    pub create_revision: Revision,
    /// Revision of its last put.
    pub mod_revision: Revision,
    /// Puts since it came to exist, from 1.
    pub version: u64,
    /// The lease it hangs on; 0 for none.
    pub lease: LeaseId,
}

/// Entries in key order, all as of `revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Every key with the prefix.
    pub entries: Vec<Entry>,
    /// A watch from `revision + 1` continues without a gap.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key was last written at this revision; 0 means that it does not exist.
    ModRevision(String, Revision),
    /// The key exists.
    Exists(String),
    /// The key does not exist.
    Absent(String),
    /// The key exists and holds exactly this.
    Value(String, Bytes),
}

impl Compare {
    /// The key it looks at.
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision(key, _) | Self::Exists(key) | Self::Absent(key) | Self::Value(key, _) => key,
        }
    }

    /// Whether `entry`, the key's present state, satisfies it.
    pub fn holds(&self, entry: Option<&Entry>) -> bool {
        match self {
            Self::ModRevision(_, wanted) => entry.map_or(0, |e| e.mod_revision) == *wanted,
            Self::Exists(_) => entry.is_some(),
            Self::Absent(_) => entry.is_none(),
            Self::Value(_, wanted) => entry.is_some_and(|e| e.value == *wanted),
        }
    }
}

/// An effect of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets the key; its lease becomes `lease` (0: none).
    Put {
        /// The key.
        key: String,
        /// The new value.
        value: Bytes,
        /// The lease it shall hang on, or 0.
        lease: LeaseId,
    },
    /// Removes the key, if it is there.
    Delete {
        /// The key.
        key: String,
    },
}

impl Write {
    /// The key it changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of `writes`, if all of `compares` hold; else nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions; none means always.
    pub compares: Vec<Compare>,
    /// Effects; each key at most once.
    pub writes: Vec<Write>,
}

impl Txn {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds a put without lease.
    #[must_use]
    pub fn put(self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.put_leased(key, value, 0)
    }

    /// Adds a put on a lease.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.writes.push(Write::Put { key: key.into(), value: value.into(), lease });
        self
    }

    /// Adds a delete.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete { key: key.into() });
        self
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// The conditions held. `revision` is the store's revision afterwards: raised by one if anything was changed.
    Committed {
        /// The store's revision after it.
        revision: Revision,
    },
    /// Nothing was written.
    Conflict {
        /// The first condition that did not hold.
        failed: Compare,
        /// The store's revision at which it was looked at.
        revision: Revision,
    },
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The key was set.
    Put(Entry),
    /// The key was removed, by a transaction or with its lease.
    Delete {
        /// The key.
        key: String,
        /// The revision of the removal.
        revision: Revision,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision at which it changed.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// Events of one or more whole transactions, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventBatch {
    /// Every event up to and including this revision has now been delivered.
    pub revision: Revision,
    /// Never empty.
    pub events: Vec<Event>,
}

/// Why a watch ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// Events it has not seen are no longer kept. List again, then watch from the listing's revision + 1.
    #[error("events up to revision {through} are no longer kept; list again")]
    Compacted {
        /// The newest revision that is no longer kept.
        through: Revision,
    },
    /// The store is gone for now. List again, after a pause.
    #[error("the watch broke off: {0}")]
    Broken(String),
}

/// A watch's events. It ends after its first error. Implementations keep nothing unbounded for a slow reader.
pub type Watch = Pin<Box<dyn Stream<Item = Result<EventBatch, WatchError>> + Send>>;

/// A store of keys with etcd's semantics.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// "embedded" or "etcd", for status pages.
    fn kind(&self) -> &'static str;

    /// The key as it stands now.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Every key that starts with `prefix`, at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Commits durably, or does nothing. After [`StoreError::Unavailable`] the outcome is unknown: read before retrying.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Events of keys with `prefix` at revisions from `from` on.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError>;

    /// A new lease. Without a keep-alive its keys are deleted, in one transaction, `ttl` later.
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Gives the lease its full time again.
    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends the lease now; its keys are deleted.
    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Resolves when the store has failed for good and the process must start anew; may never resolve.
    async fn failed(&self) -> StoreError;

    /// Ends its tasks after what was accepted is durable. Later calls get [`StoreError::Unavailable`].
    async fn close(&self);
}
