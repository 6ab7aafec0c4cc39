//! vLLM itself, on a CPU: placed, ready, asked, scaled, killed, stopped, drained, ended, and what was left each time.
//!
//! Opt-in, since it takes minutes and gigabytes: `scripts/vllm_cpu.sh DIR`, then
//! `PENSTOCK_TEST_VLLM=DIR cargo nextest run --release -p penstock --test real_vllm --no-capture`. docs/vllm.md has its output.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client, eventually, pid};

/// Three Python processes import everything, one after the other.
const LONG: Duration = Duration::from_secs(400);
const MODEL: &str = "tiny";

/// One process of an engine.
#[derive(Debug, Clone)]
struct Proc {
    name: String,
    rss_mib: u64,
}

/// The living processes of a group, by pid.
fn group(leader: u32) -> BTreeMap<u32, Proc> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of_group = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((_, fields)) = stat.rsplit_once(')') else { return false };
        let fields: Vec<&str> = fields.split_whitespace().collect();
        fields[0] != "Z" && fields[2] == leader.to_string()
    };
    let process = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let kib = field("VmRSS:").and_then(|text| text.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0);
        Some((pid, Proc { name: field("Name:")?.to_owned(), rss_mib: kib / 1_024 }))
    };
    pids.filter(of_group).filter_map(process).collect()
}

/// MiB that the machine could give to new processes.
fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 1_024
}

fn tell(since: Instant, what: &str) {
    println!("{:>6.1} s  {what}; {} MiB of memory available", since.elapsed().as_secs_f64(), available_mib());
}

fn show(leader: u32) {
    for (pid, process) in group(leader) {
        println!("          {pid:>7} {:<16} {:>5} MiB", process.name, process.rss_mib);
    }
}

fn number(endpoint: &Value, key: &str) -> u32 {
    u32::try_from(endpoint[key].as_u64().unwrap()).unwrap()
}

fn ready(up: &Up, wanted: usize) -> Vec<Value> {
    eventually(&format!("{wanted} ready engines"), LONG, || {
        let mut endpoints = up.endpoints();
        endpoints.retain(|e| e["state"] == "ready");
        (endpoints.len() == wanted).then_some(endpoints)
    })
}

/// Until the replica is ready as another process.
fn replaced(up: &Up, former: &Value) -> Value {
    eventually("a replacement", LONG, || {
        let now = up.endpoints().into_iter().find(|e| e["id"] == former["id"])?;
        (now["state"] == "ready" && now["pid"] != former["pid"]).then_some(now)
    })
}

fn port_is_free(endpoint: &Value) -> bool {
    std::net::TcpListener::bind(endpoint["address"].as_str().unwrap()).is_ok()
}

async fn chat(up: &Up, stream: bool) -> String {
    let body = json!({
        "model": MODEL, "stream": stream, "max_tokens": 16, "temperature": 0,
        "messages": [{"role": "user", "content": "the quick brown fox"}],
    });
    let answer = client().post(format!("{}/v1/chat/completions", up.url())).json(&body).send().await.unwrap();
    let status = answer.status().as_u16();
    let text = answer.text().await.unwrap();
    assert_eq!(status, 200, "{text}");
    text
}

/// A streamed chat every two seconds: more would take the cores that engines need for their start.
struct Trickle {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<Result<(), String>>>,
}

impl Trickle {
    fn start(up: &Up) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (url, ended) = (up.url(), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut results = Vec::new();
            while !ended.load(SeqCst) {
                results.push(streamed(&url).await);
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            results
        });
        Self { stop, task }
    }

    async fn end(self) -> Vec<Result<(), String>> {
        self.stop.store(true, SeqCst);
        self.task.await.unwrap()
    }
}

async fn streamed(url: &str) -> Result<(), String> {
    let body = json!({
        "model": MODEL, "stream": true, "max_tokens": 16,
        "messages": [{"role": "user", "content": "the quick brown fox"}],
    });
    let asked = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await;
    let text = asked.map_err(|e| e.to_string())?.text().await.map_err(|e| e.to_string())?;
    match text.ends_with("data: [DONE]\n\n") && !text.contains("\"error\"") {
        true => Ok(()),
        false => Err(text),
    }
}

