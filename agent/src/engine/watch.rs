//! Watching a ready engine: does it answer, what is its load, which adapters has it.
//!
//! Three loops that the supervisor polls beside the engine's exit and its orders. Liveness is tolerant: a saturated vLLM
//! can take 4 s to answer anything, a restart costs a minute, and a check that failed while tokens were made does not count.
//! An engine that answers and makes no progress is found in [`canary`](super::canary).

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use super::{
    load::Scrape,
    probe::{Probe, Target},
};

/// Returns, with the reason, when `failures` checks in a row have failed and the engine got nowhere meanwhile:
/// `moved_since(t)` says whether there was progress after `t`.
pub(crate) async fn until_silent(
    probe: &Probe,
    target: &Target,
    period: Duration,
    deadline: Duration,
    failures: u32,
    moved_since: impl Fn(Instant) -> bool,
) -> String {
    let mut in_a_row = 0;
    loop {
        tokio::time::sleep(period).await;
        let began = Instant::now();
        match probe.health(target, deadline).await {
            Ok(()) => in_a_row = 0,
            Err(reason) if moved_since(began) => {
                in_a_row = 0;
                tracing::debug!(reason, "an engine that makes progress does not answer its liveness check");
            }
            Err(reason) => {
                in_a_row += 1;
                tracing::warn!(in_a_row, reason, "an engine's liveness check failed");
                if in_a_row >= failures {
                    return format!("{in_a_row} liveness checks in a row failed: {reason}");
                }
            }
        }
    }
}

/// Reads `/metrics` every `period`, one reading at a time, and hands each outcome to `note`, with when it was begun. Never
/// returns.
pub(crate) async fn follow_load(
    probe: &Probe,
    target: &Target,
    period: Duration,
    deadline: Duration,
    mut note: impl FnMut(Result<Scrape, String>, Instant),
) -> Infallible {
    if !target.says_load() {
        return std::future::pending().await;
    }
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let began = Instant::now();
        note(probe.scrape(target, deadline).await, began);
    }
}

/// Reads the list of adapters every `period` and hands it to `note` when it has changed. A list that cannot be read is
/// taken for the last one: whether the engine answers at all is found out elsewhere. Never returns.
pub(crate) async fn follow_adapters(
    probe: &Probe,
    target: &Target,
    model: &str,
    period: Duration,
    mut known: Vec<String>,
    note: impl Fn(Vec<String>),
) -> Infallible {
    loop {
        tokio::time::sleep(period).await;
        match probe.adapters(target, model).await {
            Ok(adapters) if adapters != known => {
                tracing::info!(?adapters, before = ?known, "an engine has other adapters");
                known.clone_from(&adapters);
                note(adapters);
            }
            Ok(_) => {}
            Err(reason) => tracing::debug!(reason, "an engine's adapters cannot be read"),
        }
    }
}
