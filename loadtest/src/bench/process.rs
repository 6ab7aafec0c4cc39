//! A peer as a process: started by a plan, and ended with everything below it.

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::process::{Child, Command};

use super::{plan::Plan, tree::Tree};

/// A running peer; dropping it ends it, and all below it.
pub(super) struct Running {
    child: Child,
    pub(super) tree: Tree,
    /// What it says on standard output and standard error.
    said: PathBuf,
}

impl Running {
    /// Writes its files and starts it, in a process group of its own.
    pub(super) fn start(plan: &Plan, folder: &Path) -> Result<Self, String> {
        for (name, text) in &plan.files {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        let said = folder.join("said");
        let file = || File::options().create(true).append(true).open(&said);
        let (out, err) = (file(), file());
        let (out, err) =
            out.and_then(|out| Ok((out, err?))).map_err(|e| format!("{}: {e}", said.display()))?;
        let child = Command::new(&plan.program)
            .args(&plan.arguments)
            .envs(plan.environment.iter().map(|(name, value)| (*name, value.as_str())))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", plan.program.display()))?;
        let root = child.id().ok_or("it ended at once")?;
        Ok(Self { child, tree: Tree { root }, said })
    }

    /// Why it has ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(format!("it ended: {status}: {}", self.last_words()))
    }

    /// The last line that it said.
    pub(super) fn last_words(&self) -> String {
        let said = std::fs::read(&self.said).unwrap_or_default();
        let text = String::from_utf8_lossy(&said);
        let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        last.map_or_else(|| "it said nothing".into(), |line| line.chars().take(300).collect())
    }

    /// Ends it and waits for its end, so that its port and its CPU are free again.
    pub(super) async fn stop(mut self) {
        self.end();
        // Killed: it is gone, or was before.
        self.child.wait().await.map(drop).unwrap_or_default();
    }

    fn end(&self) {
        let pid = |pid: u32| i32::try_from(pid).ok().map(Pid::from_raw);
        // What has ended already cannot be ended: that is all these can say.
        for below in self.tree.pids().into_iter().filter_map(pid) {
            kill(below, Signal::SIGKILL).unwrap_or_default();
        }
        // Workers that outlive their parent for a moment are not below it any more, but in its group.
        if let Some(group) = pid(self.tree.root) {
            killpg(group, Signal::SIGKILL).unwrap_or_default();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Reaped: its number may be somebody else's.
        if self.child.id().is_some() {
            self.end();
        }
    }
}

/// A port that was free just now.
pub(super) fn free_port() -> Result<u16, String> {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|e| format!("no free port: {e}"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn shell(script: &str) -> Plan {
        Plan { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()], ..Plan::default() }
    }

    #[tokio::test]
    async fn it_ends_with_everything_below_it() {
        let folder = tempfile::tempdir().unwrap();
        let running = Running::start(&shell("sleep 1000 & sleep 1000; true"), folder.path()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let pids = loop {
            let pids = running.tree.pids();
            if pids.len() == 3 {
                break pids;
            }
            assert!(Instant::now() < deadline, "{pids:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        running.stop().await;
        // A zombie, until whoever adopted it has looked, runs no more.
        let runs = |pid: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while pids.iter().any(runs) {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn one_that_ends_by_itself_leaves_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let plan = shell("cat settings; echo; echo no such upstream >&2; exit 3");
        let plan = Plan { files: vec![("settings", "a setting".into())], ..plan };
        let mut running = Running::start(&plan, folder.path()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let why = loop {
            if let Some(why) = running.ended() {
                break why;
            }
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(why, "it ended: exit status: 3: no such upstream");
        let missing = Plan { program: "/nowhere/at-all".into(), ..Plan::default() };
        assert!(
            Running::start(&missing, folder.path()).err().unwrap().contains("cannot start /nowhere/at-all")
        );
    }
}
