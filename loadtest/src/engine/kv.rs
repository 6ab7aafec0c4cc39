//! KV blocks and the prefix cache: who holds how much, what is reused, what is evicted. Pure.
//!
//! Full blocks of prompts are known by their hash, which names the whole prefix up to the block's end, so equal hashes
//! mean equal content. A block in use has holders; one without stays cached until it is the least recently used when
//! room is needed. Blocks being filled (the prompt's rest, the output) belong to one sequence; when it ends, those that
//! are full by then join the cache, so that the next turn of a conversation finds them.
//!
//! Invariant: `held + cached + private <= capacity`, except for a sequence alone that is larger than everything: it is
//! let in and counted as a full cache, because refusing it forever would hang its client.

use std::collections::{BTreeMap, HashMap};

use super::generation::BLOCK_TOKENS;

/// Blocks of one engine.
#[derive(Debug)]
pub struct KvCache {
    capacity: usize,
    known: HashMap<u64, Block>,
    /// Cached blocks nobody holds, by the time of their last use.
    idle: BTreeMap<u64, u64>,
    /// Blocks that belong to one sequence.
    private: usize,
    clock: u64,
    queries: u64,
    hits: u64,
}

#[derive(Debug)]
struct Block {
    holders: u32,
    last_used: u64,
}

/// What one sequence holds. Give it back with [`KvCache::release`].
#[derive(Debug, Default)]
pub struct Holding {
    shared: Vec<u64>,
    private: usize,
    tokens: u64,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u64,
}

