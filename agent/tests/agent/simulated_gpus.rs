//! Pretended GPUs that break: what an operator can make happen to them, and what that leads to.

use serde_json::{Value, json};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment},
};

fn parsed(answer: (u16, String)) -> (u16, Value) {
    (answer.0, serde_json::from_str(&answer.1).unwrap())
}

#[tokio::test]
async fn a_fault_on_demand_pulls_the_engine_and_its_end_brings_it_back() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.gpus.policy.hot_s = 0;
    let memory = ["--gpu-memory-utilization", "0.5"];
    cp.assign(1, 2, vec![assignment("m-0", 7, &memory)]).await;
    node.start().await;
    node.registered("m-0").await;
    let used = |body: &Value| body["gpus"][0]["memory_used_mib"] == 40960;
    let body = node.gpus(used).await;
    assert_eq!(body["gpus"][0]["processes"][0]["replica_id"], "m-0");
    assert_eq!(body["gpus"][0]["processes"].as_array().unwrap().len(), 1);

    let (status, gpu) =
        parsed(node.send("PUT", "/gpus/SIM-node-1-0/fault", r#"{"temperature_c": 95}"#).await);
    assert_eq!((status, &gpu["health"], &gpu["remedy"]), (200, &json!("degraded"), &json!("cooling")));
    node.registered("m-0").await;
    let (status, gpu) =
        parsed(node.send("PUT", "/gpus/SIM-node-1-0/fault", r#"{"ecc_uncorrected": 2}"#).await);
    assert_eq!((status, &gpu["health"]), (200, &json!("faulty")));
    let reason = "GPU SIM-node-1-0 must not be used: uncorrected ECC errors since the driver was loaded (needs: reset)";
    node.engine("m-0", |e| e["reason"] == reason).await;
    node.no_process_is_left().await;
    node.gpus(|body| body["gpus"][0]["memory_used_mib"] == 0).await;

    let (status, gpu) = parsed(node.send("DELETE", "/gpus/SIM-node-1-0/fault", "").await);
    assert_eq!((status, &gpu["health"]), (200, &json!("healthy")));
    node.registered("m-0").await;

    for (body, says) in [
        ("{\"boom\": 1}", "unknown field `boom`, expected one of `xid`, `temperature_c`"),
        ("nonsense", "the body is no fault of a GPU"),
    ] {
        let (status, answer) = node.send("PUT", "/gpus/SIM-node-1-0/fault", body).await;
        assert_eq!(status, 400);
        assert!(answer.contains(says), "{answer}");
    }
    assert_eq!(node.send("PUT", "/gpus/SIM-node-2-0/fault", "{}").await.0, 404);
}

#[tokio::test]
async fn a_policy_that_only_reports_leaves_the_engine_alone_and_a_script_makes_things_happen() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let script = node.path("faults.json");
    std::fs::write(&script, r#"[{"at_s": 0.5, "gpu": "0", "xid": 48}]"#).unwrap();
    node.config.gpus.simulated_script = script;
    node.config.gpus.policy.on_fault = "report".into();
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let body = node.gpus(|body| body["gpus"][0]["health"] == "faulty").await;
    let gpu = &body["gpus"][0];
    assert_eq!((&gpu["reason"], &gpu["fault"]), (&json!("XID 48 (double-bit ECC error)"), &json!("")));
    node.registered("m-0").await;
}
