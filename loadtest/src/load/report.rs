//! Counting, and saying what was counted.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::Options;

/// Longest time that is told apart, µs: an hour.
const MAX_US: u64 = 3_600_000_000;

/// The kind of failure of a stream that ended with an error event which says what it is: what came before was right, and
/// nobody was deceived.
pub const ERROR_EVENT: &str = "error in the stream";

/// Counts while the load runs.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) good: u64,
    failed: BTreeMap<String, Failure>,
    pub(super) tokens: u64,
    pub(super) bytes: u64,
    pub(super) ttft_us: Option<Histogram<u64>>,
    pub(super) gap_us: Option<Histogram<u64>>,
    pub(super) total_us: Option<Histogram<u64>>,
}

/// Failures of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// How many.
    pub count: u64,
    /// What the first said.
    pub example: String,
}

impl Stats {
    pub(super) fn new() -> Self {
        // Three digits from 1 µs to an hour: valid, so never none.
        let histogram = || Histogram::new_with_bounds(1, MAX_US, 3).ok();
        Self {
            good: 0,
            failed: BTreeMap::new(),
            tokens: 0,
            bytes: 0,
            ttft_us: histogram(),
            gap_us: histogram(),
            total_us: histogram(),
        }
    }

    /// Counts a failed request.
    pub(super) fn fail(&mut self, kind: &str, example: &str) {
        let failure =
            self.failed.entry(kind.into()).or_insert_with(|| Failure { count: 0, example: example.into() });
        failure.count += 1;
    }
}

/// Adds a time to a histogram.
pub(super) fn note(histogram: &mut Option<Histogram<u64>>, time: Duration) {
    if let Some(histogram) = histogram {
        histogram.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1));
    }
}

/// Percentiles of a time, µs.
#[derive(Debug, Clone, Copy, Default, Serialize)]
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

impl Quantiles {
    fn of(histogram: &Option<Histogram<u64>>) -> Self {
        let Some(histogram) = histogram.as_ref().filter(|h| !h.is_empty()) else { return Self::default() };
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self {
            count: histogram.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: histogram.max(),
        }
    }
}

/// What a run found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Concurrent streams.
    pub streams: u64,
    /// Tokens asked for in each request.
    pub tokens_per_request: u64,
    /// Wall time, s.
    pub elapsed_s: f64,
    /// Requests whose every token was right.
    pub good: u64,
    /// The others.
    pub failed: u64,
    /// Of the others: streams that said so themselves, by an error event. The rest were refused, cut, or wrong.
    pub error_events: u64,
    /// The others by kind.
    pub failures: BTreeMap<String, Failure>,
    /// Tokens of the good requests.
    pub tokens_verified: u64,
    /// These per second.
    pub tokens_per_s: f64,
    /// Good requests per second.
    pub requests_per_s: f64,
    /// Bytes of response bodies.
    pub body_bytes: u64,
    /// Tokens per second that each stream should have got; 0 = not said.
    pub wanted_rate: f64,
    /// From the request to the first text.
    pub ttft: Quantiles,
    /// Between texts of one stream.
    pub inter_token: Quantiles,
    /// From the request to the end.
    pub total: Quantiles,
}

impl Report {
    pub(super) fn new(options: &Options, stats: &Stats, elapsed: Duration) -> Self {
        let elapsed_s = elapsed.as_secs_f64();
        Self {
            streams: options.streams,
            tokens_per_request: options.tokens,
            elapsed_s,
            good: stats.good,
            failed: stats.failed.values().map(|f| f.count).sum(),
            error_events: stats.failed.get(ERROR_EVENT).map_or(0, |f| f.count),
            failures: stats.failed.clone(),
            tokens_verified: stats.tokens,
            tokens_per_s: stats.tokens as f64 / elapsed_s,
            requests_per_s: stats.good as f64 / elapsed_s,
            body_bytes: stats.bytes,
            wanted_rate: options.rate,
            ttft: Quantiles::of(&stats.ttft_us),
            inter_token: Quantiles::of(&stats.gap_us),
            total: Quantiles::of(&stats.total_us),
        }
    }

    /// True if something was done and all of it was right.
    pub const fn is_good(&self) -> bool {
        self.good > 0 && self.failed == 0
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
    }

    /// For a human.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} streams, {} tokens each, {:.2} s\nrequests   {} good, {} failed ({:.1}/s)\ntokens     {} verified ({:.0}/s",
            self.streams,
            self.tokens_per_request,
            self.elapsed_s,
            self.good,
            self.failed,
            self.requests_per_s,
            self.tokens_verified,
            self.tokens_per_s
        );
        if self.wanted_rate > 0.0 {
            let wanted = self.wanted_rate * self.streams as f64;
            text.push_str(&format!(", {:.0}/s wanted", wanted));
        }
        text.push_str(")\n\n              p50        p90        p99      p99.9        max   (ms)\n");
        for (name, q) in [("ttft", &self.ttft), ("inter-token", &self.inter_token), ("total", &self.total)] {
            let ms = [q.p50_us, q.p90_us, q.p99_us, q.p999_us, q.max_us]
                .map(|us| format!("{:10.3}", us as f64 / 1e3));
            text.push_str(&format!("{name:<11}{}\n", ms.join(" ")));
        }
        for (kind, failure) in &self.failures {
            text.push_str(&format!("failed: {kind} × {}: {}\n", failure.count, failure.example));
        }
        text
    }
}
