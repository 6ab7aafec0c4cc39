//! When to start a child again. Pure.
//!
//! A process that worked for a while and then died gets a quick new start. One that dies again and again right after
//! its start will not be healed by trying: after [`LIMIT`] such ends the whole `up` stops and says why.

use std::time::Duration;

/// A run at least this long counts as having worked.
const WORKED: Duration = Duration::from_secs(10);
/// Short runs in a row that are one too many.
const LIMIT: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// One child's record.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    short_runs: u32,
}

/// What to do about an end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start it again after this pause.
    After(Duration),
    /// It ended this many times in a row right after its start.
    GiveUp(u32),
}

impl Restarts {
    /// The child ended after having run for `ran`.
    pub(crate) fn ended(&mut self, ran: Duration) -> Verdict {
        self.short_runs = if ran >= WORKED { 0 } else { self.short_runs + 1 };
        if self.short_runs >= LIMIT {
            return Verdict::GiveUp(self.short_runs);
        }
        let doublings = self.short_runs.saturating_sub(1);
        Verdict::After(FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_it_is_given_up() {
        let mut restarts = Restarts::default();
        let short = Duration::from_secs(1);
        for pause in [100, 200, 400, 800, 1_600] {
            assert_eq!(restarts.ended(short), Verdict::After(Duration::from_millis(pause)));
        }
        assert_eq!(restarts.ended(short), Verdict::GiveUp(6));
    }

    #[test]
    fn a_run_that_worked_wipes_the_record() {
        let mut restarts = Restarts::default();
        for _ in 0..100 {
            restarts.ended(Duration::ZERO);
            restarts.ended(Duration::ZERO);
            assert_eq!(restarts.ended(WORKED), Verdict::After(FIRST_PAUSE));
        }
    }
}
