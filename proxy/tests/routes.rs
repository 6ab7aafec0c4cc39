//! Names that lead to several deployments: splits, fallbacks, aliases, adapters, with real requests.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use penstock_config::proxy::{Policy, ProxyConfig};
use penstock_proto::v1;
use serde_json::Value;
use support::*;

fn config() -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.routing.hash_key = "the same in every run".into();
    config
}

async fn named(name: &str) -> Engine {
    Engine::answering(json_answer("200 OK", &format!("{{\"engine\":\"{name}\"}}"))).await
}

/// The whole answer, and the engine's name in it.
async fn ask(proxy: &Proxy, model: &str, headers: &str) -> (String, String) {
    let body = chat(false).replace("\"m\"}", &format!("\"{model}\"}}"));
    let answer = proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{headers}"), &body)).await;
    let name = answer.split_once("{\"engine\":\"").map(|(_, name)| name.trim_end_matches("\"}").to_owned());
    (answer, name.unwrap_or_default())
}

fn asked_for(engine: &Engine) -> Vec<String> {
    let model = |seen: Seen| {
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        body["model"].as_str().unwrap().to_owned()
    };
    engine.seen().into_iter().map(model).collect()
}

fn session(n: usize) -> String {
    format!("x-session-affinity: s{n}\r\n")
}

#[tokio::test]
async fn a_split_follows_its_weights_and_a_session_stays_on_its_side() {
    let (old, new) = (named("old").await, named("new").await);
    let tables = vec![table("old", &[old.address]), table("new", &[new.address])];
    let weights = |old, new| fleet(tables.clone(), vec![route("chat", &[("old", old), ("new", new)], &[])]);
    let proxy = Proxy::start_on(config(), &weights(80, 20));
    let mut counts = BTreeMap::<String, usize>::new();
    for _ in 0..400 {
        let (answer, name) = ask(&proxy, "chat", "").await;
        assert!(answer.contains(&format!("x-penstock-model: {name}\r\n")), "{answer}");
        *counts.entry(name).or_default() += 1;
    }
    // 80 expected, four standard deviations to either side.
    assert!((48..112).contains(&counts["new"]), "{counts:?}");
    let by_target = |target| proxy.gateway.metrics.targets.with_label_values(&["chat", target]).get();
    assert_eq!((by_target("old") + by_target("new"), by_target("new")), (400, counts["new"] as u64));
    assert!(asked_for(&old).iter().all(|model| model == "old") && asked_for(&new).iter().all(|m| m == "new"));

    let mut sides = vec![];
    for n in 0..60 {
        let (_, side) = ask(&proxy, "chat", &session(n)).await;
        assert_eq!(ask(&proxy, "chat", &session(n)).await.1, side, "session {n}");
        sides.push(side);
    }
    // Another proxy with the same key agrees; with more weight on it, sessions only move to the new one.
    let other = Proxy::start_on(config(), &weights(80, 20));
    let shifted = Proxy::start_on(config(), &weights(50, 50));
    for (n, side) in sides.iter().enumerate() {
        assert_eq!(ask(&other, "chat", &session(n)).await.1, *side, "session {n}");
        let now = ask(&shifted, "chat", &session(n)).await.1;
        assert!(now == *side || now == "new", "session {n} moved from {side} to {now}");
    }
    proxy.settles().await;
}

#[tokio::test]
async fn a_fallback_answers_while_the_client_has_seen_nothing() {
    let small = named("small").await;
    let busy = Engine::answering(json_answer("503 Service Unavailable", "{\"error\":\"full\"}")).await;
    let dead = nobody().await;
    let tables = vec![
        table("dead", &[dead]),
        table("busy", &[busy.address]),
        table("empty", &[]),
        table("small", &[small.address]),
    ];
    let routes = vec![
        route("dead", &[("dead", 1)], &["small"]),
        route("busy", &[("busy", 1)], &["gone", "small"]),
        route("empty", &[("empty", 1)], &["busy"]),
        route("nothing", &[], &["empty"]),
        route("alone", &[("busy", 1)], &[]),
        route("void", &[("empty", 1)], &[]),
        route("small", &[("small", 1)], &[]),
    ];
    let proxy = Proxy::start_on(config(), &fleet(tables, routes));
    for name in ["dead", "busy", "empty", "nothing"] {
        let (answer, engine) = ask(&proxy, name, "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
        assert_eq!(engine, "small", "{name}");
        assert!(answer.contains("x-penstock-model: small\r\n"), "{name}: {answer}");
        assert!(proxy.gateway.metrics.fallbacks.with_label_values(&[name]).get() >= 1, "{name}");
    }
    assert!(asked_for(&small).iter().all(|model| model == "small"), "each target by its own name");
    let (answer, _) = ask(&proxy, "small", "").await;
    assert!(!answer.contains("x-penstock-model"), "what was asked for has answered: {answer}");
    let (answer, _) = ask(&proxy, "alone", "").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after"), "{answer}");
    assert!(ask(&proxy, "void", "").await.0.starts_with("HTTP/1.1 503"));
    assert!(ask(&proxy, "gone", "").await.0.starts_with("HTTP/1.1 404"));
    proxy.settles().await;
}

#[tokio::test]
async fn nothing_falls_back_once_the_client_has_seen_a_byte() {
    let broken = Engine::start(|_| {
        vec![Step::Send(format!("{SSE_HEAD}{}", chunk(&delta("one"))).into_bytes()), Step::Reset]
    })
    .await;
    let small = named("small").await;
    let tables = vec![table("m", &[broken.address]), table("small", &[small.address])];
    let routes = vec![route("m", &[("m", 1)], &["small"]), route("small", &[("small", 1)], &[])];
    let proxy = Proxy::start_on(config(), &fleet(tables, routes));
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("one") && answer.contains("error"), "{answer}");
    assert!(small.seen().is_empty(), "never sent again");
    assert_eq!(proxy.gateway.metrics.fallbacks.with_label_values(&["m"]).get(), 0);
    proxy.settles().await;
}

