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
//! An endpoint is out if even the fastest of its last five streams took `factor` times, and `floor` longer, than what is usual
//! at the others to its first token. The fastest, because a few long prompts make any engine slow for some; five in a row
//! that are all slow are no chance. Usual is the median of what the others have shown since the first of those five: when all
//! of a pool become slow at once, they all show it. A longer queue is no fault: where the endpoint has more requests under way
//! than the others have on average, it may take as many times longer.
//! Only streams are compared: the time of a whole answer is its length.

use super::{
    state::Reason,
    window::{STREAMS, Sample, Tally},
};

/// Hosts from which on deviations say something; Envoy's `success_rate_minimum_hosts`.
const DEVIATION_HOSTS: usize = 5;

/// Above this rate nobody is an outlier by deviation.
const GOOD_ENOUGH: f64 = 0.95;

/// How much better the others must do, as a rate.
const MARGIN: f64 = 0.1;

/// First tokens of others without which nothing is usual.
const USUAL: usize = 3;

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
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Standing {
    /// Its requests of late, if there were enough.
    pub tally: Option<Tally>,
    /// Its last first tokens.
    pub first_tokens: Vec<Sample>,
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
    let fastest = one.first_tokens.iter().map(|sample| sample.took_ms).min();
    let since = one.first_tokens.iter().map(|sample| sample.at_ms).min();
    let (Some(fastest), Some(since)) = (fastest, since) else { return false };
    // Mostly nobody is slow by any measure: the others need not be looked at.
    let judged = rules.latency_factor > 0 && one.first_tokens.len() >= STREAMS;
    if !judged || fastest <= rules.latency_floor_ms {
        return false;
    }
    let others = || pool.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
    let shown = others().flat_map(|other| &other.first_tokens).filter(|sample| sample.at_ms >= since);
    let mut shown: Vec<u64> = shown.map(|sample| sample.took_ms).collect();
    shown.sort_unstable();
    let Some(usual) = shown.get(shown.len() / 2).copied().filter(|_| shown.len() >= USUAL) else {
        return false;
    };
    // Requests here for each one there, both plus one; never less than one for one.
    let load: u64 = others().map(|other| u64::from(other.inflight) + 1).sum();
    let here = (u64::from(one.inflight) + 1).saturating_mul(others().count() as u64).max(load);
    let explained = usual.saturating_mul(rules.latency_factor).saturating_mul(here) / load.max(1);
    fastest > explained && fastest > usual.saturating_add(rules.latency_floor_ms)
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

    /// Five streams, all since then, each as long.
    fn timed_since(at_ms: u64, took_ms: u64, inflight: u32) -> Standing {
        let first_tokens = (0..5).map(|i| Sample { at_ms: at_ms + i, took_ms }).collect();
        Standing { first_tokens, inflight, tally: None }
    }

    fn timed(took_ms: u64, inflight: u32) -> Standing {
        timed_since(1_000, took_ms, inflight)
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
        assert!(outliers(&vec![rated(50, 50); 4], &RULES).is_empty());
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
        let pool = [timed(20, 3), timed(2_020, 3), timed(18, 2)];
        assert_eq!(outliers(&pool, &RULES), [(1, Reason::Latency)]);
        assert_eq!(outliers(&pool[..2], &RULES), [(1, Reason::Latency)], "one other is enough");
        assert!(outliers(&pool[1..2], &RULES).is_empty(), "alone there is nothing to compare with");
    }

    #[test]
    fn a_few_long_prompts_make_nobody_slow() {
        let mut pool = [timed(20, 3), timed(9_000, 3)];
        pool[1].first_tokens[4].took_ms = 30;
        assert!(outliers(&pool, &RULES).is_empty(), "one of five was fast");
        pool[1].first_tokens.truncate(4);
        assert!(outliers(&pool, &RULES).is_empty(), "too few to tell");
    }

    #[test]
    fn what_the_others_showed_before_is_not_compared_with_what_one_shows_now() {
        let pool = [timed_since(5_000, 3_000, 3), timed_since(4_000, 20, 3)];
        assert!(outliers(&pool, &RULES).is_empty(), "perhaps all have become slow");
        let pool = [timed_since(5_000, 3_000, 3), timed_since(5_000, 20, 3)];
        assert_eq!(outliers(&pool, &RULES), [(0, Reason::Latency)]);
    }

    #[test]
    fn a_long_queue_explains_a_long_wait() {
        let busy = [timed(1_000, 10), timed(5_900, 60)];
        assert!(outliers(&busy, &RULES).is_empty(), "six times the requests, six times the wait");
        let slow = [timed(1_000, 10), timed(5_900, 10)];
        assert_eq!(outliers(&slow, &RULES), [(1, Reason::Latency)]);
        assert!(outliers(&vec![timed(9_000, 50); 3], &RULES).is_empty(), "all are busy");
    }

    #[test]
    fn off_is_off() {
        let off = Rules { floor_rate: 0.0, stdev_factor: 0.0, latency_factor: 0, latency_floor_ms: 0 };
        let mut pool = vec![rated(100, 0); 9];
        pool.extend([rated(0, 100), timed(9, 1), timed(9_000, 1)]);
        assert!(outliers(&pool, &off).is_empty());
    }

    fn standing() -> impl Strategy<Value = Standing> {
        let tally = prop::option::of((0u32..200, 0u32..200).prop_map(|(good, bad)| Tally { good, bad }));
        let sample = (0u64..5_000, 0u64..5_000).prop_map(|(at_ms, took_ms)| Sample { at_ms, took_ms });
        (tally, prop::collection::vec(sample, 0..=5), 0u32..100)
            .prop_map(|(tally, first_tokens, inflight)| Standing { tally, first_tokens, inflight })
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
                        let fastest = |one: &Standing| one.first_tokens.iter().map(|s| s.took_ms).min();
                        let least = pool.iter().filter_map(fastest).min();
                        prop_assert!(fastest(&pool[at]) > least);
                    }
                }
            }
        }
    }
}
