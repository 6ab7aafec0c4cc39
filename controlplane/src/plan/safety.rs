//! What keeps a mistake small: how much one plan may start and stop, and when it may do nothing at all.
//!
//! A wrong figure or a wrong wish must not take a fleet down between two looks at it. So a plan starts and stops at most
//! so many replicas; the caller takes a plan that hit a cap (`Plan::is_capped`) as one for this tick, and the rest comes
//! with the next. And a view that is too old to be true is no base for anything: then only the report is made.

use std::time::Duration;

use super::{Observed, Rules};

/// What is left of a plan's caps.
#[derive(Debug)]
pub(super) struct Caps {
    starts: usize,
    stops: usize,
    pub(super) is_hit: bool,
}

impl Caps {
    pub(super) fn new(rules: &Rules) -> Self {
        Self { starts: rules.max_starts, stops: rules.max_stops, is_hit: false }
    }

    /// Whether one more replica may be started.
    pub(super) fn start(&mut self) -> bool {
        take(&mut self.starts, &mut self.is_hit)
    }

    /// How many more replicas may be stopped.
    pub(super) fn stops_left(&self) -> usize {
        self.stops
    }

    /// Whether one more replica may be stopped.
    pub(super) fn stop(&mut self) -> bool {
        take(&mut self.stops, &mut self.is_hit)
    }
}

fn take(left: &mut usize, is_hit: &mut bool) -> bool {
    let may = *left > 0;
    *left = left.saturating_sub(1);
    *is_hit |= !may;
    may
}

/// Why nothing at all may be done, if that is so.
pub(super) fn refusal(observed: &Observed<'_>, rules: &Rules) -> Option<String> {
    let is_stale = rules.max_view_age > Duration::ZERO && observed.view_age > rules.max_view_age;
    is_stale.then(|| {
        let (age, most) = (observed.view_age.as_secs(), rules.max_view_age.as_secs());
        format!("nothing is changed: the store was last followed {age} s ago, and after {most} s it is not acted upon")
    })
}
