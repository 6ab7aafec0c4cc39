//! The mean time to the first token over the last half minute, out of counters that only grow. Pure.
//!
//! vLLM tells a histogram: the sum of all times and the number of requests since the engine started. Two readings of both
//! give the mean of what came between them. Readings are kept for [`WINDOW`], at most one for each [`STEP`], so memory is
//! bounded; counters that fall belong to a new engine, and what was read of the old one is forgotten.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How far back the mean goes.
const WINDOW: Duration = Duration::from_secs(30);

/// Between two readings that are kept.
const STEP: Duration = Duration::from_secs(1);

/// The counters of one reading.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct FirstTokens {
    /// Requests that have had their first token.
    pub(crate) requests: f64,
    /// The sum of their times, in seconds.
    pub(crate) seconds: f64,
}

/// The mean of a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Mean {
    /// Requests it is of; 0: there is none.
    pub(crate) requests: u32,
    /// Milliseconds.
    pub(crate) ttft_ms: u32,
}

/// The readings of one engine.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Window {
    /// Oldest first; the last may be younger than a step.
    readings: VecDeque<(Instant, FirstTokens)>,
}

impl Window {
    /// Takes a reading in; readings come in the order of their times.
    pub(crate) fn note(&mut self, reading: FirstTokens, now: Instant) {
        if self
            .readings
            .back()
            .is_some_and(|(_, last)| reading.requests < last.requests || reading.seconds < last.seconds)
        {
            self.readings.clear();
        }
        // The last one is replaced as long as it is within a step of the one before it.
        if let Some((before, _)) = self.readings.len().checked_sub(2).and_then(|at| self.readings.get(at))
            && now.saturating_duration_since(*before) < STEP
        {
            self.readings.pop_back();
        }
        self.readings.push_back((now, reading));
        // One reading from before the window stays: the window begins with it.
        while self.readings.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW) {
            self.readings.pop_front();
        }
    }

    /// The mean of the requests between the first reading and the last.
    pub(crate) fn mean(&self) -> Mean {
        let (Some((_, first)), Some((_, last))) = (self.readings.front(), self.readings.back()) else {
            return Mean::default();
        };
        let requests = whole(last.requests - first.requests);
        if requests == 0 {
            return Mean::default();
        }
        Mean { requests, ttft_ms: whole((last.seconds - first.seconds) / f64::from(requests) * 1e3) }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, NaN becomes 0")]
fn whole(value: f64) -> u32 {
    value.round() as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reading(requests: u32, seconds: f64) -> FirstTokens {
        FirstTokens { requests: requests.into(), seconds }
    }

    #[test]
    fn the_mean_is_of_what_came_between_two_readings() {
        let (mut window, start) = (Window::default(), Instant::now());
        assert_eq!(window.mean(), Mean::default());
        window.note(reading(1_000, 900.0), start);
        assert_eq!(
            window.mean(),
            Mean::default(),
            "what came before the first reading is not known to be of late"
        );
        window.note(reading(1_010, 902.0), start + STEP);
        assert_eq!(window.mean(), Mean { requests: 10, ttft_ms: 200 });
        window.note(reading(1_010, 902.0), start + STEP + WINDOW);
        assert_eq!(window.mean(), Mean::default(), "nothing for half a minute");
    }

    #[test]
    fn an_engine_that_began_anew_is_not_compared_with_the_one_before() {
        let (mut window, start) = (Window::default(), Instant::now());
        window.note(reading(100, 10.0), start);
        window.note(reading(4, 2.0), start + STEP);
        assert_eq!(window.mean(), Mean::default());
        window.note(reading(6, 3.0), start + 2 * STEP);
        assert_eq!(window.mean(), Mean { requests: 2, ttft_ms: 500 });
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_the_mean_lies_between_the_least_and_the_most(
            steps in prop::collection::vec((0u64..3_000, 0u32..5, 1u32..4_000), 1..200),
        ) {
            let (mut window, mut now) = (Window::default(), Instant::now());
            let (mut requests, mut seconds) = (0, 0.0);
            for (later_ms, more, each_ms) in steps {
                now += Duration::from_millis(later_ms);
                requests += more;
                seconds += f64::from(more) * f64::from(each_ms) / 1e3;
                window.note(reading(requests, seconds), now);
                prop_assert!(window.readings.len() <= 33, "{}", window.readings.len());
                let mean = window.mean();
                prop_assert!(mean.ttft_ms <= 4_000 && (mean.requests > 0 || mean.ttft_ms == 0));
                prop_assert!(mean.requests == 0 || mean.ttft_ms >= 1);
            }
        }
    }
}
