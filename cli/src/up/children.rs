//! Child processes: this program executed again, one process each.
//!
//! Each child is in a process group of its own, so that the terminal's Ctrl-C reaches `up` alone, which then stops the
//! children in order. A proxy may give way to a successor of its own (`penstock proxy upgrade`): that is no child of ours, is
//! known by the announce file that it wrote anew, and is watched in /proc. Should `up` be killed instead, the kernel sends each child SIGTERM. That signal is tied to the
//! *thread* that spawned the child: spawn only from the main thread, which ends when the process does.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep},
};

use super::{datadir::DataDir, error::UpError, leftovers::MARK};

/// Lines of a child's log that are shown when it ends unasked.
const TAIL_LINES: usize = 12;
/// Where the search for those lines starts, counted from the log's end.
const TAIL_BYTES: u64 = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    ControlPlane,
    Agent,
    Proxy,
}

impl Kind {
    /// The subcommand; also the name of its files and of its settings' variables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ControlPlane => "controlplane",
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// What the control plane announces.
#[derive(Debug, Deserialize)]
pub(crate) struct ControlPlaneAddresses {
    pub(crate) http: String,
    pub(crate) grpc: String,
}

/// What the agent announces.
#[derive(Debug, Deserialize)]
pub(crate) struct AgentAddresses {
    pub(crate) private: String,
}

/// What the proxy announces.
#[derive(Debug, Deserialize)]
pub(crate) struct ProxyAddresses {
    pub(crate) public: String,
    pub(crate) private: String,
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) kind: Kind,
    pub(crate) pid: u32,
    pub(crate) started: Instant,
    handle: Handle,
    log: PathBuf,
    /// The log's length at the start: what is older belongs to a predecessor.
    log_from: u64,
    announce: PathBuf,
}

#[derive(Debug)]
enum Handle {
    Child(Child),
    /// The successor of a child: told from later processes of its number by when it started.
    Successor {
        start_ticks: u64,
    },
}

/// Between two looks at a process that is no child.
const LOOK: Duration = Duration::from_millis(100);

/// Starts `penstock KIND` with the settings in `data`. Call it on the main thread only.
pub(crate) fn spawn(program: &Path, data: &DataDir, kind: Kind) -> Result<Process, UpError> {
    let (log, announce) = (data.log(kind.name()), data.announce(kind.name()));
    if let Err(error) = std::fs::remove_file(&announce)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(UpError::io("remove the old announce file", &announce, &error));
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(|e| UpError::io("open the log", &log, &e))?;
    let log_from = file.metadata().map(|meta| meta.len()).unwrap_or(0);
    let stderr = file.try_clone().map_err(|e| UpError::io("open the log", &log, &e))?;
    let mut command = std::process::Command::new(program);
    command
        .arg(kind.name())
        .arg("--config")
        .arg(data.config(kind.name()))
        .arg("--announce")
        .arg(&announce)
        .env(MARK, data.root())
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(stderr)
        .process_group(0);
    end_with_this_thread(&mut command);
    let child = Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| UpError::Failed(format!("cannot start {}: {e}", program.display())))?;
    let pid = child.id().unwrap_or(0);
    Ok(Process { kind, pid, started: Instant::now(), handle: Handle::Child(child), log, log_from, announce })
}

/// Makes the kernel send the child SIGTERM when the thread that spawns it ends.
#[allow(unsafe_code, reason = "pre_exec is the only way to run prctl between fork and exec")]
fn end_with_this_thread(command: &mut std::process::Command) {
    let parent = nix::unistd::getpid();
    let ask = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
        // Had the parent died before the line above, nobody would send the signal any more.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; `ask` makes two system calls, allocates
    // nothing, takes no lock and touches no memory of the parent but a copied pid.
    unsafe {
        command.pre_exec(ask);
    }
}

