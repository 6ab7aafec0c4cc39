//! The simulator as processes: two of them, signals, ends.
#![allow(clippy::unwrap_used)]

mod engine_support;

use std::{
    io::Read,
    net::TcpStream,
    time::{Duration, Instant},
};

use engine_support::{Sim, command, is_alive, read_reply, wait_for};
use nix::sys::signal::{Signal, killpg};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn body(stream: bool, max_tokens: u64) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream, "max_tokens": max_tokens})
}

/// Opens a long stream and waits until it runs.
fn streaming(sim: &Sim) -> TcpStream {
    let mut stream = sim.open(CHAT, &body(true, 1_000_000));
    let mut some = [0; 1000];
    stream.read_exact(&mut some).unwrap();
    stream
}

fn tokens(sim: &Sim) -> u64 {
    sim.state()["generated_tokens"].as_u64().unwrap()
}

#[test]
fn a_stopped_core_stops_the_tokens_and_nothing_else() {
    let sim = Sim::start(&[]);
    let core = sim.core_pid.unwrap();
    let _stream = streaming(&sim);
    sim.signal(core, Signal::SIGSTOP);
    // The lease ends within 100 ms; then the count stands still.
    let mut last = (tokens(&sim), Instant::now());
    wait_for("the tokens to stop", || {
        let now = tokens(&sim);
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(300)
    });
    assert_eq!(
        (sim.get("/health").status, sim.get("/metrics").status, sim.get("/v1/models").status),
        (200, 200, 200)
    );
    assert_eq!(tokens(&sim), last.0);
    sim.signal(core, Signal::SIGCONT);
    wait_for("the tokens to come back", || tokens(&sim) > last.0 + 10);
}

#[test]
fn an_idle_core_stopped_lets_no_request_through() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let core = sim.core_pid.unwrap();
    sim.signal(core, Signal::SIGSTOP);
    let mut stream = sim.open(CHAT, &body(false, 5));
    wait_for("the request", || sim.state()["in_flight"] == 1);
    assert_eq!(tokens(&sim), 0);
    sim.signal(core, Signal::SIGCONT);
    assert_eq!(read_reply(&mut stream).status, 200);
}

#[test]
fn when_the_core_dies_streams_are_told_and_the_server_exits() {
    let mut sim = Sim::start(&[]);
    let mut stream = streaming(&sim);
    let mut unary = sim.open(CHAT, &body(false, 100_000));
    wait_for("both", || sim.state()["in_flight"] == 2);
    let started = Instant::now();
    sim.signal(sim.core_pid.unwrap(), Signal::SIGKILL);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: {\"error\": {\"message\": \"EngineCore encountered an issue."));
    assert!(rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{rest}");
    let unary = read_reply(&mut unary);
    assert_eq!((unary.status, &unary.json()["error"]["type"]), (500, &json!("InternalServerError")));
    assert_eq!(sim.get("/health").status, 503);
    assert_eq!(sim.wait().code(), Some(1));
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

#[test]
fn a_killed_api_server_leaves_its_core_in_the_same_group() {
    let mut sim = Sim::start(&[]);
    let core = sim.core_pid.unwrap();
    sim.signal(sim.pid, Signal::SIGKILL);
    sim.wait();
    assert!(is_alive(core));
    let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(core))).unwrap();
    assert_eq!(group.as_raw(), sim.pid);
    sim.signal(core, Signal::SIGTERM);
    wait_for("the orphan's end", || !is_alive(core));
}

#[test]
fn sigterm_without_a_timeout_aborts() {
    for (flag, wanted) in [("abort", "\"finish_reason\":\"abort\""), ("error", "{\"error\": {")] {
        let mut sim = Sim::start(&["--sim-sigterm", flag]);
        let core = sim.core_pid.unwrap();
        let mut stream = streaming(&sim);
        let mut idle = sim.open(CHAT, &body(false, 1));
        assert_eq!(read_reply(&mut idle).status, 200);
        sim.signal(sim.pid, Signal::SIGTERM);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains(wanted) && rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{flag}: {rest}");
        assert_eq!(sim.wait().code(), Some(0));
        assert!(!is_alive(core));
    }
}

#[test]
fn sigterm_with_a_timeout_drains() {
    let mut sim = Sim::start(&["--shutdown-timeout", "60"]);
    let core = sim.core_pid.unwrap();
    let mut stream = sim.open(CHAT, &body(true, 200));
    wait_for("the stream", || sim.state()["in_flight"] == 1);
    // To the whole group, as an agent does it: the core passes it on.
    killpg(nix::unistd::Pid::from_raw(sim.pid), Signal::SIGTERM).unwrap();
    wait_for("the drain", || sim.state()["phase"] == "draining");
    assert_eq!(sim.get("/health").status, 200);
    let refused = sim.post(CHAT, &body(true, 5));
    assert_eq!(refused.status, 500);
    assert_eq!(refused.json()["error"]["message"], "cannot schedule new futures after shutdown");
    let reply = read_reply(&mut stream);
    assert!(reply.whole && reply.text().contains("\"finish_reason\":\"length\""));
    assert_eq!(sim.wait().code(), Some(0));
    assert!(!is_alive(core));
}

#[test]
fn a_drain_ends_by_its_timeout() {
    let mut sim = Sim::start(&["--shutdown-timeout", "1"]);
    let mut stream = streaming(&sim);
    sim.signal(sim.pid, Signal::SIGTERM);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"abort\""));
    assert_eq!(sim.wait().code(), Some(0));
}

#[test]
fn a_taken_port_is_one_clear_line_and_exit_code_1() {
    let sim = Sim::start(&["--sim-no-core"]);
    assert_eq!(sim.core_pid, None);
    let port = sim.address.port().to_string();
    let output = command(&["--port", &port]).stderr(std::process::Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&format!("cannot listen on 127.0.0.1:{port} (--host, --port)")), "{said}");
}

/// Whether a process has a handler for a signal: proc_pid_status(5), SigCgt.
fn catches(pid: u32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() >> (signal as i32 - 1) & 1 == 1
}

#[test]
fn never_ready_never_listens_and_ends_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let announce = dir.path().join("a");
    let mut child =
        command(&["--port", "0", "--sim-load-ms", "1", "--sim-fault", "never_ready", "--sim-announce"])
            .arg(&announce)
            .spawn()
            .unwrap();
    // Sent before the process catches it, the signal would end it as any other.
    wait_for("SIGTERM to be caught", || catches(child.id(), Signal::SIGTERM));
    // One that was started later, with the same loading time, is ready by now.
    let _later = Sim::start(&[]);
    assert!(!announce.exists() && child.try_wait().unwrap().is_none());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn usage_errors_have_exit_code_2() {
    let output =
        command(&["--tensor-paralel-size", "2"]).stderr(std::process::Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("unrecognized arguments: --tensor-paralel-size 2")
    );
}
