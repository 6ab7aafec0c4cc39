//! What an earlier agent on this state folder left behind: engines to take over, and remains to end.
//!
//! A process is ours when its environment names our state folder, or when its output goes to one of our log files (vLLM
//! renames its processes, which overwrites their environment as `/proc` shows it), or when it is in the cgroup that an agent
//! on this state folder made for an engine, or when it is in the group of a recorded main process that is still the same
//! process. Nothing else is ever touched: "it looks like vLLM" is no reason.
//!
//! [`survey`] is pure; [`end_remains`] acts, and runs before any engine is started, so that no remains hold a GPU or port.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use tokio::time::Instant;

use super::{
    cgroup::Cgroups,
    command::{REPLICA_VARIABLE, STATE_DIR_VARIABLE},
    procfs::{self, Proc},
    records::Record,
};
use crate::state::{StateDir, stem};

const POLL: Duration = Duration::from_millis(50);

/// A process, and what ties it to an engine of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The process.
    pub(crate) process: Proc,
    /// File stem of the replica that its environment or its output names, if they name one of this state folder.
    pub(crate) stem: Option<String>,
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Survey {
    /// Records whose main process runs: to be taken over, or to be stopped in good order.
    pub(crate) alive: Vec<Record>,
    /// Processes of ours without a living main process that a record names.
    pub(crate) remains: Vec<Proc>,
}

/// Sorts processes into those of living engines and remains; foreign ones are in neither.
pub(crate) fn survey(records: &[Record], boot_id: &str, seen: &[Seen]) -> Survey {
    let by_pid: BTreeMap<i32, &Proc> = seen.iter().map(|s| (s.process.pid, &s.process)).collect();
    let lives = |record: &&Record| {
        record.boot_id == boot_id
            && by_pid.get(&record.pid).is_some_and(|p| p.start_ticks == record.start_ticks && !p.is_dead())
    };
    let alive: Vec<Record> = records.iter().filter(lives).cloned().collect();
    let groups: BTreeSet<i32> = alive.iter().map(|r| r.pid).collect();
    let stems: BTreeSet<String> = alive.iter().map(|r| stem(&r.assignment.replica_id)).collect();
    let remains = seen.iter().filter(|s| {
        let ours = s.stem.as_ref().is_some_and(|stem| !stems.contains(stem));
        let led = groups.contains(&s.process.pgrp) || groups.contains(&s.process.session);
        ours && !led && !s.process.is_dead()
    });
    let remains = remains.map(|s| s.process).collect();
    Survey { alive, remains }
}

/// Every process, with what ties it to this state folder. The agent itself is left out.
pub(crate) fn look(state: &StateDir, cgroups: &Cgroups) -> Vec<Seen> {
    let own = procfs::raw_pid(std::process::id());
    let mut tied = cgroups.tied();
    let others = procfs::all().into_iter().filter(|p| p.pid != own);
    others
        .map(|process| Seen { process, stem: tied.remove(&process.pid).or_else(|| tie(process.pid, state)) })
        .collect()
}

/// Those processes of the replica that left its group.
pub(crate) fn strays(state: &StateDir, cgroups: &Cgroups, replica_id: &str) -> Vec<Proc> {
    let wanted = stem(replica_id);
    let of_replica = |s: &Seen| s.stem.as_ref() == Some(&wanted) && !s.process.is_dead();
    look(state, cgroups).into_iter().filter(of_replica).map(|s| s.process).collect()
}

/// File stem of the replica of ours that the process belongs to, by its environment or its output.
pub(crate) fn tie(pid: i32, state: &StateDir) -> Option<String> {
    let [replica, dir] = procfs::environment(pid, [REPLICA_VARIABLE, STATE_DIR_VARIABLE]);
    let marked = replica.filter(|_| dir.as_deref().is_some_and(|dir| Path::new(dir) == state.root()));
    marked.map(|replica| stem(&replica)).or_else(|| {
        let logs = state.logs();
        let log = procfs::outputs(pid).into_iter().find(|path| path.parent() == Some(&logs))?;
        Some(log.file_name()?.to_str()?.strip_suffix(".log")?.to_owned())
    })
}

