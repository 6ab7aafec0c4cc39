//! Which endpoint takes a request: filter, then the least loaded.
//!
//! Least loaded is the smallest number of requests under way from this proxy; ties go to a random one of the tied, so
//! that an idle pool is not always begun at its first endpoint. Every endpoint is looked at: a pool of 100 costs less than
//! a microsecond, and two random candidates would be worse where all of them can be compared.
//!
//! Filters, in order: not draining, not tried by this request before, not ejected. At most a share of the pool may be out
//! for failures: beyond it, and when none is left at all (*panic*), ejections are not looked at, since trying a sick
//! engine beats refusing a client.

use std::sync::Arc;

use crate::endpoints::{Endpoint, Pool, Ticket};

/// What a pick may look at besides the pool.
#[derive(Debug, Clone, Copy)]
pub struct PickRules {
    /// Largest share of a pool that ejections may take away, in percent.
    pub max_ejected_percent: u32,
}

/// Reserves a place at the best endpoint, or `None` when the pool has none that this request has not tried.
/// `chance` gives a number in `0..n`.
pub fn pick(
    pool: &Pool,
    tried: &[Arc<str>],
    now_ms: u64,
    rules: PickRules,
    mut chance: impl FnMut(usize) -> usize,
) -> Option<Ticket> {
    let eligible = |endpoint: &Endpoint| !endpoint.draining && !tried.contains(&endpoint.id);
    let respect_ejections = !too_many_ejected(&pool.endpoints, now_ms, rules.max_ejected_percent);
    let mut best = least_loaded(&pool.endpoints, &mut chance, |e| {
        eligible(e) && !(respect_ejections && e.is_ejected(now_ms))
    });
    if best.is_none() && respect_ejections {
        best = least_loaded(&pool.endpoints, &mut chance, eligible);
    }
    best.map(Endpoint::reserve)
}

fn too_many_ejected(endpoints: &[Arc<Endpoint>], now_ms: u64, max_percent: u32) -> bool {
    let (mut out, mut all) = (0usize, 0usize);
    for endpoint in endpoints.iter().filter(|e| !e.draining) {
        all += 1;
        out += usize::from(endpoint.is_ejected(now_ms));
    }
    out * 100 > all * max_percent as usize
}

fn least_loaded<'a>(
    endpoints: &'a [Arc<Endpoint>],
    chance: &mut impl FnMut(usize) -> usize,
    eligible: impl Fn(&Endpoint) -> bool,
) -> Option<&'a Arc<Endpoint>> {
    let mut best: Option<(&Arc<Endpoint>, u32)> = None;
    let mut ties = 0;
    for endpoint in endpoints.iter().filter(|e| eligible(e)) {
        let load = endpoint.inflight();
        match best {
            Some((_, least)) if load > least => {}
            Some((_, least)) if load == least => {
                // Reservoir sampling: each of the tied has the same chance.
                ties += 1;
                if chance(ties) == 0 {
                    best = Some((endpoint, load));
                }
            }
            _ => {
                ties = 1;
                best = Some((endpoint, load));
            }
        }
    }
    best.map(|(endpoint, _)| endpoint)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        endpoints::{endpoint::tests::endpoint, outlier::Rules},
        upstream::retry::RetryBudget,
    };

    const RULES: PickRules = PickRules { max_ejected_percent: 67 };
    const EJECT: Rules = Rules { consecutive_failures: 1, base_ejection_ms: 1_000, max_ejection_ms: 1_000 };

    fn pool(n: usize) -> Pool {
        Pool {
            endpoints: (0..n).map(|i| endpoint(&format!("e{i}"))).collect(),
            budget: Arc::new(RetryBudget::new(10, 10)),
            source: Arc::default(),
        }
    }

    fn picked(ticket: &Option<Ticket>) -> Option<&str> {
        ticket.as_ref().map(|t| &*t.endpoint().id)
    }

    #[test]
    fn the_least_loaded_wins_and_the_pick_counts_at_once() {
        let pool = pool(3);
        let _busy = (pool.endpoints[0].reserve(), pool.endpoints[0].reserve(), pool.endpoints[2].reserve());
        let ticket = pick(&pool, &[], 0, RULES, |_| 0);
        assert_eq!(picked(&ticket), Some("e1"));
        assert_eq!(pool.endpoints[1].inflight(), 1);
    }

    #[test]
    fn tried_draining_and_ejected_endpoints_are_passed_over() {
        let pool = pool(3);
        pool.endpoints[0].failed(0, &EJECT);
        assert_eq!(picked(&pick(&pool, &["e1".into()], 10, RULES, |_| 0)), Some("e2"));
    }

    #[test]
    fn with_everything_ejected_all_are_tried_rather_than_none() {
        let pool = pool(2);
        for endpoint in &pool.endpoints {
            endpoint.failed(0, &EJECT);
        }
        assert!(pick(&pool, &[], 10, RULES, |_| 0).is_some());
    }

    #[test]
    fn nothing_is_left_once_all_are_tried() {
        let pool = pool(2);
        assert!(pick(&pool, &["e0".into(), "e1".into()], 0, RULES, |_| 0).is_none());
    }

    proptest! {
        #[test]
        fn a_pick_is_never_busier_than_another_that_was_free_to_take(
            loads in prop::collection::vec(0usize..6, 1..12), seed in any::<u64>()
        ) {
            let pool = pool(loads.len());
            let mut held = vec![];
            for (endpoint, load) in pool.endpoints.iter().zip(&loads) {
                held.extend((0..*load).map(|_| endpoint.reserve()));
            }
            let mut rng = fastrand::Rng::with_seed(seed);
            let ticket = pick(&pool, &[], 0, RULES, |n| rng.usize(0..n)).expect("one is eligible");
            let least = loads.iter().min().copied().unwrap_or(0);
            prop_assert_eq!(ticket.endpoint().inflight() as usize, least + 1);
        }

        #[test]
        fn an_idle_pool_is_spread(seed in any::<u64>()) {
            let pool = pool(4);
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut hits = [0usize; 4];
            for _ in 0..400 {
                let ticket = pick(&pool, &[], 0, RULES, |n| rng.usize(0..n)).expect("one is eligible");
                let index = pool.endpoints.iter().position(|e| e.id == ticket.endpoint().id).expect("known");
                hits[index] += 1;
            }
            prop_assert!(hits.iter().all(|&h| h > 40), "{:?}", hits);
        }
    }
}
