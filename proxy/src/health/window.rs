//! What an endpoint's last requests were like, in a fixed number of atomics: one update a request, no lock, no allocation.
//!
//! [`Window`] counts successes and failures in buckets of a second. [`Window::recent`] looks back only as far as it must for
//! enough requests, two seconds at least and ten at most: under load a change shows within two seconds, and a quiet
//! endpoint is judged too. [`FirstTokens`] keeps the last five times to first token.
//!
//! Concurrent updates of one bucket are a compare-and-swap each; a reader beside them sees some of them. Nothing here
//! has to be exact: what is decided from it is looked at again and again.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Seconds looked back at most.
const BUCKETS: usize = 10;

/// Seconds looked back at least: the present one has only begun.
const LEAST: u64 = 2;

/// First-token times kept.
pub const STREAMS: usize = 5;

/// How old they may be, in milliseconds.
const STREAMS_AGE_MS: u64 = 30_000;

/// Successes and failures of the last seconds.
#[derive(Debug, Default)]
pub struct Window {
    /// Of each: the second it is of, then successes, then failures: 32, 16 and 16 bits.
    buckets: [AtomicU64; BUCKETS],
}

/// Requests, by how they went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answered.
    pub good: u32,
    /// Failed.
    pub bad: u32,
}

impl Tally {
    /// All of them.
    pub fn total(self) -> u32 {
        self.good.saturating_add(self.bad)
    }

    /// Share of them answered, 0 to 1; of none: 1.
    pub fn rate(self) -> f64 {
        match self.total() {
            0 => 1.0,
            total => f64::from(self.good) / f64::from(total),
        }
    }
}

impl Window {
    /// Counts a request.
    pub fn record(&self, now_ms: u64, good: bool) {
        let second = second(now_ms);
        let Some(bucket) = self.buckets.get(slot(second)) else { return };
        // The closure always gives a value, so the update cannot fail.
        let _always = bucket.fetch_update(Relaxed, Relaxed, |packed| {
            let (of, mut tally) = unpack(packed);
            if of != second {
                tally = Tally::default();
            }
            let row = if good { &mut tally.good } else { &mut tally.bad };
            *row = (*row + 1).min(0xffff);
            Some(pack(second, tally))
        });
    }

    /// The last seconds, as many as hold `enough` requests; `None` if all of them do not.
    pub fn recent(&self, now_ms: u64, enough: u32) -> Option<Tally> {
        let now = second(now_ms);
        let mut sum = Tally::default();
        for back in 0..(BUCKETS as u64).min(now + 1) {
            let wanted = now - back;
            let packed = self.buckets.get(slot(wanted)).map_or(0, |b| b.load(Relaxed));
            let (of, tally) = unpack(packed);
            if of == wanted {
                sum.good += tally.good;
                sum.bad += tally.bad;
            }
            if back + 1 >= LEAST && sum.total() >= enough {
                break;
            }
        }
        (sum.total() >= enough).then_some(sum)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
    }
}

fn second(now_ms: u64) -> u64 {
    (now_ms / 1_000) & 0xffff_ffff
}

fn slot(second: u64) -> usize {
    usize::try_from(second % BUCKETS as u64).unwrap_or(0)
}

fn pack(second: u64, tally: Tally) -> u64 {
    second << 32 | u64::from(tally.good) << 16 | u64::from(tally.bad)
}

fn unpack(packed: u64) -> (u64, Tally) {
    let sixteen = |shift: u32| u32::try_from(packed >> shift & 0xffff).unwrap_or(0);
    (packed >> 32, Tally { good: sixteen(16), bad: sixteen(0) })
}

/// The last times to first token of streams, in milliseconds.
#[derive(Debug, Default)]
pub struct FirstTokens {
    /// Of each: when, in 40 bits, and how long it took plus one, in 24; 0: none.
    ring: [AtomicU64; STREAMS],
    next: AtomicUsize,
}

/// One stream's first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When it came.
    pub at_ms: u64,
    /// How long after its request was sent.
    pub took_ms: u64,
}

impl FirstTokens {
    /// A stream's first token came at `now_ms`, `took_ms` after its request was sent.
    pub fn record(&self, now_ms: u64, took_ms: u64) {
        let at = self.next.fetch_add(1, Relaxed) % STREAMS;
        if let Some(slot) = self.ring.get(at) {
            slot.store(now_ms << 24 | (took_ms + 1).min(0xff_ffff), Relaxed);
        }
    }

