//! The embedded store's state in memory: what transactions mean. No I/O, no clock.
//!
//! [`Memory`] holds what is durable. A [`Draft`] evaluates transactions on top of it without changing it, so that the
//! writer can first make a whole group of them durable and only then show them to readers: memory is never ahead of
//! the disk, and a failed commit leaves nothing to undo.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use super::{
    Compare, Entry, Event, EventBatch, LeaseId, Listing, Revision, StoreError, Txn, TxnOutcome, WatchError,
    Write,
};

/// Durable state, and the recent events for watchers.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) revision: Revision,
    history: VecDeque<(Revision, Arc<[Event]>)>,
    history_events: usize,
    history_limit: usize,
    compacted_through: Revision,
}

impl Memory {
    /// State as read from the disk: its history begins after `revision`.
    pub(super) fn new(entries: BTreeMap<String, Entry>, revision: Revision, history_limit: usize) -> Self {
        Self {
            entries,
            revision,
            history: VecDeque::new(),
            history_events: 0,
            history_limit,
            compacted_through: revision,
        }
    }

    /// Every key with `prefix`.
    pub(super) fn list(&self, prefix: &str) -> Listing {
        let from: (Bound<&str>, Bound<&str>) = (Bound::Included(prefix), Bound::Unbounded);
        let entries = self.entries.range::<str, _>(from).take_while(|(key, _)| key.starts_with(prefix));
        Listing { entries: entries.map(|(_, entry)| entry.clone()).collect(), revision: self.revision }
    }

    /// Kept events of `prefix` from revision `from` on: an empty batch when there are none.
    pub(super) fn events_from(&self, prefix: &str, from: Revision) -> Result<EventBatch, WatchError> {
        if from <= self.compacted_through {
            return Err(WatchError::Compacted { through: self.compacted_through });
        }
        let start = self.history.partition_point(|(revision, _)| *revision < from);
        let events = self.history.range(start..).flat_map(|(_, events)| events.iter());
        let events = events.filter(|event| event.key().starts_with(prefix)).cloned().collect();
        Ok(EventBatch { revision: self.revision.max(from.saturating_sub(1)), events })
    }

    /// Makes a draft's changes visible; called once they are durable.
    pub(super) fn publish(&mut self, changes: Changes) {
        for (key, entry) in changes.entries {
            match entry {
                Some(entry) => self.entries.insert(key, entry),
                None => self.entries.remove(&key),
            };
        }
        self.revision = changes.revision;
        for (revision, events) in changes.events {
            self.history_events += events.len();
            self.history.push_back((revision, events.into()));
        }
        while self.history_events > self.history_limit {
            let Some((revision, events)) = self.history.pop_front() else { break };
            self.history_events -= events.len();
            self.compacted_through = revision;
        }
    }
}

/// What a group of transactions changes.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// New state of each changed key; None: removed.
    pub(super) entries: BTreeMap<String, Option<Entry>>,
    pub(super) revision: Revision,
    events: Vec<(Revision, Vec<Event>)>,
    /// Leases granted (with their TTL in milliseconds) and ended (None).
    pub(super) leases: HashMap<LeaseId, Option<u64>>,
}

/// Transactions evaluated one after the other, each seeing the ones before it.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    base: &'a Memory,
    pub(super) changes: Changes,
}

impl<'a> Draft<'a> {
    pub(super) fn new(base: &'a Memory) -> Self {
        Self { base, changes: Changes { revision: base.revision, ..Changes::default() } }
    }

    fn get(&self, key: &str) -> Option<&Entry> {
        match self.changes.entries.get(key) {
            Some(changed) => changed.as_ref(),
            None => self.base.entries.get(key),
        }
    }

    /// Evaluates one transaction; `lease_exists` answers for leases that puts name.
    pub(super) fn txn(
        &mut self,
        txn: &Txn,
        lease_exists: impl Fn(LeaseId) -> bool,
    ) -> Result<TxnOutcome, StoreError> {
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = txn.writes.iter().find(|write| !seen.insert(write.key())) {
            return Err(StoreError::Invalid(format!("key {:?} is written twice", twice.key())));
        }
        let unmet = |compare: &&Compare| !compare.holds(self.get(compare.key()));
        if let Some(failed) = txn.compares.iter().find(unmet) {
            return Ok(TxnOutcome::Conflict { failed: failed.clone(), revision: self.changes.revision });
        }
        for write in &txn.writes {
            match write {
                Write::Put { lease, .. } if *lease != 0 && !lease_exists(*lease) => {
                    return Err(StoreError::LeaseNotFound(*lease));
                }
                Write::Put { .. } | Write::Delete { .. } => {}
            }
        }
        self.write(&txn.writes);
        Ok(TxnOutcome::Committed { revision: self.changes.revision })
    }

