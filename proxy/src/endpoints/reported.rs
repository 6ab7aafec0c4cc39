//! What an engine last said of its load, as news from the control plane, beside what this proxy knows itself.
//!
//! A report is a measurement with an age, never a state: nothing withdraws it, it only grows old, and whoever reads it
//! decides by its age. A pick uses it through [`load::estimate`], which lets foreign load fade; a report can thus make an
//! endpoint look busier than it is, for a while, and never keeps a request from being sent.
//!
//! Why there is a history: a report counts everybody's requests at a moment that has passed. To tell its own part, the proxy
//! must know what it had under way there *then*. It is sampled for endpoints that have reports, by a timer
//! ([`super::EndpointTable::sample`]), and not at each request, so that requests take no lock here.
//!
//! Cost: a reader loads two words. They may come from two reports that follow each other at once: the later's load with the
//! earlier's moment is off by one measurement's difference, for one pick.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::routing::load::{self, History};

/// Time between two samples of what is under way, in milliseconds. [`History::SAMPLES`] of them reach back 3.2 s.
pub const SAMPLE_MS: u64 = 50;

/// What an engine said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReportedLoad {
    /// Requests being generated, everybody's.
    pub running: u32,
    /// Requests in the engine's own queue.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1000.
    pub kv_used_permille: u32,
    /// How long ago that was measured.
    pub age_ms: u64,
}

/// A report as it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Requests being generated.
    pub running: u32,
    /// Requests in the engine's own queue.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1000.
    pub kv_used_permille: u32,
    /// When, on the clock of the picks.
    pub at_ms: u64,
}

/// The last report of one endpoint. `Default`: none yet.
#[derive(Debug, Default)]
pub struct Reported {
    /// running, waiting, KV use and whether there is any report.
    figures: AtomicU64,
    /// When, and how many of the requests were this proxy's.
    moment: AtomicU64,
    /// Taken by the timer and by reports, never by requests.
    history: Mutex<History>,
}

const COUNT_BITS: u32 = 26;
const KV_BITS: u32 = 10;
const PRESENT: u64 = 1 << 63;
const OWN_BITS: u32 = 24;

fn field(value: u64, bits: u32) -> u64 {
    value.min((1 << bits) - 1)
}

fn part(word: u64, shift: u32, bits: u32) -> u32 {
    u32::try_from((word >> shift) & ((1 << bits) - 1)).unwrap_or(u32::MAX)
}

impl Reported {
    /// Takes a report in, unless a later one is there. `inflight`: this proxy's requests under way now.
    pub fn take(&self, measured: Measured, now_ms: u64, inflight: u32) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let present = self.figures.load(Relaxed) & PRESENT != 0;
        if present && measured.at_ms < self.moment.load(Relaxed) >> OWN_BITS {
            return; // overtaken on its way
        }
        if !present {
            *history = History::default();
            history.note(now_ms, inflight, 0);
        }
        let own = history.at(measured.at_ms);
        let at_ms = field(measured.at_ms, u64::BITS - OWN_BITS);
        self.moment.store(at_ms << OWN_BITS | field(own.into(), OWN_BITS), Relaxed);
        let counts = field(measured.running.into(), COUNT_BITS)
            | field(measured.waiting.into(), COUNT_BITS) << COUNT_BITS
            | u64::from(measured.kv_used_permille.min(1_000)) << (2 * COUNT_BITS);
        self.figures.store(PRESENT | counts, Relaxed);
    }

    /// Notes what this proxy has under way, where there are reports to compare it with.
    pub fn sample(&self, now_ms: u64, inflight: u32) {
        if self.figures.load(Relaxed) & PRESENT != 0 {
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            // A timer that is a little early must not overwrite the sample before.
            history.note(now_ms, inflight, SAMPLE_MS / 2);
        }
    }

    /// The last report, of whatever age.
    pub fn get(&self, now_ms: u64) -> Option<ReportedLoad> {
        let figures = self.figures.load(Relaxed);
        (figures & PRESENT != 0).then(|| ReportedLoad {
            running: part(figures, 0, COUNT_BITS),
            waiting: part(figures, COUNT_BITS, COUNT_BITS),
            kv_used_permille: part(figures, 2 * COUNT_BITS, KV_BITS),
            age_ms: now_ms.saturating_sub(self.moment.load(Relaxed) >> OWN_BITS),
        })
    }

    /// The last report as picks take it.
    pub fn report(&self) -> Option<load::Report> {
        let figures = self.figures.load(Relaxed);
        let moment = self.moment.load(Relaxed);
        (figures & PRESENT != 0).then(|| load::Report {
            load: part(figures, 0, COUNT_BITS).saturating_add(part(figures, COUNT_BITS, COUNT_BITS)),
            own: part(moment, 0, OWN_BITS),
            measured_ms: moment >> OWN_BITS,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn measured(running: u32, waiting: u32, at_ms: u64) -> Measured {
        Measured { running, waiting, kv_used_permille: 250, at_ms }
    }

    #[test]
    fn before_the_first_report_there_is_none() {
        let reported = Reported::default();
        reported.sample(5, 3);
        assert_eq!((reported.get(9), reported.report()), (None, None));
    }

    #[test]
    fn a_report_ages_and_a_later_one_replaces_it_but_not_an_overtaken_one() {
        let reported = Reported::default();
        reported.take(measured(3, 2, 100), 150, 0);
        let expected = ReportedLoad { running: 3, waiting: 2, kv_used_permille: 250, age_ms: 400 };
        assert_eq!(reported.get(500), Some(expected));
        reported.take(measured(9, 9, 90), 160, 0);
        assert_eq!(reported.get(500), Some(expected));
        reported.take(measured(1, 0, 300), 310, 0);
        assert_eq!(reported.get(500).map(|r| (r.running, r.age_ms)), Some((1, 200)));
    }

    #[test]
    fn what_was_ones_own_when_it_was_measured_is_not_foreign() {
        let reported = Reported::default();
        reported.take(measured(0, 0, 0), 0, 0);
        for (now, inflight) in [(50, 4), (100, 4), (150, 10), (200, 10)] {
            reported.sample(now, inflight);
        }
        reported.take(measured(6, 0, 120), 210, 10);
        let report = reported.report().unwrap();
        assert_eq!((report.load, report.own, report.foreign(210, 100_000)), (6, 4, 1), "two, a little aged");
    }

    proptest! {
        #[test]
        fn nothing_is_too_large_to_be_kept_near_enough(
            running in any::<u32>(), waiting in any::<u32>(), kv in any::<u32>(), at in any::<u64>(), own in any::<u32>(),
        ) {
            let reported = Reported::default();
            reported.take(Measured { running, waiting, kv_used_permille: kv, at_ms: at }, at, own);
            let got = reported.get(at).unwrap();
            prop_assert_eq!(got.running, running.min((1 << 26) - 1));
            prop_assert_eq!(got.waiting, waiting.min((1 << 26) - 1));
            prop_assert_eq!(got.kv_used_permille, kv.min(1_000));
            prop_assert_eq!(reported.report().unwrap().own, own.min((1 << 24) - 1));
        }
    }
}
