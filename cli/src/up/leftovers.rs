//! Processes that belong to a data directory: found by the mark in their environment, however they came to be there.
//!
//! `up` sets the mark on its children and they hand it down, so an engine whose agent was killed is found too, where
//! a list of pids would have missed it or, worse, named a stranger that got the number later.

use std::{
    os::unix::ffi::OsStrExt,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::error::UpError;
use crate::output::say;

/// The environment variable that marks a process; its value is the data directory.
pub(crate) const MARK: &str = "PENSTOCK_UP_DATA_DIR";

/// How long marked processes have to stop on SIGTERM: an agent stops its engines in this time.
const ORDERLY: Duration = Duration::from_secs(15);
/// How long the kernel has to end them after SIGKILL.
const KILLED: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leftover {
    pub(crate) pid: i32,
    /// Its command line, shortened.
    pub(crate) command: String,
}

/// The processes, other than this one, that carry the mark of `data_dir`.
pub(crate) fn find(data_dir: &Path) -> Vec<Leftover> {
    let mut mark = format!("{MARK}=").into_bytes();
    mark.extend(data_dir.as_os_str().as_bytes());
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            // Unreadable: another user's, or gone meanwhile. A zombie's environment is empty.
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|entry| entry == mark))
        })
        .map(|pid| Leftover { pid, command: command(pid) })
        .collect()
}

/// Ends what a predecessor left: orderly if that works, else by force. Says so.
pub(crate) fn clear(data_dir: &Path) -> Result<(), UpError> {
    let found = find(data_dir);
    if found.is_empty() {
        return Ok(());
    }
    say(&format!(
        "an earlier `penstock up` was cut off and left processes; ending them (up to {} s):{}",
        ORDERLY.as_secs(),
        list(&found)
    ));
    end(data_dir, ORDERLY)
}

/// Ends every marked process: SIGTERM, SIGKILL after `orderly`, an error for what then still runs.
pub(crate) fn end(data_dir: &Path, orderly: Duration) -> Result<(), UpError> {
    for (signal, wait) in [(Signal::SIGTERM, orderly), (Signal::SIGKILL, KILLED)] {
        let deadline = Instant::now() + wait;
        let mut told = Vec::new();
        loop {
            let left = find(data_dir);
            if left.is_empty() {
                return Ok(());
            }
            for process in left.iter().filter(|p| !told.contains(&p.pid)) {
                // It may be gone already, which is what is wanted.
                kill(Pid::from_raw(process.pid), signal).ok();
            }
            told = left.iter().map(|process| process.pid).collect();
            if Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(PAUSE);
        }
    }
    let left = find(data_dir);
    if left.is_empty() {
        return Ok(());
    }
    Err(UpError::Failed(format!("these processes could not be ended:{}", list(&left))))
}

/// One indented line for each.
pub(crate) fn list(processes: &[Leftover]) -> String {
    processes.iter().map(|p| format!("\n  pid {}  {}", p.pid, p.command)).collect()
}

fn command(pid: i32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&raw).replace('\0', " ");
    text.trim().chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn finds_and_ends_marked_processes_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let sleeper = |mark: &Path| Command::new("sleep").arg("60").env(MARK, mark).spawn().unwrap();
        let mut marked = sleeper(dir.path());
        let mut other = sleeper(&dir.path().join("other"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while find(dir.path()).is_empty() && Instant::now() < deadline {
            std::thread::sleep(PAUSE); // until the child has become `sleep`
        }
        let found = find(dir.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].command, "sleep 60");
        assert_eq!(list(&found), format!("\n  pid {}  sleep 60", marked.id()));
        clear(dir.path()).unwrap();
        assert!(!marked.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
