//! Answers on their way to the client: streams, whole answers, retries, and what breaks between.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_config::proxy::ProxyConfig;
use support::*;

#[tokio::test]
async fn a_stream_arrives_as_the_engine_wrote_it() {
    let engine = Engine::answering(sse(&["one", "two"])).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    for part in [
        &delta("one"),
        &delta("two"),
        "data: [DONE]\n\n",
        "text/event-stream; charset=utf-8",
        "x-request-id: ",
    ] {
        assert!(answer.contains(part), "{part:?} missing in {answer}");
    }
    assert!(!answer.contains("uvicorn"), "the engine's server header stays inside: {answer}");
    assert!(answer.ends_with("0\r\n\r\n"), "{answer}");
    proxy.settles().await;
    assert_eq!(proxy.gateway.metrics.events.get(), 3);
}

#[tokio::test]
async fn the_engine_gets_the_clients_body_byte_for_byte_and_none_of_its_secrets() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let body = "{ \"unknown\" : [1,  2.50] ,\n\t\"messages\":[], \"model\"\n:\"m\" }";
    let headers = "connection: close, x-hop\r\nx-hop: 1\r\nauthorization: Bearer s3cret\r\nx-vllm-priority: 0\r\nx-data-parallel-rank: 1\r\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    proxy.exchange(&post_with("/v1/chat/completions?beta=1", headers, body)).await;
    let seen = engine.seen().remove(0);
    assert_eq!(seen.body, body.as_bytes());
    assert!(seen.head.starts_with("post /v1/chat/completions?beta=1 http/1.1"), "{}", seen.head);
    for secret in ["s3cret", "x-vllm-priority", "x-data-parallel-rank", "x-hop"] {
        assert!(!seen.head.contains(secret), "{secret} in {}", seen.head);
    }
    assert!(
        seen.head.contains("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-")
            && !seen.head.contains("-00f067aa0ba902b7-")
    );
    assert!(seen.head.contains("x-request-id: "));
}

#[tokio::test]
async fn engines_that_all_failed_a_request_are_asked_once_more_a_little_later() {
    let broken = |n: usize| match n {
        0 => vec![Step::Send(json_answer("500 Internal Server Error", "{}").into())],
        _ => vec![Step::Send(sse(&["hello"]).into())],
    };
    let (a, b) = (Engine::start(broken).await, Engine::start(broken).await);
    let proxy = Proxy::start(ProxyConfig::default(), &[a.address, b.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("[DONE]"), "{answer}");
    assert_eq!(a.served() + b.served(), 3, "each once, and one of them again");
}

#[tokio::test]
async fn a_dead_engine_costs_nobody_a_request() {
    let alive = Engine::answering(sse(&["hello"])).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[nobody().await, alive.address]);
    for _ in 0..20 {
        let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
        assert!(answer.contains("[DONE]"), "{answer}");
    }
    assert_eq!(ejections(&proxy, "consecutive_failures"), 1, "after three failures it is left alone");
    proxy.settles().await;
}

#[tokio::test]
async fn with_every_engine_dead_the_client_gets_a_typed_503() {
    let proxy = Proxy::start(ProxyConfig::default(), &[nobody().await, nobody().await]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("\"code\":\"engine_unreachable\""), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: 1"), "{answer}");
    proxy.settles().await;
}

#[tokio::test]
async fn a_busy_engine_is_passed_over_and_not_blamed() {
    let busy = Engine::answering(json_answer(
        "503 Service Unavailable",
        r#"{"error":{"message":"busy","code":503}}"#,
    ))
    .await;
    let free = Engine::answering(sse(&["ok"])).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[busy.address, free.address]);
    for _ in 0..10 {
        let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
        assert!(answer.contains("[DONE]"), "{answer}");
    }
    assert_eq!(ejections(&proxy, "consecutive_failures"), 0);
}

#[tokio::test]
async fn an_engine_lost_before_its_first_event_is_replaced_unseen() {
    let breaks = |_| vec![Step::Send(SSE_HEAD.into()), Step::Reset];
    let (breaking, good) = (Engine::start(breaks).await, Engine::answering(sse(&["whole"])).await);
    let proxy = Proxy::start(ProxyConfig::default(), &[breaking.address, good.address]);
    for _ in 0..6 {
        let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        assert!(answer.contains("[DONE]") && !answer.contains("error"), "{answer}");
    }
}

