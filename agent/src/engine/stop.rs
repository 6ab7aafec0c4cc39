//! The end of an engine: drained where it can be, then every process of it gone, and known to be gone.
//!
//! Order of a stop: deregister → wait until its running requests are done → SIGTERM to the whole tree, and SIGCONT, since
//! what is stopped heeds no SIGTERM → SIGKILL → look in `/proc` until nothing is left → look for processes of the replica
//! that left the tree, and end those too. The caller has deregistered already. [`put_down`] is the part without draining, for engines whose main process has died.
//!
//! It does not return before nothing is left: a new engine beside the remains of an old one would find the GPU full. What
//! cannot be killed (a process stuck in the driver) is reported and waited for.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    adopt,
    cgroup::Cgroups,
    probe::{Probe, Target},
    process::Tree,
};
use crate::{metrics::Metrics, state::StateDir};

/// How often the tree is looked at.
const POLL: Duration = Duration::from_millis(25);
/// How often SIGKILL is repeated: a process may have been forked between two looks.
const KILL_AGAIN: Duration = Duration::from_secs(1);
/// SIGTERM's time once the operator has lost patience.
const HURRIED_TERM: Duration = Duration::from_secs(1);
/// Readings of "nothing runs" in a row that count as drained: a request may be between the server and the scheduler.
const QUIET_READINGS: u32 = 2;

/// What [`drain`] says of an engine that has nothing left to do.
pub(crate) const DRAINED: &str = "drained";

/// Bounds of a drain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DrainTimes {
    /// At least this long.
    pub(crate) settle: Duration,
    /// At most this long.
    pub(crate) longest: Duration,
    /// Pause between two readings.
    pub(crate) poll: Duration,
    /// Longest wait for one reading.
    pub(crate) reading: Duration,
}

impl DrainTimes {
    /// The longest that a drain takes.
    pub(crate) fn longest(&self) -> Duration {
        self.longest.max(self.settle)
    }
}

/// Waits until the engine has nothing to do, within `times`. How it went, for the log.
pub(crate) async fn drain(probe: &Probe, target: &Target, times: DrainTimes) -> &'static str {
    let quiet = async {
        sleep(times.settle).await;
        let mut in_a_row = 0;
        loop {
            // An engine whose load cannot be read may still be busy: then the whole time is its.
            let idle = matches!(probe.load(target, times.reading).await, Ok(load) if load.running == 0 && load.waiting == 0);
            in_a_row = if idle { in_a_row + 1 } else { 0 };
            if in_a_row >= QUIET_READINGS {
                return;
            }
            sleep(times.poll).await;
        }
    };
    match tokio::time::timeout(times.longest(), quiet).await {
        Ok(()) => DRAINED,
        Err(_) => "not drained in time",
    }
}

/// Ends the whole tree: SIGTERM, `term` later SIGKILL, and returns when nothing of it is left. `stuck` is told of
/// processes that are still there `kill_report` after SIGKILL, each time that much later.
pub(crate) async fn put_down(
    tree: &mut Tree,
    term: Duration,
    kill_report: Duration,
    hurry: &CancellationToken,
    metrics: &Metrics,
    mut stuck: impl FnMut(String),
) {
    tree.signal(Signal::SIGTERM);
    // One that was stopped heeds the other only when it goes on; to the others this is nothing.
    tree.signal(Signal::SIGCONT);
    if gone_within(tree, term, Some(hurry)).await {
        return;
    }
    metrics.kills.inc();
    let mut reported = Instant::now();
    loop {
        tree.signal(Signal::SIGKILL);
        if gone_within(tree, KILL_AGAIN, None).await {
            return;
        }
        if reported.elapsed() >= kill_report {
            reported = Instant::now();
            let left: Vec<String> =
                tree.members().iter().map(|p| format!("pid {} in state {}", p.pid, p.state)).collect();
            stuck(format!("SIGKILL has not ended {}", left.join(", ")));
        }
    }
}

/// Ends processes of the replica that are in no tree of ours.
pub(crate) async fn end_strays(
    state: &StateDir,
    cgroups: &Cgroups,
    replica_id: &str,
    term: Duration,
    give_up: Duration,
) {
    let find = || adopt::strays(state, cgroups, replica_id);
    for process in adopt::end_remains(find, term, give_up).await {
        tracing::error!(
            replica_id,
            pid = process.pid,
            "a process that left its engine's tree cannot be ended"
        );
    }
}

/// Whether the tree is empty within `time`, which `hurry` cuts to a second.
async fn gone_within(tree: &mut Tree, time: Duration, hurry: Option<&CancellationToken>) -> bool {
    let start = Instant::now();
    let mut time = time;
    loop {
        if tree.members().is_empty() {
            return true;
        }
        if hurry.is_some_and(CancellationToken::is_cancelled) {
            time = time.min(HURRIED_TERM);
        }
        if start.elapsed() >= time {
            return false;
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::engine::command::Launch;

    fn shell(script: &str) -> Tree {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        Tree::spawn(
            &Launch { argv, env: BTreeMap::new(), env_removed: vec![] },
            tempfile::tempfile().unwrap(),
        )
        .unwrap()
    }

    async fn put_down_within(tree: &mut Tree, term: Duration, hurry: &CancellationToken) -> (u64, Duration) {
        let metrics = Metrics::new().unwrap();
        let start = Instant::now();
        put_down(tree, term, Duration::from_secs(5), hurry, &metrics, |left| panic!("{left}")).await;
        assert!(tree.members().is_empty());
        (metrics.kills.get(), start.elapsed())
    }

    #[tokio::test]
    async fn a_group_that_heeds_sigterm_is_not_killed() {
        let mut tree = shell("sleep 600 & sleep 600");
        let (kills, took) =
            put_down_within(&mut tree, Duration::from_secs(30), &CancellationToken::new()).await;
        assert_eq!(kills, 0);
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test]
    async fn a_stopped_tree_heeds_sigterm_all_the_same() {
        let mut tree = shell("sleep 600 & sleep 600");
        tree.signal(Signal::SIGSTOP);
        let (kills, took) =
            put_down_within(&mut tree, Duration::from_secs(30), &CancellationToken::new()).await;
        assert_eq!(kills, 0);
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test]
    async fn a_group_that_ignores_sigterm_is_killed_and_hurry_shortens_the_wait() {
        let stubborn = "trap '' TERM; sh -c \"trap '' TERM; while :; do sleep 0.1; done\" & echo up; wait";
        let mut tree = shell(stubborn);
        // The trap must be set before the signal comes.
        let deadline = Instant::now() + Duration::from_secs(10);
        while tree.members().len() < 3 && Instant::now() < deadline {
            sleep(POLL).await;
        }
        let hurry = CancellationToken::new();
        hurry.cancel();
        let (kills, took) = put_down_within(&mut tree, Duration::from_secs(600), &hurry).await;
        assert_eq!(kills, 1);
        assert!(took >= HURRIED_TERM && took < Duration::from_secs(60), "{took:?}");
    }
}
