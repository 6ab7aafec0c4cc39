//! Finds out why an engine ended, counts it, and shows it: the shell around [`causes`].

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    causes::{self, Cause, Evidence},
    cgroup,
    context::Context,
    launch::Failure,
    logs,
    process::Exit,
};
use crate::{board::LastExit, state::stem};

/// Lines of the log that are quoted.
const QUOTED: usize = 5;
/// An end for want of memory this long ago may be the reason of one that is noticed now.
const MEMORY_HORIZON: Duration = Duration::from_secs(15);

/// Why the replica's main process ended; counted, and on the board until the next end.
pub(crate) fn failure(cx: &Context, replica_id: &str, exit: Exit) -> Failure {
    let lines = logs::life(&cx.state.log(replica_id));
    let counted = cx.cgroups.find(&stem(replica_id)).and_then(|cgroup| cgroup.memory().oom_kills);
    let oom_killed = counted.is_some_and(|kills| kills > 0);
    let oom_nearby = cx.memories.lately(Instant::now());
    let evidence = Evidence { exit, oom_killed, oom_nearby, lines: &lines };
    let finding = causes::decide(evidence);
    let last = lines.get(lines.len().saturating_sub(QUOTED)..).unwrap_or_default();
    let mut reason = format!("the engine {exit}");
    if let Some(words) = finding.cause.words() {
        reason.push_str(&format!(" ({words})"));
    }
    if let Some(line) = finding.line.filter(|line| !last.contains(line)) {
        reason.push_str(&format!("; it wrote: {line}"));
    }
    match last {
        [] => reason.push_str("; it wrote nothing"),
        last => reason.push_str(&format!("; last lines: {}", last.join(" | "))),
    }
    note(cx, replica_id, finding.cause, reason)
}

/// The same of an engine that could not be started.
pub(crate) fn not_started(cx: &Context, replica_id: &str, cause: Cause, reason: String) -> Failure {
    note(cx, replica_id, cause, reason)
}

fn note(cx: &Context, replica_id: &str, cause: Cause, reason: String) -> Failure {
    cx.metrics.exited(cause.label());
    let exit = LastExit { cause, detail: reason.clone(), at: Instant::now() };
    cx.board.update(replica_id, |view| view.last_exit = Some(exit));
    Failure { hopeless: !cause.retry_helps(), ..Failure::passing(reason) }
}

/// Remembers when the kernel last ended a process of this machine for want of memory: engines without a cgroup that counts
/// learn of their own end from it.
#[derive(Debug, Default)]
pub(crate) struct Memories {
    seen: Mutex<Option<(u64, Option<Instant>)>>,
}

impl Memories {
    /// Looks; called every few seconds.
    pub(crate) fn look(&self, now: Instant) {
        self.note(cgroup::machine_oom_kills(), now);
    }

    /// Whether it has ended one a moment ago.
    pub(crate) fn lately(&self, now: Instant) -> bool {
        self.note(cgroup::machine_oom_kills(), now)
    }

    fn note(&self, count: Option<u64>, now: Instant) -> bool {
        let Some(count) = count else { return false };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = match *seen {
            Some((before, _)) if count > before => Some(now),
            Some((_, changed)) => changed,
            None => None,
        };
        *seen = Some((count, changed));
        changed.is_some_and(|changed| now.saturating_duration_since(changed) <= MEMORY_HORIZON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_for_want_of_memory_is_remembered_for_a_moment() {
        let (memories, start) = (Memories::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        assert!(!memories.note(Some(7), at(0)), "what happened before is nothing new");
        assert!(!memories.note(Some(7), at(5)));
        assert!(memories.note(Some(8), at(10)));
        assert!(memories.note(Some(8), at(20)));
        assert!(!memories.note(Some(8), at(30)));
        assert!(!memories.note(None, at(31)));
    }
}
