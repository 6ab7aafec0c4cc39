//! An engine's process group: spawn, notice its end, signal, and know when nothing of it is left.
//!
//! The group, not the pid, is what we own: kill -9 of vLLM's API server leaves its EngineCore and workers running with all
//! of the GPU's memory, in the group that the API server led. The agent is a child subreaper, so those orphans become its
//! children; they are reaped by group, which takes no other child of this process away from whoever waits for it.
//!
//! Engines taken over from an earlier agent are nobody's children here. What `/proc` says is therefore the truth about an
//! end for both kinds, and the exit status is an extra that only children have.
//!
//! Invariant: once a group has been seen empty it is never signalled again, because its number may be another's by then.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};

use super::{command::Launch, procfs};

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

impl Exit {
    /// Label of the exits metric.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Code(0) => "clean",
            Self::Code(_) => "code",
            Self::Signal(_) => "signal",
            Self::Unknown => "unknown",
        }
    }
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

/// The process group of one engine.
#[derive(Debug)]
pub(crate) struct Tree {
    pid: i32,
    start_ticks: u64,
    exit: Option<Exit>,
    gone: bool,
}

impl Tree {
    /// Runs `launch` as the leader of a new group, its output going to `log`.
    ///
    /// # Errors
    /// The program cannot be executed; the text names it.
    pub(crate) fn spawn(launch: &Launch, log: File) -> io::Result<Self> {
        let (program, args) = launch
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"))?;
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        for name in &launch.env_removed {
            command.env_remove(name);
        }
        command.envs(&launch.env);
        // The child is waited for by its group, in `reap`.
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("cannot execute {program:?} (engines.NAME.command): {e}"))
        })?;
        let pid = procfs::raw_pid(child.id());
        // Not reaped yet, so its entry is there even if it has ended already.
        let start_ticks = procfs::read(pid).map(|p| p.start_ticks).unwrap_or_default();
        Ok(Self { pid, start_ticks, exit: None, gone: false })
    }

    /// The group of a process that an earlier agent started, if it still runs.
    pub(crate) fn find(pid: i32, start_ticks: u64) -> Option<Self> {
        let alive =
            pid > 1 && procfs::read(pid).is_some_and(|p| p.start_ticks == start_ticks && !p.is_dead());
        alive.then_some(Self { pid, start_ticks, exit: None, gone: false })
    }

    /// Id of the main process, and of the group.
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

    /// The group's processes that are not dead. Empty for good once it was empty.
    pub(crate) fn members(&mut self) -> Vec<procfs::Proc> {
        if self.gone {
            return Vec::new();
        }
        self.reap();
        let member =
            |p: &procfs::Proc| p.pgrp == self.pid && p.start_ticks >= self.start_ticks && !p.is_dead();
        let members: Vec<_> = procfs::all().into_iter().filter(member).collect();
        if members.is_empty() {
            self.reap();
            self.gone = true;
        }
        members
    }

    /// Sends `signal` to the whole group, if anything of it is left.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.members().is_empty() {
            return;
        }
        match killpg(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                tracing::error!(pgid = self.pid, %signal, %error, "cannot signal an engine's process group")
            }
        }
    }

    /// Takes the exit statuses of those of the group's dead that are our children.
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
                _ => return,
            };
            if pid.as_raw() == self.pid {
                self.exit = Some(exit);
            }
        }
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

    #[tokio::test]
    async fn what_a_dead_main_process_leaves_is_still_seen_and_signalled() {
        let mut tree = shell("sleep 600 & sleep 600 & exit 0");
        assert_eq!(tree.exited().await, Exit::Code(0));
        assert_eq!(tree.members().len(), 2);
        tree.signal(Signal::SIGKILL);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while !tree.members().is_empty() {
            assert!(tokio::time::Instant::now() < deadline, "still there: {:?}", tree.members());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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
