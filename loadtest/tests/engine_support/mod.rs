//! Real simulator processes for tests: started on a free port, gone when dropped.
#![allow(clippy::unwrap_used, dead_code)] // Shared by several tests, none of which uses all of it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running simulator.
pub(crate) struct Sim {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) pid: i32,
    pub(crate) core_pid: Option<i32>,
    _dir: TempDir,
}

/// The simulator's command line, in a process group of its own.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-engine-sim"));
    command.args(["serve", "sim-model", "--host", "127.0.0.1"]).args(args);
    command.stderr(Stdio::null()).process_group(0);
    command
}

impl Sim {
    /// Starts one with more flags and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let announce: PathBuf = dir.path().join("announce.json");
        let mut command = command(args);
        command.args(["--port", "0", "--sim-load-ms", "1", "--sim-announce"]).arg(&announce);
        let mut child = command.spawn().unwrap();
        let mut text = String::new();
        wait_for("the announcement", || {
            assert!(child.try_wait().unwrap().is_none(), "the simulator ended before it was ready");
            text = std::fs::read_to_string(&announce).unwrap_or_default();
            !text.is_empty()
        });
        let said: Value = serde_json::from_str(&text).unwrap();
        let pid = |value: &Value| value.as_i64().map(|pid| i32::try_from(pid).unwrap());
        Self {
            child,
            address: said["address"].as_str().unwrap().parse().unwrap(),
            pid: pid(&said["pid"]).unwrap(),
            core_pid: pid(&said["core_pid"]),
            _dir: dir,
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends a signal to one process of the engine.
    pub(crate) fn signal(&self, pid: i32, signal: Signal) {
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Waits for the API server to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of the process", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        request(self.address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"), b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub(crate) fn post_bytes(&self, path: &str, body: &[u8]) -> Reply {
        request(self.address, &post_head(path, body.len(), "connection: close\r\n"), body)
    }

    pub(crate) fn state(&self) -> Value {
        self.get("/sim/state").json()
    }

    pub(crate) fn fault(&self, fault: Value) {
        assert_eq!(self.post("/sim/faults", &fault).status, 200);
    }

    /// The newest remembered request.
    pub(crate) fn last_record(&self) -> Value {
        self.get("/sim/requests?limit=1").json()["requests"][0].clone()
    }

    /// Opens a connection, sends a request, and leaves the response unread.
    pub(crate) fn open(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(post_head(path, body.len(), "").as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        stream
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // The group: also a core that outlived its API server. Gone already is fine.
        killpg(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap_or_default();
        self.child.wait().unwrap();
    }
}

pub(crate) fn post_head(path: &str, length: usize, more: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{more}\r\n"
    )
}

/// A response read to the end of its connection.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    /// Chunks joined.
    pub(crate) body: Vec<u8>,
    /// False if the connection broke, or closed before the body's end.
    pub(crate) whole: bool,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `data:` of all events, `[DONE]` included.
    pub(crate) fn data(&self) -> Vec<String> {
        self.text().lines().filter_map(|l| l.strip_prefix("data: ")).map(String::from).collect()
    }

    /// The events as JSON, `[DONE]` left out.
    pub(crate) fn events(&self) -> Vec<Value> {
        let events = self.data().into_iter().filter(|d| d != "[DONE]");
        events.map(|d| serde_json::from_str(&d).unwrap()).collect()
    }

    /// The text of a chat stream.
    pub(crate) fn content(&self) -> String {
        let events = self.events();
        events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
    }
}

/// Sends a request and reads until the connection closes.
pub(crate) fn request(address: SocketAddr, head: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    read_reply(&mut stream)
}

/// Reads one response, to the end of its body or of the connection.
pub(crate) fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let mut broken = false;
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(reply) = parse_reply(&bytes, true) {
            return reply;
        }
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            Err(_) => {
                broken = true;
                break;
            }
        }
    }
    let mut reply = parse_reply(&bytes, false).unwrap();
    reply.whole &= !broken;
    reply
}

fn parse_reply(bytes: &[u8], only_whole: bool) -> Option<Reply> {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        let nothing = Reply { status: 0, head: String::new(), body: bytes.to_vec(), whole: false };
        return (!only_whole).then_some(nothing);
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let rest = &bytes[end + 4..];
    let length =
        head.lines().find_map(|l| l.strip_prefix("content-length: ")).map(|l| l.parse::<usize>().unwrap());
    let (body, whole) = match length {
        Some(length) => (rest[..rest.len().min(length)].to_vec(), rest.len() >= length),
        None => dechunk(rest),
    };
    (whole || !only_whole).then_some(Reply { status, head, body, whole })
}

fn dechunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(line) = rest.iter().position(|&b| b == b'\n') else { return (body, false) };
        let size =
            std::str::from_utf8(&rest[..line]).ok().and_then(|l| usize::from_str_radix(l.trim(), 16).ok());
        let Some(size) = size else { return (body, false) };
        rest = &rest[line + 1..];
        if size == 0 {
            return (body, true);
        }
        body.extend_from_slice(&rest[..rest.len().min(size)]);
        if rest.len() < size + 2 {
            return (body, false);
        }
        rest = &rest[size + 2..];
    }
}

/// Waits for a condition, with a deadline.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// True if a process exists and is no zombie.
pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}
