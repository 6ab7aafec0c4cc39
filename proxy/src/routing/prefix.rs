//! Which endpoint probably holds a prompt's beginning in its cache.
//!
//! A prompt is cut into blocks of bytes; each block's hash covers everything up to its end ([`Chain`]), so two prompts
//! have a hash in common exactly as far as they begin alike. [`PrefixTable`] remembers for each hash who got such a
//! prompt last. The longest known prefix decides.
//!
//! A table and not a tree: a tree of prompts splits and has to be merged again, grows with what clients send, and needs
//! care when endpoints go. Here memory is fixed when the table is made (32 bytes an entry), the oldest entry of a small
//! set gives way, and an endpoint that went is simply nobody's candidate any more: entries that name it lead nowhere and
//! age out. Hashes are keyed, so no client can aim at a set or at another's entries.
//!
//! A wrong guess (two names of endpoints that look alike in 32 bits, an engine that has evicted) costs one prefill.

#![allow(
    deprecated,
    reason = "std's keyed SipHash; DefaultHasher, named as its replacement, has a fixed key"
)]

use std::hash::{Hasher, SipHasher};

use super::affinity::HashKey;

/// How prompts are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Bytes of a block; at least 1.
    pub bytes: usize,
    /// Blocks looked at; what lies behind does not count.
    pub most: usize,
}

/// The hashes of a prompt's prefixes, made while the prompt passes by.
#[derive(Debug, Clone)]
pub struct Chain {
    hasher: SipHasher,
    blocks: Blocks,
    filled: usize,
    hashes: Vec<u64>,
}

impl Chain {
    /// Nothing seen yet.
    pub fn new(key: HashKey, blocks: Blocks) -> Self {
        Self { hasher: key.hasher(), blocks, filled: 0, hashes: Vec::new() }
    }

    /// The next part of the prompt: a whole text, or a run of token ids. Two parts are not the same as both in one.
    pub fn push(&mut self, part: &[u8]) {
        self.take(part);
        self.take(&[0xff]); // no byte of UTF-8
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.hashes.len() < self.blocks.most {
            let room = self.blocks.bytes.max(1) - self.filled;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.hasher.write(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == self.blocks.bytes.max(1) {
                self.hashes.push(self.hasher.finish());
                self.filled = 0;
            }
        }
    }

    /// One hash for each whole block, of all bytes up to its end.
    pub fn hashes(self) -> Vec<u64> {
        self.hashes
    }
}

/// Entries that share a place: a hash may lie in any of them.
const WAYS: usize = 8;

/// Endpoints remembered for one prefix: a hot one is held by several.
const HOLDERS: usize = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// 0 is free.
    hash: u64,
    /// Low halves of endpoint keys, the latest first; 0 is none.
    holders: [u32; HOLDERS],
    /// When it was last remembered, in the table's own count.
    used: u64,
}

/// Who got which prefix. Its memory is fixed from the start.
#[derive(Debug)]
pub struct PrefixTable {
    sets: Vec<[Entry; WAYS]>,
    clock: u64,
}

impl PrefixTable {
    /// A table of `entries`, rounded up to whole sets.
    pub fn new(entries: usize) -> Self {
        Self { sets: vec![Default::default(); entries.div_ceil(WAYS).max(1)], clock: 0 }
    }

    /// Entries there is room for.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// The endpoints that got the longest known prefix of `hashes` and are wanted; `wanted` is asked for low halves of
    /// keys. Prefixes that only unwanted endpoints have are as good as unknown. With it the number of blocks known.
    pub fn holders(
        &self,
        hashes: &[u64],
        wanted: impl Fn(u32) -> bool,
    ) -> Option<(usize, impl Iterator<Item = u32>)> {
        hashes.iter().enumerate().rev().find_map(|(index, hash)| {
            let entry = self.find(*hash)?;
            let here = entry.holders.map(|holder| if holder != 0 && wanted(holder) { holder } else { 0 });
            let found = here.into_iter().filter(|holder| *holder != 0);
            here.iter().any(|holder| *holder != 0).then_some((index + 1, found))
        })
    }

    fn find(&self, hash: u64) -> Option<&Entry> {
        self.sets.get(self.place(hash))?.iter().find(|entry| entry.hash == hash && hash != 0)
    }

    fn place(&self, hash: u64) -> usize {
        let sets = u64::try_from(self.sets.len()).unwrap_or(u64::MAX);
        // The high bits, scaled: below the number of sets.
        usize::try_from((u128::from(hash) * u128::from(sets)) >> 64).unwrap_or_default()
    }

