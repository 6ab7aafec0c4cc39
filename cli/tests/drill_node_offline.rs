//! DR19: a node loses its power. Its packets vanish; nobody is refused, nobody is told. Other models lose nothing, the
//! model that had a replica there loses only what was there, and the replica is started elsewhere.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    os::unix::process::CommandExt,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use support::{
    Up,
    load::{Load, proxy_metric, state, until},
    marked,
    netns::Node,
    penstock, pid,
};
use tempfile::TempDir;

const LONGEST: Duration = Duration::from_secs(90);
const IDLE: Duration = Duration::from_secs(6);

/// An agent on a node of its own.
struct FarAgent {
    agent: Child,
    data: TempDir,
}

impl FarAgent {
    fn start(node: &Node, grpc_port: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let binary = penstock().get_program().to_owned();
        let set = |key: &str, value: &str| (format!("PENSTOCK_AGENT__{key}"), value.to_owned());
        let sim = format!("[{:?}, \"engine-sim\"]", binary.to_str().unwrap());
        let agent = node
            .command(&binary)
            .arg("agent")
            .envs([
                set("NODE_ID", "far"),
                set("STATE_DIR", data.path().to_str().unwrap()),
                set("CONTROLPLANE__ENDPOINTS", &format!("[\"http://{}:{grpc_port}\"]", node.here)),
                set("PRIVATE__LISTEN", "127.0.0.1:0"),
                set("GPUS__SOURCE", "simulated"),
                set("GPUS__SIMULATED_COUNT", "4"),
                set("ENGINES__BIND_HOST", "0.0.0.0"),
                set("ENGINES__ADVERTISE_HOST", &node.there),
                set("ENGINES__SIM__COMMAND", &sim),
            ])
            .env("PENSTOCK_UP_DATA_DIR", data.path())
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { agent, data }
    }
}

impl Drop for FarAgent {
    fn drop(&mut self) {
        for process in marked(self.data.path()) {
            kill(nix::unistd::Pid::from_raw(process), Signal::SIGKILL).ok();
        }
        kill(pid(self.agent.id()), Signal::SIGKILL).ok();
        self.agent.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_vanishes_takes_only_its_own_streams_with_it() {
    let node = match Node::new() {
        Ok(node) => node,
        Err(why) => {
            // proxy/tests/health.rs shows the same of the proxy alone, without a namespace.
            eprintln!("skipped: no network namespace on this machine: {why}");
            return;
        }
    };
    let up = Up::start_with_env(
        &["--engines", "1", "--gpus", "6"],
        &[
            ("PENSTOCK_CONTROLPLANE__LISTEN__GRPC", "0.0.0.0:0"),
            ("PENSTOCK_PROXY__UPSTREAM__IDLE_MS", &IDLE.as_millis().to_string()),
            ("PENSTOCK_PROXY__UPSTREAM__FIRST_BYTE_MS", &IDLE.as_millis().to_string()),
        ],
    );
    let grpc = up.address("grpc");
    let far = FarAgent::start(&node, grpc.rsplit(':').next().unwrap());
    let nodes = || up.run_json(&["nodes"])["nodes"].as_array().unwrap().len();
    support::eventually("the far node is there", LONGEST, || (nodes() == 2).then_some(()));
    let deployed =
        up.run(&["deploy", "wide", "--engine", "sim", "--replicas", "2", "--wait", "--timeout-s", "90"]);
    assert!(deployed.status.success(), "{}", String::from_utf8_lossy(&deployed.stderr));
    let placed = |on: &str| {
        let wide = up.endpoints().into_iter().filter(|e| e["model"] == "wide" && e["node"] == on);
        wide.map(|e| e["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let victim = placed("far").first().expect("one replica on each node").clone();

    let (other, wide) = (Load::start(&up, "sim-model", 4, 20), Load::start(&up, "wide", 8, 20));
    until("there is load", LONGEST, async || (other.done() > 40 && wide.done() > 80).then_some(())).await;
    node.cut_off();
    let cut = Instant::now();
    let (mut first_failure, mut ejected) = (None, None);
    until("it is ejected", LONGEST, async || {
        let failed = "penstock_proxy_attempt_failures_total{reason=\"connect\"}";
        if first_failure.is_none() && proxy_metric(&up, failed).await? > 0.0 {
            first_failure = Some(Instant::now());
        }
        ejected = (state(&up, "wide", &victim).await == "ejected").then(Instant::now);
        ejected.map(|_| ())
    })
    .await;
    let ejected = ejected.unwrap();
    println!(
        "ejected {:?} after the cut; first failed connection {:?} after it",
        ejected - cut,
        first_failure.map(|at| at - cut)
    );
    // With connections kept open, silence is the first sign, not a connection that fails.
    let (sign, longest) = first_failure.map_or((cut, 3), |failed| (failed, 3));
    assert!(ejected.saturating_duration_since(sign) <= Duration::from_secs(longest), "{:?}", ejected - cut);
    let elsewhere = || (placed("local").len() == 2).then_some(());
    until("its replica is elsewhere", Duration::from_secs(60), async || elsewhere()).await;

    let failed: Vec<_> = other.end().await.into_iter().filter_map(|outcome| outcome.result.err()).collect();
    assert!(failed.is_empty(), "another model: {failed:?}");
    for outcome in wide.end().await {
        let Err(text) = &outcome.result else { continue };
        assert!(outcome.began <= ejected, "sent to a node that was known to be gone: {text}");
        assert!(
            outcome.ended >= cut && outcome.ended - cut.max(outcome.began) <= IDLE + Duration::from_secs(4)
        );
        assert!(
            text.contains("engine_stalled") || text.contains("engine_timeout"),
            "not a typed end: {text}"
        );
    }
    drop(far);
    up.stop();
}