fn run(up: &Up, args: &[&str]) {
    let output = up.run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn start(folder: &str) -> Up {
    let folder = PathBuf::from(folder);
    assert!(folder.join("venv/bin/vllm").exists(), "{}: run scripts/vllm_cpu.sh there", folder.display());
    let model = folder.join("tiny");
    let flags =
        ["--load-format=dummy", "--enforce-eager", "--seed=1", "--max-model-len=2048", "--max-num-seqs=32"];
    let flags = flags.iter().chain(&["--dtype=bfloat16"]).map(|flag| format!("--engine-arg={flag}"));
    let mut args: Vec<String> =
        ["--ready-timeout-s", "390", "--engine", "vllm", "--engines", "1", "--vllm-dir"]
            .map(str::to_owned)
            .into();
    args.extend([folder.display().to_string(), "--model-dir".into(), model.display().to_string()]);
    args.extend(flags);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let env = [("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")];
    Up::start_with_env(&args, &env)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vllm_is_started_killed_stopped_drained_and_nothing_is_left() {
    let Ok(folder) = std::env::var("PENSTOCK_TEST_VLLM") else {
        println!("skipped: PENSTOCK_TEST_VLLM does not name a folder made by scripts/vllm_cpu.sh");
        return;
    };
    let began = Instant::now();
    let before = available_mib();
    tell(began, "nothing runs");
    let up = start(&folder);
    let first = ready(&up, 1).remove(0);
    tell(began, "one engine is ready");
    show(number(&first, "pid"));
    println!("          version {}, ready after {}", first["engine_version"], first["ready_ms"]);
    assert!(chat(&up, false).await.contains("\"finish_reason\""));
    assert!(chat(&up, true).await.ends_with("data: [DONE]\n\n"));
    tell(began, "chats through the proxy, unary and streamed, were answered");

    run(&up, &["scale", MODEL, "--replicas", "2"]);
    let both = ready(&up, 2);
    tell(began, "scaled to two, both ready");
    let second = both.iter().find(|e| e["id"] != first["id"]).unwrap().clone();
    show(number(&second, "pid"));

    // Its EngineCore and worker would stay behind, with all of the memory.
    let load = Trickle::start(&up);
    let leader = number(&first, "pid");
    kill(pid(leader), Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    eventually("the orphans' end", LONG, || group(leader).is_empty().then_some(()));
    tell(
        began,
        &format!(
            "API server killed with -9: its orphans were gone {:.1} s later",
            killed.elapsed().as_secs_f64()
        ),
    );
    eventually("its port to be free", LONG, || port_is_free(&first).then_some(()));
    let first = replaced(&up, &first);
    tell(began, &format!("its replacement was ready {:.1} s after the kill", killed.elapsed().as_secs_f64()));

    // A stopped core: /health goes on to say that all is well.
    let leader = number(&second, "pid");
    let core =
        group(leader).into_iter().find(|(_, process)| process.name.starts_with("VLLM::Engine")).unwrap().0;
    kill(pid(core), Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let health = format!("http://{}/health", second["address"].as_str().unwrap());
    let health = client().get(health).send().await.unwrap().status().as_u16();
    let wedged = eventually("the wedge to be found", LONG, || {
        let now = up.endpoints().into_iter().find(|e| e["id"] == second["id"])?;
        let reason = now["reason"].as_str().unwrap_or_default().to_owned();
        (now["state"] != "ready" && reason.contains("wedged")).then_some(reason)
    });
    tell(
        began,
        &format!(
            "EngineCore stopped, /health said {health}: found after {:.1} s",
            stopped.elapsed().as_secs_f64()
        ),
    );
    println!("          {wedged}");
    eventually("its end", LONG, || group(leader).is_empty().then_some(()));
    let second = replaced(&up, &second);
    tell(
        began,
        &format!("its replacement was ready {:.1} s after the stop", stopped.elapsed().as_secs_f64()),
    );
    let outcomes = load.end().await;
    let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    println!(
        "          a chat every two seconds meanwhile: {} in all, {} failed",
        outcomes.len(),
        failed.len()
    );
    for answer in &failed {
        assert!(answer.contains("\"error\"") && answer.contains("\"type\""), "not a typed end: {answer}");
    }
    assert!(failed.len() <= 2, "more than were under way on the two: {failed:?}");

    run(&up, &["drain", first["id"].as_str().unwrap()]);
    eventually("it to drain", LONG, || {
        let now = up.endpoints().into_iter().find(|e| e["id"] == first["id"])?;
        (now["state"] == "draining").then_some(())
    });
    assert!(chat(&up, false).await.contains("\"finish_reason\""));
    run(&up, &["undrain", first["id"].as_str().unwrap()]);
    ready(&up, 2);
    tell(began, "drained while the other answered, and taken back");

    run(&up, &["scale", MODEL, "--replicas", "1"]);
    let scaled = Instant::now();
    let left = [&first, &second].map(|e| number(e, "pid"));
    let gone =
        eventually("the end of one", LONG, || left.iter().find(|leader| group(**leader).is_empty()).copied());
    tell(
        began,
        &format!(
            "scaled to one: the other's last process ended after {:.1} s",
            scaled.elapsed().as_secs_f64()
        ),
    );
    assert!(chat(&up, true).await.ends_with("data: [DONE]\n\n"));
    let last = left.into_iter().find(|leader| *leader != gone).unwrap();
    let ending = Instant::now();
    up.stop();
    assert!(group(last).is_empty());
    tell(
        began,
        &format!("SIGTERM of `up`: all ended after {:.1} s, nothing is left", ending.elapsed().as_secs_f64()),
    );
    let lost = before.saturating_sub(available_mib());
    assert!(lost < 500, "{lost} MiB of memory did not come back");
}
