//! A whole Penstock for a test: `penstock up --json --ports auto` in a data directory of its own.
//!
//! `Up::stop` is the assertion that nothing is left behind; dropping an `Up` (a test that failed) ends its processes, and
//! no others: they are told by the data directory in their environment.

#![allow(dead_code, reason = "each test program uses its own part of this module")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

pub(crate) mod load;
pub(crate) mod netns;
pub(crate) mod nodes;

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// For all engines to be ready, on a machine that is busy with other tests.
const READY: Duration = Duration::from_secs(400);
/// For a clean stop.
const STOPPED: Duration = Duration::from_secs(60);

/// The binary under test.
pub(crate) fn penstock() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"PENSTOCK_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Asks again until there is an answer; panics with `what` after `longest`.
pub(crate) fn eventually<T>(what: &str, longest: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + longest;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {longest:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// An HTTP client with a deadline, and no proxy between.
pub(crate) fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().unwrap()
}

/// A running `penstock up`.
pub(crate) struct Up {
    child: Child,
    /// The JSON line.
    pub(crate) json: Value,
    data: Data,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// A data directory, made for this `Up` or lent to it.
enum Data {
    Own(TempDir),
    Lent(PathBuf),
}

impl Up {
    /// Starts with these further flags and waits for the JSON line.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::launch(Data::Own(tempfile::tempdir().unwrap()), args, &[])
    }

    /// The same with further environment variables.
    pub(crate) fn start_with_env(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::launch(Data::Own(tempfile::tempdir().unwrap()), args, env)
    }

    /// The same on a data directory that outlives it.
    pub(crate) fn start_in(data_dir: &Path, args: &[&str]) -> Self {
        Self::launch(Data::Lent(data_dir.to_path_buf()), args, &[])
    }

    fn launch(data: Data, args: &[&str], env: &[(&str, &str)]) -> Self {
        let path = match &data {
            Data::Own(dir) => dir.path(),
            Data::Lent(path) => path,
        };
        let mut child = penstock()
            .args(["up", "--json", "--ports", "auto", "--data-dir"])
            .arg(path)
            .args(args)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let (line_found, line) = mpsc::sync_channel(1);
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let errors = BufReader::new(child.stderr.take().unwrap());
        let kept = Arc::clone(&stderr);
        let readers = vec![
            std::thread::spawn(move || {
                for text in stdout.lines().map_while(Result::ok) {
                    line_found.try_send(text).ok();
                }
            }),
            std::thread::spawn(move || {
                for text in errors.lines().map_while(Result::ok) {
                    let mut kept = kept.lock().unwrap();
                    kept.push_str(&text);
                    kept.push('\n');
                }
            }),
        ];
        let mut up = Self { child, json: Value::Null, data, stderr, readers };
        match line.recv_timeout(READY) {
            Ok(text) => up.json = serde_json::from_str(&text).unwrap(),
            Err(why) => panic!("no JSON line ({why}); stderr:\n{}\n{}", up.stderr(), up.logs()),
        }
        up
    }

    /// The data directory.
    pub(crate) fn data_dir(&self) -> &Path {
        match &self.data {
            Data::Own(dir) => dir.path(),
            Data::Lent(path) => path,
        }
    }

    /// A string of the JSON line: "public", "proxy_private", "controlplane", "grpc", "agent_private", "console".
    pub(crate) fn address(&self, key: &str) -> String {
        self.json[key].as_str().unwrap_or_else(|| panic!("no {key} in {}", self.json)).to_string()
    }

    /// `http://HOST:PORT` of the API for clients.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address("public"))
    }

    /// Of "proxy", "controlplane", "agent" or "up", as `up.json` has it now.
    pub(crate) fn pid(&self, process: &str) -> u32 {
        self.try_pid(process).unwrap()
    }

    /// The same, or `None` once `up` has begun to stop.
    pub(crate) fn try_pid(&self, process: &str) -> Option<u32> {
        let text = std::fs::read(self.data_dir().join("up.json")).ok()?;
        let summary: Value = serde_json::from_slice(&text).unwrap();
        summary["pids"][process].as_u64().and_then(|pid| u32::try_from(pid).ok())
    }

    /// What it wrote to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// The logs of its processes, for a failure's message.
    pub(crate) fn logs(&self) -> String {
        let read = |name: &str| {
            let text = std::fs::read_to_string(self.data_dir().join("logs").join(name)).unwrap_or_default();
            let from = text.len().saturating_sub(4_000);
            let tail: String = text.chars().skip(text[..from].chars().count()).collect();
            format!("--- {name}\n{tail}\n")
        };
        ["controlplane.log", "agent.log", "proxy.log"].map(read).concat()
    }

    /// Runs `penstock ARGS --data-dir ...`.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        penstock().args(args).arg("--data-dir").arg(self.data_dir()).output().unwrap()
    }

    /// Runs `penstock ARGS --output json`, which must succeed, and reads what it printed.
    pub(crate) fn run_json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--output", "json"]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}\n{stderr}", output.status);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The endpoints, as the control plane tells them.
    pub(crate) fn endpoints(&self) -> Vec<Value> {
        self.run_json(&["endpoints"])["endpoints"].as_array().unwrap().clone()
    }

    /// Waits until exactly `wanted` endpoints are ready, and gives them back.
    pub(crate) fn wait_for_ready(&self, wanted: usize) -> Vec<Value> {
        eventually(&format!("{wanted} ready endpoints"), Duration::from_secs(60), || {
            let mut endpoints = self.endpoints();
            endpoints.retain(|e| e["state"] == "ready");
            (endpoints.len() == wanted).then_some(endpoints)
        })
    }

    /// Sends a signal to the `up` process itself.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(pid(self.child.id()), signal).unwrap();
    }

    /// Kills `up` with SIGKILL and waits for its end; its children are then on their own.
    pub(crate) fn kill_hard(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it with SIGTERM; it must exit with 0 and leave nothing.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "stderr:\n{}\n{}", self.stderr(), self.logs());
        let left = marked(self.data_dir());
        assert!(left.is_empty(), "left behind: {left:?}\n{}", self.logs());
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = eventually("the end of `penstock up`", STOPPED, || self.child.try_wait().unwrap());
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        status
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        for process in marked(self.data_dir()) {
            kill(Pid::from_raw(process), Signal::SIGKILL).ok();
        }
        if std::thread::panicking() {
            eprintln!("stderr of `penstock up`:\n{}\n{}", self.stderr(), self.logs());
        }
    }
}

/// A pid as nix wants it.
pub(crate) fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap())
}

/// Processes, engines included, that belong to the `up` on this data directory.
pub(crate) fn marked(data_dir: &Path) -> Vec<i32> {
    let root = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_path_buf());
    let mark = [b"PENSTOCK_UP_DATA_DIR=", root.as_os_str().as_bytes()].concat();
    let carries_mark = |process: &i32| {
        let mut environment = Vec::new();
        std::fs::File::open(format!("/proc/{process}/environ"))
            .and_then(|mut file| file.read_to_end(&mut environment))
            .is_ok_and(|_| environment.split(|byte| *byte == 0).any(|entry| entry == mark))
    };
    let entries = std::fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(carries_mark)
        .collect()
}