    /// The last five, in no order, those that came in the last thirty seconds.
    pub fn recent(&self, now_ms: u64) -> impl Iterator<Item = Sample> {
        self.ring.iter().filter_map(move |slot| {
            let packed = slot.load(Relaxed);
            let sample = Sample { at_ms: packed >> 24, took_ms: (packed & 0xff_ffff).saturating_sub(1) };
            let fresh = packed != 0 && now_ms.saturating_sub(sample.at_ms) <= STREAMS_AGE_MS;
            fresh.then_some(sample)
        })
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.ring.iter().for_each(|slot| slot.store(0, Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(window: &Window, from_s: u64, to_s: u64, good: u32, bad: u32) {
        for second in from_s..to_s {
            (0..good).for_each(|_| window.record(second * 1_000, true));
            (0..bad).for_each(|_| window.record(second * 1_000 + 999, false));
        }
    }

    #[test]
    fn under_load_only_the_last_two_seconds_count() {
        let window = Window::default();
        fill(&window, 0, 100, 50, 0);
        fill(&window, 100, 102, 20, 20);
        assert_eq!(window.recent(101_500, 20), Some(Tally { good: 40, bad: 40 }));
    }

    #[test]
    fn with_little_traffic_it_looks_back_ten_seconds_and_no_further() {
        let window = Window::default();
        fill(&window, 0, 30, 2, 0);
        assert_eq!(window.recent(29_000, 20).map(Tally::total), Some(20));
        assert_eq!(window.recent(29_000, 21), None);
        assert_eq!(window.recent(60_000, 1), None, "half a minute old");
    }

    #[test]
    fn cleared_it_knows_nothing() {
        let window = Window::default();
        fill(&window, 5, 6, 9, 9);
        window.clear();
        assert_eq!(window.recent(5_500, 1), None);
    }

    #[test]
    fn the_last_five_streams_are_kept_for_half_a_minute() {
        let tokens = FirstTokens::default();
        let took = |now_ms| {
            let mut took: Vec<u64> = tokens.recent(now_ms).map(|sample| sample.took_ms).collect();
            took.sort_unstable();
            took
        };
        for (at, took) in [(1_000, 30), (1_100, 10), (1_200, 20), (1_300, 50), (1_400, 40)] {
            tokens.record(at, took);
        }
        assert_eq!(took(1_400), [10, 20, 30, 40, 50]);
        tokens.record(1_500, 0);
        assert_eq!(took(1_500), [0, 10, 20, 40, 50], "the first has given way");
        assert_eq!(took(31_250), [0, 40, 50]);
        tokens.clear();
        assert!(took(1_500).is_empty());
    }

    #[test]
    fn an_endless_wait_does_not_spill_into_the_time() {
        let tokens = FirstTokens::default();
        tokens.record(7, u64::from(u32::MAX));
        assert_eq!(tokens.recent(7).next(), Some(Sample { at_ms: 7, took_ms: 0xff_fffe }));
    }

    proptest! {
        /// Against a list of all requests: never more than happened in ten seconds, never fewer than in two.
        #[test]
        fn a_window_agrees_with_the_list(steps in prop::collection::vec((0u64..3_000, any::<bool>()), 1..300), enough in 1u32..40) {
            let window = Window::default();
            let (mut now, mut all) = (0, vec![]);
            for (passed, good) in steps {
                now += passed;
                window.record(now, good);
                all.push((now / 1_000, good));
            }
            let of = |seconds: u64, wanted: bool| {
                let counted = all.iter().filter(|(s, good)| now / 1_000 - s < seconds && *good == wanted);
                u32::try_from(counted.count()).expect("few")
            };
            let most = of(10, true) + of(10, false);
            match window.recent(now, enough) {
                None => prop_assert!(most < enough),
                Some(tally) => {
                    prop_assert!(tally.good <= of(10, true) && tally.good >= of(2, true));
                    prop_assert!(tally.bad <= of(10, false) && tally.bad >= of(2, false));
                    prop_assert!(tally.total() >= enough);
                }
            }
        }
    }
}
