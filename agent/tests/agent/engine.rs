//! The stand-in engine. It is told what to do by the arguments of its assignment:
//!
//! - `--completions-after FILE`: completions fail until FILE exists
//! - `--health-while-not FILE`: hangs on every request once FILE exists
//! - `--running FILE`: `/metrics` says that as many requests run as FILE holds
//! - `--frozen-while FILE`: while FILE exists no token is made: completions hang, counters stand still, `/health` is 200
//! - `--few-metrics`: `/metrics` has the load and nothing else
//! - `--ignore-term`: SIGTERM does nothing
//! - `--sleep-fails`: `/sleep` answers 500
//! - `--wake-hangs`: `/wake_up` is never answered
//! - `--orphan`: starts a child in its group that ignores SIGTERM and outlives it
//! - `--stray`: starts a child in a group of its own
//! - `--outside`: starts a child in a session of its own, without a mark of its engine
//! - `--says TEXT`: writes TEXT and exits with 1
//! - `--bind-fails-on PORT`: says that the address is in use, and exits, when given PORT

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// Set on the child that is to be an engine.
pub(crate) const ROLE: &str = "STAND_IN_ENGINE";

/// The command that runs this program as an engine; the agent appends `serve ...`.
pub(crate) fn command() -> Vec<String> {
    let program = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let flags = ["--exact", "engine::stand_in_engine", "--nocapture", "--test-threads=1", "--"];
    [program].into_iter().chain(flags.map(str::to_owned)).collect()
}

/// No test: does nothing unless it is run as an engine.
#[test]
fn stand_in_engine() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).map(|at| args[at + 1].clone());
    let port: u16 = value("--port").unwrap().parse().unwrap();
    if value("--bind-fails-on") == Some(port.to_string()) {
        println!("error: cannot listen: Address already in use (os error 98)");
        #[allow(clippy::disallowed_methods, reason = "this is an engine's main, inside a test harness")]
        std::process::exit(1);
    }
    if let Some(text) = value("--says") {
        println!("{text}");
        #[allow(clippy::disallowed_methods, reason = "this is an engine's main, inside a test harness")]
        std::process::exit(1);
    }
    if args.iter().any(|a| a == "--outside") {
        // Not before the agent has put us where we belong; where it puts nobody anywhere, after a while.
        let placed = || fs::read_to_string("/proc/self/cgroup").unwrap().contains("/engine-");
        let mut tries = 0;
        while !placed() && tries < 500 {
            thread::sleep(Duration::from_millis(10));
            tries += 1;
        }
        #[allow(clippy::zombie_processes, reason = "it is to outlive us")]
        Command::new("setsid")
            .args(["sleep", "600"])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    }
    if args.iter().any(|a| a == "--orphan") {
        let script = "trap '' TERM; while :; do sleep 0.2; done";
        #[allow(clippy::zombie_processes, reason = "it is to outlive us")]
        Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
    }
    if args.iter().any(|a| a == "--stray") {
        #[allow(clippy::zombie_processes, reason = "it is to outlive us")]
        Command::new("sleep").arg("600").process_group(0).stdin(Stdio::null()).spawn().unwrap();
    }
    let ignores_term = args.iter().any(|a| a == "--ignore-term");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    thread::spawn(move || {
        runtime.block_on(async {
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
            while term.recv().await.is_some() {
                println!("SIGTERM");
                if !ignores_term {
                    #[allow(
                        clippy::disallowed_methods,
                        reason = "this is an engine's main, inside a test harness"
                    )]
                    std::process::exit(0);
                }
            }
        });
    });
    let script = Script {
        model: value("--served-model-name").unwrap(),
        completions_after: value("--completions-after"),
        hang_file: value("--health-while-not"),
        running: value("--running"),
        sleep_fails: args.iter().any(|a| a == "--sleep-fails"),
        wake_hangs: args.iter().any(|a| a == "--wake-hangs"),
        asleep: Arc::default(),
        frozen_file: value("--frozen-while"),
        few_metrics: args.iter().any(|a| a == "--few-metrics"),
        tokens: Arc::default(),
    };
    println!("listening on {port}");
    for stream in TcpListener::bind((value("--host").unwrap(), port)).unwrap().incoming() {
        let script = script.clone();
        thread::spawn(move || drop(script.answer(stream.unwrap())));
    }
}

