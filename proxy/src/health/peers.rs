//! Who does worse than the rest of its pool. Pure: numbers in, verdicts out.
//!
//! # Success rate
//!
//! Two rules, for two sizes of pool; each looks only at endpoints with enough requests.
//!
//! *Five and more*: an endpoint is out if its rate is below mean − factor · stdev over the pool, Envoy's rule
//! (`outlier_detection.success_rate_stdev_factor` in envoyproxy.io's reference of `config.cluster.v3.OutlierDetection`, default
//! 1.9), and below 95 %. The second half is ours: in a pool that answers all but one request in a thousand, a tiny
//! difference is many deviations.
//!
//! *Any size*: an endpoint is out if its rate is below `floor` and the others' together is a tenth better. Among n values one
//! alone is never more than √(n−1) deviations from the mean, so with four endpoints Envoy's rule finds nobody, however bad. That
//! the others do better keeps a failure they share (a bad client, a missing file) from taking capacity away.
//!
//! # Speed
//!
//! An endpoint is out if even the fastest of its last five streams took `factor` times, and `floor` longer, than the
//! others' usual one (the median of their medians) to its first token. The fastest, because a few long prompts make any
//! engine slow for some; five in a row that are all slow are no chance. A longer queue is no fault: where the endpoint has
//! more requests under way than the others have on average, it may take as many times longer.
//! Only streams are compared: the time of a whole answer is its length.

use super::{
    state::Reason,
    window::{Speed, Tally},
};

/// Hosts from which on deviations say something; Envoy's `success_rate_minimum_hosts`.
const DEVIATION_HOSTS: usize = 5;

/// Above this rate nobody is an outlier by deviation.
const GOOD_ENOUGH: f64 = 0.95;

/// How much better the others must do, as a rate.
const MARGIN: f64 = 0.1;

/// The rules of comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// Rate below which an endpoint is out, 0 to 1; 0: never.
    pub floor_rate: f64,
    /// Deviations below the mean; 0: never.
    pub stdev_factor: f64,
    /// Times the usual first-token time; 0: never.
    pub latency_factor: u64,
    /// And at least this much longer, in milliseconds.
    pub latency_floor_ms: u64,
}

/// One admitted endpoint of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Standing {
    /// Its requests of late, if there were enough.
    pub tally: Option<Tally>,
    /// Its first-token times, if there were enough.
    pub speed: Option<Speed>,
    /// Requests under way.
    pub inflight: u32,
}

/// Indices of those that are out, and why. Success comes before speed: who fails fast is not fast.
pub fn outliers(pool: &[Standing], rules: &Rules) -> Vec<(usize, Reason)> {
    let line = deviation_line(pool, rules);
    let verdict = |at: usize, one: &Standing| {
        if one.tally.is_some_and(|tally| fails(at, tally, pool, line, rules)) {
            Some((at, Reason::SuccessRate))
        } else {
            is_slow(at, one, pool, rules).then_some((at, Reason::Latency))
        }
    };
    pool.iter().enumerate().filter_map(|(at, one)| verdict(at, one)).collect()
}

fn fails(at: usize, tally: Tally, pool: &[Standing], line: Option<f64>, rules: &Rules) -> bool {
    let rate = tally.rate();
    let deviates = line.is_some_and(|line| rate < line && rate < GOOD_ENOUGH);
    deviates || rate < rules.floor_rate && rate + MARGIN < rate_of_others(at, pool)
}

/// The rate below which Envoy's rule ejects.
fn deviation_line(pool: &[Standing], rules: &Rules) -> Option<f64> {
    let rates: Vec<f64> = pool.iter().filter_map(|one| one.tally).map(Tally::rate).collect();
    if rules.stdev_factor <= 0.0 || rates.len() < DEVIATION_HOSTS {
        return None;
    }
    let count = rates.len() as f64;
    let mean = rates.iter().sum::<f64>() / count;
    let variance = rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / count;
    Some(mean - rules.stdev_factor * variance.sqrt())
}

/// Of all requests to the others; with none, they are thought to do well.
fn rate_of_others(at: usize, pool: &[Standing]) -> f64 {
    let others = pool.iter().enumerate().filter(|(other, _)| *other != at);
    let add = |sum: Tally, tally: Tally| Tally {
        good: sum.good.saturating_add(tally.good),
        bad: sum.bad.saturating_add(tally.bad),
    };
    others.filter_map(|(_, one)| one.tally).fold(Tally::default(), add).rate()
}

