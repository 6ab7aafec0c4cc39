//! One `penstock up`, used the way a person would: chat, look around, scale, drain, lose a child, stop.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client, eventually};

const SOON: Duration = Duration::from_secs(30);

/// Streams a chat and gives back its text; the stream must end with `[DONE]`.
async fn chat(url: &str, model: &str) -> Result<String, String> {
    let body = json!({
        "model": model,
        "stream": true,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "Tell me about valves."}]
    });
    let request = client().post(format!("{url}/v1/chat/completions")).json(&body);
    let mut response = request.send().await.map_err(|e| e.to_string())?;
    let status = response.status();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| e.to_string())? {
        bytes.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(bytes).map_err(|e| e.to_string())?;
    if !status.is_success() {
        return Err(format!("{status}: {text}"));
    }
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let Some(("[DONE]", chunks)) = events.split_last().map(|(last, rest)| (*last, rest)) else {
        return Err(format!("no [DONE] at the end of {text}"));
    };
    chunks
        .iter()
        .map(|chunk| {
            let chunk: Value = serde_json::from_str(chunk).map_err(|e| e.to_string())?;
            Ok(chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_string())
        })
        .collect()
}

#[tokio::test]
async fn serves_a_chat_scales_drains_restarts_a_child_and_stops_cleanly() {
    let up = Up::start(&["--engines", "2"]);
    for key in ["public", "proxy_private", "controlplane", "grpc", "agent_private"] {
        assert!(up.address(key).starts_with("127.0.0.1:"), "{}", up.json);
    }
    assert_eq!(up.json["models"], json!(["sim-model"]));
    assert_eq!(up.json["engines"].as_array().unwrap().len(), 2);
    for engine in up.json["engines"].as_array().unwrap() {
        assert!(engine["pid"].as_u64().unwrap() > 0 && engine["address"].as_str().unwrap().contains(':'));
    }

    assert!(!chat(&up.url(), "sim-model").await.unwrap().is_empty());
    let models = client().get(format!("{}/v1/models", up.url())).send().await.unwrap();
    let models: Value = models.json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "sim-model");

    look_around(&up);
    scale_and_drain(&up);
    restart_a_child(&up).await;
    up.stop();
}

fn look_around(up: &Up) {
    let status = up.run_json(&["status"]);
    assert_eq!(status["deployments"][0]["status"]["ready"], 2, "{status}");
    assert_eq!(up.run_json(&["models"])["models"][0]["ready"], 2);
    assert_eq!(up.run_json(&["nodes"])["nodes"][0]["engines"], 2);
    assert_eq!(up.run_json(&["proxies"])["proxies"].as_array().unwrap().len(), 1);
    assert_eq!(up.run_json(&["version"])["controlplane"], env!("CARGO_PKG_VERSION"));
    assert_eq!(up.run(&["scale", "no-such-model", "--replicas", "1"]).status.code(), Some(4));
    assert_eq!(up.run(&["drain", "no-such-endpoint"]).status.code(), Some(4));
}

fn scale_and_drain(up: &Up) {
    let scaled = up.run_json(&["scale", "sim-model", "--replicas", "3", "--wait", "--timeout-s", "60"]);
    assert_eq!(scaled["status"]["ready"], 3, "{scaled}");

    let id = up.endpoints()[0]["id"].as_str().unwrap().to_string();
    let state = |id: &str| {
        let endpoints = up.endpoints();
        endpoints.iter().find(|e| e["id"] == id).unwrap()["state"].as_str().unwrap().to_string()
    };
    up.run_json(&["drain", &id]);
    eventually("the endpoint drains", SOON, || (state(&id) == "draining").then_some(()));
    up.run_json(&["undrain", &id]);
    eventually("the endpoint is back", SOON, || (state(&id) == "ready").then_some(()));

    up.run_json(&["scale", "sim-model", "--replicas", "1"]);
    eventually("one engine is left", SOON, || (up.endpoints().len() == 1).then_some(()));
}

async fn restart_a_child(up: &Up) {
    for name in ["proxy", "controlplane", "agent"] {
        let before = up.pid(name);
        kill(support::pid(before), Signal::SIGKILL).unwrap();
        eventually(&format!("a new {name}"), SOON, || (up.pid(name) != before).then_some(()));
        let report = format!("the {name} (pid {before}) ended: killed by SIGKILL");
        eventually("the report", SOON, || up.stderr().contains(&report).then_some(()));
    }
    // At the same address as before, with the control plane's memory and an engine.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match chat(&up.url(), "sim-model").await {
            Ok(text) => break assert!(!text.is_empty()),
            Err(why) => assert!(tokio::time::Instant::now() < deadline, "no chat after the restarts: {why}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    eventually("the control plane remembers", SOON, || {
        let output = up.run(&["models", "--output", "json"]);
        let models: Value = serde_json::from_slice(&output.stdout).ok()?;
        (models["models"][0]["ready"] == 1).then_some(())
    });
}
