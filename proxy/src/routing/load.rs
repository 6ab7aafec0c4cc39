//! How busy an endpoint is, from two sources of different age.
//!
//! What this proxy has under way there is exact and of this moment; what the engine reported counts everybody's requests
//! but is old. The estimate is max(local, reported + sent since − finished since), where *since* is the moment of the
//! measurement. With `own` the requests that this proxy had under way at that moment, sent − finished is local − own, so
//!
//! > estimate = local + max(0, reported − own)
//!
//! A report thus tells one thing: how much of the load is *foreign*, other proxies'. The local part is always the present
//! one: no report, however old, can hide a request that this proxy has sent since, or bring back one that has ended.
//! Foreign load fades linearly with its age, to nothing at the staleness bound: what others did long ago says little, and
//! an endpoint whose reports stopped is neither shunned nor sought for ever.
//!
//! Invariants: an estimate is never below the local count; it grows with each request sent and falls with each that ends;
//! it falls with the report's age.

use std::collections::VecDeque;

/// What an engine said of itself, seen from one proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Requests running and waiting there, everybody's.
    pub load: u32,
    /// Those of them that were this proxy's.
    pub own: u32,
    /// When that was measured, in milliseconds on the clock of the picks.
    pub measured_ms: u64,
}

impl Report {
    /// The later measured of the two: reports may overtake each other on their way.
    #[must_use]
    pub fn newer(self, other: Option<Self>) -> Self {
        other.filter(|other| other.measured_ms > self.measured_ms).unwrap_or(self)
    }

    /// Load of others still believed at `now_ms`, when nothing is believed any more at an age of `stale_ms`.
    pub fn foreign(&self, now_ms: u64, stale_ms: u64) -> u32 {
        let age = now_ms.saturating_sub(self.measured_ms);
        if age >= stale_ms {
            return 0;
        }
        let left = u128::from(stale_ms - age);
        let load = u128::from(self.load.saturating_sub(self.own)) * left / u128::from(stale_ms);
        u32::try_from(load).unwrap_or(u32::MAX)
    }
}

/// Requests thought to be at an endpoint, of which `local` are this proxy's own at this moment.
pub fn estimate(local: u32, report: Option<&Report>, now_ms: u64, stale_ms: u64) -> u32 {
    local.saturating_add(report.map_or(0, |report| report.foreign(now_ms, stale_ms)))
}

/// The weight of a full-grown endpoint.
pub const FULL_WEIGHT: u32 = 1_000;

/// Slow start: what share of its load an endpoint of this age should carry, from a tenth of [`FULL_WEIGHT`] up to all of it
/// at `slow_start_ms`. An engine that just came compiles kernels and has empty caches; at full weight the idlest of all
/// would get every request at once.
pub fn weight(age_ms: u64, slow_start_ms: u64) -> u32 {
    if age_ms >= slow_start_ms {
        return FULL_WEIGHT;
    }
    let floor = u64::from(FULL_WEIGHT / 10);
    let grown = (u64::from(FULL_WEIGHT) - floor).saturating_mul(age_ms) / slow_start_ms;
    u32::try_from(floor + grown).unwrap_or(FULL_WEIGHT)
}

/// What is left of a weight for an endpoint that gets only so many percent of a full share; at least 1.
pub fn share(weight: u32, percent: u32) -> u32 {
    let share = u64::from(weight) * u64::from(percent.min(100)) / 100;
    u32::try_from(share).unwrap_or(weight).max(1)
}

/// How busy an endpoint would be with one request more, in thousandths of a request; smaller is better. An endpoint of
/// half the weight counts as twice as busy.
pub fn score(load: u32, weight: u32) -> u64 {
    let full = u64::from(FULL_WEIGHT);
    (u64::from(load) + 1) * full * full / u64::from(weight.clamp(1, FULL_WEIGHT))
}

/// What this proxy had under way at an endpoint in the recent past, to tell its own part of a report that took time to
/// arrive. Keeps at most [`History::SAMPLES`] counts.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// (milliseconds, count from then on), oldest first.
    samples: VecDeque<(u64, u32)>,
}

impl History {
    /// Most counts kept.
    pub const SAMPLES: usize = 64;

    /// `count` requests are under way from `now_ms` on. Changes within `spacing_ms` of a sample overwrite it.
    pub fn note(&mut self, now_ms: u64, count: u32, spacing_ms: u64) {
        match self.samples.back_mut() {
            Some((at, last)) if now_ms < at.saturating_add(spacing_ms) => *last = count,
            _ => {
                if self.samples.len() == Self::SAMPLES {
                    self.samples.pop_front();
                }
                self.samples.push_back((now_ms, count));
            }
        }
    }

