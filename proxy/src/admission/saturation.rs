//! Whether an engine is at its limit: a request sent there now would only wait there.
//!
//! Two sources, each with its own decay, so that neither can keep an engine shut by being old:
//!
//! - *What it reported.* Requests waiting inside an engine mean that it runs as many as it can: its capacity is what it
//!   runs, and it may have [`Limits::waiting`] more in its own queue (so that it never idles while we are told), fewer when
//!   its KV cache is nearly full as well. Compared with the load estimate, which grows with each request sent since, so one
//!   old report does not let a whole queue in. An engine that reports nobody waiting is never full by its report, whatever
//!   its other gauges say: vLLM's KV gauge has been seen to stay high after mass aborts.
//! - *Busy answers.* A 503 teaches the number of our own requests that the engine was willing to hold. That number is the
//!   limit from then on and grows by one each [`Limits::busy_step_ms`], until it is forgotten after [`BUSY_MEMORY_STEPS`] of
//!   them: additive increase after a cut, the way TCP finds its share. So a full engine is asked once a step, not once a
//!   request, and a place that falls free there is used at once.
//!
//! A fixed ceiling on requests per engine ([`Limits::inflight`]) serves engines that neither report nor refuse.

/// Steps after which a busy answer is forgotten.
pub const BUSY_MEMORY_STEPS: u64 = 40;

/// The limits, see `[queue]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait inside an engine.
    pub waiting: u32,
    /// KV use, in thousandths, from which on only one may.
    pub kv_permille: u32,
    /// Milliseconds after which one request more than a busy engine held is tried.
    pub busy_step_ms: u64,
    /// Requests of this proxy that an engine may have; 0: no such limit.
    pub inflight: u32,
}

/// What an engine said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    /// Requests that it works on.
    pub running: u32,
    /// Requests in its own queue.
    pub waiting: u32,
    /// KV cache in use, in thousandths.
    pub kv_permille: u32,
}

/// A busy answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// This proxy's requests there at that moment, the refused one not counted.
    pub held: u32,
    /// When, on the clock of the picks.
    pub at_ms: u64,
}

impl Busy {
    /// How many of our own the engine is thought to hold at `now_ms`; `None` once that is forgotten.
    pub fn limit(&self, now_ms: u64, step_ms: u64) -> Option<u32> {
        let steps = now_ms.saturating_sub(self.at_ms) / step_ms.max(1);
        let grown = u32::try_from(steps).unwrap_or(u32::MAX);
        (steps < BUSY_MEMORY_STEPS).then(|| self.held.saturating_add(grown))
    }
}

/// Whether an engine with `local` requests of this proxy, and `load` of everybody by the estimate, is at its limit.
/// `reported` must be fresh.
pub fn is_full(
    (local, load): (u32, u32),
    reported: Option<Reported>,
    busy: Option<Busy>,
    now_ms: u64,
    limits: &Limits,
) -> bool {
    let ceiling = limits.inflight > 0 && local >= limits.inflight;
    let refused =
        busy.and_then(|busy| busy.limit(now_ms, limits.busy_step_ms)).is_some_and(|most| local >= most);
    let queueing = reported.filter(|reported| reported.waiting > 0).is_some_and(|reported| {
        let room =
            if reported.kv_permille >= limits.kv_permille { limits.waiting.min(1) } else { limits.waiting };
        load >= reported.running.saturating_add(room)
    });
    ceiling || refused || queueing
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { waiting: 4, kv_permille: 950, busy_step_ms: 250, inflight: 0 };

    fn reported(running: u32, waiting: u32, kv_permille: u32) -> Option<Reported> {
        Some(Reported { running, waiting, kv_permille })
    }

    #[test]
    fn an_engine_with_a_queue_of_its_own_takes_what_keeps_it_busy_and_no_more() {
        let full = |load| is_full((0, load), reported(16, 1, 500), None, 0, &LIMITS);
        assert!(!full(19));
        assert!(full(20));
        let pressed = |load| is_full((0, load), reported(16, 1, 960), None, 0, &LIMITS);
        assert!(!pressed(16));
        assert!(pressed(17), "with its cache full only one may wait");
    }

    #[test]
    fn a_full_cache_with_nobody_waiting_is_no_reason() {
        assert!(!is_full((0, 500), reported(0, 0, 1_000), None, 0, &LIMITS));
    }

    #[test]
    fn a_refusal_teaches_a_limit_that_grows_and_is_forgotten() {
        let busy = Some(Busy { held: 3, at_ms: 1_000 });
        let full = |local, now| is_full((local, local), None, busy, now, &LIMITS);
        assert!(full(3, 1_000));
        assert!(!full(2, 1_000), "a place that falls free is used at once");
        assert!(!full(3, 1_250), "one more is tried a step later");
        assert!(full(4, 1_250));
        assert!(!full(1_000_000, 1_000 + 250 * BUSY_MEMORY_STEPS));
    }

    #[test]
    fn a_ceiling_holds_without_reports() {
        let limits = Limits { inflight: 2, ..LIMITS };
        assert!(!is_full((1, 1), None, None, 0, &limits));
        assert!(is_full((2, 2), None, None, 0, &limits));
    }

    proptest! {
        #[test]
        fn no_refusal_shuts_an_engine_for_ever(held in any::<u32>(), local in any::<u32>(), step in 1u64..10_000) {
            let busy = Some(Busy { held, at_ms: 7 });
            let limits = Limits { busy_step_ms: step, ..LIMITS };
            prop_assert!(!is_full((local, local), None, busy, 7 + step * BUSY_MEMORY_STEPS, &limits));
        }

        #[test]
        fn less_load_never_makes_an_engine_full(
            local in 0u32..100, less in 0u32..100, running in 0u32..64, waiting in 0u32..64, kv in 0u32..1_001,
            held in 0u32..64, now in 0u64..20_000,
        ) {
            let busy = Some(Busy { held, at_ms: 0 });
            let full = |load: u32| is_full((load, load), reported(running, waiting, kv), busy, now, &LIMITS);
            prop_assert!(full(local) || !full(local.saturating_sub(less)));
        }
    }
}
