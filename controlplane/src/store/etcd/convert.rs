//! Our transactions and entries in etcd's terms, and back. Pure.
//!
//! etcd says of a transaction only that some condition did not hold. Its other branch therefore reads every compared
//! key, at that same revision, and the first unmet condition is found here by the rule that the embedded store uses.

use bytes::Bytes;
use etcd_client::{
    Compare as EtcdCompare, CompareOp, GetOptions, KeyValue, PutOptions, Txn as EtcdTxn, TxnOp,
};

use crate::store::{Compare, Entry, StoreError, Txn, Write};

/// Most conditions, and most writes, that etcd takes in one transaction (its `--max-txn-ops`).
pub(super) const MAX_OPERATIONS: usize = 128;
/// Largest request that etcd takes is 1.5 MiB (its `--max-request-bytes`); a part is left for what surrounds our bytes.
pub(super) const MAX_BYTES: usize = 1_536 * 1_024 - 64 * 1_024;
/// What one operation costs beside its key and value, at most.
const OVERHEAD_BYTES: usize = 48;

/// The prefix of one Penstock's keys.
#[derive(Debug, Clone, Default)]
pub(super) struct Prefix(pub(super) String);

impl Prefix {
    /// The key as etcd has it.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}{key}", self.0)
    }

    /// The key as we have it; None if it is not below the prefix or not UTF-8.
    pub(super) fn own(&self, key: &[u8]) -> Option<String> {
        std::str::from_utf8(key).ok()?.strip_prefix(&self.0).map(str::to_owned)
    }

    /// An entry; None for a key that cannot be ours.
    pub(super) fn entry(&self, kv: &KeyValue) -> Option<Entry> {
        Some(Entry {
            key: self.own(kv.key())?,
            value: Bytes::copy_from_slice(kv.value()),
            create_revision: number(kv.create_revision()),
            mod_revision: number(kv.mod_revision()),
            version: number(kv.version()),
            lease: number(kv.lease()),
        })
    }

    fn compare(&self, compare: &Compare) -> EtcdCompare {
        let key = self.full(compare.key());
        match compare {
            Compare::ModRevision(_, revision) => {
                EtcdCompare::mod_revision(key, CompareOp::Equal, signed(*revision))
            }
            Compare::Exists(_) => EtcdCompare::create_revision(key, CompareOp::Greater, 0),
            Compare::Absent(_) => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
            Compare::Value(_, value) => EtcdCompare::value(key, CompareOp::Equal, value.to_vec()),
        }
    }

    fn write(&self, write: &Write) -> TxnOp {
        match write {
            Write::Put { key, value, lease } => {
                let options = PutOptions::new().with_lease(signed(*lease));
                TxnOp::put(self.full(key), value.to_vec(), Some(options))
            }
            Write::Delete { key } => TxnOp::delete(self.full(key), None),
        }
    }

    /// The transaction in etcd's terms.
    pub(super) fn transaction(&self, txn: &Txn) -> EtcdTxn {
        let looks = txn.compares.iter().map(|c| TxnOp::get(self.full(c.key()), None::<GetOptions>));
        EtcdTxn::new()
            .when(txn.compares.iter().map(|c| self.compare(c)).collect::<Vec<_>>())
            .and_then(txn.writes.iter().map(|w| self.write(w)).collect::<Vec<_>>())
            .or_else(looks.collect::<Vec<_>>())
    }

    /// Refuses what etcd would, before it is sent and in words that help.
    pub(super) fn check(&self, txn: &Txn) -> Result<(), StoreError> {
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = txn.writes.iter().find(|write| !seen.insert(write.key())) {
            return Err(StoreError::Invalid(format!("key {:?} is written twice", twice.key())));
        }
        let most = txn.compares.len().max(txn.writes.len());
        if most > MAX_OPERATIONS {
            return Err(StoreError::Invalid(format!(
                "it has {most} conditions or writes; etcd takes {MAX_OPERATIONS} in one transaction"
            )));
        }
        let cost = |key: &str, value: usize| self.0.len() + key.len() + value + OVERHEAD_BYTES;
        let compared = txn.compares.iter().map(|c| {
            let value = if let Compare::Value(_, value) = c { value.len() } else { 0 };
            2 * cost(c.key(), 0) + value
        });
        let written = txn.writes.iter().map(|w| match w {
            Write::Put { key, value, .. } => cost(key, value.len()),
            Write::Delete { key } => cost(key, 0),
        });
        let bytes: usize = compared.chain(written).sum();
        if bytes > MAX_BYTES {
            let sized = |w: &Write| if let Write::Put { value, .. } = w { value.len() } else { 0 };
            let largest = txn.writes.iter().max_by_key(|w| sized(w)).map_or("", |w| w.key());
            return Err(StoreError::Invalid(format!(
                "it has {bytes} bytes, most of them for {largest:?}; etcd takes {MAX_BYTES} in one transaction"
            )));
        }
        Ok(())
    }
}

/// The first condition that does not hold, given what etcd read of each compared key.
pub(super) fn unmet(txn: &Txn, seen: &[Option<Entry>]) -> Option<Compare> {
    let pairs = txn.compares.iter().zip(seen);
    pairs.filter(|(compare, entry)| !compare.holds(entry.as_ref())).map(|(compare, _)| compare.clone()).next()
}

/// etcd's numbers are never negative.
pub(super) fn number(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// Beyond i64 there is nothing in etcd to be found.
pub(super) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_etcd_would_refuse_is_refused_in_words() {
        let prefix = Prefix("/p".into());
        let many = (0..129).fold(Txn::new(), |txn, n| txn.put(format!("/k{n}"), ""));
        let error = prefix.check(&many).expect_err("too many").to_string();
        assert!(error.contains("129") && error.contains("128"), "{error}");
        let large = Txn::new().put("/small", "x").put("/large", vec![0; MAX_BYTES]);
        let error = prefix.check(&large).expect_err("too large").to_string();
        assert!(error.contains("/large"), "{error}");
        assert!(prefix.check(&Txn::new().put("/a", vec![0; MAX_BYTES - 1_000])).is_ok());
        assert!(prefix.check(&Txn::new().put("/a", "").delete("/a")).is_err());
    }

    #[test]
    fn a_key_outside_the_prefix_is_not_ours() {
        let prefix = Prefix("/p".into());
        assert_eq!(prefix.own(b"/p/nodes/n"), Some("/nodes/n".to_owned()));
        assert_eq!(prefix.own(b"/q/nodes/n"), None);
        assert_eq!(prefix.own(b"/p/\xff"), None);
    }
}
