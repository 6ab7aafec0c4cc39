//! Every way in which an engine becomes ready, measured on one system: from nothing, with its model fetched for it, with its
//! model there, restored, woken, taken over. `WRITE_FIGURES=1` puts the table into docs/warm-starts.md.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client};

/// A start, the fetch of a model, and a restore, as the simulator and the two commands pretend them.
const LOAD_MS: u64 = 3_000;
const FETCH_MS: u64 = 2_000;
const RESTORE_MS: u64 = 500;
const LONGEST: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_way_to_be_ready_takes_its_time_and_the_warm_ones_take_less() {
    let penstock = env!("CARGO_BIN_EXE_penstock");
    let restored = RESTORE_MS.to_string();
    let hook = json!([
        penstock,
        "engine-sim",
        "serve",
        "{model_path}",
        "--host",
        "{host}",
        "--port",
        "{port}",
        "--served-model-name",
        "{model}",
        "--sim-load-ms",
        restored
    ]);
    let fetch = json!(["sh", "-c", format!("sleep {}", FETCH_MS / 1_000), "fetch", "{model_path}"]);
    let (hook, fetch) = (hook.to_string(), fetch.to_string());
    let settings = [
        ("PENSTOCK_AGENT__ENGINES__SIM__RESTORE__COMMAND", hook.as_str()),
        ("PENSTOCK_AGENT__ENGINES__SIM__PREFETCH__COMMAND", fetch.as_str()),
    ];
    let up = Up::start_with_env(&["--engines", "1", "--gpus", "8"], &settings);
    let mut ways = Vec::new();

    let cold = ready(&up, "cold", json!({"warm": {"prefetch": "off"}})).await;
    note(&mut ways, &cold, "from nothing", "cold", LOAD_MS);
    let fetched = ready(&up, "fetched", json!({"model_path": "org/model"})).await;
    note(&mut ways, &fetched, "its model fetched for this start", "prefetched", LOAD_MS + FETCH_MS);
    let there = ready(&up, "there", json!({"model_path": "org/model"})).await;
    note(&mut ways, &there, "its model fetched before", "prefetched", LOAD_MS);
    assert!(took(&there) < took(&fetched), "it was fetched again: {there:#}");
    let restore = json!({"warm": {"restore": {"storage": "s3://checkpoints/model"}}});
    let restored = ready(&up, "restored", restore).await;
    note(&mut ways, &restored, "restored by the hook", "restored", RESTORE_MS);

    let sleepy = json!({
        "autoscaling": {"min": 0, "max": 1, "idle_to_zero_s": 1},
        "warm": {"sleep": {"level": 1}, "prefetch": "off"},
    });
    deploy(&up, "sleepy", sleepy).await;
    endpoint(&up, "sleepy", |e| e["state"] == "asleep").await;
    let chat = json!({"model": "sleepy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1});
    let asked = Instant::now();
    let answer = client().post(format!("{}/v1/chat/completions", up.url())).timeout(LONGEST).json(&chat);
    assert_eq!(answer.send().await.unwrap().status(), 200);
    let answered_ms = asked.elapsed().as_millis();
    let woken = endpoint(&up, "sleepy", |e| e["started"] == "woken").await;
    note(&mut ways, &woken, "woken by a request", "woken", 0);

    kill(support::pid(up.pid("agent")), Signal::SIGKILL).unwrap();
    let adopted = endpoint(&up, "cold", |e| e["started"] == "adopted" && e["state"] == "ready").await;
    note(&mut ways, &adopted, "taken over by the next agent", "adopted", 0);
    assert_eq!(adopted["pid"], cold["pid"]);
    for warm in [&restored, &woken, &adopted] {
        assert!(took(warm) < took(&cold), "{warm:#}");
    }

    let mut table = String::from("| How | `started` | Time to ready |\n|---|---|---|\n");
    for (how, way, ms) in &ways {
        table += &format!("| {how} | {way} | {}.{:02} s |\n", ms / 1_000, ms % 1_000 / 10);
    }
    table += &format!("\nThe request that woke it was answered after {answered_ms} ms.\n");
    println!("{table}");
    if std::env::var_os("WRITE_FIGURES").is_some() {
        write(&table);
    }
    up.stop();
}

fn took(endpoint: &Value) -> u64 {
    endpoint["ready_ms"].as_u64().unwrap()
}

fn note(ways: &mut Vec<(String, String, u64)>, endpoint: &Value, how: &str, way: &str, least: u64) {
    assert_eq!(endpoint["started"], way, "{endpoint:#}");
    assert!(took(endpoint) >= least, "{how}: {endpoint:#}");
    ways.push((how.into(), way.into(), took(endpoint)));
}

async fn deploy(up: &Up, model: &str, more: Value) {
    let url = format!("http://{}/api/v2/deployments/{model}", up.address("controlplane"));
    let load = LOAD_MS.to_string();
    let mut body =
        json!({"engine": "sim", "model_path": model, "replicas": 1, "args": ["--sim-load-ms", load]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = client().put(&url).json(&body).send().await.unwrap();
    assert_eq!(made.status(), 201, "{:?}", made.text().await);
}

async fn ready(up: &Up, model: &str, more: Value) -> Value {
    deploy(up, model, more).await;
    endpoint(up, model, |e| e["state"] == "ready" && e["started"] != "").await
}

/// The model's endpoint, once it is so.
async fn endpoint(up: &Up, model: &str, is: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + LONGEST;
    loop {
        let url = format!("http://{}/api/v2/endpoints", up.address("controlplane"));
        let shown: Value = client().get(&url).send().await.unwrap().json().await.unwrap();
        let found = shown["endpoints"].as_array().unwrap().iter().find(|e| e["model"] == model).cloned();
        if let Some(endpoint) = found.clone().filter(&is) {
            return endpoint;
        }
        assert!(Instant::now() < deadline, "{model} is {found:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Puts the table between its marks in the docs.
fn write(table: &str) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/warm-starts.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let (before, rest) = text.split_once("<!-- figures -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- /figures -->\n").unwrap();
    std::fs::write(page, format!("{before}<!-- figures -->\n{table}<!-- /figures -->\n{after}")).unwrap();
}
