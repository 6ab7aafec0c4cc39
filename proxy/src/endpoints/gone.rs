//! What is remembered of endpoints that the tables have dropped.
//!
//! A table may lose an endpoint and have it again a moment later: a control plane changed hands, or a lease lapsed while a node
//! stood still. It is the same process then, by its address and generation, and what was known of its health still holds: an
//! engine that was ejected must not come back as a good one because it was out of a table for a second, nor one that holds
//! requests as an idle one. So the live figures of an endpoint that is in doubt or has requests under way are kept for
//! [`KEPT`] after it left; of the others there is nothing to remember.
//!
//! Bounded: at most [`MOST`], the oldest go first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use super::endpoint::{Endpoint, Live};

/// How long an endpoint that left is remembered: longer than the longest ejection.
pub const KEPT: Duration = Duration::from_secs(600);

/// Endpoints remembered.
pub const MOST: usize = 1_024;

/// Pool and id.
type Key = (String, Arc<str>);

#[derive(Debug)]
struct Gone {
    number: u64,
    address: String,
    generation: u64,
    live: Arc<Live>,
}

/// Those that left.
#[derive(Debug, Default)]
pub(super) struct Memory {
    gone: HashMap<Key, Gone>,
    /// In the order in which they left.
    order: BTreeMap<u64, (Instant, Key)>,
    next: u64,
}

impl Memory {
    /// `endpoint` has left `pool`.
    pub(super) fn left(&mut self, pool: &str, endpoint: &Endpoint, now: Instant) {
        if !endpoint.live.is_worth_keeping() {
            return;
        }
        let key = (pool.to_owned(), Arc::clone(&endpoint.id));
        let gone = Gone {
            number: self.next,
            address: endpoint.address.clone(),
            generation: endpoint.generation,
            live: Arc::clone(&endpoint.live),
        };
        self.order.insert(self.next, (now, key.clone()));
        self.next += 1;
        if let Some(before) = self.gone.insert(key, gone) {
            self.order.remove(&before.number);
        }
    }

    /// The figures of one that is back, if it is the same process.
    pub(super) fn back(&mut self, pool: &str, id: &str, address: &str, generation: u64) -> Option<Arc<Live>> {
        if self.gone.is_empty() {
            return None;
        }
        let gone = self.gone.remove(&(pool.to_owned(), Arc::from(id)))?;
        self.order.remove(&gone.number);
        (gone.address == address && gone.generation == generation).then_some(gone.live)
    }

    /// The figures of one that left, with the generation it had.
    pub(super) fn find(&self, pool: &str, id: &str, generation: u64) -> Option<&Arc<Live>> {
        if self.gone.is_empty() {
            return None;
        }
        let gone = self.gone.get(&(pool.to_owned(), Arc::from(id)))?;
        (gone.generation == generation).then_some(&gone.live)
    }

    /// Forgets what is too old, or too much.
    pub(super) fn forget(&mut self, now: Instant) {
        while let Some(first) = self.order.first_entry() {
            let (since, _) = first.get();
            if self.gone.len() <= MOST && now.saturating_duration_since(*since) < KEPT {
                return;
            }
            let (_, key) = first.remove();
            self.gone.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{endpoints::endpoint::tests::endpoint, error::UpstreamFailure, health::Rules};

    fn ejected(id: &str) -> Arc<Endpoint> {
        let rules = Rules { consecutive_failures: 1, ..crate::health::rules(&Default::default()) };
        let endpoint = endpoint(id);
        endpoint.reserve(0).failed(UpstreamFailure::Connect, 0, &rules);
        assert!(endpoint.is_ejected(1));
        endpoint
    }

    fn back(memory: &mut Memory, endpoint: &Endpoint) -> bool {
        let live = memory.back("p", &endpoint.id, &endpoint.address, endpoint.generation);
        live.is_some_and(|live| Arc::ptr_eq(&live, &endpoint.live))
    }

    #[test]
    fn one_in_doubt_is_known_again_once_and_a_good_one_needs_no_memory() {
        let (mut memory, now) = (Memory::default(), Instant::now());
        let (sick, well, at_work) = (ejected("a"), endpoint("b"), endpoint("c"));
        let _ticket = at_work.reserve(0);
        [&sick, &well, &at_work].into_iter().for_each(|endpoint| memory.left("p", endpoint, now));
        assert!(back(&mut memory, &sick) && !back(&mut memory, &sick));
        assert!(!back(&mut memory, &well) && back(&mut memory, &at_work));
        assert!(memory.order.is_empty() && memory.gone.is_empty());
    }

    #[test]
    fn another_process_at_its_place_is_a_stranger() {
        let (mut memory, now) = (Memory::default(), Instant::now());
        let sick = ejected("a");
        memory.left("p", &sick, now);
        assert!(memory.back("p", "a", &sick.address, sick.generation + 1).is_none());
        memory.left("p", &sick, now);
        assert!(memory.back("p", "a", "127.0.0.1:10", sick.generation).is_none());
        memory.left("p", &sick, now);
        assert!(memory.back("other", "a", &sick.address, sick.generation).is_none());
    }

    #[test]
    fn memory_ends_with_time_and_with_room() {
        let (mut memory, now) = (Memory::default(), Instant::now());
        let sick = ejected("a");
        memory.left("p", &sick, now);
        memory.forget(now + KEPT - Duration::from_millis(1));
        assert_eq!(memory.gone.len(), 1);
        memory.left("p", &sick, now + KEPT);
        memory.forget(now + KEPT);
        assert_eq!((memory.gone.len(), memory.order.len()), (1, 1), "it left again");
        memory.forget(now + 2 * KEPT);
        assert_eq!((memory.gone.len(), memory.order.len()), (0, 0));
        for number in 0..MOST + 10 {
            memory.left(&number.to_string(), &sick, now);
        }
        memory.forget(now);
        assert_eq!((memory.gone.len(), memory.order.len()), (MOST, MOST));
        assert!(memory.back("0", "a", &sick.address, sick.generation).is_none(), "the first that left");
    }
}
