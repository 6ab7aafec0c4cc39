//! What a pick looked at, written down for those who ask why: see [`super::pick_seen`].
//!
//! Bounded: counts of everything, and at most [`SHOWN`] candidates by name, the chosen one and the least busy of the rest.

use std::sync::Arc;

use super::{load::score, policy::View};
use crate::endpoints::{Endpoint, reported::ReportedLoad};

/// Most candidates that are kept by name.
pub const SHOWN: usize = 16;

/// One pick's view of its pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Considered {
    /// Endpoints of the pool.
    pub endpoints: usize,
    /// Endpoints left by the filters.
    pub candidates: usize,
    /// Endpoints taken out, by filter; only filters that took any.
    pub out: Vec<(&'static str, usize)>,
    /// Whether endpoints were looked at that health would take out, because too much of the pool was out.
    pub panic: bool,
    /// The best of the candidates, the chosen one first.
    pub shown: Vec<Candidate>,
}

/// An endpoint that might have been chosen, as it was at that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: Arc<str>,
    /// Requests of this proxy under way there.
    pub local: u32,
    /// Requests thought to be there in all: what was compared.
    pub load: u32,
    /// Its share of a full-grown endpoint's load, in thousandths.
    pub weight: u32,
    /// Whether it is in this proxy's zone.
    pub near: bool,
    /// What the engine last said of its load, and how old that was; `None`: nothing yet.
    pub reported: Option<ReportedLoad>,
    /// The state of its health; an ejected one is a candidate by panic only.
    pub health: &'static str,
}

impl Considered {
    /// Of a pool of which nobody could be picked: why each was left out.
    pub fn nobody(pool: &[Arc<Endpoint>], tried: &[Arc<str>], adapter: Option<&str>, now_ms: u64) -> Self {
        Self::of(pool, (tried, adapter), &[], &[], None, now_ms)
    }

    /// Of `pool`, the filters left `left`, which the policy saw as `views` and of which it chose one.
    pub(super) fn of(
        pool: &[Arc<Endpoint>],
        (tried, adapter): (&[Arc<str>], Option<&str>),
        left: &[&Arc<Endpoint>],
        views: &[View],
        chosen: Option<usize>,
        now_ms: u64,
    ) -> Self {
        let mut seen = Self { endpoints: pool.len(), candidates: left.len(), ..Self::default() };
        let mut kept: Vec<*const Endpoint> = left.iter().map(|endpoint| Arc::as_ptr(endpoint)).collect();
        kept.sort_unstable();
        for endpoint in pool {
            if kept.binary_search(&Arc::as_ptr(endpoint)).is_ok() {
                continue;
            }
            let filter = match () {
                () if endpoint.draining => "draining",
                () if adapter.is_some_and(|name| !endpoint.adapters.contains(name)) => "no_adapter",
                () if tried.contains(&endpoint.id) => "tried",
                () if !endpoint.vitals().is_open(now_ms) => endpoint.vitals().phase(now_ms).label(),
                () => "full",
            };
            match seen.out.iter_mut().find(|(name, _)| *name == filter) {
                Some((_, count)) => *count += 1,
                None => seen.out.push((filter, 1)),
            }
        }
        seen.panic = left.iter().any(|endpoint| !endpoint.vitals().is_open(now_ms));
        let mut best: Vec<(usize, &View)> = views.iter().enumerate().collect();
        let rank = |&(index, view): &(usize, &View)| (chosen != Some(index), score(view.load, view.weight));
        if best.len() > SHOWN {
            best.select_nth_unstable_by_key(SHOWN, rank);
            best.truncate(SHOWN);
        }
        best.sort_by_key(rank);
        let candidate = |(index, view): (usize, &View)| {
            let endpoint = left.get(index)?;
            Some(Candidate {
                id: Arc::clone(&endpoint.id),
                local: endpoint.inflight(),
                load: view.load,
                weight: view.weight,
                near: view.near,
                reported: endpoint.reported(now_ms),
                health: endpoint.vitals().phase(now_ms).label(),
            })
        };
        seen.shown = best.into_iter().filter_map(candidate).collect();
        seen
    }
}
