//! What has to be looked at now and then, whatever engines do: logs that grow, ends for want of memory, foreign processes,
//! and dead processes that nobody waits for.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};
use tokio_util::sync::CancellationToken;

use crate::engine::{context::Context, procfs};

/// Between two rounds.
const PERIOD: Duration = Duration::from_secs(5);

/// Until `stop`. The first round is made at once.
pub(crate) async fn run(cx: Arc<Context>, stop: CancellationToken) {
    let foreign = Duration::from_secs(cx.config.foreign_s);
    let mut looked: Option<Instant> = None;
    let mut dead = BTreeSet::new();
    loop {
        let due = !foreign.is_zero() && looked.is_none_or(|looked| looked.elapsed() >= foreign);
        if due {
            looked = Some(Instant::now());
        }
        let (cx, before) = (cx.clone(), std::mem::take(&mut dead));
        let round = tokio::task::spawn_blocking(move || {
            cx.memories.look(Instant::now());
            put_logs_aside(&cx);
            if due {
                look_for_foreign(&cx);
            }
            reap(&before)
        });
        match round.await {
            Ok(now) => dead = now,
            Err(error) => tracing::error!(%error, "a round of the janitor broke"),
        }
        if stop.run_until_cancelled(tokio::time::sleep(PERIOD)).await.is_none() {
            return;
        }
    }
}

fn put_logs_aside(cx: &Context) {
    let Ok(entries) = std::fs::read_dir(cx.state.logs()) else { return };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    for path in paths.filter(is_current) {
        match cx.logs.rotate(&path, cx.config.log_bytes, cx.config.log_files) {
            Ok(true) => cx.metrics.log_rotations.inc(),
            Ok(false) => {}
            Err(error) => tracing::error!(path = %path.display(), %error, "cannot put an engine's log aside"),
        }
    }
}

/// STEM.log, and not STEM.previous.log: stems have no dots.
fn is_current(path: &PathBuf) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_suffix(".log")).is_some_and(|stem| !stem.contains('.'))
}

fn look_for_foreign(cx: &Context) {
    let found = crate::foreign::look(cx);
    cx.metrics.foreign.set(i64::try_from(found.len()).unwrap_or(i64::MAX));
    for process in cx.foreign.replace(found) {
        tracing::warn!(
            pid = process.pid,
            kind = process.kind,
            user = process.user,
            port = process.port,
            "a vLLM process that is none of this agent's runs here; it is left alone"
        );
    }
}

/// Takes the exit statuses of our children that were dead a round ago already: orphans of engines that fell to this
/// process, and that nobody waits for. The dead of this round.
fn reap(before: &BTreeSet<(i32, u64)>) -> BTreeSet<(i32, u64)> {
    let own = procfs::raw_pid(std::process::id());
    let dead = procfs::all().into_iter().filter(|p| p.ppid == own && p.is_dead());
    let dead: BTreeSet<_> = dead.map(|p| (p.pid, p.start_ticks)).collect();
    for (pid, _) in dead.intersection(before) {
        // Taken by somebody after all: as good.
        waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG)).ok();
    }
    dead
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_present_logs_are_put_aside() {
        for (name, current) in [
            ("m-0.log", true),
            ("m-0.previous.log", false),
            ("m-0.previous-2.log", false),
            ("m-0.previous.new", false),
        ] {
            assert_eq!(is_current(&PathBuf::from("/logs").join(name)), current, "{name}");
        }
    }

    #[test]
    fn a_child_that_nobody_waits_for_is_reaped_in_the_second_round() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = procfs::raw_pid(child.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        let dead = loop {
            let dead = reap(&BTreeSet::new());
            if dead.iter().any(|(p, _)| *p == pid) || Instant::now() > deadline {
                break dead;
            }
        };
        let own = dead.into_iter().filter(|(p, _)| *p == pid).collect();
        assert!(procfs::read(pid).is_some(), "the first round only looks");
        reap(&own);
        assert!(procfs::read(pid).is_none());
        child.wait().unwrap_err();
    }
}
