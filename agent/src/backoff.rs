//! How long to wait before the next try.

use std::time::Duration;

/// Doubling pauses between two bounds, each shortened by chance so that many waiters do not come back together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
}

impl Backoff {
    /// Pauses from `min_ms` to `max_ms`.
    pub(crate) fn new(min_ms: u64, max_ms: u64) -> Self {
        Self { min: Duration::from_millis(min_ms), max: Duration::from_millis(max_ms.max(min_ms)) }
    }

    /// The pause after `failures` (from 1) in a row: between half of and the whole of min · 2^(failures-1), at most max.
    pub(crate) fn pause(&self, failures: u32, rng: &mut fastrand::Rng) -> Duration {
        let doublings = failures.saturating_sub(1).min(30);
        let full = self.min.saturating_mul(1 << doublings).min(self.max);
        full.mul_f64(0.5 + rng.f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_bound_and_never_fall_below_half() {
        let backoff = Backoff::new(100, 5_000);
        let mut rng = fastrand::Rng::with_seed(1);
        for (failures, full_ms) in [(0, 100), (1, 100), (2, 200), (6, 3_200), (7, 5_000), (1_000_000, 5_000)]
        {
            for _ in 0..100 {
                let pause = backoff.pause(failures, &mut rng);
                let full = Duration::from_millis(full_ms);
                assert!(pause >= full / 2 && pause <= full, "{failures}: {pause:?}");
            }
        }
    }
}