#[tokio::test]
async fn a_unary_answer_cut_short_is_asked_for_again() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"half\":";
    let breaking = Engine::start(move |_| vec![Step::Send(cut.into()), Step::Close]).await;
    let good = Engine::answering(json_answer("200 OK", r#"{"whole":true}"#)).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[breaking.address, good.address]);
    for _ in 0..6 {
        let answer = proxy.exchange(&post(CHAT, &chat(false))).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"whole":true}"#), "{answer}");
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event_and_no_half_event() {
    let script = |_| {
        let half = "data: {\"half an ev";
        vec![Step::Send([SSE_HEAD, &chunk(&delta("one")), &chunk(half)].concat().into()), Step::Reset]
    };
    let engine = Engine::start(script).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains(&delta("one")), "{answer}");
    assert!(answer.contains("\"code\":\"stream_interrupted\""), "{answer}");
    assert!(!answer.contains("half an ev") && !answer.contains("[DONE]"), "{answer}");
    proxy.settles().await;
}

#[tokio::test]
async fn after_an_error_event_the_connection_takes_the_next_request() {
    let breaks_once = |n| match n {
        0 => vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::Reset],
        _ => vec![Step::Send(json_answer("200 OK", r#"{"next":true}"#).into())],
    };
    let engine = Engine::start(breaks_once).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    client.send(&post_with(CHAT, "", &chat(true))).await;
    let broken = client.read_until("0\r\n\r\n").await;
    assert!(
        broken.contains("stream_interrupted") && !broken.to_lowercase().contains("connection: close"),
        "{broken}"
    );
    client.received.clear();
    client.send(&post_with(CHAT, "", &chat(false))).await;
    assert!(client.read_answer().await.ends_with(r#"{"next":true}"#));
}

#[tokio::test]
async fn a_stream_that_stops_in_good_order_without_its_last_event_is_broken_too() {
    let engine = Engine::answering(format!("{SSE_HEAD}{}0\r\n\r\n", chunk(&delta("one")))).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("\"code\":\"stream_interrupted\""), "{answer}");
}

#[tokio::test]
async fn a_silent_engine_is_given_up_on_in_each_phase() {
    let mut config = ProxyConfig::default();
    config.upstream.first_byte_ms = 80;
    config.upstream.idle_ms = 80;
    let silent = Engine::start(|_| vec![Step::UntilClosed]).await;
    let proxy = Proxy::start(config.clone(), &[silent.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("engine_timeout"), "{answer}");
    let stalls =
        move |_| vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::UntilClosed];
    let stalling = Engine::start(stalls).await;
    let proxy = Proxy::start(config, &[stalling.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains(&delta("one")) && answer.contains("engine_stalled"), "{answer}");
    eventually("the engine's connection closes", || stalling.closed_at().len() == 1).await;
}

/// P7: in each phase.
#[tokio::test]
async fn a_client_that_leaves_closes_its_engines_connection_at_once() {
    let waiting = Engine::start(|_| vec![Step::UntilClosed]).await;
    let head_only = Engine::start(|_| vec![Step::Send(SSE_HEAD.into()), Step::UntilClosed]).await;
    let half_body = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let unary = Engine::start(move |_| vec![Step::Send(half_body.into()), Step::UntilClosed]).await;
    let streaming = Engine::start(|_| {
        vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::UntilClosed]
    })
    .await;
    for (engine, until) in [(&waiting, None), (&head_only, None), (&unary, None), (&streaming, Some("one"))] {
        let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
        let mut client = Client::connect(proxy.address).await;
        client.send(&post(CHAT, &chat(true))).await;
        match until {
            Some(text) => drop(client.read_until(text).await),
            None => eventually("the engine has the request", || engine.seen().len() == 1).await,
        }
        let left = Instant::now();
        drop(client);
        eventually("the engine sees the end", || engine.closed_at().len() == 1).await;
        let took = engine.closed_at()[0].saturating_duration_since(left);
        assert!(took < Duration::from_millis(50), "{took:?}");
        proxy.settles().await;
        assert_eq!(proxy.gateway.metrics.client_disconnects.get(), 1);
    }
}

#[tokio::test]
async fn a_connection_that_the_engine_closed_meanwhile_costs_nothing() {
    // The engine answers once on a connection, then closes it as soon as the next request has come.
    let engine = Engine::replying(|_, seen| match seen.before {
        0 => vec![Step::Send(json_answer("200 OK", "{}").into_bytes())],
        _ => vec![Step::Close],
    })
    .await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    // A connection that was just put aside may be out of reach for a moment: then there is a new one, and nothing is closed.
    let mut asked = 0;
    while engine.seen().len() == asked {
        assert!(asked < 100, "no connection is ever used again");
        let answer = proxy.exchange(&post(CHAT, &chat(false))).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        asked += 1;
    }
    assert_eq!(engine.seen().len(), asked + 1, "the last request was sent again on a new connection");
    assert_eq!(ejections(&proxy, "consecutive_failures"), 0);
}

#[tokio::test]
async fn drain_lets_streams_finish_and_refuses_new_connections() {
    let script = |_| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        vec![Step::Send(head.into()), Step::Pause(Duration::from_millis(300)), Step::Send(rest.into())]
    };
    let engine = Engine::start(script).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    client.send(&post(CHAT, &chat(true))).await;
    client.read_until("one").await;
    let (config, hurry) = Default::default();
    let drain = proxy.gateway.lifecycle.drain(&config, &hurry);
    let (cut, answer) = tokio::join!(drain, client.read_to_end());
    assert_eq!(cut, 0);
    assert!(answer.contains("two") && answer.contains("[DONE]"), "{answer}");
    assert!(tokio::net::TcpStream::connect(proxy.address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn at_the_drains_deadline_a_stream_ends_with_an_error_event() {
    let endless = |_| vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::UntilClosed];
    let engine = Engine::start(endless).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    client.send(&post(CHAT, &chat(true))).await;
    client.read_until("one").await;
    let config = penstock_config::proxy::DrainConfig { unready_ms: 0, deadline_ms: 50 };
    assert_eq!(proxy.gateway.lifecycle.drain(&config, &Default::default()).await, 1);
    let answer = client.read_to_end().await;
    assert!(answer.contains("\"code\":\"gateway_draining\"") && answer.ends_with("0\r\n\r\n"), "{answer}");
}