impl Process {
    /// Waits until it ends. May be cancelled and called again.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        // Of what is no child, or was reaped by someone else, there is no status to be had.
        match &mut self.handle {
            Handle::Child(child) => child.wait().await.unwrap_or_else(|_| ExitStatus::from_raw(0)),
            Handle::Successor { start_ticks } => {
                while start_ticks_of(self.pid) == Some(*start_ticks) {
                    sleep(LOOK).await;
                }
                ExitStatus::from_raw(0)
            }
        }
    }

    /// Whether it has ended; reaps it.
    pub(crate) fn has_ended(&mut self) -> bool {
        match &mut self.handle {
            Handle::Child(child) => child.try_wait().is_ok_and(|status| status.is_some()),
            Handle::Successor { start_ticks } => start_ticks_of(self.pid) != Some(*start_ticks),
        }
    }

    /// The process that took over from it, if one has announced itself in its place.
    pub(crate) fn successor(&self) -> Option<Self> {
        #[derive(Deserialize)]
        struct Announced {
            pid: u32,
        }
        let Announced { pid } = serde_json::from_slice(&std::fs::read(&self.announce).ok()?).ok()?;
        let start_ticks = start_ticks_of(pid).filter(|_| pid != self.pid)?;
        Some(Self {
            kind: self.kind,
            pid,
            started: Instant::now(),
            handle: Handle::Successor { start_ticks },
            log: self.log.clone(),
            log_from: self.log_from,
            announce: self.announce.clone(),
        })
    }

    /// Waits until it has announced its addresses.
    ///
    /// # Errors
    /// It ended first, or the deadline came.
    pub(crate) async fn announced<T: DeserializeOwned>(&mut self, deadline: Instant) -> Result<T, UpError> {
        let announce = self.announce.clone();
        let kind = self.kind.name();
        let read = async {
            loop {
                if let Ok(text) = std::fs::read(&announce) {
                    return serde_json::from_slice(&text).map_err(|e| e.to_string());
                }
                if Instant::now() >= deadline {
                    return Err("the deadline came first".into());
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let outcome = tokio::select! {
            biased;
            read = read => read.map_err(|why: String| format!("the {kind} did not announce where it listens: {why}")),
            status = self.wait() => Err(format!("the {kind} ended while it started ({})", describe(status))),
        };
        outcome.map_err(|why| UpError::Failed(format!("{why}{}", self.tail())))
    }

    /// SIGTERM to the process alone: it stops what it started itself.
    pub(crate) fn terminate(&self) {
        if let Some(pid) = self.raw_pid() {
            kill(pid, Signal::SIGTERM).ok(); // ended meanwhile: what was wanted
        }
    }

    /// SIGKILL to its whole group; to itself alone where it is another's successor, in whose group it is.
    pub(crate) fn kill_group(&self) {
        if let Some(pid) = self.raw_pid() {
            let killed = match self.handle {
                Handle::Child(_) => killpg(pid, Signal::SIGKILL),
                Handle::Successor { .. } => kill(pid, Signal::SIGKILL),
            };
            killed.ok(); // ended meanwhile: what was wanted
        }
    }

    /// The pid, unless the process was reaped: then the number may be a stranger's.
    fn raw_pid(&self) -> Option<Pid> {
        let pid = match &self.handle {
            Handle::Child(child) => child.id(),
            Handle::Successor { start_ticks } => {
                Some(self.pid).filter(|pid| start_ticks_of(*pid) == Some(*start_ticks))
            }
        };
        pid.and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }

    /// The last lines that it logged since its start, as an indented text that says where they are from.
    pub(crate) fn tail(&self) -> String {
        let lines = File::open(&self.log).and_then(|log| last_lines(log, self.log_from)).unwrap_or_default();
        let place = self.log.display();
        if lines.is_empty() {
            return format!("\n  it logged nothing to {place}");
        }
        format!("\n  last lines of {place}:\n    {}", lines.join("\n    "))
    }
}

/// When a process started, in the kernel's ticks since boot; `None` when it is gone or a zombie.
fn start_ticks_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may hold anything; the state is the next.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn last_lines(mut log: File, from: u64) -> io::Result<Vec<String>> {
    let end = log.seek(SeekFrom::End(0))?;
    log.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL_BYTES)).min(end)))?;
    let mut bytes = Vec::new();
    log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(String::from).collect();
    Ok(lines.into_iter().rev().take(TAIL_LINES).rev().collect())
}

/// "exit code 1", "killed by SIGKILL".
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal().map(Signal::try_from)) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(Ok(signal))) => format!("killed by {signal}"),
        (None, _) => status.to_string(),
    }
}

/// Lets this process and its children open as many files and sockets as the system permits: each stream takes two, and
/// the usual limit of 1,024 is there for programs that use select().
pub(crate) fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok(); // refused: the former limit stays
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_tail_starts_where_this_run_began() {
        let mut log = tempfile::tempfile().unwrap();
        writeln!(log, "of the run before").unwrap();
        let from = log.stream_position().unwrap();
        for line in 0..20 {
            writeln!(log, "line {line}\n").unwrap();
        }
        let lines = last_lines(log.try_clone().unwrap(), from).unwrap();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines.last().unwrap(), "line 19");
        assert!(last_lines(log, 1 << 30).unwrap().is_empty());
    }

    #[test]
    fn a_process_is_known_by_its_start_until_it_ends() {
        let own = start_ticks_of(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(start_ticks_of(child.id()).unwrap() >= own);
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while start_ticks_of(child.id()).is_some() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5)); // until the kernel has made it a zombie
        }
        assert_eq!(start_ticks_of(child.id()), None, "a zombie has ended");
        child.wait().unwrap();
    }

    #[test]
    fn an_end_is_described_by_code_or_signal() {
        assert_eq!(describe(ExitStatus::from_raw(2 << 8)), "exit code 2");
        assert_eq!(describe(ExitStatus::from_raw(9)), "killed by SIGKILL");
    }
}
