//! Backup and restore of an embedded store whose control plane is not running.
//!
//! The file is opened as the control plane would open it: its lock keeps a running one away, and a file that is damaged is
//! refused and left as it is. Restoring into another path makes a new file there.

use std::path::Path;

use super::{Backup, Options, Plan, plan::PlanError};
use crate::store::{EmbeddedStore, Store, StoreError, TxnOutcome, keys, schema};

/// Events that are kept: nobody watches.
const HISTORY: usize = 100;

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither the backup nor the site can be read.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The store's.
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Reads a backup out of the store in `file`, which must be there.
///
/// # Errors
/// The store's.
pub async fn take(file: &Path, now_unix_s: i64) -> Result<Backup, Error> {
    if !file.exists() {
        return Err(StoreError::Open(format!("there is no store {}", file.display())).into());
    }
    let store = EmbeddedStore::open(file, HISTORY).await?;
    let backup = super::take(&store, now_unix_s).await;
    store.close().await;
    Ok(backup?)
}

/// Restores `backup` into the store in `file`, which is made if it is not there, unless the plan says that it must be
/// forced, or `dry_run` is set. Says what was, or would be, done.
///
/// # Errors
/// The store's, and what [`super::plan::plan`] says.
pub async fn restore(
    file: &Path,
    backup: &Backup,
    options: Options,
    dry_run: bool,
    now_unix_s: i64,
) -> Result<Plan, Error> {
    let made = !file.exists();
    if made && dry_run {
        let empty = crate::store::Listing { entries: Vec::new(), revision: 0 };
        return Ok(super::plan::plan(&empty, backup, options, now_unix_s)?);
    }
    let store = EmbeddedStore::open(file, HISTORY).await?;
    let outcome = into(&store, backup, options, dry_run, now_unix_s).await;
    store.close().await;
    outcome
}

async fn into(
    store: &EmbeddedStore,
    backup: &Backup,
    options: Options,
    dry_run: bool,
    now_unix_s: i64,
) -> Result<Plan, Error> {
    let site = store.list(keys::ROOT).await?;
    let plan = super::plan::plan(&site, backup, options, now_unix_s)?;
    if dry_run || !plan.refusals.is_empty() {
        return Ok(plan);
    }
    let first = schema::prepare(store, crate::store::Txn::new()).await?;
    let schema = (!first.writes.is_empty()).then_some(first);
    for txn in schema.into_iter().chain(plan.txns.iter().cloned()) {
        if let TxnOutcome::Conflict { failed, .. } = store.txn(txn).await? {
            return Err(StoreError::Unavailable(format!("{} changed meanwhile", failed.key())).into());
        }
    }
    Ok(plan)
}
