//! What happens while every engine of a model is at its limit, and how patient the gateway is with a model.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_config::proxy::{Patience, ProxyConfig};
use support::*;

/// A gateway that gives an engine one request at a time.
fn one_at_a_time() -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.queue.engine_inflight = 1;
    config
}

fn depth(proxy: &Proxy) -> usize {
    proxy.gateway.table.load().pools["m"].queue.len()
}

/// An engine whose first answer lasts until the gateway leaves, and which answers all others at once with their number.
async fn held_by_the_first() -> Engine {
    Engine::start(|n| match n {
        0 => {
            vec![Step::Send(format!("{SSE_HEAD}{}", chunk(&delta("first"))).into_bytes()), Step::UntilClosed]
        }
        n => vec![Step::Send(sse(&[&format!("number {n}")]).into_bytes())],
    })
    .await
}

async fn first_in(proxy: &Proxy) -> Client {
    let mut first = Client::connect(proxy.address).await;
    first.send(&post(CHAT, &chat(true))).await;
    first.read_until("first").await;
    first
}

async fn queued(proxy: &Proxy, place: usize) -> Client {
    let mut client = Client::connect(proxy.address).await;
    client.send(&post(CHAT, &chat(true))).await;
    eventually("it waits", || depth(proxy) == place).await;
    client
}

#[tokio::test]
async fn requests_wait_in_order_of_arrival_and_go_as_places_fall_free() {
    let engine = held_by_the_first().await;
    let proxy = Proxy::start(one_at_a_time(), &[engine.address]);
    let first = first_in(&proxy).await;
    let mut second = queued(&proxy, 1).await;
    let mut third = queued(&proxy, 2).await;
    assert_eq!(engine.seen().len(), 1, "nothing reaches a full engine");
    drop(first);
    assert!(third.read_to_end().await.contains("number 2"));
    assert!(second.read_to_end().await.contains("number 1"));
    proxy.settles().await;
    assert_eq!(proxy.gateway.metrics.queue_outcomes.with_label_values(&["placed"]).get(), 2);
    assert_eq!(proxy.gateway.metrics.queue_wait.get_sample_count(), 2);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_frees_its_place_at_once() {
    let engine = held_by_the_first().await;
    let mut config = one_at_a_time();
    config.queue.max_waiting = 1;
    let proxy = Proxy::start(config, &[engine.address]);
    let first = first_in(&proxy).await;
    let second = queued(&proxy, 1).await;
    drop(second);
    eventually("its place is free", || depth(&proxy) == 0).await;
    let mut third = queued(&proxy, 1).await;
    drop(first);
    assert!(third.read_to_end().await.contains("number 1"), "the engine never saw the one that left");
    proxy.settles().await;
}

#[tokio::test]
async fn a_wait_ends_at_its_deadline_with_a_time_to_come_back() {
    let engine = held_by_the_first().await;
    let mut config = one_at_a_time();
    config.queue.deadline_ms = 100;
    let proxy = Proxy::start(config, &[engine.address]);
    let _first = first_in(&proxy).await;
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: 1\r\n"), "{answer}");
    assert!(answer.contains(r#""code":"engine_overloaded""#), "{answer}");
    assert_eq!(proxy.gateway.metrics.queue_outcomes.with_label_values(&["deadline"]).get(), 1);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let engine = held_by_the_first().await;
    let mut config = one_at_a_time();
    config.queue.max_waiting = 1;
    let proxy = Proxy::start(config, &[engine.address]);
    let _first = first_in(&proxy).await;
    let _second = queued(&proxy, 1).await;
    let asked = Instant::now();
    let answer = proxy.exchange(&post(CHAT, &chat(false))).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(asked.elapsed() < Duration::from_secs(5), "not at the deadline");
    assert_eq!(proxy.gateway.metrics.queue_outcomes.with_label_values(&["full"]).get(), 1);
    assert_eq!(depth(&proxy), 1, "the one that waits is left alone");
}

#[tokio::test]
async fn a_busy_only_engine_is_waited_for_rather_than_given_up() {
    let engine = Engine::start(|n| {
        let busy = json_answer("503 Service Unavailable", r#"{"error":{"message":"busy","code":503}}"#);
        vec![Step::Send(if n == 0 { busy } else { sse(&["now"]) }.into_bytes())]
    })
    .await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("now"), "{answer}");
    assert_eq!(engine.seen().len(), 2);
    assert_eq!(ejections(&proxy, "consecutive_failures"), 0, "full is not sick");
}

#[tokio::test]
async fn an_engine_that_is_always_busy_is_asked_twice_a_step_and_not_once_a_request() {
    let busy = json_answer("503 Service Unavailable", r#"{"error":{"message":"busy","code":503}}"#);
    let engine = Engine::answering(busy).await;
    let mut config = ProxyConfig::default();
    config.queue.deadline_ms = 1_000;
    config.queue.busy_step_ms = 400;
    let proxy = Proxy::start(config, &[engine.address]);
    let body = post(CHAT, &chat(false));
    // The first is refused in a row, which teaches the limit.
    let taught = proxy.exchange(&body).await;
    assert!(taught.starts_with("HTTP/1.1 503 "), "{taught}");
    let (before, began) = (engine.seen().len(), Instant::now());
    let answers = futures_util::future::join_all((0..20).map(|_| proxy.exchange(&body))).await;
    for answer in &answers {
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    let steps = usize::try_from(began.elapsed().as_millis() / 400).unwrap() + 1;
    let asked = engine.seen().len() - before;
    assert!(asked <= 2 * (steps + 1), "{asked} in {steps} steps");
    proxy.settles().await;
}

#[tokio::test]
async fn a_stopping_gateway_does_not_leave_its_queue_hanging() {
    let engine = held_by_the_first().await;
    let proxy = Proxy::start(one_at_a_time(), &[engine.address]);
    let _first = first_in(&proxy).await;
    let mut second = queued(&proxy, 1).await;
    proxy.gateway.lifecycle.cut().cancel();
    let answer = second.read_to_end().await;
    assert!(answer.contains("gateway_draining"), "{answer}");
}

#[tokio::test]
async fn a_model_has_the_patience_it_was_given() {
    let engine = Engine::start(|_| vec![Step::UntilClosed]).await;
    let mut config = ProxyConfig::default();
    config.upstream.by_model.insert("m".into(), Patience { first_byte_ms: 150, idle_ms: 0 });
    let proxy = Proxy::start(config, &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 504 ") && answer.contains("engine_timeout"), "{answer}");
    eventually("the engine is let go", || engine.closed_at().len() == 1).await;
}
