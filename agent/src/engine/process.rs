//! An engine's processes: spawn, notice their end, signal, and know when nothing of them is left.
//!
//! The tree, not the pid, is what we own: kill -9 of vLLM's API server leaves its EngineCore and workers running with all
//! of the GPU's memory. What belongs to it is told three ways: the process group and the session that the main process
//! leads, and the engine's cgroup where there are cgroups (`cgroup`). The agent is a child subreaper, so orphans become its
//! children; they are reaped by group, or by a pid that was seen to belong to the tree, which takes no other child of this
//! process away from whoever waits for it.
//!
//! Engines taken over from an earlier agent are nobody's children here. What `/proc` says is therefore the truth about an
//! end for both kinds, and the exit status is an extra that only children have.
//!
//! Invariant: once a tree has been seen empty it is never signalled again, because its number may be another's by then.

use std::{collections::BTreeSet, fmt, fs::File, io, time::Duration};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};

use super::{cgroup::Cgroup, command::Launch, procfs, spawn};

/// How often `/proc` is looked at for an end that no SIGCHLD announces.
const POLL: Duration = Duration::from_millis(200);

/// How a main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(Signal),
    /// It ended, and was no child of ours.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {} ({})", *signal as i32, signal.as_str()),
            Self::Unknown => {
                write!(f, "ended (it was started by an earlier agent, so its exit code is not known)")
            }
        }
    }
}

/// The processes of one engine.
#[derive(Debug)]
pub(crate) struct Tree {
    pid: i32,
    start_ticks: u64,
    exit: Option<Exit>,
    gone: bool,
    cgroup: Option<Cgroup>,
    /// Members that were seen outside the group: the kernel gives us their ends one by one.
    outside: BTreeSet<i32>,
}

impl Tree {
    /// Runs `launch` as the leader of a new session, its output going to `log`.
    ///
    /// # Errors
    /// The program cannot be executed; the text names it.
    pub(crate) fn spawn(launch: &Launch, log: File) -> io::Result<Self> {
        let pid = spawn::spawn(launch, &log)?;
        // Not reaped yet, so its entry is there even if it has ended already.
        let start_ticks = procfs::read(pid).map(|p| p.start_ticks).unwrap_or_default();
        Ok(Self::of(pid, start_ticks))
    }

    /// The tree of a process that an earlier agent started, if that process still runs.
    pub(crate) fn find(pid: i32, start_ticks: u64) -> Option<Self> {
        let alive =
            pid > 1 && procfs::read(pid).is_some_and(|p| p.start_ticks == start_ticks && !p.is_dead());
        alive.then(|| Self::of(pid, start_ticks))
    }

    fn of(pid: i32, start_ticks: u64) -> Self {
        Self { pid, start_ticks, exit: None, gone: false, cgroup: None, outside: BTreeSet::new() }
    }

    /// Moves what there is of the tree into `cgroup`; whatever it starts from then on is in it.
    ///
    /// Looked at until nothing new is found, for a process may start another between two looks. One that has ended by then
    /// is no error.
    pub(crate) fn enter(&mut self, cgroup: Cgroup) {
        for _ in 0..8 {
            let there = cgroup.members();
            let missing: Vec<i32> =
                self.members().iter().map(|p| p.pid).filter(|pid| !there.contains(pid)).collect();
            if missing.is_empty() {
                break;
            }
            for pid in missing {
                if let Err(error) = cgroup.add(pid) {
                    tracing::debug!(pid, %error, "a process did not enter its engine's cgroup");
                }
            }
        }
        // An end in between must not be taken for the tree's: what is in the cgroup counts too from now on.
        self.gone = false;
        self.cgroup = Some(cgroup);
    }

    /// Holds the tree to the cgroup that an earlier agent put it in.
    pub(crate) fn found_in(&mut self, cgroup: Option<Cgroup>) {
        self.cgroup = cgroup;
    }

    /// Its cgroup, if it has one.
    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Id of the main process, of the group and of the session.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// With the pid, what identifies the main process: ticks since boot.
    pub(crate) fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// How the main process ended, if it did.
    pub(crate) fn exit(&mut self) -> Option<Exit> {
        self.reap();
        if self.exit.is_none() {
            let alive =
                procfs::read(self.pid).is_some_and(|p| p.start_ticks == self.start_ticks && !p.is_dead());
            // It may have become a child of ours that ended between the two looks.
            if !alive {
                self.reap();
                self.exit.get_or_insert(Exit::Unknown);
            }
        }
        self.exit
    }

