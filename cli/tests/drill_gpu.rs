//! DR46: a GPU breaks under load. Its endpoint is pulled before anybody fails on it, nothing is placed on the GPU any more,
//! the replica is started on another node, everybody is told why, and the GPU is used again once an operator has seen to it.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use support::{
    Up, client,
    load::{Load, get, seen_by_proxy, until},
    marked, penstock, pid,
};
use tempfile::TempDir;

const LONGEST: Duration = Duration::from_secs(60);

/// The agent of another node on this machine.
struct Other {
    agent: Child,
    data: TempDir,
}

impl Other {
    fn start(up: &Up) -> Self {
        let data = tempfile::tempdir().unwrap();
        let set = |key: &str, value: &str| (format!("PENSTOCK_AGENT__{key}"), value.to_owned());
        let sim = format!("[{:?}, \"engine-sim\"]", penstock().get_program().to_str().unwrap());
        let agent = penstock()
            .arg("agent")
            .envs([
                set("NODE_ID", "other"),
                set("STATE_DIR", data.path().to_str().unwrap()),
                set("CONTROLPLANE__ENDPOINTS", &format!("[\"http://{}\"]", up.address("grpc"))),
                set("PRIVATE__LISTEN", "127.0.0.1:0"),
                set("GPUS__SOURCE", "simulated"),
                set("GPUS__SIMULATED_COUNT", "2"),
                set("ENGINES__PORT_BASE", "0"),
                set("ENGINES__SIM__COMMAND", &sim),
            ])
            .env("PENSTOCK_UP_DATA_DIR", data.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { agent, data }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        kill(pid(self.agent.id()), Signal::SIGKILL).ok();
        self.agent.wait().ok();
        for process in marked(self.data.path()) {
            kill(nix::unistd::Pid::from_raw(process), Signal::SIGKILL).ok();
        }
    }
}

/// The GPU of an engine on `up`'s own node.
async fn gpu_of(up: &Up, replica: &str) -> String {
    let engines = get(&up.address("agent_private"), "/engines").await.unwrap();
    let engine = engines["engines"].as_array().unwrap().iter().find(|e| e["id"] == replica).unwrap();
    engine["gpu_uuids"][0].as_str().unwrap().to_owned()
}

/// Lets something happen to a GPU of `up`'s own node.
async fn befall(up: &Up, gpu: &str, fault: &'static str) {
    let url = format!("http://{}/gpus/{gpu}/fault", up.address("agent_private"));
    let answer = client().put(url).body(fault).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
}

fn known(up: &Up, gpu: &str) -> Value {
    let gpus = up.run_json(&["gpus"]);
    gpus["gpus"].as_array().unwrap().iter().find(|g| g["uuid"] == gpu).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_on_a_broken_gpu_is_pulled_replaced_elsewhere_and_nobody_fails() {
    let up = Up::start_with_env(
        &["--engines", "2", "--gpus", "2"],
        &[
            ("PENSTOCK_AGENT__GPUS__POLICY__DEGRADED_WEIGHT_PERCENT", "25"),
            ("PENSTOCK_AGENT__GPUS__POLICY__HOT_S", "0"),
        ],
    );
    let other = Other::start(&up);
    let nodes = || up.run_json(&["nodes"])["nodes"].as_array().unwrap().len();
    support::eventually("the other node is there", LONGEST, || (nodes() == 2).then_some(()));
    let victim = up.json["engines"][0]["id"].as_str().unwrap().to_owned();
    let gpu = gpu_of(&up, &victim).await;
    let load = Load::start(&up, "sim-model", 8, 20);
    until("there is load", LONGEST, async || (load.done() > 60).then_some(())).await;

    // Degraded: it stays, with a smaller share, by the policy above.
    let weight = async || seen_by_proxy(&up, "sim-model", &victim).await.unwrap()["weight_percent"].clone();
    assert_eq!(weight().await, 100);
    befall(&up, &gpu, r#"{"temperature_c": 93}"#).await;
    until("its share is smaller", LONGEST, async || (weight().await == 25).then_some(())).await;
    assert_eq!(known(&up, &gpu)["health"], "degraded");
    befall(&up, &gpu, r#"{"temperature_c": 40}"#).await;
    until("its share is whole again", LONGEST, async || (weight().await == 100).then_some(())).await;

    let broke = Instant::now();
    befall(&up, &gpu, r#"{"xid": 79}"#).await;
    let of_victim = || up.endpoints().into_iter().find(|endpoint| endpoint["id"] == victim);
    let pulled = || of_victim().is_none_or(|endpoint| endpoint["state"] != "ready");
    until("it is pulled", LONGEST, async || pulled().then_some(())).await;
    println!("pulled after {:?}", broke.elapsed());
    let elsewhere = || {
        let ready = up.endpoints().into_iter().filter(|endpoint| endpoint["state"] == "ready");
        ready.filter(|endpoint| endpoint["node"] == "other").count() == 1
    };
    until("its replica is on the other node", LONGEST, async || elsewhere().then_some(())).await;
    println!("replaced after {:?}", broke.elapsed());
    up.wait_for_ready(2);

    // Why, wherever an operator looks.
    let broken = known(&up, &gpu);
    assert_eq!((&broken["health"], &broken["remedy"]), (&"faulty".into(), &"reboot".into()), "{broken}");
    assert_eq!(broken["xids"][0]["xid"], 79);
    let said = String::from_utf8(up.run(&["describe", "node", "local"]).stdout).unwrap();
    assert!(said.contains("XID 79 (GPU has fallen off the bus) (needs: reboot)"), "{said}");
    let doctor = String::from_utf8(up.run(&["doctor"]).stdout).unwrap();
    assert!(doctor.contains(&format!("GPU {gpu}: XID 79")), "{doctor}");
    let metrics =
        client().get(format!("http://{}/metrics", up.address("agent_private"))).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains(&format!("penstock_agent_gpu_faulty{{gpu=\"{gpu}\"}} 1")), "{metrics}");

    // Nothing is placed there: with the other two taken, a third replica has the last of the other node, a fourth waits.
    assert!(up.run(&["scale", "sim-model", "--replicas", "4"]).status.success());
    up.wait_for_ready(3);
    let waits = || up.run_json(&["describe", "deployment", "sim-model"])["waits_for"].to_string();
    until("one waits", LONGEST, async || waits().contains("waits for a GPU").then_some(())).await;
    let is_empty = || pulled() && known(&up, &gpu)["memory_used_mib"] == 0;
    until("nothing is left on it", LONGEST, async || is_empty().then_some(())).await;

    let cleared = up.run(&["gpu", "clear", &gpu]);
    let said = String::from_utf8(cleared.stdout).unwrap();
    assert_eq!(said, format!("{gpu} is healthy and in use again\n"));
    up.wait_for_ready(4);
    assert_eq!(up.run(&["gpu", "clear", "GPU-nowhere"]).status.code(), Some(4));

    let failed: Vec<_> = load.end().await.into_iter().filter_map(|outcome| outcome.result.err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    drop(other);
    up.stop();
}
