//! The one way in which the API changes a thing that is stored: read, decide, write by compare-and-swap, with its record in
//! the audit; again if it was overtaken.

use axum::http::StatusCode;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use super::{ask::Ask, error::ApiError};
use crate::{
    audit::{Change, Subject},
    core::Core,
    store::{Compare, Entry, Revision, Txn, TxnOutcome},
};

/// Tries before a write that is overtaken again and again is given back to the caller.
const ATTEMPTS: usize = 16;

/// Where a thing is stored, and what it is for the audit.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) subject: Subject,
    pub(super) key: String,
    /// Another key that the decision depends on, and that may be written with it.
    pub(super) beside: Option<String>,
}

/// What shall become of it.
#[derive(Debug, Clone)]
pub(super) struct Step<T> {
    /// None: it shall go, or not be there.
    pub(super) after: Option<T>,
    /// What becomes of the key beside it.
    pub(super) beside: Beside,
}

/// What becomes of the key beside.
#[derive(Debug, Clone)]
pub(super) enum Beside {
    Leave,
    Put(Vec<u8>),
    Delete,
}

impl<T> From<Option<T>> for Step<T> {
    fn from(after: Option<T>) -> Self {
        Self { after, beside: Beside::Leave }
    }
}

/// What became of it.
#[derive(Debug, Clone)]
pub(super) struct Edited<T> {
    pub(super) before: Option<T>,
    pub(super) after: Option<T>,
    /// Of its last write, this one or an earlier one; of the deleted thing the last it had. 0 for what never was.
    pub(super) revision: Revision,
    /// Nothing was written, because nothing shall be.
    pub(super) dry_run: bool,
}

impl<T> Edited<T> {
    /// 201 for what was not there before.
    pub(super) fn status(&self) -> StatusCode {
        match self.before.is_none() && !self.dry_run {
            true => StatusCode::CREATED,
            false => StatusCode::OK,
        }
    }
}

/// Replaces what is at `place` by what `decide` makes of it, and of the entry beside it. What stays the same is not written.
pub(super) async fn edit<T: Serialize + DeserializeOwned + PartialEq>(
    core: &Core,
    ask: &Ask,
    place: &Place,
    decide: impl Fn(Option<&T>, Option<&Entry>) -> Result<Step<T>, ApiError>,
) -> Result<Edited<T>, ApiError> {
    let Place { subject, key, beside } = place;
    let unreadable = |error: serde_json::Error| ApiError::unreadable(subject.kind, &error);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(key).await?;
        let before: Option<T> = entry
            .as_ref()
            .map(|entry| serde_json::from_slice(&entry.value))
            .transpose()
            .map_err(unreadable)?;
        let at = entry.as_ref().map_or(0, |entry| entry.mod_revision);
        let beside_entry = match beside {
            Some(key) => core.store.get(key).await?,
            None => None,
        };
        // What cannot be is told before what was not expected: a missing thing is 404 and not 412.
        let Step { after, beside: beside_step } = decide(before.as_ref(), beside_entry.as_ref())?;
        ask.conditions.check(at)?;
        if before == after || ask.dry_run {
            return Ok(Edited { before, after, revision: at, dry_run: ask.dry_run });
        }
        let shown =
            |state: &Option<T>| state.as_ref().map(serde_json::to_value).transpose().map_err(unreadable);
        let change = Change {
            caller: ask.caller.clone(),
            subject: subject.clone(),
            before: shown(&before)?,
            after: shown(&after)?,
        };
        let mut txn = Txn::new().when(Compare::ModRevision(key.clone(), at));
        txn = match &after {
            Some(after) => {
                let value: Bytes = serde_json::to_vec(after).map_err(unreadable)?.into();
                txn.put(key.clone(), value)
            }
            None => txn.delete(key.clone()),
        };
        if let Some(key) = beside {
            txn = txn
                .when(Compare::ModRevision(key.clone(), beside_entry.map_or(0, |entry| entry.mod_revision)));
            txn = match beside_step {
                Beside::Leave => txn,
                Beside::Put(value) => txn.put(key.clone(), value),
                Beside::Delete => txn.delete(key.clone()),
            };
        }
        match core.commit_audited(txn, change).await? {
            TxnOutcome::Committed { revision } => {
                core.seen(revision).await;
                let revision = if after.is_some() { revision } else { at };
                return Ok(Edited { before, after, revision, dry_run: false });
            }
            TxnOutcome::Conflict { failed, .. } => {
                let marker = ask.caller.marker.as_ref().map(|marker| marker.key.as_str());
                if marker == Some(failed.key()) {
                    return Err(ApiError::begun());
                }
            }
        }
    }
    Err(ApiError::conflict())
}
