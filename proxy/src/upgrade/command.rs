//! `penstock proxy upgrade`: asks a running proxy to give way to the binary that is installed now, and waits until it has.

use std::{
    io::{Read, Write},
    net::{TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::Tries;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// For one question.
const ANSWER: Duration = Duration::from_secs(5);

/// Most bytes of an answer.
const MOST_BYTES: u64 = 64 << 10;

/// `penstock proxy upgrade`
#[derive(Debug, clap::Args)]
pub struct UpgradeArgs {
    /// The proxy's announce file, which names its private port
    #[arg(long, value_name = "FILE", conflicts_with = "private")]
    announce: Option<PathBuf>,
    /// The proxy's private port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:18081")]
    private: String,
    /// Longest wait, in seconds; the proxy itself gives up after upgrade.ready_ms
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout_s: u64,
}

/// What `GET /debug/process` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The process that answers.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Upgrades that it tried.
    pub upgrades: Tries,
}

/// Runs the command. The text tells what serves now.
///
/// # Errors
/// A sentence about what stood in the way; the old process then still serves.
pub fn run(args: &UpgradeArgs) -> Result<String, String> {
    let private = match &args.announce {
        Some(file) => announced(file)?,
        None => args.private.trim_start_matches("http://").trim_end_matches('/').to_owned(),
    };
    let old = ask(&private)?;
    let pid = i32::try_from(old.pid).map(Pid::from_raw).map_err(|e| e.to_string())?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !String::from_utf8_lossy(&command).contains("penstock") {
        return Err(format!(
            "the proxy at {private} says that it is pid {pid}, and there is no such proxy on this machine: run this where it runs"
        ));
    }
    kill(pid, Signal::SIGUSR2).map_err(|e| format!("cannot signal the proxy, pid {pid}: {e}"))?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout_s);
    loop {
        // Old and new share the port for a moment, and either may answer.
        let now = ask(&private);
        if let Some(outcome) = now.as_ref().ok().and_then(|now| judge(&old, now)) {
            return outcome;
        }
        if Instant::now() >= deadline {
            let seen = now.map_or_else(|e| e, |now| format!("pid {} still answers", now.pid));
            return Err(format!("no new process after {} s: {seen}", args.timeout_s));
        }
        std::thread::sleep(PAUSE);
    }
}

/// What an answer after the signal means; `None`: it is not decided yet.
fn judge(old: &Process, now: &Process) -> Option<Result<String, String>> {
    if now.pid != old.pid {
        return Some(Ok(format!(
            "pid {} (version {}) serves; pid {} (version {}) finishes its requests",
            now.pid, now.version, old.pid, old.version
        )));
    }
    (now.upgrades.failed > old.upgrades.failed)
        .then(|| Err(format!("the new process failed, pid {} goes on: {}", old.pid, now.upgrades.last_error)))
}

fn announced(file: &Path) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Announced {
        private: String,
    }
    let text = std::fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    let announced: Announced = serde_json::from_slice(&text)
        .map_err(|e| format!("{} is not a proxy's announce file: {e}", file.display()))?;
    Ok(announced.private)
}

/// `GET /debug/process`, on a connection of its own: the next one may lead to another process.
fn ask(private: &str) -> Result<Process, String> {
    let failed = |e: std::io::Error| format!("no proxy answers at {private}, its private port: {e}");
    let address = private
        .to_socket_addrs()
        .map_err(failed)?
        .next()
        .ok_or_else(|| format!("{private} is no address; expected HOST:PORT"))?;
    let mut stream = TcpStream::connect_timeout(&address, ANSWER).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER)).map_err(failed)?;
    let request = format!("GET /debug/process HTTP/1.1\r\nhost: {private}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    stream.take(MOST_BYTES).read_to_string(&mut answer).map_err(failed)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    serde_json::from_str(body)
        .map_err(|_| format!("what answers at {private} is not the private port of a proxy that can upgrade"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, failed: u32) -> Process {
        let upgrades = Tries { failed, last_error: "settings".into() };
        Process { pid, version: "1.0".into(), uptime_s: 1, upgrades }
    }

    #[test]
    fn a_new_pid_is_success_and_one_more_failure_is_failure() {
        let old = process(7, 1);
        assert_eq!(judge(&old, &old), None);
        let done = judge(&old, &process(8, 0)).expect("decided").expect("done");
        assert!(done.starts_with("pid 8 (version 1.0) serves; pid 7"), "{done}");
        let failed = judge(&old, &process(7, 2)).expect("decided").expect_err("failed");
        assert_eq!(failed, "the new process failed, pid 7 goes on: settings");
    }
}
