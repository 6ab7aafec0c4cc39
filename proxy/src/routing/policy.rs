//! Which of the endpoints that are left takes a request: one function over plain data, the same for the proxy and for the
//! simulator ([`crate::simulator`]).
//!
//! - *Least loaded*: where it has the fewest requests under way itself; ties go to a random one of the tied, so that an idle
//!   pool is not always begun at its first endpoint. Looking at all of them costs under a microsecond for a hundred. Where
//!   engines' reports tell of others' requests, that one and one random other are compared by the estimate, and the less busy
//!   takes it. The estimate is not minimised over all: every proxy that has the same report would run to the same engine
//!   until the next (docs/routing.md has the figures); each has its own least busy, and its own random other.
//! - *Power of two*: the better of two random ones. Worse than all where the estimate is good; better where many proxies
//!   act on the same old reports, since they do not all run to the same place.
//! - *Round robin*: in turn, load not looked at.
//! - *Prefix affinity*: who got the longest known prefix of the prompt ([`super::prefix`]).
//! - *Session affinity*: whose the session is ([`super::affinity`]).
//!
//! Both affinities give way to the load bound, and then, as for requests without a session or a known prefix, the least
//! loaded takes it: never "the first".
//!
//! Zones: endpoints elsewhere carry a handicap of `zone_spill` requests. So traffic stays home until the best endpoint at
//! home is that much busier than the best elsewhere, and leaves by degrees, without a threshold at which all of it jumps.
//! Affinity does not look at zones: a prompt computed twice costs more than a trip to the next building.

use std::sync::{
    Mutex, OnceLock, PoisonError,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

pub use penstock_config::proxy::Policy;

use super::{
    affinity::{self, LoadBound},
    load::{FULL_WEIGHT, score},
    prefix::PrefixTable,
};

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// By what.
    pub policy: Policy,
    /// Where affinity ends.
    pub bound: LoadBound,
    /// Requests by which an endpoint of another zone must be less busy to be taken.
    pub zone_spill: u32,
    /// Entries of the prefix table.
    pub prefix_entries: usize,
}

/// An endpoint that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Its name in hashes, see [`affinity::HashKey::endpoint`].
    pub key: u64,
    /// Requests thought to be there, see [`super::load::estimate`].
    pub load: u32,
    /// Those of them that are the chooser's own; at most `load`.
    pub own: u32,
    /// Of [`FULL_WEIGHT`], see [`super::load::weight`].
    pub weight: u32,
    /// Whether it is in the chooser's zone.
    pub near: bool,
}

impl Default for View {
    /// An idle, full-grown endpoint near by.
    fn default() -> Self {
        Self { key: 0, load: 0, own: 0, weight: FULL_WEIGHT, near: true }
    }
}

/// What is known of the request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked<'a> {
    /// Keyed hash of whatever names its session.
    pub session: Option<u64>,
    /// Keyed hashes of its prompt's prefixes, the shortest first.
    pub prefix: &'a [u64],
    /// Only an engine that has this adapter loaded can answer.
    pub adapter: Option<&'a str>,
}

/// What a pool remembers from pick to pick. Bounded; survives changes of the pool.
#[derive(Debug, Default)]
pub struct Memory {
    turn: AtomicUsize,
    prefixes: OnceLock<Mutex<PrefixTable>>,
}

/// Why it became this endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By load or by turn.
    Balanced,
    /// It is the session's, or holds the prefix.
    Affine,
    /// The one with affinity was too busy.
    Spilled,
}

impl How {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Balanced, Self::Affine, Self::Spilled];

    /// For metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Affine => "affine",
            Self::Spilled => "spilled",
        }
    }
}

/// One of `views` by its index, or `None` when there are none. `chance` gives a number in `0..n`.
pub fn choose(
    rules: &Rules,
    views: &[View],
    asked: &Asked<'_>,
    memory: &Memory,
    chance: &mut impl FnMut(usize) -> usize,
) -> Option<(usize, How)> {
    let balanced = |index: Option<usize>| index.map(|index| (index, How::Balanced));
    match rules.policy {
        Policy::LeastLoaded => balanced(zoned(views, rules, |set| set.least_loaded(chance))),
        Policy::PowerOfTwo => balanced(zoned(views, rules, |set| set.two_random(chance))),
        Policy::RoundRobin => {
            let turn = memory.turn.fetch_add(1, Relaxed);
            balanced(zoned(views, rules, |set| set.nth(turn.checked_rem(set.len()).unwrap_or_default())))
        }
        Policy::SessionAffinity => {
            let Some(session) = asked.session else {
                return balanced(zoned(views, rules, |set| set.least_loaded(chance)));
            };
            match affinity::rendezvous(session, views, rules.bound) {
                (home, Some(index)) if home == Some(index) => Some((index, How::Affine)),
                (_, Some(next)) => Some((next, How::Spilled)),
                (_, None) => {
                    zoned(views, rules, |set| set.least_loaded(chance)).map(|index| (index, How::Spilled))
                }
            }
        }
        Policy::PrefixAffinity if asked.prefix.is_empty() => {
            balanced(zoned(views, rules, |set| set.least_loaded(chance)))
        }
        Policy::PrefixAffinity => {
            let table = memory.prefixes.get_or_init(|| Mutex::new(PrefixTable::new(rules.prefix_entries)));
            // A poisoned table is at worst a wrong guess.
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            let (index, how) = match holder(&table, views, asked.prefix, rules.bound) {
                Some(Some(index)) => (index, How::Affine),
                busy_or_unknown => {
                    let index = zoned(views, rules, |set| set.least_loaded(chance))?;
                    (index, if busy_or_unknown.is_some() { How::Spilled } else { How::Balanced })
                }
            };
            table.remember(asked.prefix, low(views.get(index)?.key));
            Some((index, how))
        }
    }
}

