//! A whole Penstock with a model that may sleep: it goes to zero, and the first request brings it back and is answered.

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
