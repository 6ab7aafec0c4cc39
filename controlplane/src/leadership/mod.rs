//! Who may write: the term, and the condition that every write carries.
//!
//! `/meta/leader` names the leader; it is written once per term, and the store's revision of that write *is* the term.
//! Every transaction that changes state compares it ([`Leadership::guard`]): a control plane whose term has passed cannot
//! write, however late its request arrives and whatever it believes. Terms rise because revisions do. `/meta/term` is
//! written in the same transaction and stays when the leader is gone, so that every control plane, leading or not,
//! publishes the same (term, revision) for the same state.
//!
//! With the embedded store there is one process, and each start takes the next term ([`Leadership::seize`]). With etcd
//! the key hangs on the leader's lease: [`machine`] decides and `elector` acts.

mod elector;
#[cfg(test)]
mod explorer;
pub mod machine;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::store::{Compare, Store, StoreError, Txn, TxnOutcome, keys, schema};
pub use elector::Elector;

/// What `/meta/leader` holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Leader {
    /// Its name.
    pub id: String,
    /// HOST:PORT of its REST API.
    pub http: String,
    /// HOST:PORT of its gRPC.
    pub grpc: String,
    /// Its zone; may be empty.
    pub zone: String,
    /// Its release.
    pub version: String,
}

/// How this control plane stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// The term it was elected in, and until when it may write in it (None: as long as it runs).
    pub elected: Option<(u64, Option<Instant>)>,
}

impl Standing {
    fn writing(&self) -> Option<u64> {
        let (term, until) = self.elected?;
        until.is_none_or(|until| Instant::now() < until).then_some(term)
    }
}

/// The right to write, as it stands at any moment.
#[derive(Debug, Clone)]
pub struct Leadership {
    standing: watch::Receiver<Standing>,
    /// Terms whose writes were refused; one is enough to wake the elector.
    fenced: mpsc::Sender<u64>,
}

impl Leadership {
    /// Takes the next term of a store that has no other writer.
    ///
    /// # Errors
    /// The store's, and [`StoreError::Open`] if a newer build wrote it.
    pub async fn seize(store: &Arc<dyn Store>, leader: &Leader) -> Result<Self, StoreError> {
        let before = store.get(keys::LEADER).await?.map_or(0, |entry| entry.mod_revision);
        let txn = take(leader, 0)?.when(Compare::ModRevision(keys::LEADER.into(), before));
        match store.txn(schema::prepare(&**store, txn).await?).await? {
            TxnOutcome::Committed { revision } => {
                let standing = Standing { elected: Some((revision, None)) };
                // The sender may go: what it said last stays.
                Ok(Self { standing: watch::channel(standing).1, fenced: mpsc::channel(1).0 })
            }
            TxnOutcome::Conflict { .. } => {
                Err(StoreError::Unavailable("another control plane took the term at the same moment".into()))
            }
        }
    }

    /// The term this control plane may write in now; None if it does not lead, or cannot be sure to.
    pub fn term(&self) -> Option<u64> {
        self.standing.borrow().writing()
    }

    /// The term it was elected in and has not lost for certain: it may be unable to write for the moment.
    pub fn elected(&self) -> Option<u64> {
        self.standing.borrow().elected.map(|(term, _)| term)
    }

    /// The condition that every write carries, with its term.
    pub fn guard(&self) -> Option<(u64, Compare)> {
        let term = self.term()?;
        Some((term, Compare::ModRevision(keys::LEADER.into(), term)))
    }

    /// A write of `term` was refused by its guard.
    pub fn fenced(&self, term: u64) {
        if self.fenced.try_send(term).is_err() {
            tracing::debug!(term, "the election has been told already that the term has passed");
        }
    }

    /// Until this control plane does not lead in `term` any more. Never, if it leads as long as it runs.
    pub async fn lost(&self, term: Option<u64>) {
        let mut standing = self.standing.clone();
        let lost = standing.wait_for(|standing| standing.elected.map(|(elected, _)| elected) != term);
        if lost.await.is_err() {
            std::future::pending().await
        }
    }

    /// Wakes whenever the standing changes.
    pub fn changes(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }
}

/// The writes that begin a term.
fn take(leader: &Leader, lease: u64) -> Result<Txn, StoreError> {
    let value = serde_json::to_vec(leader).map_err(|e| StoreError::Invalid(e.to_string()))?;
    Ok(Txn::new().put_leased(keys::LEADER, value, lease).put(keys::TERM, leader.id.clone()))
}

/// A decimal number out of the store.
pub(crate) fn number(value: &[u8], key: &str) -> Result<u64, StoreError> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| StoreError::Open(format!("the store's key {key} holds no decimal number")))
}
