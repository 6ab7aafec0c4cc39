//! The agent with NVIDIA's library: a fake one that does what a test says, and the real one where there is one.

use std::{fs, path::Path};

use nix::sys::signal::Signal;
use penstock_proto::v1::{self, EngineState, agent_message::Message};
use serde_json::{Value, json};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, number},
    nvml::{Fake, TWO},
};

/// A node whose GPUs are those of a fake library of this kind, which is there.
fn fake_node(cp: &ControlPlane, cfg: &str) -> (Node, Fake) {
    let mut node = Node::new(cp);
    let fake = Fake::new(node.dir.path(), cfg);
    fake.install();
    node.config.gpus.source = "nvml".into();
    node.config.gpus.nvml_library = fake.path();
    (node, fake)
}

/// An assignment of one GPU of the fake.
fn on_gpu(replica_id: &str, index: u32, args: &[&str]) -> v1::Assignment {
    v1::Assignment { gpu_uuids: vec![format!("GPU-fake-{index}")], ..assignment(replica_id, 7, args) }
}

async fn gpu(node: &Node, index: usize, is: impl Fn(&Value) -> bool) -> Value {
    node.gpus(|body| is(&body["gpus"][index])).await["gpus"][index].clone()
}

#[tokio::test]
async fn every_figure_of_two_gpus_is_read_and_what_a_card_does_not_say_is_absent() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    fake.with("0.processes=4000001:1500,4000002:20\n1.mig=1");
    node.start().await;
    let body = node.gpus(|body| body["gpus"].as_array().is_some_and(|gpus| gpus.len() == 2)).await;
    assert_eq!((&body["driver_version"], &body["cuda_version"]), (&json!("570.86.15"), &json!("12.8")));
    let expected = json!({
        "uuid": "GPU-fake-0", "name": "Fake GPU", "pci_bus_id": "00000000:1A:00.0", "numa_node": null,
        "link_group": "nvlink-0", "health": "healthy", "reason": "", "remedy": "", "fault": "",
        "memory_total_mib": 81920, "memory_used_mib": 1520, "utilization_percent": 37, "temperature_c": 41,
        "slowdown_c": 90, "shutdown_c": 95, "power_w": 123, "power_limit_w": 700, "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619, "throttle_reasons": ["sw_power_cap"], "ecc_corrected": 3, "ecc_uncorrected": 0,
        "ecc_corrected_ever": 17, "ecc_uncorrected_ever": 0, "remap_pending": false, "remap_failed": false,
        "pcie_replays": 5, "xids": [], "mig_enabled": false, "mig_instances": [],
        "processes": [
            {"pid": 4000001, "used_mib": 1500, "replica_id": ""}, {"pid": 4000002, "used_mib": 20, "replica_id": ""}
        ],
    });
    // The kernel of this machine may have a device at that address.
    let mut read = body["gpus"][0].clone();
    read["numa_node"] = Value::Null;
    assert_eq!(read, expected);

    let second = &body["gpus"][1];
    for absent in ["power_w", "sm_clock_mhz", "slowdown_c", "ecc_corrected", "remap_pending", "pcie_replays"]
    {
        assert_eq!(second[absent], Value::Null, "{absent}");
    }
    assert_eq!(second["utilization_percent"], 0, "said, and 0");
    assert_eq!(second["link_group"], "nvlink-0");
    assert!(second["fault"].as_str().unwrap().contains("divided (MIG)"), "{second}");
    assert_eq!(second["health"], "healthy");
    let part = json!({"uuid": "MIG-fake-1", "name": "Fake GPU MIG 1g.10gb", "memory_total_mib": 10240});
    assert_eq!(second["mig_instances"], json!([part]));

    let reported = |m: &Message| match m {
        Message::Report(report) => report.gpu_source.clone().zip(report.gpus.first().cloned()),
        _ => None,
    };
    let (source, first) = cp.hears("a report", 0, |heard| heard.iter().find_map(reported)).await;
    assert_eq!((source.kind.as_str(), source.driver_version.as_str()), ("nvml", "570.86.15"));
    assert_eq!((first.power_w, first.processes.len()), (Some(123), 2));
    let metrics = node.get("/metrics").await.1;
    assert!(metrics.contains("penstock_agent_gpu_power_watts{gpu=\"GPU-fake-0\"} 123"), "{metrics}");
    assert!(!metrics.contains("penstock_agent_gpu_power_watts{gpu=\"GPU-fake-1\"}"), "{metrics}");

    node.signal_agent(Signal::SIGTERM);
    assert_eq!(node.agent_ends().await.code(), Some(0));
    assert_eq!(fake.calls(), ["init", "free", "shutdown"], "ended in order");
}