    /// The count at `then_ms`, as far as is still known: before the oldest sample it is the oldest.
    pub fn at(&self, then_ms: u64) -> u32 {
        let known = self.samples.iter().rev().find(|(at, _)| *at <= then_ms).or(self.samples.front());
        known.map_or(0, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_share_lowers_a_weight_and_never_takes_all_of_it() {
        assert_eq!(share(FULL_WEIGHT, 100), FULL_WEIGHT);
        assert_eq!(share(FULL_WEIGHT, 25), FULL_WEIGHT / 4);
        assert_eq!((share(10, 1), share(FULL_WEIGHT, 0)), (1, 1));
        assert!(score(3, share(FULL_WEIGHT, 50)) == 2 * score(3, FULL_WEIGHT), "twice as busy");
    }

    const REPORT: Report = Report { load: 10, own: 4, measured_ms: 1_000 };

    #[test]
    fn a_report_tells_what_is_foreign_and_fades() {
        assert_eq!(estimate(4, Some(&REPORT), 1_000, 2_000), 10);
        assert_eq!(estimate(4, Some(&REPORT), 2_000, 2_000), 7);
        assert_eq!(estimate(4, Some(&REPORT), 3_000, 2_000), 4);
        assert_eq!(estimate(4, Some(&REPORT), 1_000, 0), 4, "a bound of 0 believes nothing");
        assert_eq!(estimate(4, None, 1_000, 2_000), 4);
    }

    #[test]
    fn a_report_that_was_overtaken_is_dropped() {
        let late = Report { load: 99, measured_ms: 500, ..REPORT };
        assert_eq!(late.newer(Some(REPORT)), REPORT);
        assert_eq!(REPORT.newer(Some(late)), REPORT);
        assert_eq!(late.newer(None), late);
    }

    #[test]
    fn the_young_carry_less() {
        assert_eq!(weight(0, 1_000), 100);
        assert_eq!(weight(500, 1_000), 550);
        assert_eq!(weight(1_000, 1_000), 1_000);
        assert_eq!(weight(0, 0), 1_000, "0 is off");
        assert_eq!(score(0, 100), score(9, 1_000), "an idle one at a tenth is as good as one with nine");
    }

    #[test]
    fn history_answers_for_the_past() {
        let mut history = History::default();
        assert_eq!(history.at(5), 0);
        for now in 0..100 {
            history.note(now * 10, u32::try_from(now).unwrap(), 10);
        }
        history.note(995, 7, 10);
        assert_eq!(history.at(985), 98);
        assert_eq!(history.at(2_000), 7);
        assert_eq!(history.at(0), 36, "the oldest of 64 samples stands for all before");
    }

    proptest! {
        #[test]
        fn the_formula_of_the_module_doc_holds(
            reported in 0u32..1_000, own in 0u32..1_000, sent in 0u32..1_000, finished in 0u32..1_000,
        ) {
            prop_assume!(own + sent >= finished);
            let local = own + sent - finished;
            let report = Report { load: reported, own, measured_ms: 0 };
            let since = i64::from(reported) + i64::from(sent) - i64::from(finished);
            prop_assert_eq!(i64::from(estimate(local, Some(&report), 0, 1)), i64::from(local).max(since));
        }

        #[test]
        fn no_report_hides_what_is_known_here_and_the_estimate_is_monotone(
            local in 0u32..1_000, load in any::<u32>(), own in any::<u32>(), at in 0u64..5_000,
            now in 0u64..10_000, later in 0u64..5_000, stale in 0u64..5_000,
        ) {
            let report = Report { load, own, measured_ms: at };
            let estimated = estimate(local, Some(&report), now, stale);
            prop_assert!(estimated >= local);
            prop_assert!(estimate(local + 1, Some(&report), now, stale) >= estimated);
            prop_assert!(estimate(local, Some(&report), now + later, stale) <= estimated);
            if now >= at + stale { prop_assert_eq!(estimated, local); }
        }

        #[test]
        fn weights_grow_with_age_and_scores_with_load(age in 0u64..20_000, more in 0u64..20_000, load in 0u32..10_000) {
            prop_assert!(weight(age, 10_000) <= weight(age + more, 10_000));
            prop_assert!(score(load, weight(age, 10_000)) < score(load + 1, weight(age, 10_000)));
        }
    }
}
