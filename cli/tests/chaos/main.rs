//! A hundred random kills under load: of API servers, engine cores and agents, with SIGKILL, SIGTERM and SIGSTOP, whenever it
//! happens to be. Afterwards exactly the assigned engines run, and no other process is left.
//!
//! Requests may fail meanwhile, in the API's words; none may hang. `PENSTOCK_CHAOS_SEED` repeats a run's choices (not its timing, which
//! is the machine's), `PENSTOCK_CHAOS_KILLS` asks for more of them.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use support::{
    load::{Load, until},
    nodes::{Agent, LONGEST, Nodes},
};
use tokio::task::JoinSet;

const REPLICAS: usize = 4;
/// Longer than any request may take by the proxy's settings, and shorter than the client's own patience.
const HANGS: Duration = Duration::from_secs(25);

/// Times short enough for a test: what takes half a minute takes two seconds.
const AGENT: [(&str, &str); 15] = [
    ("LOG__LEVEL", "info"),
    ("ENGINES__READY_POLL_MS", "50"),
    ("ENGINES__FIRST_COMPLETION_MS", "5000"),
    ("ENGINES__LIVENESS_MS", "200"),
    ("ENGINES__LIVENESS_TIMEOUT_MS", "1000"),
    ("ENGINES__WEDGE_S", "3"),
    ("ENGINES__CANARY_S", "1"),
    ("ENGINES__SETTLE_MS", "200"),
    ("ENGINES__DRAIN_MS", "1000"),
    ("ENGINES__TERM_MS", "1500"),
    ("ENGINES__ORPHAN_TERM_MS", "300"),
    ("ENGINES__BACKOFF_MIN_MS", "50"),
    ("ENGINES__BACKOFF_MAX_MS", "500"),
    ("ENGINES__STABLE_S", "2"),
    ("ENGINES__GIVE_UP_RETRY_S", "2"),
];
const PROXY: [(&str, &str); 4] = [
    ("UPSTREAM__IDLE_MS", "4000"),
    ("UPSTREAM__FIRST_BYTE_MS", "4000"),
    ("HEALTH__HANG_MS", "1000"),
    ("HEALTH__CANARY_MS", "1000"),
];

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// One process that may be hit.
fn victim(agents: &[Agent], rng: &mut fastrand::Rng) -> Option<(String, i32)> {
    let agent = &agents[rng.usize(..agents.len())];
    if rng.u8(..100) < 20 {
        return Some((format!("agent of {}", agent.node_id), agent.pid()?));
    }
    let records = agent.records();
    let engine = records.get(rng.usize(..records.len().max(1)))?;
    if rng.u8(..100) < 55 {
        return Some((format!("API server of {}", engine.replica_id), engine.pid));
    }
    let of_engine = |p: &support::nodes::Marked| p.group == engine.pid && p.pid != engine.pid;
    let core = agent.processes().into_iter().find(of_engine)?;
    Some((format!("core of {}", engine.replica_id), core.pid))
}

/// Kills so many; what was done, for a failure's message.
async fn rage(nodes: &Nodes, kills: u64, rng: &mut fastrand::Rng) -> Vec<String> {
    let (mut done, mut resumed) = (Vec::new(), JoinSet::new());
    let began = Instant::now();
    while (done.len() as u64) < kills {
        tokio::time::sleep(Duration::from_millis(rng.u64(50..450))).await;
        let Some((name, process)) = victim(&nodes.agents, rng) else { continue };
        let signal = match rng.u8(..10) {
            0..5 => Signal::SIGKILL,
            5..7 => Signal::SIGTERM,
            _ => Signal::SIGSTOP,
        };
        if kill(Pid::from_raw(process), signal).is_err() {
            continue;
        }
        done.push(format!("{:6.2} s {signal} to the {name}, pid {process}", began.elapsed().as_secs_f64()));
        // Nobody else would wake an agent; an engine is its agent's to find.
        if signal == Signal::SIGSTOP && name.starts_with("agent") {
            let asleep = Duration::from_millis(rng.u64(200..3_000));
            resumed.spawn(async move {
                tokio::time::sleep(asleep).await;
                kill(Pid::from_raw(process), Signal::SIGCONT).ok();
            });
        }
    }
    resumed.join_all().await;
    done
}