#[tokio::test]
async fn a_library_that_comes_later_is_found_and_one_that_is_too_old_is_refused_in_words() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let fake = Fake::new(node.dir.path(), "");
    node.config.gpus.source = "nvml".into();
    node.config.gpus.nvml_library = fake.path();
    node.start().await;
    let body = node.gpus(|body| !body["reason"].as_str().unwrap().is_empty()).await;
    assert_eq!(body["gpus"], json!([]));
    assert!(body["reason"].as_str().unwrap().contains(&fake.path()), "{body}");
    fake.install();
    gpu(&node, 1, |gpu| gpu["health"] == "healthy").await;

    let (mut ancient, _fake) = fake_node(&cp, "ancient");
    ancient.start().await;
    let body = ancient.gpus(|body| !body["reason"].as_str().unwrap().is_empty()).await;
    let expected = "is too old: it has no nvmlDeviceGetMemoryInfo_v2; driver 510 or newer is needed";
    assert!(body["reason"].as_str().unwrap().contains(expected), "{body}");
}

#[tokio::test]
async fn an_older_driver_has_fewer_figures_and_no_events_and_is_used_all_the_same() {
    let cp = ControlPlane::start().await;
    let (mut node, _fake) = fake_node(&cp, "old");
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[])]).await;
    node.start().await;
    let first = gpu(&node, 0, |gpu| gpu["temperature_c"] == 41).await;
    assert_eq!((&first["throttle_reasons"], &first["remap_pending"]), (&json!([]), &Value::Null));
    assert_eq!(first["health"], "healthy");
    node.registered("m-0").await;
    assert!(fs::read_to_string(node.agent_log()).unwrap().contains("this NVML tells of no events"));
}

#[tokio::test]
async fn a_gpu_that_is_lost_takes_its_engine_out_and_gives_it_back_when_it_returns() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[]), on_gpu("m-1", 1, &[])]).await;
    node.start().await;
    let first = number(&node.registered("m-0").await, "pid");
    let other = number(&node.registered("m-1").await, "pid");
    let from = cp.heard().len();
    fake.with("0.lost=1");
    let left = |m: &Message| matches!(m, Message::Deregister(d) if d.replica_id == "m-0");
    cp.hears("deregistration", from, |heard| heard.iter().any(left).then_some(())).await;
    let reason = "GPU GPU-fake-0 must not be used: the driver says that the GPU is lost (needs: reboot)";
    node.engine("m-0", |e| e["state"] == "starting" && e["reason"] == reason).await;
    let lost = gpu(&node, 0, |gpu| gpu["health"] == "faulty").await;
    assert_eq!((&lost["uuid"], &lost["memory_total_mib"]), (&json!("GPU-fake-0"), &json!(81920)));
    assert_eq!(lost["temperature_c"], Value::Null, "it does not say");
    let faulty = |m: &Message| match m {
        Message::Report(report) => report.gpus.iter().any(|gpu| gpu.fault.contains("lost")).then_some(()),
        _ => None,
    };
    cp.hears("the fault", from, |heard| heard.iter().find_map(faulty)).await;
    assert!(!node.processes().contains(&first));

    fake.script(TWO);
    assert_ne!(number(&node.registered("m-0").await, "pid"), first);
    assert_eq!(number(&node.registered("m-1").await, "pid"), other, "nothing happened to the other");
}

#[tokio::test]
async fn an_xid_condemns_through_a_restart_of_the_agent_until_an_operator_clears_it() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[])]).await;
    node.start().await;
    node.registered("m-0").await;
    fake.with("event=1:0:31");
    let first = gpu(&node, 0, |gpu| gpu["xids"][0]["xid"] == 31).await;
    assert_eq!(first["health"], "healthy", "an application's error");

    let from = cp.heard().len();
    fake.with("event=2:0:79");
    let reason = "GPU GPU-fake-0 must not be used: XID 79 (GPU has fallen off the bus) (needs: reboot)";
    node.engine("m-0", |e| e["reason"] == reason).await;
    let failed = |m: &Message| match m {
        Message::Report(r) => {
            r.engines.iter().any(|e| e.state == i32::from(EngineState::Failed)).then_some(())
        }
        _ => None,
    };
    assert_eq!(cp.heard()[from..].iter().find_map(failed), None, "it was stopped in good order");
    node.metric_reaches("penstock_agent_gpus_faulty", 1).await;
    let metrics = node.get("/metrics").await.1;
    assert!(metrics.contains("penstock_agent_gpu_xids_total{class=\"hardware\"} 1"), "{metrics}");

    node.signal_agent(Signal::SIGTERM);
    assert_eq!(node.agent_ends().await.code(), Some(0));
    fake.script(TWO);
    node.start().await;
    node.engine("m-0", |e| e["reason"] == reason).await;
    let (status, body) = node.send("POST", "/gpus/GPU-fake-0/clear", "").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["health"], "healthy");
    node.registered("m-0").await;
    let (status, body) = node.send("POST", "/gpus/GPU-9/clear", "").await;
    assert_eq!(status, 404);
    assert!(body.contains("it has GPU-fake-0, GPU-fake-1"), "{body}");
    assert_eq!(node.send("PUT", "/gpus/GPU-fake-0/fault", "{\"xid\": 79}").await.0, 409, "it is real");
}

