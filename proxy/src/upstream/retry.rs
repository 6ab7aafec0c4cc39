//! Whether a failed attempt is followed by another, on another endpoint.
//!
//! Two questions. *Is it safe?* Only while the client has seen nothing: a generation has no side effects, so running it
//! again elsewhere costs engine time and nothing else. *Is it affordable?* Each pool has a budget of retries, a share of
//! its requests plus a small floor, so that a fleet that fails as a whole is not sent its traffic several times over.
//! A stale pooled connection is free: the engine never saw that request.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::UpstreamFailure;

/// Retries that a pool may still do: a bucket filled by requests and by time.
///
/// One credit is one retry, counted in thousandths. A request adds `percent` hundredths of one, each second adds
/// `floor_per_s`; the bucket holds ten seconds of the floor, or ten retries if that is more, unless it is told otherwise.
#[derive(Debug)]
pub struct RetryBudget {
    percent: u32,
    floor_per_s: u32,
    /// What the bucket holds.
    capacity: u32,
    millicredits: AtomicU64,
    refilled_ms: AtomicU64,
}

impl RetryBudget {
    /// A full budget. `percent` of requests, plus `floor_per_s` a second.
    pub fn new(percent: u32, floor_per_s: u32) -> Self {
        let capacity =
            if percent > 0 || floor_per_s > 0 { floor_per_s.saturating_mul(10).max(10) } else { 0 };
        Self::holding(percent, floor_per_s, capacity)
    }

    /// A full budget of `per_s` a second and no share of requests, which holds `burst`.
    pub fn of_time(per_s: u32, burst: u32) -> Self {
        Self::holding(0, per_s, burst)
    }

    fn holding(percent: u32, floor_per_s: u32, capacity: u32) -> Self {
        let full = AtomicU64::new(u64::from(capacity) * 1_000);
        Self { percent, floor_per_s, capacity, millicredits: full, refilled_ms: AtomicU64::new(0) }
    }

    fn capacity(&self) -> u64 {
        u64::from(self.capacity) * 1_000
    }

    /// Whole retries left, as of the last that was asked for.
    pub fn left(&self) -> u64 {
        self.millicredits.load(Relaxed) / 1_000
    }

    /// A request came in.
    pub fn earn(&self) {
        self.add(u64::from(self.percent) * 10);
    }

    /// Takes one retry if there is one at `now_ms` (any monotonic clock).
    pub fn take(&self, now_ms: u64) -> bool {
        let last = self.refilled_ms.fetch_max(now_ms, Relaxed);
        self.add(now_ms.saturating_sub(last).min(10_000) * u64::from(self.floor_per_s));
        self.millicredits.fetch_update(Relaxed, Relaxed, |credits| credits.checked_sub(1_000)).is_ok()
    }

    fn add(&self, millicredits: u64) {
        let capacity = self.capacity();
        // The closure always gives a value, so the update cannot fail.
        let _always = self.millicredits.fetch_update(Relaxed, Relaxed, |credits| {
            Some(credits.saturating_add(millicredits).min(capacity))
        });
    }
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try another endpoint.
    Retry,
    /// Try any endpoint again, the same included: it never saw the request.
    Resend,
    /// Tell the client.
    GiveUp,
}

impl Next {
    /// For decision records.
    pub fn label(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Resend => "resend",
            Self::GiveUp => "give_up",
        }
    }
}

/// Decides after `failure`, with `tries` attempts made of at most `attempts`, free resends not counted.
/// `take_budget` is asked only when everything else allows a retry.
pub fn after_failure(
    failure: UpstreamFailure,
    tries: usize,
    attempts: usize,
    resent: bool,
    take_budget: impl FnOnce() -> bool,
) -> Next {
    use UpstreamFailure as F;
    match failure {
        // The client has seen bytes, or has waited out the whole time that was allowed.
        F::MidStream | F::FirstByteTimeout | F::IdleTimeout => Next::GiveUp,
        // Once for nothing. Twice is no race any more: a request that kills its engines looks the same.
        F::StaleConnection if !resent => Next::Resend,
        _ if tries < attempts && take_budget() => Next::Retry,
        _ => Next::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_the_client_has_seen_is_never_sent_again() {
        for failure in
            [UpstreamFailure::MidStream, UpstreamFailure::IdleTimeout, UpstreamFailure::FirstByteTimeout]
        {
            assert_eq!(
                after_failure(failure, 1, 9, false, || panic!("budget must not be asked")),
                Next::GiveUp
            );
        }
    }

    #[test]
    fn a_refused_connection_is_retried_while_attempts_and_budget_last() {
        assert_eq!(after_failure(UpstreamFailure::Connect, 1, 3, false, || true), Next::Retry);
        assert_eq!(after_failure(UpstreamFailure::Connect, 1, 3, false, || false), Next::GiveUp);
        assert_eq!(after_failure(UpstreamFailure::Connect, 3, 3, false, || true), Next::GiveUp);
    }

    #[test]
    fn a_stale_connection_is_free_once_and_cannot_loop() {
        let stale = UpstreamFailure::StaleConnection;
        assert_eq!(after_failure(stale, 1, 3, false, || panic!("free")), Next::Resend);
        assert_eq!(after_failure(stale, 1, 3, true, || true), Next::Retry);
        assert_eq!(after_failure(stale, 3, 3, true, || true), Next::GiveUp);
    }

    #[test]
    fn a_budget_of_nothing_allows_nothing() {
        assert!(!RetryBudget::new(0, 0).take(1_000));
    }

    proptest! {
        /// P10 in small: with everything failing, retries stay within the share, the floor and the first bucket.
        #[test]
        fn retries_stay_within_their_share(requests in 1u64..5_000, ms_apart in 0u64..50) {
            let budget = RetryBudget::new(10, 10);
            let mut retries = 0u64;
            for i in 0..requests {
                budget.earn();
                while budget.take(i * ms_apart) { retries += 1; }
            }
            let floor = requests * ms_apart * 10 / 1_000;
            prop_assert!(retries <= requests / 10 + floor + 100 + 1, "{} of {}", retries, requests);
        }
    }
}
