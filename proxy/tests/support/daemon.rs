//! The real process, `penstock-proxy`, as a process manager would start it; and those that take over from it.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_proxy::xds::cache;
use serde_json::Value;
use tempfile::TempDir;

use super::{PATIENCE, state};

/// A running proxy. Every process of it that was ever seen is ended when this is dropped.
pub struct Daemon {
    pub dir: TempDir,
    first: Child,
    seen: Arc<Mutex<BTreeSet<i32>>>,
}

impl Daemon {
    /// Starts one that routes the model "m" to `engines`. `settings` is TOML.
    pub fn start(settings: &str, engines: &[SocketAddr]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), settings, engines)
    }

    /// The same in a directory that has files already.
    pub fn start_in(dir: TempDir, settings: &str, engines: &[SocketAddr]) -> Self {
        cache::save(&dir.path().join("snapshot"), &state(engines)).unwrap();
        write_settings(&dir, settings);
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let first = Command::new(env!("CARGO_BIN_EXE_penstock-proxy"))
            .arg("--config")
            .arg(dir.path().join("proxy.toml"))
            .arg("--announce")
            .arg(dir.path().join("announce"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut daemon = Self { dir, first, seen: Arc::default() };
        let began = Instant::now();
        while daemon.announced().is_none() {
            let ended = daemon.first.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "{ended:?}: {}", daemon.log());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        daemon
    }

    /// What the latest process has announced.
    fn announced(&self) -> Option<Value> {
        let announced: Value = serde_json::from_slice(&std::fs::read(self.announce_file()).ok()?).ok()?;
        self.seen.lock().unwrap().insert(i32::try_from(announced["pid"].as_i64()?).ok()?);
        Some(announced)
    }

    pub fn announce_file(&self) -> PathBuf {
        self.dir.path().join("announce")
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.announced().unwrap()["pid"].as_i64().unwrap()).unwrap()
    }

    /// `public`, `private`, or a listener's name.
    pub fn address(&self, name: &str) -> SocketAddr {
        let announced = self.announced().unwrap();
        let address = announced.get(name).unwrap_or(&announced["listeners"][name]);
        address.as_str().unwrap().parse().unwrap()
    }

    pub fn write_settings(&self, settings: &str) {
        write_settings(&self.dir, settings);
    }

    /// Sends a signal to the latest process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// `penstock-proxy upgrade`, to its end.
    pub fn upgrade(&self) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_penstock-proxy"))
            .args(["upgrade", "--announce"])
            .arg(self.announce_file())
            .output()
            .unwrap();
        self.announced();
        output
    }

    /// Whether that process has ended. The first is our child; the others are not.
    pub fn has_ended(&mut self, pid: i32) -> bool {
        if pid == i32::try_from(self.first.id()).unwrap() {
            return self.first.try_wait().unwrap().is_some();
        }
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
    }

    /// The first process's exit code, once it has ended.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.first.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// GET on the private port; the status and the body.
    pub async fn private(&self, path: &str) -> Option<(u16, String)> {
        let mut client = tokio::net::TcpStream::connect(self.address("private")).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = super::tls::exchange(&mut client, request.as_bytes()).await.ok()?;
        let status = answer.get(9..12)?.parse().ok()?;
        Some((status, answer.split_once("\r\n\r\n")?.1.to_owned()))
    }
}

fn write_settings(dir: &TempDir, settings: &str) {
    let snapshot = dir.path().join("snapshot").display().to_string();
    let text = format!(
        "public.listen = '127.0.0.1:0'\nprivate.listen = '127.0.0.1:0'\npublic.threads = 2\n\
         discovery.controlplanes = []\ndiscovery.snapshot_file = '{snapshot}'\n{settings}\n"
    );
    std::fs::write(dir.path().join("proxy.toml"), text).unwrap();
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the proxy:\n{}", self.log());
        }
        self.announced();
        for pid in std::mem::take(&mut *self.seen.lock().unwrap()) {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if super::contains(&command, b"penstock-proxy") {
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
        self.first.kill().ok();
        self.first.wait().ok();
    }
}