    /// Waits for the main process to end.
    pub(crate) async fn exited(&mut self) -> Exit {
        let mut child_ended = signal(SignalKind::child()).ok();
        loop {
            if let Some(exit) = self.exit() {
                return exit;
            }
            match &mut child_ended {
                Some(signal) => drop(tokio::time::timeout(POLL, signal.recv()).await),
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The tree's processes that are not dead. Empty for good once it was empty.
    pub(crate) fn members(&mut self) -> Vec<procfs::Proc> {
        if self.gone {
            return Vec::new();
        }
        self.reap();
        let held: BTreeSet<i32> = self.cgroup.iter().flat_map(Cgroup::members).collect();
        let member = |p: &procfs::Proc| {
            let led = (p.pgrp == self.pid || p.session == self.pid) && p.start_ticks >= self.start_ticks;
            led || held.contains(&p.pid)
        };
        let all: Vec<_> = procfs::all().into_iter().filter(member).collect();
        self.outside.extend(all.iter().filter(|p| p.pgrp != self.pid).map(|p| p.pid));
        let members: Vec<_> = all.into_iter().filter(|p| !p.is_dead()).collect();
        if members.is_empty() {
            self.reap();
            self.gone = true;
        }
        members
    }

    /// Sends `signal` to the whole tree, if anything of it is left.
    pub(crate) fn signal(&mut self, signal: Signal) {
        let members = self.members();
        if members.is_empty() {
            return;
        }
        // One call for all that the kernel knows to belong together, so that none can fork itself out of it.
        if signal == Signal::SIGKILL && self.cgroup.as_ref().is_some_and(Cgroup::kill) {
            tracing::debug!(pgid = self.pid, "an engine's cgroup was killed");
        }
        if members.iter().any(|p| p.pgrp == self.pid) {
            match killpg(Pid::from_raw(self.pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    tracing::error!(pgid = self.pid, %signal, %error, "cannot signal an engine's process group")
                }
            }
        }
        for process in members.iter().filter(|p| p.pgrp != self.pid) {
            // Gone meanwhile: the next look tells.
            kill(Pid::from_raw(process.pid), signal).ok();
        }
    }

    /// Takes the exit statuses of those of the tree's dead that are our children.
    fn reap(&mut self) {
        if self.gone {
            return;
        }
        loop {
            let status = waitpid(Pid::from_raw(-self.pid), Some(WaitPidFlag::WNOHANG));
            let (pid, exit) = match status {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal)),
                Err(Errno::EINTR) => continue,
                _ => break,
            };
            if pid.as_raw() == self.pid {
                self.exit = Some(exit);
            }
        }
        // Kept while it lives, or is the child of another that will see to it.
        self.outside.retain(|pid| match waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => true,
            Err(Errno::ECHILD) => procfs::read(*pid).is_some(),
            _ => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn shell(script: &str) -> Tree {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let launch = Launch { argv, env: BTreeMap::new(), env_removed: vec![] };
        Tree::spawn(&launch, tempfile::tempfile().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn an_exit_is_named() {
        assert_eq!(shell("exit 3").exited().await, Exit::Code(3));
        let mut killed = shell("kill -9 $$");
        assert_eq!(killed.exited().await, Exit::Signal(Signal::SIGKILL));
        assert_eq!(killed.exit().unwrap().to_string(), "was ended by signal 9 (SIGKILL)");
        assert!(killed.members().is_empty());
    }

    async fn is_empty_soon(tree: &mut Tree) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while !tree.members().is_empty() {
            assert!(tokio::time::Instant::now() < deadline, "still there: {:?}", tree.members());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn has_members(tree: &mut Tree, count: usize) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while tree.members().len() != count {
            assert!(tokio::time::Instant::now() < deadline, "not {count}: {:?}", tree.members());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn what_moved_to_another_group_of_the_session_is_still_of_the_tree() {
        // `timeout` takes itself and what it runs to a group of their own.
        let mut tree = shell("timeout 600 sleep 600 & exit 0");
        assert_eq!(tree.exited().await, Exit::Code(0));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while tree.members().iter().filter(|p| p.pgrp != tree.pid() && p.session == tree.pid()).count() != 2 {
            assert!(tokio::time::Instant::now() < deadline, "not there: {:?}", tree.members());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tree.signal(Signal::SIGTERM);
        is_empty_soon(&mut tree).await;
    }

    #[tokio::test]
    async fn a_cgroup_holds_what_left_group_and_session() {
        let Some((_home, cgroup)) = crate::engine::cgroup::tests::one("process") else { return };
        let mut tree = shell("sleep 0.3; setsid sleep 600 & setsid sleep 600 & wait; sleep 600");
        tree.enter(cgroup);
        has_members(&mut tree, 3).await;
        tree.signal(Signal::SIGKILL);
        assert_eq!(tree.exited().await, Exit::Signal(Signal::SIGKILL));
        is_empty_soon(&mut tree).await;
        tree.cgroup().unwrap().remove().unwrap();
    }

    #[tokio::test]
    async fn what_a_dead_main_process_leaves_is_still_seen_and_signalled() {
        let mut tree = shell("sleep 600 & sleep 600 & exit 0");
        assert_eq!(tree.exited().await, Exit::Code(0));
        assert_eq!(tree.members().len(), 2);
        tree.signal(Signal::SIGKILL);
        is_empty_soon(&mut tree).await;
    }

    #[tokio::test]
    async fn a_process_is_found_again_by_pid_and_start_time_only() {
        let mut tree = shell("sleep 600");
        assert!(Tree::find(tree.pid(), tree.start_ticks()).is_some());
        assert!(Tree::find(tree.pid(), tree.start_ticks() + 1).is_none());
        assert!(Tree::find(0, 0).is_none());
        tree.signal(Signal::SIGKILL);
        assert_eq!(tree.exited().await, Exit::Signal(Signal::SIGKILL));
        assert!(Tree::find(tree.pid(), tree.start_ticks()).is_none());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let launch =
            Launch { argv: vec!["/no/such/engine".into()], env: BTreeMap::new(), env_removed: vec![] };
        let error = Tree::spawn(&launch, tempfile::tempfile().unwrap()).unwrap_err().to_string();
        assert!(error.contains("/no/such/engine") && error.contains("engines.NAME.command"), "{error}");
    }
}
