//! Counting, one of these per thread, added up at the end.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest time that is told apart, µs: an hour.
const MAX_US: u64 = 3_600_000_000;

/// The part of a run that is measured, by [`crate::clock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from_ns: u64,
    pub(super) to_ns: u64,
}

impl Span {
    pub(super) const fn holds(self, at_ns: u64) -> bool {
        self.from_ns <= at_ns && at_ns <= self.to_ns
    }
}

/// Failures of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Failed {
    /// How many.
    pub count: u64,
    /// What the first said.
    pub example: String,
}

/// What happened up to some second, in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Events of streams.
    pub events: u64,
    /// Requests whose every token was right.
    pub good: u64,
    /// The others.
    pub failed: u64,
    /// Bytes of bodies.
    pub bytes: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.events += other.events;
        self.good += other.good;
        self.failed += other.failed;
        self.bytes += other.bytes;
    }
}

/// Times, in µs.
#[derive(Debug, Clone)]
pub(super) struct Times(Option<Histogram<u64>>);

impl Times {
    fn new() -> Self {
        // Three digits from 1 µs to an hour: valid, so never none.
        Self(Histogram::new_with_bounds(1, MAX_US, 3).ok())
    }

    /// Adds the time between two moments.
    pub(super) fn note(&mut self, from_ns: u64, to_ns: u64) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record((to_ns.saturating_sub(from_ns) / 1_000).max(1));
        }
    }

    fn add(&mut self, other: &Self) {
        if let (Some(ours), Some(theirs)) = (&mut self.0, &other.0) {
            // Both have the same bounds, so it cannot fail.
            ours.add(theirs).unwrap_or_default();
        }
    }

    pub(super) fn quantiles(&self) -> Quantiles {
        let Some(histogram) = self.0.as_ref().filter(|h| !h.is_empty()) else { return Quantiles::default() };
        let at = |quantile| histogram.value_at_quantile(quantile);
        Quantiles {
            count: histogram.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: histogram.max(),
        }
    }

    /// Points of the curve of percentiles, for a plot: by how many nines, and ms.
    pub(super) fn curve(&self) -> Vec<(f64, f64)> {
        let Some(histogram) = self.0.as_ref().filter(|h| !h.is_empty()) else { return Vec::new() };
        let most = (histogram.len() as f64).log10().clamp(1.0, 5.0);
        let points = (0..=100).map(|step| most * f64::from(step) / 100.0);
        points
            .map(|nines| (nines, histogram.value_at_quantile(1.0 - 10f64.powf(-nines)) as f64 / 1e3))
            .collect()
    }
}

/// Percentiles of a time, µs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Quantiles {
    /// Values counted.
    pub count: u64,
    /// Half are below.
    pub p50_us: u64,
    /// Nine of ten are below.
    pub p90_us: u64,
    /// 99 of 100 are below.
    pub p99_us: u64,
    /// 999 of 1,000 are below.
    pub p999_us: u64,
    /// The largest.
    pub max_us: u64,
}

/// What one thread counted.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) span: Span,
    pub(super) failures: BTreeMap<String, Failed>,
    pub(super) tokens: u64,
    /// All there was.
    pub(super) all: Counts,
    /// That of the measured part.
    pub(super) measured: Counts,
    /// Sessions that arrived, in the open loop.
    pub(super) arrived: u64,
    /// Of them those for which there was no place.
    pub(super) not_sent: u64,
    /// From when they should have been sent to when they were.
    pub(super) late: Times,
    pub(super) ttft: Times,
    pub(super) ttft_service: Times,
    pub(super) gap: Times,
    pub(super) one_way: Times,
    pub(super) total: Times,
    pub(super) total_service: Times,
    /// `all` at every second of the run.
    pub(super) seconds: Vec<Counts>,
}

impl Stats {
    pub(super) fn new(span: Span) -> Self {
        Self {
            span,
            failures: BTreeMap::new(),
            tokens: 0,
            all: Counts::default(),
            measured: Counts::default(),
            arrived: 0,
            not_sent: 0,
            late: Times::new(),
            ttft: Times::new(),
            ttft_service: Times::new(),
            gap: Times::new(),
            one_way: Times::new(),
            total: Times::new(),
            total_service: Times::new(),
            seconds: Vec::new(),
        }
    }

    /// Counts a failed request.
    pub(super) fn fail(&mut self, now_ns: u64, kind: &str, example: &str) {
        let failed =
            self.failures.entry(kind.into()).or_insert_with(|| Failed { count: 0, example: example.into() });
        failed.count += 1;
        self.all.failed += 1;
        self.measured.failed += u64::from(self.span.holds(now_ns));
    }

    /// Counts what a read brought.
    pub(super) fn read(&mut self, now_ns: u64, bytes: usize, events: u64) {
        let counts = Counts { events, bytes: bytes as u64, ..Counts::default() };
        self.all.add(counts);
        if self.span.holds(now_ns) {
            self.measured.add(counts);
        }
    }

