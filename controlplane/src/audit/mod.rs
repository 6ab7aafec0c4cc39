//! What operators changed: one record in the same transaction as each change, in a chain of hashes.
//!
//! [`Core::commit_audited`] is the one way in which the REST API writes: the record is there if and only if the change is.
//! The head of the chain is compared in each transaction, so records have an order and none is lost; changes by operators
//! are few, and those of reconcile and of agents, which are many, are not recorded here. `/audit/head` says where the chain
//! begins and ends, records lie in blocks of [`keys::AUDIT_BLOCK`], so that reading a page reads few of them.

pub mod chain;
pub mod log;
pub mod mask;

use std::{
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    core::Core,
    store::{Compare, Entry, StoreError, Txn, TxnOutcome, keys},
};
pub use chain::{Change, Head, Record, Sealed, Subject};

/// Tries before a write whose place in the chain is taken again and again is given back.
const ATTEMPTS: usize = 64;

impl Core {
    /// Commits `txn` under this process's term, together with the record of `change` (and the marker of a request that may
    /// be repeated). A conflict is one of `txn`'s own conditions, or of the marker's key, which another request with the
    /// same key has written.
    ///
    /// # Errors
    /// As [`Core::commit`], and [`StoreError::Unavailable`] if others wrote over and over at the same moment.
    pub async fn commit_audited(&self, txn: Txn, change: Change) -> Result<TxnOutcome, StoreError> {
        let marker = change.caller.marker.clone().filter(|marker| !marker.written.load(Ordering::Acquire));
        for _ in 0..ATTEMPTS {
            let entry = self.store.get(keys::AUDIT_HEAD).await?;
            let head = read_head(entry.as_ref())?;
            let mut txn = txn.clone();
            let mut anchor = None;
            if let Some((first, last)) = head.surplus(self.config.audit.keep) {
                anchor = Some((last, self.hash_of(last).await?));
                for number in first..=last {
                    txn = txn.delete(keys::audit_record(number));
                }
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let now = u64::try_from(now).unwrap_or(u64::MAX);
            let term = self.leadership.term().unwrap_or_default();
            let json = |error: serde_json::Error| StoreError::Invalid(error.to_string());
            let (sealed, next) = chain::append(&head, &change, now, term, anchor).map_err(json)?;
            let mut txn = txn
                .when(Compare::ModRevision(keys::AUDIT_HEAD.into(), entry.map_or(0, |e| e.mod_revision)))
                .put(keys::AUDIT_HEAD, serde_json::to_vec(&next).map_err(json)?)
                .put(keys::audit_record(next.number), serde_json::to_vec(&sealed).map_err(json)?);
            if let Some(marker) = &marker {
                txn = txn.when(Compare::Absent(marker.key.clone())).put_leased(
                    marker.key.clone(),
                    marker.value.clone(),
                    marker.lease,
                );
            }
            match self.commit(txn).await? {
                TxnOutcome::Conflict { failed, .. } if failed.key() == keys::AUDIT_HEAD => {}
                outcome => {
                    if let TxnOutcome::Committed { revision } = outcome {
                        if let Some(marker) = &marker {
                            marker.written.store(true, Ordering::Release);
                        }
                        self.metrics.audit_records.inc();
                        let (actor, subject) = (&change.caller.name, &change.subject);
                        let (kind, name, number, hash) =
                            (subject.kind, &subject.name, next.number, next.hash);
                        tracing::info!(number, hash, actor, kind, name, revision, "audit: a change was made");
                    }
                    return Ok(outcome);
                }
            }
        }
        Err(StoreError::Unavailable("the audit's head changed over and over; nothing was written".into()))
    }

    /// The hash of a record that goes. One that cannot be read leaves an anchor that nothing follows: it shows.
    async fn hash_of(&self, number: u64) -> Result<String, StoreError> {
        let entry = self.store.get(&keys::audit_record(number)).await?;
        let sealed = entry.and_then(|entry| serde_json::from_slice::<Sealed>(&entry.value).ok());
        if sealed.is_none() {
            tracing::error!(number, "an audit record that shall go cannot be read");
        }
        Ok(sealed.map_or_else(|| "unreadable".to_owned(), |sealed| sealed.hash))
    }
}

/// The head out of its entry.
pub(crate) fn read_head(entry: Option<&Entry>) -> Result<Head, StoreError> {
    let Some(entry) = entry else { return Ok(Head::default()) };
    serde_json::from_slice(&entry.value).map_err(|error| {
        let key = keys::AUDIT_HEAD;
        StoreError::Open(format!(
            "the store's key {key} cannot be read, and no change can be recorded: {error}"
        ))
    })
}