/// Ends processes one by one: SIGTERM, then after `term` SIGKILL, until `find` finds none, at most `give_up` after that.
/// What is left then, if anything.
pub(crate) async fn end_remains(
    mut find: impl FnMut() -> Vec<Proc>,
    term: Duration,
    give_up: Duration,
) -> Vec<Proc> {
    let start = Instant::now();
    let mut told: BTreeSet<(i32, u64, Signal)> = BTreeSet::new();
    loop {
        let left = find();
        let elapsed = start.elapsed();
        for (pid, ..) in &told {
            // Reaps those that had become our children; the others are not ours to wait for.
            waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG)).ok();
        }
        if left.is_empty() || elapsed >= term + give_up {
            return left;
        }
        for process in &left {
            let signal = if elapsed >= term { Signal::SIGKILL } else { Signal::SIGTERM };
            if told.insert((process.pid, process.start_ticks, signal)) {
                tracing::info!(pid = process.pid, %signal, "ending a process that an engine left behind");
                // Gone meanwhile: the next look tells. One that is stopped heeds nothing but these two.
                for signal in [signal, Signal::SIGCONT] {
                    kill(Pid::from_raw(process.pid), signal).ok();
                }
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::records::tests::record;

    fn process(pid: i32, pgrp: i32) -> Proc {
        Proc { pid, ppid: 1, pgrp, session: pgrp, state: 'S', threads: 1, start_ticks: 100 }
    }

    fn seen(pid: i32, pgrp: i32, stem: Option<&str>) -> Seen {
        Seen { process: process(pid, pgrp), stem: stem.map(str::to_owned) }
    }

    #[test]
    fn a_living_engine_is_kept_with_all_of_its_group() {
        let records = [record("a", 10)];
        let seen = [seen(10, 10, Some("a")), seen(11, 10, None), seen(12, 12, Some("a")), seen(99, 99, None)];
        assert_eq!(survey(&records, "boot", &seen), Survey { alive: records.to_vec(), remains: vec![] });
    }

    #[test]
    fn what_an_engine_moved_to_another_group_of_its_session_is_not_remains() {
        let records = [record("a", 10)];
        let mut moved = seen(11, 11, Some("b"));
        moved.process.session = 10;
        let seen = [seen(10, 10, Some("a")), moved];
        assert_eq!(survey(&records, "boot", &seen).remains, []);
    }

    #[test]
    fn orphans_of_a_dead_main_process_are_remains() {
        let records = [record("a", 10)];
        let left = [seen(11, 10, Some("a")), seen(99, 99, None)];
        assert_eq!(survey(&records, "boot", &left), Survey { alive: vec![], remains: vec![process(11, 10)] });
    }

    #[test]
    fn an_engine_that_no_record_names_is_remains() {
        let left = [seen(20, 20, Some("b")), seen(21, 20, Some("b"))];
        let unfinished = record("b", 0);
        let found = survey(&[unfinished], "boot", &left);
        assert_eq!(found, Survey { alive: vec![], remains: vec![process(20, 20), process(21, 20)] });
    }

    #[test]
    fn a_pid_that_is_anothers_now_is_left_alone() {
        let mut other = seen(10, 10, None);
        other.process.start_ticks = 5_000;
        assert_eq!(survey(&[record("a", 10)], "boot", std::slice::from_ref(&other)), Survey::default());
        let same = seen(10, 10, None);
        assert_eq!(survey(&[record("a", 10)], "another boot", &[same]), Survey::default());
    }

    #[test]
    fn the_dead_are_neither() {
        let mut dead = seen(10, 10, Some("a"));
        dead.process.state = 'Z';
        assert_eq!(survey(&[record("a", 10)], "boot", &[dead]), Survey::default());
    }
}
