//! A whole Penstock with models that go to zero: the first request brings them back and is answered. One that may sleep is not
//! ended meanwhile, and its GPU is had by whoever finds no other.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{Up, client};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_request_wakes_a_model_and_is_answered() {
    let up = Up::start(&["--engines", "1", "--gpus", "2"]);
    let url = format!("http://{}/api/v2/deployments/sleepy", up.address("controlplane"));
    let body = json!({
        "engine": "sim",
        "model_path": "x",
        "replicas": 1,
        "autoscaling": {"min": 0, "max": 1, "idle_to_zero_s": 1},
    });
    let made = client().put(&url).json(&body).send().await.unwrap();
    assert_eq!(made.status(), 201, "{:?}", made.text().await);
    let asleep = async || -> bool {
        let shown: Value = client().get(&url).send().await.unwrap().json().await.unwrap();
        let status = &shown["status"];
        status["wanted"] == 0 && status["ready"] == 0 && status["draining"] == 0
    };
    let chat = json!({"model": "sleepy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    for _ in 0..2 {
        let deadline = std::time::Instant::now() + Duration::from_secs(120);
        while !asleep().await {
            assert!(std::time::Instant::now() < deadline, "it does not go to sleep");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let asked = client()
            .post(format!("{}/v1/chat/completions", up.url()))
            .timeout(Duration::from_secs(120))
            .json(&chat);
        let answer = asked.send().await.unwrap();
        assert_eq!(answer.status(), 200, "{:?}", answer.text().await);
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["model"], "sleepy", "{answer}");
    }
    // The word reached the control plane by the proxy, and is told of.
    let metrics = format!("http://{}/metrics", up.address("proxy_private"));
    let metrics = client().get(metrics).send().await.unwrap().text().await.unwrap();
    let told = |line: &str| {
        line.starts_with("penstock_proxy_wakes_asked_total{outcome=\"taken\"}") && !line.ends_with(" 0")
    };
    assert!(metrics.lines().any(told), "{metrics}");
    up.stop();
}

/// A model that may sleep, on a whole Penstock.
async fn deploy(up: &Up, model: &str, more: Value) -> String {
    let url = format!("http://{}/api/v2/deployments/{model}", up.address("controlplane"));
    let mut body = json!({"engine": "sim", "model_path": "x", "replicas": 1});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = client().put(&url).json(&body).send().await.unwrap();
    assert_eq!(made.status(), 201, "{:?}", made.text().await);
    url
}

/// Waits until a deployment's status is so.
async fn until(url: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    loop {
        let shown: Value = client().get(url).send().await.unwrap().json().await.unwrap();
        if is(&shown["status"]) {
            return shown;
        }
        assert!(std::time::Instant::now() < deadline, "not {what}: {:#}", shown["status"]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_may_sleep_is_woken_as_it_was_and_gives_its_gpu_to_whoever_needs_it() {
    let up = Up::start(&["--engines", "1", "--gpus", "2"]);
    let sleepy = json!({
        "autoscaling": {"min": 0, "max": 1, "idle_to_zero_s": 1},
        "warm": {"sleep": {"level": 1}},
        // Its start takes long: an answer in less time can only come from one that was woken.
        "args": ["--sim-load-ms", "3000"],
    });
    let url = deploy(&up, "sleepy", sleepy).await;
    until(&url, "asleep", |status| status["asleep"] == 1).await;
    let endpoint = |up: &Up| up.endpoints().into_iter().find(|e| e["model"] == "sleepy").unwrap();
    let before = endpoint(&up);
    assert_eq!((before["state"].as_str(), before["started"].as_str()), (Some("asleep"), Some("cold")));
    assert!(before["ready_ms"].as_u64().unwrap() >= 3_000, "{before}");

    let chat = json!({"model": "sleepy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    let asked = client().post(format!("{}/v1/chat/completions", up.url()));
    let answer = asked.timeout(Duration::from_secs(120)).json(&chat).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{:?}", answer.text().await);
    let woken = endpoint(&up);
    assert_eq!(
        (woken["pid"].clone(), woken["generation"].clone()),
        (before["pid"].clone(), before["generation"].clone())
    );
    assert_eq!(woken["started"], "woken", "{woken}");
    let described = up.run(&["describe", "endpoint", woken["id"].as_str().unwrap()]);
    let described = String::from_utf8_lossy(&described.stdout).into_owned();
    assert!(described.contains("started: woken") && described.contains("ready_ms: "), "{described}");

    // Both GPUs are had: one by the model of `up`, one by the sleeper, which ends for a model that serves.
    until(&url, "asleep again", |status| status["asleep"] == 1).await;
    let other = deploy(&up, "other", json!({})).await;
    until(&other, "ready", |status| status["ready"] == 1).await;
    until(&url, "gone", |status| status["asleep"] == 0 && status["draining"] == 0).await;
    up.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_for_a_model_reaches_its_node_and_how_far_it_is_is_shown() {
    let up = Up::start(&["--engines", "1", "--gpus", "2"]);
    let model = up.run_json(&["get", "deployments"])["deployments"][0]["model"].as_str().unwrap().to_owned();
    let told = up.run_json(&["prefetch", &model]);
    let node = told["nodes"][0]["node_id"].as_str().unwrap().to_owned();
    assert_eq!(told["nodes"][0]["policy"]["prefetch"], json!([model]));
    // No command is set for the simulator: there is nothing to fetch, and that is said.
    let done = |node: &Value| node["prefetches"][0]["state"] == "done";
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let nodes = up.run_json(&["nodes"]);
        if done(&nodes["nodes"][0]) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{nodes:#}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let unknown = up.run(&["prefetch", "no-such-model", "--node", &node]);
    assert!(!unknown.status.success());
    let removed = up.run_json(&["prefetch", &model, "--remove"]);
    assert_eq!(removed["nodes"][0]["policy"], Value::Null, "{removed:#}");
    up.stop();
}