/// All of these count the completions.
const COUNTERS: [&str; 7] = [
    "time_to_first_token_seconds_count",
    "time_to_first_token_seconds_sum",
    "generation_tokens_total",
    "prompt_tokens_total",
    "iteration_tokens_total_count",
    "request_success_total",
    "inter_token_latency_seconds_count",
];

#[derive(Clone)]
struct Script {
    model: String,
    completions_after: Option<String>,
    hang_file: Option<String>,
    running: Option<String>,
    sleep_fails: bool,
    wake_hangs: bool,
    asleep: Arc<AtomicBool>,
    frozen_file: Option<String>,
    few_metrics: bool,
    tokens: Arc<AtomicU64>,
}

impl Script {
    fn answer(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let mut length = 0;
            loop {
                let mut header = String::new();
                reader.read_line(&mut header)?;
                if header.trim().is_empty() {
                    break;
                }
                if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            if exists(&self.hang_file) {
                thread::sleep(Duration::from_secs(600));
            }
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (status, text) = self.route(path, &body);
            write!(writer, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{text}", text.len())?;
        }
    }

    fn route(&self, path: &str, body: &[u8]) -> (u16, String) {
        let model = &self.model;
        let asleep = self.asleep.load(Ordering::SeqCst);
        if asleep
            && !["/is_sleeping", "/wake_up", "/collective_rpc"].contains(&path.split('?').next().unwrap())
        {
            println!("asked {path} while asleep");
        }
        match path {
            "/sleep?level=1" | "/sleep?level=2" if self.sleep_fails => (500, "{\"error\":\"no\"}".into()),
            "/sleep?level=1" | "/sleep?level=2" => {
                self.asleep.store(true, Ordering::SeqCst);
                (200, String::new())
            }
            "/wake_up" | "/wake_up?tags=kv_cache" => {
                if self.wake_hangs {
                    thread::sleep(Duration::from_secs(600));
                }
                println!("woken by {path}");
                self.asleep.store(false, Ordering::SeqCst);
                (200, String::new())
            }
            "/wake_up?tags=weights" | "/collective_rpc" => {
                println!("asked {path} {}", String::from_utf8_lossy(body));
                (200, String::new())
            }
            "/is_sleeping" => (200, format!("{{\"is_sleeping\":{asleep}}}")),
            "/health" => (200, String::new()),
            "/v1/models" => (200, format!("{{\"data\":[{{\"id\":\"{model}\"}}]}}")),
            "/v1/completions" => {
                while exists(&self.frozen_file) {
                    thread::sleep(Duration::from_millis(20));
                }
                self.tokens.fetch_add(1, Ordering::Relaxed);
                let request: serde_json::Value = serde_json::from_slice(body).unwrap();
                let ready = !asleep && (self.completions_after.is_none() || exists(&self.completions_after));
                match ready && request["model"] == model.as_str() && request["max_tokens"] == 1 {
                    true => (200, "{\"choices\":[{\"text\":\"pong\"}]}".into()),
                    false => (500, "{\"error\":\"not yet\"}".into()),
                }
            }
            "/metrics" => {
                let running =
                    self.running.as_ref().and_then(|f| fs::read_to_string(f).ok()).unwrap_or("0".into());
                let waiting = if running.trim() == "0" { 0 } else { 2 };
                let mut text = format!(
                    "vllm:num_requests_running{{engine=\"0\"}} {}\nvllm:num_requests_waiting{{engine=\"0\"}} {waiting}\n\
                     vllm:kv_cache_usage_perc{{engine=\"0\"}} 0.5\n",
                    running.trim()
                );
                let tokens = self.tokens.load(Ordering::Relaxed);
                for name in COUNTERS.iter().filter(|_| !self.few_metrics) {
                    text.push_str(&format!("vllm:{name}{{engine=\"0\"}} {tokens}\n"));
                }
                (200, text)
            }
            _ => (404, String::new()),
        }
    }
}

fn exists(file: &Option<String>) -> bool {
    file.as_ref().is_some_and(|file| Path::new(file).exists())
}
