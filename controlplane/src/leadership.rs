//! Who may write: the term, and the condition that every write carries.
//!
//! `/meta/leader` holds the present term. Every transaction that changes state compares it ([`Leadership::guard`]), so
//! that a control plane whose term has passed cannot write, however late its request arrives. With the embedded store
//! there is one process, and each start takes the next term; an election takes the term from its own key instead and
//! leaves the guard as it is.

use std::sync::Arc;

use crate::store::{Compare, Store, StoreError, Txn, TxnOutcome, keys};

/// The right to write in one term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// Raised by one with each start; orders everything published, together with the store's revision.
    pub term: u64,
}

impl Leadership {
    /// Takes the next term.
    ///
    /// # Errors
    /// The store's, and [`StoreError::Open`] if the store was written by a build with another layout.
    pub async fn take(store: &Arc<dyn Store>) -> Result<Self, StoreError> {
        let schema = store.get(keys::SCHEMA).await?;
        let known = keys::SCHEMA_VERSION;
        if let Some(schema) = schema.filter(|schema| schema.value != known.as_bytes()) {
            let found = String::from_utf8_lossy(&schema.value).into_owned();
            return Err(StoreError::Open(format!(
                "the store has schema version {found:?}, this build reads version {known}; nothing was changed"
            )));
        }
        let before = store.get(keys::LEADER).await?;
        let (revision, last) = match &before {
            None => (0, 0),
            Some(entry) => (entry.mod_revision, number(&entry.value, keys::LEADER)?),
        };
        let term = last + 1;
        let txn = Txn::new()
            .when(Compare::ModRevision(keys::LEADER.into(), revision))
            .put(keys::LEADER, term.to_string())
            .put(keys::SCHEMA, keys::SCHEMA_VERSION);
        match store.txn(txn).await? {
            TxnOutcome::Committed { .. } => Ok(Self { term }),
            TxnOutcome::Conflict { .. } => {
                Err(StoreError::Unavailable("another control plane took the term at the same moment".into()))
            }
        }
    }

    /// The condition that every write carries.
    pub fn guard(&self) -> Compare {
        Compare::Value(keys::LEADER.into(), self.term.to_string().into())
    }
}

/// A decimal number out of the store.
pub(crate) fn number(value: &[u8], key: &str) -> Result<u64, StoreError> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| StoreError::Open(format!("the store's key {key} holds no decimal number")))
}