#[tokio::test]
async fn an_adapter_is_asked_for_only_where_it_is_and_all_names_are_listed() {
    let (plain, with) = (named("plain").await, named("with").await);
    let mut base = table("base", &[plain.address, with.address]);
    base.endpoints[1].adapters = vec!["sql".into()];
    let adapter = |name: &str| v1::ModelRoute {
        targets: vec![v1::RouteTarget {
            pool: "base".into(),
            served_model: name.into(),
            weight: 1,
            adapter: name.into(),
        }],
        parent: "base".into(),
        ..route(name, &[], &[])
    };
    let routes = vec![
        route("base", &[("base", 1)], &[]),
        route("alias", &[("base", 1)], &[]),
        adapter("sql"),
        adapter("unloaded"),
    ];
    let proxy = Proxy::start_on(config(), &fleet(vec![base], routes));
    for _ in 0..10 {
        assert_eq!(ask(&proxy, "sql", "").await.1, "with");
    }
    assert!(asked_for(&with).iter().all(|model| model == "sql") && plain.seen().is_empty());
    assert!(ask(&proxy, "unloaded", "").await.0.starts_with("HTTP/1.1 503"), "known, and nobody has it now");

    let get =
        |path: &str| format!("GET {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n").into_bytes();
    let listed = async |path: &str| -> Value {
        let answer = proxy.exchange(&get(path)).await;
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    };
    let list = listed("/v1/models").await;
    let cards: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| {
            let text = |key: &str| card[key].as_str().unwrap_or_default();
            (text("id"), text("root"), text("parent"))
        })
        .collect();
    let expected =
        [("alias", "base", ""), ("base", "", ""), ("sql", "base", "base"), ("unloaded", "base", "base")];
    assert_eq!(cards, expected);
    assert_eq!(listed("/v1/models/sql").await["parent"], "base");
}

/// Drill: session affinity with two gateways, one of them killed, and an endpoint lost.
#[tokio::test]
async fn sessions_keep_their_endpoint_through_any_gateway_and_few_move_when_an_endpoint_is_lost() {
    const SESSIONS: usize = 80;
    let mut engines = vec![];
    for name in ["0", "1", "2", "3", "4"] {
        engines.push(named(name).await);
    }
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let mut config = config();
    config.routing.policy = Policy::SessionAffinity;
    let whole = fleet(vec![table("m", &addresses)], vec![route("m", &[("m", 1)], &[])]);
    let gateways = [Proxy::start_on(config.clone(), &whole), Proxy::start_on(config, &whole)];
    let mut homes = vec![];
    for n in 0..SESSIONS {
        let (_, home) = ask(&gateways[n % 2], "m", &session(n)).await;
        homes.push(home);
    }
    // The first gateway is gone: its sessions come in through the other, and are where they were.
    let [killed, left] = gateways;
    drop(killed);
    for (n, home) in homes.iter().enumerate() {
        assert_eq!(ask(&left, "m", &session(n)).await.1, *home, "session {n}");
    }
    // An endpoint is gone, too: its sessions move, and no others.
    let mut fewer = table("m", &addresses);
    let lost = fewer.endpoints.remove(2);
    assert_eq!(lost.id, "e2");
    left.gateway.table.apply(&fleet(vec![fewer], vec![route("m", &[("m", 1)], &[])]));
    let mut moved = 0;
    for (n, home) in homes.iter().enumerate() {
        let now = ask(&left, "m", &session(n)).await.1;
        assert_eq!(now != *home, home == "2", "session {n} was on {home} and is on {now}");
        moved += usize::from(now != *home);
    }
    assert_eq!(moved, homes.iter().filter(|home| *home == "2").count());
    assert!(moved <= SESSIONS * 2 / 5, "{moved} of {SESSIONS} moved, a fifth expected");
}
