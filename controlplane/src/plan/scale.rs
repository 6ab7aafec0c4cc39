//! How many replicas a model shall have: the operator's number, or what its load calls for.
//!
//! Two steps, so that nothing here remembers anything. [`called_for`] says what the load calls for at this moment; who
//! keeps time (`memory.rs`) notes since when that has been more, or less, than there is ([`Window`]); and `decide`
//! acts once it has been so for the whole window. Every change starts both windows anew. What follows:
//!
//! - A load that swings faster than the windows changes nothing; in any time T there are at most T / `up_window_s` steps
//!   up and T / `down_window_s` steps down.
//! - Up goes to the least that was called for throughout the window, and at most to twice the present number; down goes
//!   to the most that was called for throughout.
//! - Fewer are called for only when the targets, cut to `down_percent`, would still be met: between the two nothing
//!   happens.
//! - A figure that is missing (an engine that does not report) never takes a replica away.
//! - From zero there is one way: somebody asks ([`Demand`]). That, and less than `min`, does not wait for a window.

use std::time::{Duration, Instant};

use crate::model::{Deployment, policy::Autoscaling};

/// Requests that wait for a model before any engine has them: a proxy's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Requests held.
    pub queued: u32,
    /// Since when the oldest of them waits.
    pub since: Instant,
}

/// What the ready replicas of a model do, summed up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Replicas whose figures are in here.
    pub reporting: u32,
    /// Replicas that are ready but say nothing, or nothing new.
    pub silent: u32,
    /// Requests that engines work on.
    pub running: u64,
    /// Requests that wait in engines.
    pub waiting: u64,
    /// Mean time to the first token over the last while, in milliseconds; None: not known.
    pub ttft_ms: Option<u32>,
}

/// Since when a load calls for another number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// For more: since when without a break, and the least of what was called for.
    pub above: Option<(Instant, u32)>,
    /// For fewer: since when without a break, and the most of what was called for.
    pub below: Option<(Instant, u32)>,
    /// Nothing runs and nothing waits since then.
    pub idle: Option<Instant>,
}

/// What comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scaled {
    pub(super) replicas: u32,
    /// Why it is not what it was.
    pub(super) reason: Option<String>,
    /// What it waits for.
    pub(super) waits: Option<String>,
}

/// The number that autoscaling starts from: what it said last, else the operator's, within its bounds.
pub fn present(deployment: &Deployment, scaled_to: Option<u32>) -> u32 {
    match &deployment.policy.autoscaling {
        None => deployment.replicas,
        Some(auto) => {
            let replicas = scaled_to.unwrap_or(deployment.replicas);
            let slept = replicas == 0 && auto.min == 0 && auto.idle_to_zero_s > 0;
            if slept { 0 } else { replicas.clamp(auto.min.max(1).min(auto.max), auto.max) }
        }
    }
}

/// What the load calls for now, with `present` replicas; None: not enough is known to say.
pub fn called_for(auto: &Autoscaling, load: &Load, queued: u32, present: u32) -> Option<u32> {
    let (low, high) = (auto.min.max(1).min(auto.max), auto.max);
    let waiting = load.waiting.saturating_add(u64::from(queued));
    let figures = [(waiting, auto.target_waiting), (load.running, auto.target_running)];
    let needed = |percent: u32| {
        let for_one = |(sum, target): &(u64, u32)| {
            let target = u64::from(*target) * u64::from(percent);
            (target > 0).then(|| sum.saturating_mul(100).div_ceil(target))
        };
        figures.iter().filter_map(for_one).max().unwrap_or(0)
    };
    let slow = |percent: u32| {
        // Waiting for the first token is a figure of the whole: it is judged only when the whole reports.
        let whole = load.reporting >= present && present > 0;
        let ttft = u64::from(load.ttft_ms.filter(|_| whole && auto.target_ttft_ms > 0)?);
        let target = u64::from(auto.target_ttft_ms) * u64::from(percent);
        Some((u64::from(present) * ttft).saturating_mul(100).div_ceil(target.max(1)))
    };
    let as_u32 = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).clamp(low, high);
    let up = as_u32(needed(100).max(slow(100).unwrap_or(0)));
    if up > present {
        return Some(up);
    }
    if load.silent > 0 || load.reporting < present || (auto.target_ttft_ms > 0 && load.ttft_ms.is_none()) {
        // Known to be enough, not known to be too much. An idle engine has no time to the first token.
        let idle = load.silent == 0 && load.reporting >= present && load.running == 0 && waiting == 0;
        return if idle { Some(low) } else { (load.reporting > 0).then_some(present) };
    }
    let down = as_u32(needed(auto.down_percent).max(slow(auto.down_percent).unwrap_or(0)));
    Some(down.min(present))
}

/// Decides.
pub(super) fn decide(
    deployment: &Deployment,
    scaled_to: Option<u32>,
    window: &Window,
    demand: Option<Demand>,
    now: Instant,
) -> Scaled {
    let present = present(deployment, scaled_to);
    let stay = |waits| Scaled { replicas: present, reason: None, waits };
    let Some(auto) = &deployment.policy.autoscaling else { return stay(None) };
    let to = |replicas: u32, reason: String| Scaled { replicas, reason: Some(reason), waits: None };
    let queued = demand.filter(|d| d.queued > 0);
    if present == 0 {
        return match queued {
            Some(demand) => {
                to(auto.min.max(1), format!("{} for it while it has no replica", requests(demand.queued)))
            }
            None => stay(Some("sleeps: nothing was asked of it; a request wakes it".into())),
        };
    }
    let held = |since: Instant| now.saturating_duration_since(since);
    let left = |since: Instant, window: Duration| window.saturating_sub(held(since)).as_secs_f64().ceil();
    if let Some((since, least)) = window.above.filter(|(_, least)| *least > present) {
        let up = Duration::from_secs(auto.up_window_s.into());
        let target = least.min(present.saturating_mul(2)).min(auto.max);
        if held(since) >= up {
            let reason = format!("the load called for {least} or more for {} s", auto.up_window_s);
            return to(target, reason);
        }
        let wait = left(since, up);
        return stay(Some(format!("the load calls for {least} replicas: grows to {target} in {wait:.0} s")));
    }
    if let Some(since) = window.idle.filter(|_| auto.min == 0 && auto.idle_to_zero_s > 0 && queued.is_none())
    {
        let patience = Duration::from_secs(auto.idle_to_zero_s.into());
        if held(since) >= patience {
            return to(0, format!("nothing was asked of it for {} s", auto.idle_to_zero_s));
        }
    }
    if let Some((since, most)) = window.below.filter(|(_, most)| *most < present) {
        let down = Duration::from_secs(auto.down_window_s.into());
        let target = most.max(auto.min).max(1);
        if held(since) >= down && target < present {
            return to(
                target,
                format!("the load called for no more than {most} for {} s", auto.down_window_s),
            );
        }
    }
    stay(None)
}

fn requests(count: u32) -> String {
    if count == 1 { "1 request waits".into() } else { format!("{count} requests wait") }
}