impl KvCache {
    /// An empty cache of `capacity` blocks of [`BLOCK_TOKENS`] tokens.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            known: HashMap::new(),
            idle: BTreeMap::new(),
            private: 0,
            clock: 0,
            queries: 0,
            hits: 0,
        }
    }

    /// Takes the blocks of a prompt of `tokens` tokens whose full blocks have the hashes `blocks`. None if there is no
    /// room now. `alone`: nothing else runs, so it is let in whatever its size.
    pub fn allocate(&mut self, tokens: u64, blocks: &[u64], alone: bool) -> Option<Holding> {
        // The last token is always computed: its logits are needed.
        let reusable = usize::try_from(tokens.saturating_sub(1) / BLOCK_TOKENS).unwrap_or(usize::MAX);
        let found = blocks.iter().take(reusable).take_while(|&hash| self.known.contains_key(hash)).count();
        let total = usize::try_from(tokens.div_ceil(BLOCK_TOKENS)).unwrap_or(usize::MAX);
        let fresh = total.saturating_sub(found);
        let woken =
            blocks[..found].iter().filter(|h| self.known.get(h).is_some_and(|b| b.holders == 0)).count();
        if fresh > self.free() + self.idle.len() - woken && !alone {
            return None;
        }
        let mut holding = Holding { private: fresh, tokens, ..Holding::default() };
        for &hash in &blocks[..found] {
            self.hold(hash);
            holding.shared.push(hash);
        }
        self.make_room(fresh);
        self.private += fresh;
        holding.cached_tokens = u64::try_from(found).unwrap_or(0) * BLOCK_TOKENS;
        self.queries += tokens;
        self.hits += holding.cached_tokens;
        Some(holding)
    }

    /// Adds `tokens` generated tokens. False if there is no room for them: the sequence must be preempted.
    pub fn grow(&mut self, holding: &mut Holding, tokens: u64, alone: bool) -> bool {
        let before = holding.tokens.div_ceil(BLOCK_TOKENS);
        let more =
            usize::try_from((holding.tokens + tokens).div_ceil(BLOCK_TOKENS) - before).unwrap_or(usize::MAX);
        if more > self.free() + self.idle.len() && !alone {
            return false;
        }
        self.make_room(more);
        self.private += more;
        holding.private += more;
        holding.tokens += tokens;
        true
    }

    /// Takes back what a sequence held. `blocks` are the hashes of all full blocks it computed: they stay cached.
    pub fn release(&mut self, holding: Holding, blocks: &[u64]) {
        self.clock += 1;
        self.private = self.private.saturating_sub(holding.private);
        for hash in &holding.shared {
            if let Some(block) = self.known.get_mut(hash) {
                block.holders -= 1;
                if block.holders == 0 {
                    // The clock alone would not be unique: many blocks end at once.
                    self.clock += 1;
                    block.last_used = self.clock;
                    self.idle.insert(self.clock, *hash);
                }
            }
        }
        let computed = blocks.get(holding.shared.len()..).unwrap_or_default();
        for &hash in computed.iter().take(holding.private) {
            if self.free() == 0 && self.idle.is_empty() {
                break;
            }
            if !self.known.contains_key(&hash) {
                self.make_room(1);
                self.clock += 1;
                self.known.insert(hash, Block { holders: 0, last_used: self.clock });
                self.idle.insert(self.clock, hash);
            }
        }
    }

    /// Forgets every block that nobody holds.
    pub fn reset(&mut self) {
        for hash in std::mem::take(&mut self.idle).into_values() {
            self.known.remove(&hash);
        }
    }

    /// Share of the blocks in use by running sequences, 0 to 1.
    pub fn used_ratio(&self) -> f64 {
        let used = self.private + self.known.len() - self.idle.len();
        (used as f64 / self.capacity as f64).min(1.0)
    }

    /// Prompt tokens looked up so far, and those found.
    pub const fn queries_and_hits(&self) -> (u64, u64) {
        (self.queries, self.hits)
    }

    /// Blocks that exist.
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    fn free(&self) -> usize {
        self.capacity.saturating_sub(self.known.len() + self.private)
    }

    fn hold(&mut self, hash: u64) {
        if let Some(block) = self.known.get_mut(&hash) {
            if block.holders == 0 {
                self.idle.remove(&block.last_used);
            }
            block.holders += 1;
        }
    }

    /// Evicts the least recently used idle blocks until `wanted` blocks are free, or none is idle.
    fn make_room(&mut self, wanted: usize) {
        while self.free() < wanted {
            let Some((_, hash)) = self.idle.pop_first() else { return };
            self.known.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_second_equal_prompt_hits_all_but_the_last_token() {
        let mut kv = KvCache::new(100);
        let blocks = [11, 12, 13, 14];
        let first = kv.allocate(64, &blocks, false).unwrap();
        assert_eq!(first.cached_tokens, 0);
        kv.release(first, &blocks);
        let second = kv.allocate(64, &blocks, false).unwrap();
        assert_eq!(second.cached_tokens, 48, "the last token is computed, so its block is");
        assert_eq!(kv.queries_and_hits(), (128, 48));
        let longer = kv.allocate(70, &blocks, false).unwrap();
        assert_eq!(longer.cached_tokens, 64);
    }

    #[test]
    fn a_different_prefix_hits_nothing_behind_it() {
        let mut kv = KvCache::new(100);
        let first = kv.allocate(64, &[1, 2, 3, 4], false).unwrap();
        kv.release(first, &[1, 2, 3, 4]);
        assert_eq!(kv.allocate(64, &[9, 2, 3, 4], false).unwrap().cached_tokens, 0);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut kv = KvCache::new(3);
        for hash in [1, 2, 3] {
            let one = kv.allocate(16, &[hash], false).unwrap();
            kv.release(one, &[hash]);
        }
        let again = kv.allocate(17, &[1], false).unwrap();
        assert_eq!(again.cached_tokens, 16);
        kv.release(again, &[1]);
        let other = kv.allocate(16, &[4], false).unwrap();
        kv.release(other, &[4]);
        assert_eq!(kv.allocate(17, &[1], false).unwrap().cached_tokens, 16, "2 went, not 1");
    }

    #[test]
    fn a_full_cache_refuses_unless_alone() {
        let mut kv = KvCache::new(4);
        let mut first = kv.allocate(60, &[], false).unwrap();
        assert!((kv.used_ratio() - 1.0).abs() < 1e-9);
        assert!(kv.allocate(1, &[], false).is_none());
        assert!(kv.grow(&mut first, 4, false), "the last block has room for four");
        assert!(!kv.grow(&mut first, 1, false));
        assert!(kv.grow(&mut first, 1, true));
        kv.release(first, &[]);
        assert!(kv.used_ratio() < 1e-9);
        let whale = kv.allocate(1000, &[], true).unwrap();
        assert!((kv.used_ratio() - 1.0).abs() < 1e-9);
        kv.release(whale, &[]);
        assert!(kv.allocate(64, &[], false).is_some());
    }

    proptest! {
        /// Whatever comes and goes, the books balance: capacity is kept and nothing is left held at the end.
        #[test]
        fn books_balance(steps in proptest::collection::vec((0u8..3, 1u64..200, 0u64..4), 1..120)) {
            let mut kv = KvCache::new(20);
            let mut held: Vec<(Holding, Vec<u64>)> = Vec::new();
            for (action, tokens, family) in steps {
                let blocks: Vec<u64> = (0..tokens / 16).map(|i| family * 1000 + i).collect();
                match action {
                    0 => held.extend(kv.allocate(tokens, &blocks, false).map(|h| (h, blocks))),
                    1 => if let Some((holding, _)) = held.last_mut() { kv.grow(holding, tokens, false); },
                    _ => if let Some((holding, blocks)) = held.pop() { kv.release(holding, &blocks); },
                }
                prop_assert!(kv.known.len() + kv.private <= kv.capacity);
                prop_assert_eq!(kv.idle.len(), kv.known.values().filter(|b| b.holders == 0).count());
            }
            for (holding, blocks) in held {
                kv.release(holding, &blocks);
            }
            prop_assert_eq!(kv.private, 0);
            prop_assert!(kv.used_ratio() == 0.0);
        }
    }
}
