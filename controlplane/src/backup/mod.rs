//! Backup and restore: what is wanted of a site, in one document, and the way back.
//!
//! A backup ([`document`]) is everything that people decided and everything that must never be given out twice, read at one
//! revision of the store: deployments, placements, revisions, routes, what is said of nodes, drains, hashes of tokens, the
//! counters of generations and terms, and where the audit chain stood. It is not what processes say anew by themselves:
//! endpoints, nodes that are present, who leads.
//!
//! A restore ([`plan`]) is decided by a pure function of the site, the backup and how far the operator wants to go. Into a
//! site where nothing is wanted yet everything goes; into any other only what is missing there, unless it is forced: what
//! runs is never torn down because somebody restored the wrong file. A forced restore changes what is wanted, and the
//! usual way (drain, budgets, rollouts) leads there; it never writes over where replicas are.
//!
//! Counters never go back: generations and terms continue [`GAP`] past those of the backup, because what was given out
//! after it was made is not known.
//!
//! [`schedule`] makes backups in the leader and forgets old ones. Absent: increments. The whole state of a large fleet is
//! a few megabytes.

pub mod document;
pub mod offline;
pub mod plan;
pub mod schedule;

pub use document::{Backup, Refused};
pub use plan::{Options, Plan};

use crate::store::{Store, StoreError, keys};

/// How far counters continue past a backup's: more than any site gives out between two of them.
pub const GAP: u64 = 1_000_000;

/// Reads a backup out of the store, at one revision.
///
/// # Errors
/// The store's, and [`StoreError::Open`] if a value in it cannot be read.
pub async fn take(store: &dyn Store, now_unix_s: i64) -> Result<Backup, StoreError> {
    let listing = store.list(keys::ROOT).await?;
    Backup::of(&listing, now_unix_s, env!("CARGO_PKG_VERSION"))
}