/// The low half of an endpoint's key, never 0.
fn low(key: u64) -> u32 {
    u32::try_from(key & u64::from(u32::MAX)).unwrap_or_default().max(1)
}

/// The least busy holder of the longest prefix that anybody among `views` has; `Some(None)` if all of them are too busy.
fn holder(table: &PrefixTable, views: &[View], prefix: &[u64], bound: LoadBound) -> Option<Option<usize>> {
    let limit = bound.limit(views);
    let at = |holder: u32| views.iter().position(|view| low(view.key) == holder);
    let (_, holders) = table.holders(prefix, |holder| at(holder).is_some())?;
    let free = holders.filter_map(at).filter_map(|index| Some((index, views.get(index)?)));
    let free = free.filter(|(_, view)| LoadBound::admits(limit, view));
    Some(free.min_by_key(|(_, view)| score(view.load, view.weight)).map(|(index, _)| index))
}

/// The choice of `rule` near by, or its choice elsewhere if that is less busy by more than the handicap.
fn zoned(views: &[View], rules: &Rules, mut rule: impl FnMut(Set<'_>) -> Option<usize>) -> Option<usize> {
    let near = views.iter().filter(|view| view.near).count();
    if near == 0 || near == views.len() {
        return rule(Set { views, near: None });
    }
    let here = rule(Set { views, near: Some(true) })?;
    let there = rule(Set { views, near: Some(false) })?;
    let busy = |index: usize| views.get(index).map_or(u64::MAX, |view| score(view.load, view.weight));
    let handicap = u64::from(rules.zone_spill) * u64::from(FULL_WEIGHT);
    Some(if busy(there).saturating_add(handicap) < busy(here) { there } else { here })
}

/// All of the views, or those of one side.
#[derive(Clone, Copy)]
struct Set<'a> {
    views: &'a [View],
    near: Option<bool>,
}

impl<'a> Set<'a> {
    fn iter(self) -> impl Iterator<Item = (usize, &'a View)> {
        self.views.iter().enumerate().filter(move |(_, view)| self.near.is_none_or(|near| view.near == near))
    }

    fn len(self) -> usize {
        self.iter().count()
    }

    fn nth(self, n: usize) -> Option<usize> {
        self.iter().nth(n).map(|(index, _)| index)
    }

    fn least_loaded(self, chance: &mut impl FnMut(usize) -> usize) -> Option<usize> {
        let mut best: Option<(usize, u64)> = None;
        let (mut ties, mut foreign) = (0, false);
        for (index, view) in self.iter() {
            let busy = score(view.own, view.weight);
            foreign |= view.load > view.own;
            match best {
                Some((_, least)) if busy > least => {}
                Some((_, least)) if busy == least => {
                    // Reservoir sampling: each of the tied has the same chance.
                    ties += 1;
                    if chance(ties) == 0 {
                        best = Some((index, busy));
                    }
                }
                _ => {
                    ties = 1;
                    best = Some((index, busy));
                }
            }
        }
        let (least, _) = best?;
        if !foreign {
            return Some(least);
        }
        let other = self.nth(chance(self.len()))?;
        Some(if self.busy(other) < self.busy(least) { other } else { least })
    }

    fn busy(self, index: usize) -> u64 {
        self.views.get(index).map_or(u64::MAX, |view| score(view.load, view.weight))
    }

    fn two_random(self, chance: &mut impl FnMut(usize) -> usize) -> Option<usize> {
        let all = self.len();
        if all < 2 {
            return self.nth(0);
        }
        let first = chance(all);
        let second = (first + 1 + chance(all - 1)) % all;
        let (first, second) = (self.nth(first)?, self.nth(second)?);
        Some(if self.busy(second) < self.busy(first) { second } else { first })
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
