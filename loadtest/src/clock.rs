//! The clock that all processes of a machine share.
//!
//! `CLOCK_MONOTONIC` counts from the same moment for everybody, so the time that the simulator puts into an event and the
//! time at which the generator has it can be subtracted. `Instant` is the same clock but keeps its number to itself.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since some moment before all processes.
#[must_use]
pub(crate) fn now_ns() -> u64 {
    // The one error is an unknown clock.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let part = |number: i64| u64::try_from(number).unwrap_or_default();
    part(now.tv_sec()) * 1_000_000_000 + part(now.tv_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_as_it_does_for_instants() {
        let (began, instant) = (now_ns(), std::time::Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(5));
        let (took, wanted) = (now_ns() - began, instant.elapsed());
        assert!(took >= u64::try_from(wanted.as_nanos()).unwrap() && took < 60_000_000_000);
    }
}
