//! Engines come and go for years while a proxy runs: what it held for each goes with it.

#![allow(clippy::unwrap_used)] // test code

mod support;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Weak},
};

use penstock_config::proxy::{Policy, ProxyConfig};
use penstock_proxy::endpoints::Endpoint;
use support::{CHAT, Client, Engine, Proxy, Step, chat, eventually, json_answer, post_with};

/// Tables, one after the other, and endpoints in each, none of which comes twice.
const TABLES: u8 = 50;
const ENDPOINTS: u8 = 20;
/// Descriptors that a runtime, a timer or a test may open once.
const SLACK: usize = 8;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One engine is a thousand: every address of the loopback network leads to it, and each is an endpoint of its own.
fn addresses(table: u8, port: u16) -> Vec<SocketAddr> {
    let address = |n| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 1, table, n)), port);
    (1..=ENDPOINTS).map(address).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_endpoints_that_came_and_went_leave_nothing() {
    let answer = json_answer("200 OK", r#"{"choices":[{"finish_reason":"stop"}]}"#);
    let engine =
        Engine::replying_at("0.0.0.0:0", move |_, _| vec![Step::Send(answer.clone().into_bytes())]).await;
    let mut config = ProxyConfig::default();
    config.routing.policy = Policy::RoundRobin;
    config.upstream.keepalive_ms = 300;
    let proxy = Proxy::start(config, &addresses(0, engine.address.port()));
    let mut client = Client::connect(proxy.address).await;
    let before = descriptors();

    let mut all: Vec<Weak<Endpoint>> = Vec::new();
    for table in 0..TABLES {
        proxy.route_to(&addresses(table, engine.address.port()));
        all.extend(proxy.gateway.table.load().pools["m"].endpoints.iter().map(Arc::downgrade));
        // In turn: each endpoint is asked, and its connection is kept.
        for _ in 0..ENDPOINTS {
            client.send(&post_with(CHAT, "", &chat(false))).await;
            assert!(client.read_answer().await.starts_with("HTTP/1.1 200"));
        }
    }
    assert_eq!(all.len(), usize::from(TABLES) * usize::from(ENDPOINTS));
    assert!(
        engine.connections.load(std::sync::atomic::Ordering::SeqCst) >= all.len(),
        "each had a connection"
    );

    proxy.route_to(&[]);
    proxy.settles().await;
    eventually("every endpoint is forgotten", || all.iter().all(|endpoint| endpoint.strong_count() == 0))
        .await;
    // At both ends: the engine is in this process as well.
    eventually("every connection is closed", || {
        proxy.gateway.sweep_connections(); // as `health::watch` does
        descriptors() <= before + SLACK
    })
    .await;
}
