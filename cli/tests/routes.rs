//! A whole Penstock with two deployments: routes made with the command line, an adapter, and engines' loads at the proxy.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Up, client};

/// Asks again until `holds`; gives the last answer.
async fn until(what: &str, mut ask: impl AsyncFnMut() -> Option<Value>) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn get(url: &str) -> Value {
    client().get(url).send().await.unwrap().json().await.unwrap()
}

/// Status, the deployment that answered in place of the one asked for, and the body.
async fn chat(up: &Up, model: &str) -> (u16, String, Value) {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    let answer = client().post(format!("{}/v1/chat/completions", up.url())).json(&body).send().await.unwrap();
    let by = answer.headers().get("x-penstock-model").map(|name| name.to_str().unwrap().to_owned());
    (answer.status().as_u16(), by.unwrap_or_default(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_adapters_and_loads_through_the_whole_system() {
    let up = Up::start(&["--engines", "1", "--gpus", "3"]);
    let lora = "--lora=sql=/loras/sql";
    let tuned = up.run_json(&["deploy", "tuned", "--engine", "sim", "--model-path", "x", lora, "--wait"]);
    assert_eq!(tuned["lora"], json!([{"name": "sql", "path": "/loras/sql"}]));

    let refused = up.run(&["route", "set", "chat", "--target", "nobody"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("neither a deployment nor an adapter"), "{said}");
    let set =
        ["route", "set", "chat", "--target", "sim-model=50", "--target", "tuned=50", "--fallback", "sql"];
    assert_eq!(up.run_json(&set)["targets"][1], json!({"model": "tuned", "weight": 50}));
    let table = String::from_utf8(up.run(&["routes"]).stdout).unwrap();
    assert!(table.contains("sim-model=50, tuned=50"), "{table}");

    // The adapter is a name like any other, answered by the engine that has it.
    let (_, by, answer) = {
        until("the adapter", async || (chat(&up, "sql").await.0 == 200).then_some(Value::Null)).await;
        chat(&up, "sql").await
    };
    assert_eq!((by.as_str(), answer["model"].as_str()), ("tuned", Some("sql")), "{answer}");
    let models = get(&format!("{}/v1/models", up.url())).await;
    let card = |name: &str| {
        let cards = models["data"].as_array().unwrap();
        cards.iter().find(|card| card["id"] == name).unwrap_or_else(|| panic!("{name} in {models}")).clone()
    };
    assert_eq!((&card("sql")["parent"], &card("chat")["root"]), (&json!("tuned"), &json!("sim-model")));

    let mut by = std::collections::BTreeSet::new();
    until("both sides of the split", async || {
        let (status, name, answer) = chat(&up, "chat").await;
        assert_eq!((status, answer["model"].as_str()), (200, Some(name.as_str())), "{answer}");
        by.insert(name);
        (by.len() == 2).then_some(Value::Null)
    })
    .await;

    // Every engine's load is known at the proxy, and not old.
    let debug = format!("http://{}/debug/endpoints", up.address("proxy_private"));
    until("reports of load", async || {
        let models = get(&debug).await["models"].clone();
        let endpoint = |model: &str| models[model][0].clone();
        let fresh = |e: Value| e["reported"]["age_ms"].as_u64().is_some_and(|age| age < 10_000);
        assert_eq!(endpoint("sql")["adapters"], json!(["sql"]), "{models}");
        (fresh(endpoint("sim-model")) && fresh(endpoint("tuned"))).then_some(models)
    })
    .await;

    assert_eq!(up.run_json(&["route", "delete", "chat"])["name"], "chat");
    until("the route to be gone", async || (chat(&up, "chat").await.0 == 404).then_some(Value::Null)).await;
    up.stop();
}