    /// The endpoint with this low half of a key gets a prompt with these prefixes.
    pub fn remember(&mut self, hashes: &[u64], holder: u32) {
        self.clock += 1;
        for hash in hashes.iter().copied().filter(|hash| *hash != 0) {
            let place = self.place(hash);
            let Some(set) = self.sets.get_mut(place) else { return };
            let known = set.iter().position(|entry| entry.hash == hash);
            let oldest = || set.iter().enumerate().min_by_key(|(_, entry)| entry.used).map(|(way, _)| way);
            let Some(entry) = known.or_else(oldest).and_then(|way| set.get_mut(way)) else { return };
            if entry.hash != hash {
                *entry = Entry { hash, ..Entry::default() };
            }
            entry.used = self.clock;
            // To the front; whoever was there moves back, the last one out.
            let from = entry.holders.iter().position(|h| *h == holder).unwrap_or(HOLDERS - 1);
            entry.holders[..=from].rotate_right(1);
            entry.holders[0] = holder;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: Blocks = Blocks { bytes: 4, most: 8 };

    fn hashes(parts: &[&str]) -> Vec<u64> {
        let mut chain = Chain::new(HashKey::from_secret("k"), BLOCKS);
        parts.iter().for_each(|part| chain.push(part.as_bytes()));
        chain.hashes()
    }

    fn found(table: &PrefixTable, hashes: &[u64], gone: &[u32]) -> Option<(usize, Vec<u32>)> {
        let (depth, holders) = table.holders(hashes, |holder| !gone.contains(&holder))?;
        Some((depth, holders.collect()))
    }

    #[test]
    fn prompts_share_hashes_as_far_as_they_begin_alike() {
        let (a, b) = (hashes(&["abcdefgh", "ijkl"]), hashes(&["abcdefgX", "ijkl"]));
        assert_eq!(a.len(), 3);
        assert_eq!(a[0], b[0]);
        assert!(a[1] != b[1] && a[2] != b[2], "a difference is never forgotten");
        assert_eq!(hashes(&["abcdefgh", "ijkl", "more and more"])[..3], a, "a longer talk begins the same");
        assert_ne!(hashes(&["abc", "d"]), hashes(&["ab", "cd"]), "parts do not run together");
        assert_eq!(hashes(&["x".repeat(500).as_str()]).len(), 8, "no more than asked for");
    }

    #[test]
    fn the_longest_prefix_that_is_still_held_decides() {
        let mut table = PrefixTable::new(64);
        let (short, long) = (hashes(&["abcd"]), hashes(&["abcdefgh"]));
        assert_eq!(found(&table, &long, &[]), None);
        table.remember(&short, 1);
        assert_eq!(found(&table, &long, &[]), Some((1, vec![1])));
        table.remember(&long, 2);
        assert_eq!(found(&table, &long, &[]), Some((2, vec![2])));
        assert_eq!(found(&table, &long, &[2]), Some((1, vec![1])), "who went is forgotten");
        assert_eq!(found(&table, &long, &[1, 2]), None);
    }

    #[test]
    fn several_may_hold_a_hot_prefix_and_the_last_ones_are_kept() {
        let mut table = PrefixTable::new(8);
        for holder in [1, 2, 3, 4, 5, 3] {
            table.remember(&[77], holder);
        }
        assert_eq!(found(&table, &[77], &[]), Some((1, vec![3, 5, 4, 2])));
    }

    #[test]
    fn the_oldest_gives_way() {
        let mut table = PrefixTable::new(8);
        for hash in 1..=8 {
            table.remember(&[hash], 1);
        }
        table.remember(&[1], 1);
        table.remember(&[9], 1);
        assert!(found(&table, &[1], &[]).is_some() && found(&table, &[9], &[]).is_some());
        assert!(found(&table, &[2], &[]).is_none());
    }

    proptest! {
        #[test]
        fn memory_does_not_grow_and_what_was_just_said_is_known(
            prompts in prop::collection::vec((prop::collection::vec(1u64.., 1..8), 1u32..50), 1..200), entries in 1usize..100,
        ) {
            let mut table = PrefixTable::new(entries);
            let capacity = table.capacity();
            prop_assert!(capacity < entries + WAYS);
            for (hashes, holder) in prompts {
                table.remember(&hashes, holder);
                prop_assert!(found(&table, &hashes, &[]).expect("just said").1.contains(&holder));
                prop_assert_eq!((table.capacity(), table.sets.capacity()), (capacity, capacity / WAYS));
            }
        }
    }
}
