//! Reads the audit: pages of it, newest first, and the whole chain for a check.

use serde::Serialize;

use super::{
    chain::{Broken, Head, Record, Sealed, Walk},
    read_head,
};
use crate::store::{Revision, Store, StoreError, keys};

/// Which records are asked for; None: all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this model.
    pub model: Option<String>,
    /// By this token.
    pub actor: Option<String>,
    /// Of this kind of thing.
    pub kind: Option<String>,
}

impl Filter {
    fn takes(&self, record: &Record) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        is(&self.model, &record.model) && is(&self.actor, &record.actor) && is(&self.kind, &record.kind)
    }
}

/// A record as the API shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    /// The record.
    #[serde(flatten)]
    pub record: Record,
    /// Its hash.
    pub hash: String,
    /// The store's revision of the change.
    pub revision: Revision,
}

/// What a check of the chain found.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// It holds.
    pub intact: bool,
    /// Number of the first record that is kept; 0 if there is none.
    pub first: u64,
    /// Number of the newest.
    pub last: u64,
    /// The newest one's hash: to be noted elsewhere, and asked about later.
    pub hash: String,
    /// Where it is broken.
    pub broken: Option<Broken>,
    /// Whether the record that was asked about has the hash that was noted; None: nothing was asked, or it has gone.
    pub noted: Option<bool>,
}

async fn head(store: &dyn Store) -> Result<Head, StoreError> {
    read_head(store.get(keys::AUDIT_HEAD).await?.as_ref())
}

/// Up to `limit` records that `filter` takes, newest first, all with numbers below `below` (None: from the newest); and
/// whether there may be more. Unreadable ones are left out: a check tells of them.
///
/// # Errors
/// The store's.
pub async fn page(
    store: &dyn Store,
    below: Option<u64>,
    filter: &Filter,
    limit: usize,
) -> Result<(Vec<Shown>, bool), StoreError> {
    let head = head(store).await?;
    let mut top = below.unwrap_or(u64::MAX).min(head.number.saturating_add(1));
    let mut out = Vec::new();
    while top > head.anchor_number + 1 {
        let block = (top - 1) / keys::AUDIT_BLOCK;
        let listing = store.list(&keys::audit_block(block)).await?;
        for entry in listing.entries.iter().rev() {
            let Ok(sealed) = serde_json::from_slice::<Sealed>(&entry.value) else { continue };
            let Ok(record) = serde_json::from_str::<Record>(&sealed.record) else { continue };
            if record.number >= top || !filter.takes(&record) {
                continue;
            }
            if out.len() == limit {
                return Ok((out, true));
            }
            out.push(Shown { record, hash: sealed.hash, revision: entry.mod_revision });
        }
        top = block * keys::AUDIT_BLOCK;
    }
    Ok((out, false))
}

/// Checks the whole chain, and whether the record `noted.0` has the hash `noted.1`.
///
/// # Errors
/// The store's.
pub async fn verify(store: &dyn Store, noted: Option<(u64, &str)>) -> Result<Verdict, StoreError> {
    loop {
        let head = head(store).await?;
        let mut walk = Walk::new(&head);
        let mut found = None;
        let outcome = walk_all(store, &head, &mut walk, noted, &mut found).await?;
        let now = self::head(store).await?;
        if outcome.is_err() && now.anchor_number != head.anchor_number {
            // The oldest went meanwhile.
            continue;
        }
        let broken = outcome.and_then(|()| walk.finish(&head)).err();
        let first = if head.number > head.anchor_number { head.anchor_number + 1 } else { 0 };
        let last = head.number;
        return Ok(Verdict { intact: broken.is_none(), first, last, hash: head.hash, broken, noted: found });
    }
}

async fn walk_all(
    store: &dyn Store,
    head: &Head,
    walk: &mut Walk,
    noted: Option<(u64, &str)>,
    found: &mut Option<bool>,
) -> Result<Result<(), Broken>, StoreError> {
    let mut next = head.anchor_number + 1;
    while next <= head.number {
        let block = next / keys::AUDIT_BLOCK;
        let listing = store.list(&keys::audit_block(block)).await?;
        let last = ((block + 1) * keys::AUDIT_BLOCK - 1).min(head.number);
        for number in next..=last {
            let key = keys::audit_record(number);
            let at = listing.entries.binary_search_by(|entry| entry.key.as_str().cmp(key.as_str()));
            let entry = at.ok().and_then(|at| listing.entries.get(at));
            match walk.step(entry.map(|entry| &entry.value[..])) {
                Ok(hash) => {
                    if let Some((_, wanted)) = noted.filter(|(asked, _)| *asked == number) {
                        *found = Some(hash == wanted);
                    }
                }
                Err(broken) => return Ok(Err(broken)),
            }
        }
        next = last + 1;
    }
    Ok(Ok(()))
}