/// What is not as it should be: exactly the assigned engines, each whole, recorded, told and answering.
async fn troubles(nodes: &Nodes) -> Option<Vec<String>> {
    let mut troubles = Vec::new();
    let endpoints = nodes.endpoints().await?;
    let unready = endpoints.iter().filter(|e| e["state"] != "ready").count();
    if endpoints.len() != REPLICAS || unready > 0 {
        troubles.push(format!("{} replicas, {unready} of them not ready", endpoints.len()));
    }
    for agent in &nodes.agents {
        let node = &agent.node_id;
        let assigned: BTreeSet<&str> = endpoints
            .iter()
            .filter(|e| e["node"] == node.as_str())
            .filter_map(|e| e["id"].as_str())
            .collect();
        let (records, told, processes) = (agent.records(), agent.engines().await?, agent.processes());
        let recorded: BTreeSet<&str> = records.iter().map(|r| r.replica_id.as_str()).collect();
        if recorded != assigned {
            troubles.push(format!("{node} has records of {recorded:?}, and {assigned:?} are assigned"));
        }
        for record in &records {
            let is_it = |e: &&Value| e["id"] == record.replica_id.as_str();
            let says =
                told.iter().find(is_it).map(|e| (e["state"].clone(), e["pid"].clone(), e["port"].clone()));
            if says != Some((json!("ready"), json!(record.pid), json!(record.port))) {
                troubles.push(format!("{node} says {says:?} of {record:?}"));
            }
            let registered = endpoints.iter().find(is_it).map(|e| e["address"].clone());
            if registered != Some(json!(format!("127.0.0.1:{}", record.port))) {
                troubles.push(format!("{record:?} is registered at {registered:?}"));
            }
            let whole: Vec<_> = processes.iter().filter(|p| p.group == record.pid).collect();
            if whole.len() != 2 || whole.iter().any(|p| matches!(p.state, 'T' | 't' | 'Z')) {
                troubles.push(format!("{record:?} has the processes {whole:?}"));
            }
        }
        if told.len() != records.len() {
            troubles.push(format!(
                "{node} tells of {} engines and has {} records",
                told.len(),
                records.len()
            ));
        }
        let stray: Vec<_> = processes.iter().filter(|p| !records.iter().any(|r| r.pid == p.group)).collect();
        if !stray.is_empty() {
            troubles.push(format!("{node} has stray processes: {stray:?}"));
        }
    }
    Some(troubles)
}

/// An end in the API's words: an error object, in a body or in a stream.
fn is_typed(answer: &str) -> bool {
    answer.contains("\"error\"") && answer.contains("\"message\"") && answer.contains("\"type\"")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_random_kills_under_load_leave_exactly_the_assigned_engines() {
    let seed = setting("PENSTOCK_CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..));
    let kills = setting("PENSTOCK_CHAOS_KILLS").unwrap_or(100);
    println!("PENSTOCK_CHAOS_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    // One agent leaves its engines to the next, the other ends them.
    let keeps = [AGENT.as_slice(), &[("ON_SHUTDOWN", "keep")]].concat();
    let ends = [AGENT.as_slice(), &[("ON_SHUTDOWN", "stop")]].concat();
    let fleet = [
        ("FLEET__LEASE_TTL_MS", "3000"),
        ("FLEET__REPORT_INTERVAL_MS", "200"),
        ("FLEET__LOST_GRACE_MS", "3000"),
    ];
    let nodes = Nodes::start(&[&keeps, &ends], &fleet, &PROXY);
    nodes.deploy(json!({"engine": "sim", "model_path": "x", "replicas": REPLICAS})).await;
    nodes.wait_for_ready(REPLICAS).await;
    let load = Load::on(&nodes.url(), "m", 8, 40);
    until("it serves", LONGEST, async || (load.done() > 20).then_some(())).await;

    let began = Instant::now();
    let done = rage(&nodes, kills, &mut rng).await;
    let raged = began.elapsed();
    let history = || format!("PENSTOCK_CHAOS_SEED={seed}\n{}", done.join("\n"));

    let deadline = Instant::now() + LONGEST;
    let mut quiet = 0;
    // Twice in a row: a look takes a while, and what it sees may just be changing.
    while quiet < 2 {
        let left = troubles(&nodes).await.unwrap_or_else(|| vec!["somebody does not answer".into()]);
        quiet = if left.is_empty() { quiet + 1 } else { 0 };
        assert!(Instant::now() < deadline, "not settled: {left:#?}\n{}", history());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let settled = began.elapsed() - raged;
    let before = load.done();
    until("it serves again", LONGEST, async || (load.done() > before + 40).then_some(())).await;

    let outcomes = load.end().await;
    let failed: Vec<_> = outcomes.iter().filter_map(|o| o.result.as_ref().err()).collect();
    println!(
        "{kills} kills in {raged:.1?}, settled {settled:.1?} later; {} of {} requests failed",
        failed.len(),
        outcomes.len()
    );
    for outcome in &outcomes {
        let took = outcome.ended - outcome.began;
        assert!(took < HANGS, "a request took {took:?}: {:?}\n{}", outcome.result, history());
    }
    let untyped = failed.iter().find(|answer| !is_typed(answer));
    assert_eq!(untyped, None, "an end without an error\n{}", history());

    nodes.undeploy().await;
    until("no process of any engine is left", LONGEST, async || {
        nodes
            .agents
            .iter()
            .all(|agent| agent.processes().is_empty() && agent.records().is_empty())
            .then_some(())
    })
    .await;
    nodes.stop();
}
