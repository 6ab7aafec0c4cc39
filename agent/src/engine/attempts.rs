//! How often an engine has failed in a row, and when its agent gives it up here. Pure.
//!
//! Three kinds of failure: a start that cannot succeed however often it is tried (an unknown program, a refused argument), or that
//! went wrong in a way that the same start will again (a model that is not there), is given up at once; a start that never got ready is given up after [`Rules::stuck_starts`] of them, since each took
//! `engines.ready_s`; anything else after [`Rules::failures`]. Given up means that the control plane is told, which places the
//! replica elsewhere where it can. The agent keeps trying, slowly: if the cause goes away, the engine runs again, and is not given up
//! any more from the first completion on.

/// What counts how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Failures in a row; 0: never.
    pub(crate) failures: u32,
    /// Starts in a row that never got ready; 0: never.
    pub(crate) stuck_starts: u32,
}

/// Why an engine failed, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Another try would fail the same way.
    Permanent,
    /// It was not ready in time.
    Stuck,
    /// Anything else.
    Other,
}

/// One engine's failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Attempts {
    failures: u32,
    stuck: u32,
    is_given_up: bool,
}

impl Attempts {
    /// It failed.
    pub(crate) fn failed(&mut self, kind: Kind, rules: Rules) {
        self.failures = self.failures.saturating_add(1);
        self.stuck = if kind == Kind::Stuck { self.stuck.saturating_add(1) } else { 0 };
        let reached = |count: u32, limit: u32| limit > 0 && count >= limit;
        self.is_given_up |= kind == Kind::Permanent
            || reached(self.failures, rules.failures)
            || reached(self.stuck, rules.stuck_starts);
    }

    /// It completed a request: it is worth trying, though it may fail again soon.
    pub(crate) fn got_ready(&mut self) {
        (self.stuck, self.is_given_up) = (0, false);
    }

    /// It has been ready for long enough.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Failures in a row.
    pub(crate) fn failures(self) -> u32 {
        self.failures
    }

    /// Whether it is given up here.
    pub(crate) fn is_given_up(self) -> bool {
        self.is_given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { failures: 5, stuck_starts: 2 };

    fn after(kinds: &[Kind], rules: Rules) -> Attempts {
        let mut attempts = Attempts::default();
        kinds.iter().for_each(|kind| attempts.failed(*kind, rules));
        attempts
    }

    #[test]
    fn each_kind_is_given_up_in_its_time() {
        for (kind, limit) in [(Kind::Permanent, 1), (Kind::Stuck, 2), (Kind::Other, 5)] {
            assert!(!after(&vec![kind; limit - 1], RULES).is_given_up(), "{kind:?}");
            assert!(after(&vec![kind; limit], RULES).is_given_up(), "{kind:?}");
        }
        let mixed = [Kind::Stuck, Kind::Other, Kind::Stuck, Kind::Other];
        assert!(!after(&mixed, RULES).is_given_up(), "not stuck in a row");
        let never = Rules { failures: 0, stuck_starts: 0 };
        assert!(!after(&[Kind::Stuck; 100], never).is_given_up());
    }

    #[test]
    fn ready_once_is_worth_trying_and_ready_for_long_is_forgotten() {
        let mut attempts = after(&[Kind::Other; 7], RULES);
        attempts.got_ready();
        assert_eq!((attempts.is_given_up(), attempts.failures()), (false, 7));
        attempts.failed(Kind::Other, RULES);
        assert!(attempts.is_given_up(), "it crashes as soon as it is ready, over and over");
        attempts.forget();
        assert_eq!(attempts, Attempts::default());
    }
}