#[tokio::test]
async fn a_driver_that_hangs_leaves_old_figures_and_running_engines() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    node.config.gpus.stale_ms = 300;
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    fake.with("hang=1");
    let old =
        node.gpus(|body| body["reason"].as_str().unwrap().contains("has not answered for 300 ms")).await;
    assert_eq!((&old["gpus"][0]["health"], &old["gpus"][0]["fault"]), (&json!("degraded"), &json!("")));
    assert_eq!(old["gpus"][0]["temperature_c"], 41, "as it was");
    node.gpus(|body| body["reading_age_ms"].as_u64() > Some(600)).await;
    let (status, body) = node.get("/readyz").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(number(&node.registered("m-0").await, "pid"), pid);
    fake.with("0.temperature=50");
    gpu(&node, 0, |gpu| gpu["temperature_c"] == 50 && gpu["health"] == "healthy").await;

    fake.with("hang=1");
    node.gpus(|body| body["reason"].as_str().unwrap().contains("has not answered")).await;
    node.signal_agent(Signal::SIGTERM);
    assert_eq!(node.agent_ends().await.code(), Some(0), "it ends all the same");
    fake.script(TWO);
}

#[tokio::test]
async fn a_stop_waits_for_the_memory_and_says_who_keeps_it() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    fake.with(&format!("0.processes={pid}:70000"));
    gpu(&node, 0, |gpu| gpu["processes"][0]["replica_id"] == "m-0").await;

    cp.assign(1, 3, vec![on_gpu("m-1", 0, &[])]).await;
    let holds = format!("ended; waits for its memory: pid {pid} holds 70000 MiB of GPU GPU-fake-0");
    node.engine("m-0", |e| e["reason"] == holds).await;
    assert!(!node.processes().contains(&pid), "the process has ended");
    node.engine("m-1", |e| e["reason"] == "waits for m-0 to leave its GPU").await;
    fake.script(TWO);
    node.registered("m-1").await;
}

#[tokio::test]
async fn memory_that_is_never_given_back_is_waited_for_only_so_long_and_told() {
    let cp = ControlPlane::start().await;
    let (mut node, fake) = fake_node(&cp, "");
    node.config.gpus.release_ms = 400;
    node.config.engines.give_up_failures = 0;
    cp.assign(1, 2, vec![on_gpu("m-0", 0, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    fake.with(&format!("0.processes={pid}:70000"));
    gpu(&node, 0, |gpu| gpu["processes"][0]["replica_id"] == "m-0").await;
    cp.assign(1, 3, vec![on_gpu("m-1", 0, &["--gpu-memory-utilization", "0.9"])]).await;
    node.metric_reaches("penstock_agent_gpu_leftovers_total", 1).await;

    // What comes next does not fit: it says so, and is not started to fail.
    let says = "not started: GPU GPU-fake-0 has 11920 of 81920 MiB free and the engine takes 90 % of it; in use by pid";
    let waiting = node
        .engine("m-1", |e| e["state"] == "failed" && e["reason"].as_str().unwrap().starts_with(says))
        .await;
    assert_eq!((&waiting["restarts"], &waiting["pid"]), (&json!(0), &json!(0)));
    fake.with("0.processes=4000001:50000");
    let says = format!("{}: 50000 MiB", "in use by pid 4000001 (not of this agent)");
    node.engine("m-1", |e| e["reason"].as_str().unwrap().contains(&says)).await;
    fake.script(TWO);
    assert_eq!(node.registered("m-1").await["restarts"], 0);
}

#[tokio::test]
async fn the_gpus_of_this_machine_if_it_has_some() {
    const LIBRARY: &str = "libnvidia-ml.so.1";
    let folders =
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/aarch64-linux-gnu", "/usr/lib/wsl/lib"];
    if !folders.iter().any(|folder| Path::new(folder).join(LIBRARY).exists()) {
        eprintln!("skipped: there is no {LIBRARY} in {}", folders.join(", "));
        return;
    }
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.gpus.source = "nvml".into();
    node.start().await;
    let body = node.gpus(|body| body["gpus"] != json!([]) || body["reason"] != "").await;
    if body["gpus"] == json!([]) {
        eprintln!("skipped: {}", body["reason"]);
        return;
    }
    for gpu in body["gpus"].as_array().unwrap() {
        assert!(gpu["uuid"].as_str().unwrap().starts_with("GPU-"), "{gpu:#}");
        assert!(gpu["memory_total_mib"].as_u64().unwrap() > 1_000, "{gpu:#}");
        assert!(!gpu["pci_bus_id"].as_str().unwrap().is_empty(), "{gpu:#}");
    }
    eprintln!("{body:#}");
}