    /// Counts a request whose every token was right.
    pub(super) fn good(&mut self, now_ns: u64, intended_ns: u64, began_ns: u64, tokens: u64) {
        self.all.good += 1;
        self.tokens += tokens;
        self.measured.good += u64::from(self.span.holds(now_ns));
        if self.span.holds(intended_ns) {
            self.total.note(intended_ns, now_ns);
            self.total_service.note(began_ns, now_ns);
        }
    }

    /// Adds the counts of another thread.
    pub(super) fn add(&mut self, other: &Self) {
        for (kind, failed) in &other.failures {
            let ours = self
                .failures
                .entry(kind.clone())
                .or_insert_with(|| Failed { count: 0, example: failed.example.clone() });
            ours.count += failed.count;
        }
        self.tokens += other.tokens;
        self.all.add(other.all);
        self.measured.add(other.measured);
        self.arrived += other.arrived;
        self.not_sent += other.not_sent;
        for (ours, theirs) in [
            (&mut self.late, &other.late),
            (&mut self.ttft, &other.ttft),
            (&mut self.ttft_service, &other.ttft_service),
            (&mut self.gap, &other.gap),
            (&mut self.one_way, &other.one_way),
            (&mut self.total, &other.total),
            (&mut self.total_service, &other.total_service),
        ] {
            ours.add(theirs);
        }
        // A thread that ended earlier stays at its last count.
        let ended = (self.seconds.last().copied().unwrap_or_default(), other.all);
        let length = self.seconds.len().max(other.seconds.len());
        self.seconds.resize(length, ended.0);
        for (second, ours) in self.seconds.iter_mut().enumerate() {
            ours.add(other.seconds.get(second).copied().unwrap_or(ended.1));
        }
    }
}

/// A duration as nanoseconds.
pub(super) fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// One place, 10 ms of service, arrivals every 10 ms, and a second in which nothing is served.
    #[test]
    fn a_stall_is_felt_by_all_that_should_have_been_sent_meanwhile() {
        let mut stats = Stats::new(Span { from_ns: 0, to_ns: u64::MAX });
        let mut free_ns = 0;
        for arrival in 0..1_000 {
            let intended_ns = arrival * 10 * MS;
            let began_ns = free_ns.max(intended_ns);
            let stall_ns = if arrival == 500 { 1_000 * MS } else { 0 };
            free_ns = began_ns + stall_ns + 9 * MS;
            stats.good(free_ns, intended_ns, began_ns, 1);
        }
        let (seen, served) = (stats.total.quantiles(), stats.total_service.quantiles());
        // From the intended start nearly half of all are late, and for as long as they were.
        assert!(seen.p90_us > 700_000 && seen.max_us > 1_000_000, "{seen:?}");
        // Those that were sent late look as if nothing had happened: this is the omission.
        assert!(served.p99_us < 10_000 && served.p999_us < 10_000, "{served:?}");
    }

    #[test]
    fn only_the_measured_part_is_in_times_and_rates() {
        let mut stats = Stats::new(Span { from_ns: 100 * MS, to_ns: 200 * MS });
        for at_ns in [50 * MS, 150 * MS, 250 * MS] {
            stats.read(at_ns, 10, 2);
            stats.good(at_ns, at_ns - MS, at_ns - MS, 7);
            stats.fail(at_ns, "cut", "x");
        }
        assert_eq!(stats.all, Counts { events: 6, good: 3, failed: 3, bytes: 30 });
        assert_eq!(stats.measured, Counts { events: 2, good: 1, failed: 1, bytes: 10 });
        assert_eq!((stats.tokens, stats.total.quantiles().count), (21, 1));
    }

    #[test]
    fn threads_add_up() {
        let span = Span { from_ns: 0, to_ns: u64::MAX };
        let (mut one, mut two) = (Stats::new(span), Stats::new(span));
        for (stats, seconds) in [(&mut one, 3u64), (&mut two, 1)] {
            for second in 1..=seconds {
                stats.read(second, 1, 1);
                stats.seconds.push(stats.all);
            }
            stats.good(5 * MS, 0, MS, 2);
            stats.fail(0, "cut", "x");
            stats.late.note(0, MS);
        }
        one.add(&two);
        assert_eq!((one.all.events, one.all.good, one.all.failed, one.tokens), (4, 2, 2, 4));
        assert_eq!((one.failures["cut"].count, one.late.quantiles().count), (2, 2));
        assert_eq!(one.seconds.iter().map(|counts| counts.events).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(one.total.quantiles().p50_us, 5_003, "three digits");
        assert_eq!(Times::new().quantiles(), Quantiles::default());
        let curve = one.total.curve();
        assert!(curve.len() == 101 && curve.windows(2).all(|pair| pair[0].1 <= pair[1].1));
    }
}
