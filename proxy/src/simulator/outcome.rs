//! What came of a simulation.

use serde::Serialize;

/// The figures of one policy. Milliseconds are simulated ones.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy, as settings name it.
    pub policy: &'static str,
    /// Requests counted.
    pub requests: usize,
    /// Requests without an end when the simulation gave up, three times the arrivals' length after they ended: overload.
    pub unfinished: usize,
    /// Arrival to first token, the median.
    pub ttft_p50_ms: f64,
    /// Arrival to first token; one in a hundred waits longer.
    pub ttft_p99_ms: f64,
    /// Arrival to last token, the median.
    pub latency_p50_ms: f64,
    /// Arrival to last token; one in a hundred takes longer.
    pub latency_p99_ms: f64,
    /// Herd index: the busiest engine's requests over the average engine's, on average over time. 1 is even.
    pub herd: f64,
    /// Share of prompt tokens that were in an engine's cache.
    pub cache_hits: f64,
    /// Share of picks that left the endpoint of their affinity because it was too busy.
    pub spilled: f64,
}

/// The value that `percent` of `sorted` do not exceed (nearest rank); 0 of none.
pub(super) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// `part` of `whole`, rounded to four digits; 0 of nothing.
pub(super) fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole * 10_000.0).round() / 10_000.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (100.0, 198.0));
        assert_eq!((percentile(&[7.0], 99), percentile(&[], 50)), (7.0, 0.0));
        assert_eq!((share(1.0, 3.0), share(1.0, 0.0)), (0.3333, 0.0));
    }
}