fn is_slow(at: usize, one: &Standing, pool: &[Standing], rules: &Rules) -> bool {
    let Some(speed) = one.speed else { return false };
    let others: Vec<(u64, u32)> = pool
        .iter()
        .enumerate()
        .filter(|(other, _)| *other != at)
        .filter_map(|(_, other)| Some((other.speed?.median_ms, other.inflight)))
        .collect();
    if rules.latency_factor == 0 || others.is_empty() {
        return false;
    }
    let mut medians: Vec<u64> = others.iter().map(|(median, _)| *median).collect();
    medians.sort_unstable();
    let usual = medians.get(medians.len() / 2).copied().unwrap_or(0);
    // Requests here for each one there, both plus one; never less than one for one.
    let load: u64 = others.iter().map(|(_, inflight)| u64::from(*inflight) + 1).sum();
    let here = (u64::from(one.inflight) + 1).saturating_mul(others.len() as u64).max(load);
    let explained = usual.saturating_mul(rules.latency_factor).saturating_mul(here) / load.max(1);
    speed.fastest_ms > explained && speed.fastest_ms > usual.saturating_add(rules.latency_floor_ms)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules =
        Rules { floor_rate: 0.7, stdev_factor: 1.9, latency_factor: 3, latency_floor_ms: 1_000 };

    fn rated(good: u32, bad: u32) -> Standing {
        Standing { tally: Some(Tally { good, bad }), ..Standing::default() }
    }

    fn timed(fastest_ms: u64, median_ms: u64, inflight: u32) -> Standing {
        Standing { speed: Some(Speed { fastest_ms, median_ms }), inflight, tally: None }
    }

    #[test]
    fn one_that_fails_half_of_its_requests_is_out_in_a_pool_of_any_size() {
        for others in 1..8 {
            let mut pool = vec![rated(100, 0); others];
            pool.push(rated(20, 20));
            assert_eq!(outliers(&pool, &RULES), [(others, Reason::SuccessRate)], "{others} others");
        }
    }

    #[test]
    fn a_failure_that_all_share_ejects_nobody() {
        assert!(outliers(&[rated(50, 50); 4], &RULES).is_empty());
        assert!(outliers(&[rated(10, 90), rated(11, 89), rated(12, 88)], &RULES).is_empty());
    }

    #[test]
    fn in_a_large_pool_a_rate_of_ninety_percent_stands_out_and_a_tiny_difference_does_not() {
        let mut pool = vec![rated(1_000, 1); 9];
        pool.push(rated(90, 10));
        assert_eq!(outliers(&pool, &RULES), [(9, Reason::SuccessRate)]);
        pool[9] = rated(980, 20);
        assert!(outliers(&pool, &RULES).is_empty());
    }

    #[test]
    fn without_enough_requests_nobody_is_judged() {
        assert!(outliers(&[Standing::default(), rated(100, 0)], &RULES).is_empty());
    }

    #[test]
    fn two_seconds_more_than_the_others_is_slow() {
        let pool = [timed(20, 30, 3), timed(2_020, 2_050, 3), timed(18, 25, 2)];
        assert_eq!(outliers(&pool, &RULES), [(1, Reason::Latency)]);
        assert_eq!(outliers(&pool[..2], &RULES), [(1, Reason::Latency)], "one other is enough");
        assert!(outliers(&pool[1..2], &RULES).is_empty(), "alone there is nothing to compare with");
    }

    #[test]
    fn a_few_long_prompts_make_nobody_slow() {
        let pool = [timed(20, 30, 3), timed(25, 9_000, 3)];
        assert!(outliers(&pool, &RULES).is_empty());
    }

    #[test]
    fn a_long_queue_explains_a_long_wait() {
        let busy = [timed(900, 1_000, 10), timed(5_900, 6_000, 60)];
        assert!(outliers(&busy, &RULES).is_empty(), "six times the requests, six times the wait");
        let slow = [timed(900, 1_000, 10), timed(5_900, 6_000, 10)];
        assert_eq!(outliers(&slow, &RULES), [(1, Reason::Latency)]);
        assert!(outliers(&[timed(9_000, 9_000, 50); 3], &RULES).is_empty(), "all are busy");
    }

    #[test]
    fn off_is_off() {
        let off = Rules { floor_rate: 0.0, stdev_factor: 0.0, latency_factor: 0, latency_floor_ms: 0 };
        let mut pool = vec![rated(100, 0); 9];
        pool.extend([rated(0, 100), timed(9, 9, 1), timed(9_000, 9_000, 1)]);
        assert!(outliers(&pool, &off).is_empty());
    }

    fn standing() -> impl Strategy<Value = Standing> {
        let tally = prop::option::of((0u32..200, 0u32..200).prop_map(|(good, bad)| Tally { good, bad }));
        let speed = prop::option::of(
            (0u64..5_000, 0u64..5_000)
                .prop_map(|(fastest_ms, more)| Speed { fastest_ms, median_ms: fastest_ms + more }),
        );
        (tally, speed, 0u32..100).prop_map(|(tally, speed, inflight)| Standing { tally, speed, inflight })
    }

    proptest! {
        #[test]
        fn the_best_of_a_pool_is_never_out(pool in prop::collection::vec(standing(), 1..20)) {
            let out = outliers(&pool, &RULES);
            let rated = |at: usize| pool[at].tally.map(Tally::rate);
            let best = (0..pool.len()).filter_map(rated).fold(0.0, f64::max);
            for (at, reason) in out {
                match reason {
                    Reason::SuccessRate => prop_assert!(rated(at).is_some_and(|rate| rate < best || pool.iter().filter(|s| s.tally.is_some()).count() == 1)),
                    _ => {
                        let least = pool.iter().filter_map(|s| s.speed).map(|s| s.fastest_ms).min();
                        prop_assert!(pool[at].speed.map(|s| s.fastest_ms) > least);
                    }
                }
            }
        }
    }
}
