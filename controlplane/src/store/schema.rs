//! The version of what is stored, and how an older one becomes the present one.
//!
//! `/meta/schema` holds the version, in decimal. A build reads versions up to its own: a newer one is refused in words,
//! and nothing is changed. An older one is brought up by whoever takes the term, in the very transaction that takes it:
//! either both happen or neither, so a migration that dies half-way has not begun, and one that is done is not done again.
//! The transaction compares the version it began from and every key it rewrites.
//!
//! With several control planes, upgrade them one by one: an older build goes on as a follower, and cannot take the
//! term any more once a newer one has raised the version.
//!
//! Absent: migrations that need more than one transaction (etcd takes 128 writes, 1.5 MiB). One that grows beyond it
//! would have to rewrite values as they are read.

use super::{Compare, Entry, Store, StoreError, Txn, Write, keys};

/// The version that this build writes.
pub const CURRENT: u64 = 2;

/// What a step from one version to the next rewrites, given everything that is stored. Pure.
type Step = fn(&[Entry]) -> Result<Vec<Write>, StoreError>;

/// `STEPS[n]` leads from version n + 1 to n + 2.
const STEPS: [Step; 1] = [
    // 1 → 2: /meta/leader held the term in decimal; the transaction that takes the term replaces it anyway.
    |_| Ok(Vec::new()),
];

/// The version that was found; 0 for an empty store.
fn version(entry: Option<&Entry>) -> Result<u64, StoreError> {
    let Some(entry) = entry else { return Ok(0) };
    let text = String::from_utf8_lossy(&entry.value);
    let found = text.parse::<u64>().ok().filter(|found| *found > 0);
    match found {
        Some(found) if found <= CURRENT => Ok(found),
        _ => Err(StoreError::Open(format!(
            "the store has schema version {text:?}, this build reads versions up to {CURRENT}: run a build that is at \
             least as new as the one that wrote it; nothing was changed"
        ))),
    }
}

/// Adds to `txn` what makes the store one of the present version.
///
/// # Errors
/// [`StoreError::Open`] for a newer version; the store's own.
pub async fn prepare(store: &dyn Store, txn: Txn) -> Result<Txn, StoreError> {
    let entry = store.get(keys::SCHEMA).await?;
    let found = version(entry.as_ref())?;
    let unchanged = Compare::ModRevision(keys::SCHEMA.into(), entry.as_ref().map_or(0, |e| e.mod_revision));
    let mut txn = txn.when(unchanged);
    if found == CURRENT {
        return Ok(txn);
    }
    if found > 0 {
        let stored = store.list(keys::ROOT).await?.entries;
        txn = migrate(txn, found, &stored)?;
        tracing::info!(from = found, to = CURRENT, "the store's layout is brought up");
    }
    Ok(txn.put(keys::SCHEMA, CURRENT.to_string()))
}

/// What `stored`, of version `found`, is in the present version.
///
/// # Errors
/// [`StoreError::Open`] if a step cannot read what is stored.
pub fn brought_up(found: u64, mut stored: Vec<Entry>) -> Result<Vec<Entry>, StoreError> {
    let first = usize::try_from(found.saturating_sub(1)).unwrap_or(usize::MAX);
    for step in STEPS.iter().skip(first) {
        for write in step(&stored)? {
            stored.retain(|entry| entry.key != write.key());
            if let Write::Put { key, value, lease } = write {
                let (create_revision, mod_revision, version) = (1, 1, 1);
                stored.push(Entry { key, value, create_revision, mod_revision, version, lease });
            }
        }
    }
    stored.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(stored)
}

/// Applies every step from `found` on, each seeing what those before it wrote.
fn migrate(mut txn: Txn, found: u64, stored: &[Entry]) -> Result<Txn, StoreError> {
    let mut now: std::collections::BTreeMap<String, Entry> =
        stored.iter().map(|entry| (entry.key.clone(), entry.clone())).collect();
    let mut writes: std::collections::BTreeMap<String, Write> = Default::default();
    let first = usize::try_from(found).unwrap_or(usize::MAX) - 1;
    for step in STEPS.iter().skip(first) {
        let seen: Vec<Entry> = now.values().cloned().collect();
        for write in step(&seen)? {
            let key = write.key().to_owned();
            match &write {
                Write::Put { value, .. } => {
                    if let Some(entry) = now.get_mut(&key) {
                        entry.value = value.clone();
                    }
                }
                Write::Delete { .. } => drop(now.remove(&key)),
            }
            writes.insert(key, write);
        }
    }
    for (key, write) in writes {
        let before = stored.iter().find(|entry| entry.key == key).map_or(0, |entry| entry.mod_revision);
        txn = txn.when(Compare::ModRevision(key, before));
        txn.writes.push(write);
    }
    Ok(txn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(text: &str) -> Entry {
        Entry {
            key: keys::SCHEMA.into(),
            value: text.to_owned().into(),
            create_revision: 1,
            mod_revision: 1,
            version: 1,
            lease: 0,
        }
    }

    #[test]
    fn newer_and_garbled_versions_are_refused_in_words() {
        assert_eq!(version(None), Ok(0));
        assert_eq!(version(Some(&schema("1"))), Ok(1));
        assert_eq!(version(Some(&schema("2"))), Ok(CURRENT));
        for text in ["3", "0", "", "two", "-1"] {
            let error = version(Some(&schema(text))).expect_err(text).to_string();
            assert!(error.contains("schema version") && error.contains("nothing was changed"), "{error}");
        }
    }

    #[test]
    fn there_is_a_step_from_every_older_version() {
        assert_eq!(STEPS.len() as u64 + 1, CURRENT);
        for found in 1..CURRENT {
            migrate(Txn::new(), found, &[schema(&found.to_string())]).expect("it leads on");
        }
    }
}
