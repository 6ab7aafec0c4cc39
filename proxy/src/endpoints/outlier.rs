//! When an endpoint is left out of picks because requests to it fail.
//!
//! Admitted ──(`consecutive_failures` in a row)──► Ejected for `base · 2^(n-1)`, n the ejections in a row, at most `max`
//! Ejected ──(time passes)──► On trial: picked again, but one more failure ejects it at once, for twice as long
//! any ──(a success)──► Admitted, all counts forgotten
//!
//! Consecutive failures rather than a rate: an engine that died fails everything, and three refused connections in a row
//! come within milliseconds under load, long before a rate over a window would tell. An idle pool is not hurt by the
//! choice, since a failed attempt is retried elsewhere and never seen by the client.
//! What a failure is, is decided by [`crate::error::UpstreamFailure::counts_against_endpoint`]: a busy 503 is none.
//!
//! Absent on purpose: the largest share that may be out, and trying everything when nothing is left. Those look at the
//! whole pool and live in [`crate::routing`].

/// The rules, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// Length of the first ejection.
    pub base_ejection_ms: u64,
    /// Longest ejection.
    pub max_ejection_ms: u64,
}

/// What is known of one endpoint. `Default` is admitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outlier {
    failures_in_a_row: u32,
    ejections_in_a_row: u32,
    ejected_until_ms: u64,
}

impl Outlier {
    /// The end of the present or last ejection, in the clock of `now_ms`; 0 if there was none since the last success.
    pub fn ejected_until_ms(&self) -> u64 {
        self.ejected_until_ms
    }

    /// Whether nothing speaks against the endpoint.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }

    /// An answer came.
    pub fn success(&mut self) {
        *self = Self::default();
    }

    /// A request failed at `now_ms`. True if that ejected it.
    pub fn failure(&mut self, now_ms: u64, rules: &Rules) -> bool {
        if now_ms < self.ejected_until_ms {
            return false; // sent before the ejection: already punished
        }
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        let on_trial = self.ejections_in_a_row > 0;
        if !on_trial && self.failures_in_a_row < rules.consecutive_failures {
            return false;
        }
        let doublings = self.ejections_in_a_row.min(32);
        let length = rules.base_ejection_ms.saturating_mul(1 << doublings).min(rules.max_ejection_ms);
        self.ejections_in_a_row = self.ejections_in_a_row.saturating_add(1);
        self.ejected_until_ms = now_ms.saturating_add(length.max(1));
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules { consecutive_failures: 3, base_ejection_ms: 1_000, max_ejection_ms: 8_000 };

    #[test]
    fn three_failures_in_a_row_eject_and_a_success_between_does_not() {
        let mut outlier = Outlier::default();
        assert!(!outlier.failure(10, &RULES));
        assert!(!outlier.failure(11, &RULES));
        outlier.success();
        assert!(!outlier.failure(12, &RULES));
        assert!(!outlier.failure(13, &RULES));
        assert!(outlier.failure(14, &RULES));
        assert_eq!(outlier.ejected_until_ms(), 1_014);
    }

    #[test]
    fn on_trial_one_failure_is_enough_and_counts_double() {
        let mut outlier = Outlier::default();
        for now in 0..3 {
            outlier.failure(now, &RULES);
        }
        let mut lengths = vec![];
        for _ in 0..5 {
            let now = outlier.ejected_until_ms();
            assert!(outlier.failure(now, &RULES));
            lengths.push(outlier.ejected_until_ms() - now);
        }
        assert_eq!(lengths, [2_000, 4_000, 8_000, 8_000, 8_000]);
        outlier.success();
        assert!(outlier.is_clean());
    }

    #[test]
    fn late_failures_of_requests_sent_before_do_not_lengthen_an_ejection() {
        let mut outlier = Outlier::default();
        for _ in 0..3 {
            outlier.failure(5, &RULES);
        }
        let until = outlier.ejected_until_ms();
        for now in 5..500 {
            assert!(!outlier.failure(now, &RULES));
        }
        assert_eq!(outlier.ejected_until_ms(), until);
    }

    proptest! {
        #[test]
        fn an_ejection_never_outlasts_the_longest(steps in prop::collection::vec((0u64..10_000, any::<bool>()), 0..200)) {
            let mut outlier = Outlier::default();
            let mut now = 0;
            for (passed, ok) in steps {
                now += passed;
                if ok { outlier.success() } else { outlier.failure(now, &RULES); }
                prop_assert!(outlier.ejected_until_ms() <= now + RULES.max_ejection_ms);
            }
        }
    }
}