    /// Records a new lease.
    pub(super) fn grant(&mut self, lease: LeaseId, ttl_ms: u64) {
        self.changes.leases.insert(lease, Some(ttl_ms));
    }

    /// Ends a lease: its keys go in one transaction.
    pub(super) fn revoke(&mut self, lease: LeaseId) {
        self.changes.leases.insert(lease, None);
        let untouched = self.base.entries.iter().filter(|(key, _)| !self.changes.entries.contains_key(*key));
        let untouched = untouched.map(|(_, entry)| entry);
        let changed = self.changes.entries.values().flatten();
        let mut keys: Vec<String> =
            untouched.chain(changed).filter(|e| e.lease == lease).map(|e| e.key.clone()).collect();
        keys.sort_unstable();
        let writes: Vec<Write> = keys.into_iter().map(|key| Write::Delete { key }).collect();
        self.write(&writes);
    }

    fn write(&mut self, writes: &[Write]) {
        let revision = self.changes.revision + 1;
        let mut events = Vec::new();
        for write in writes {
            let before = self.get(write.key());
            match write {
                Write::Put { key, value, lease } => {
                    let entry = Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: before.map_or(revision, |b| b.create_revision),
                        mod_revision: revision,
                        version: before.map_or(1, |b| b.version + 1),
                        lease: *lease,
                    };
                    events.push(Event::Put(entry.clone()));
                    self.changes.entries.insert(key.clone(), Some(entry));
                }
                Write::Delete { key } if before.is_some() => {
                    events.push(Event::Delete { key: key.clone(), revision });
                    self.changes.entries.insert(key.clone(), None);
                }
                Write::Delete { .. } => {}
            }
        }
        if !events.is_empty() {
            self.changes.revision = revision;
            self.changes.events.push((revision, events));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(memory: &mut Memory, key: &str) {
        let mut draft = Draft::new(memory);
        draft.txn(&Txn::new().put(key, "v"), |_| true).expect("valid");
        let changes = draft.changes;
        memory.publish(changes);
    }

    #[test]
    fn a_group_is_invisible_until_published() {
        let mut memory = Memory::new(BTreeMap::new(), 7, 100);
        let mut draft = Draft::new(&memory);
        draft.txn(&Txn::new().put("/a", "1"), |_| true).expect("valid");
        let second = draft.txn(&Txn::new().when(Compare::ModRevision("/a".into(), 8)).delete("/a"), |_| true);
        assert_eq!(second, Ok(TxnOutcome::Committed { revision: 9 }), "the second sees the first");
        let changes = draft.changes;
        assert!(memory.entries.is_empty());
        memory.publish(changes);
        assert_eq!(memory.revision, 9);
        assert_eq!(memory.events_from("/", 8).expect("kept").events.len(), 2);
    }

    #[test]
    fn history_is_bounded_and_says_where_it_begins() {
        let mut memory = Memory::new(BTreeMap::new(), 0, 3);
        for n in 0..10 {
            put(&mut memory, &format!("/k{n}"));
        }
        assert_eq!(memory.events_from("/", 7), Err(WatchError::Compacted { through: 7 }));
        assert_eq!(memory.events_from("/", 8).expect("kept").events.len(), 3);
        assert!(memory.events_from("/", 11).expect("the future is fine").events.is_empty());
    }

    #[test]
    fn revoking_takes_keys_of_the_base_and_of_the_draft() {
        let mut memory = Memory::new(BTreeMap::new(), 0, 100);
        let mut draft = Draft::new(&memory);
        draft.txn(&Txn::new().put_leased("/a", "1", 5), |_| true).expect("valid");
        memory.publish(draft.changes);
        let mut draft = Draft::new(&memory);
        draft.txn(&Txn::new().put_leased("/b", "1", 5).put("/c", "1"), |_| true).expect("valid");
        draft.revoke(5);
        assert_eq!(draft.changes.revision, 3, "one transaction for all of its keys");
        memory.publish(draft.changes);
        assert_eq!(memory.entries.keys().collect::<Vec<_>>(), ["/c"]);
    }
}
