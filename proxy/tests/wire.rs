//! HTTP/1.1 as engines may speak it, and as they must not: what clients get of it, and what becomes of the connection.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use penstock_config::proxy::ProxyConfig;
use support::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

const BODY: &str = r#"{"fine":true}"#;

/// A gateway that asks an engine once.
fn one_attempt() -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.upstream.attempts = 1;
    config
}

fn failures(proxy: &Proxy, label: &str) -> u64 {
    proxy.gateway.metrics.attempt_failures.with_label_values(&[label]).get()
}

/// Every way to frame `BODY`; whether the connection can be used again.
fn framings() -> Vec<(String, bool)> {
    let (ok, json) = ("HTTP/1.1 200 OK\r\n", "content-type: application/json\r\n");
    let length = BODY.len();
    let (front, back) = BODY.split_at(5);
    vec![
        (json_answer("200 OK", BODY), true),
        (format!("{ok}{json}Content-Length: {length}, {length}\r\n\r\n{BODY}"), true),
        (format!("{ok}{json}transfer-encoding: chunked\r\n\r\n{}0\r\n\r\n", chunk(BODY)), true),
        (
            format!(
                "{ok}{json}Transfer-Encoding: CHUNKED\r\n\r\n5;a=\"b\"\r\n{front}\r\n0000{}000\r\nx: y\r\n\r\n",
                chunk(back)
            ),
            true,
        ),
        (format!("{ok}{json}connection: close\r\ncontent-length: {length}\r\n\r\n{BODY}"), false),
        (format!("{ok}{json}\r\n{BODY}"), false),
        (format!("HTTP/1.0 200 OK\r\n{json}\r\n{BODY}"), false),
        (format!("HTTP/1.0 200 OK\r\n{json}content-length: {length}\r\n\r\n{BODY}"), false),
        (
            format!(
                "HTTP/1.0 200 OK\r\n{json}connection: keep-alive\r\ncontent-length: {length}\r\n\r\n{BODY}"
            ),
            true,
        ),
        (
            format!(
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n{}",
                json_answer("200 OK", BODY)
            ),
            true,
        ),
        (format!("{}HTTP/1.1 200 OK\r\n", json_answer("200 OK", BODY)), false),
    ]
}

#[tokio::test]
async fn every_framing_gives_the_same_answer_and_says_whether_the_connection_stays() {
    for (answer, stays) in framings() {
        for pieces in [1, answer.len()] {
            let size = answer.len().div_ceil(pieces);
            let mut steps: Vec<Step> =
                answer.as_bytes().chunks(size).map(|piece| Step::Send(piece.to_vec())).collect();
            if answer.contains("\r\n\r\n{") && !answer.to_ascii_lowercase().contains("content-length") {
                steps.push(Step::Close);
            }
            let engine = Engine::start(move |_| steps.clone()).await;
            let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
            let got = proxy.exchange(&post(CHAT, &chat(false))).await;
            assert!(
                got.starts_with("HTTP/1.1 200") && got.ends_with(&format!("\r\n\r\n{BODY}")),
                "{answer}: {got}"
            );
            assert_eq!(engine.seen().len(), 1);
            // Byte by byte, what follows an answer may come when nobody reads any more: then the next user finds it.
            if pieces == 1 {
                assert_eq!(proxy.gateway.metrics.upstream_kept.get(), u64::from(stays), "{answer}");
            }
        }
    }
}

#[tokio::test]
async fn what_is_no_answer_is_garbage() {
    let ok = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    let heads = [
        "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
        "HTTP/2 200\r\n\r\n".to_owned(),
        format!("{ok}content-length: 1\r\ncontent-length: 2\r\n\r\n{{}}"),
        format!("{ok}content-length: -2\r\n\r\n{{}}"),
        format!("{ok}content-length: 99999999999999999999\r\n\r\n{{}}"),
        format!("{ok}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{{}}"),
        format!("{ok}transfer-encoding: gzip\r\n\r\n{{}}"),
        format!("{ok}transfer-encoding: xchunked\r\n\r\n{{}}"),
        format!("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{}0\r\n\r\n", chunk("{}")),
        format!("{ok}x-folded: a\r\n b\r\ncontent-length: 2\r\n\r\n{{}}"),
        format!("{ok}content-length : 2\r\n\r\n{{}}"),
        format!("{ok}{}\r\n", "x: y\r\n".repeat(300)),
        format!("{ok}x: {}\r\n\r\n", "y".repeat(70_000)),
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n".to_owned(),
    ];
    for head in heads {
        let answer = head.clone();
        let engine = Engine::start(move |_| vec![Step::Send(answer.clone().into()), Step::UntilClosed]).await;
        let proxy = Proxy::start(one_attempt(), &[engine.address]);
        let began = Instant::now();
        let got = proxy.exchange(&post(CHAT, &chat(false))).await;
        assert!(got.starts_with("HTTP/1.1 50"), "{}: {got}", head.escape_default());
        assert_eq!(failures(&proxy, "garbage"), 1, "{}", head.escape_default());
        assert!(began.elapsed() < PATIENCE, "nobody waits for more of it");
        eventually("the connection is closed", || engine.closed_at().len() == 1).await;
        assert_eq!(proxy.gateway.metrics.upstream_kept.get(), 0);
        proxy.settles().await;
    }
}

#[tokio::test]
async fn chunks_that_break_the_rules_end_a_stream_behind_its_last_good_event() {
    for bad in ["x\r\n", "10000000000000000\r\n", "\n", "5;a\rb\r\n", "1\r\nab\r\n", "0\r\nx: y\n\r\n"] {
        let steps = vec![
            Step::Send([SSE_HEAD, &chunk(&delta("one")), &chunk(&delta("two")), bad].concat().into()),
            Step::UntilClosed,
        ];
        let engine = Engine::start(move |_| steps.clone()).await;
        let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
        let got = proxy.exchange(&post(CHAT, &chat(true))).await;
        for part in [&delta("one"), &delta("two"), "\"code\":\"stream_interrupted\""] {
            assert!(got.contains(part), "{}: {part:?} missing in {got}", bad.escape_default());
        }
        eventually("the connection is closed", || engine.closed_at().len() == 1).await;
        proxy.settles().await;
    }
}

#[tokio::test]
async fn what_follows_an_answer_is_never_anybodys_answer() {
    // A second answer that nobody asked for, in the same packet.
    let twice = [json_answer("200 OK", BODY), json_answer("200 OK", r#"{"stolen":true}"#)].concat();
    let engine = Engine::answering(twice).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    for asked in 1..=3 {
        client.send(&post_with(CHAT, "", &chat(false))).await;
        assert!(client.read_answer().await.ends_with(BODY));
        assert_eq!(engine.connections.load(SeqCst), asked, "each on a connection of its own");
    }
}

#[tokio::test]
async fn a_client_that_stays_reuses_its_engines_connection() {
    let engine = Engine::answering(json_answer("200 OK", BODY)).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    for _ in 0..20 {
        client.send(&post_with(CHAT, "", &chat(false))).await;
        assert!(client.read_answer().await.ends_with(BODY));
    }
    assert_eq!(engine.connections.load(SeqCst), 1);
    // Other clients are served by other threads: they take it over rather than make one.
    for _ in 0..8 {
        assert!(proxy.exchange(&post(CHAT, &chat(false))).await.ends_with(BODY));
    }
    assert_eq!(engine.connections.load(SeqCst), 1);
    assert_eq!(proxy.gateway.metrics.upstream_connections.with_label_values(&["reused"]).get(), 27);
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = ProxyConfig::default();
    config.upstream.keepalive_ms = 100;
    let proxy = Proxy::start(config, &[listener.local_addr().unwrap()]);
    let engine = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        assert!(stream.read(&mut request).await.unwrap() > 0);
        stream.write_all(json_answer("200 OK", BODY).as_bytes()).await.unwrap();
        let answered = Instant::now();
        assert_eq!(stream.read(&mut request).await.unwrap(), 0);
        answered.elapsed()
    };
    let client = async {
        assert!(proxy.exchange(&post(CHAT, &chat(false))).await.ends_with(BODY));
        loop {
            proxy.gateway.sweep_connections();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let open = tokio::select! {
        open = engine => open,
        () = client => unreachable!(),
        () = tokio::time::sleep(PATIENCE) => panic!("still open"),
    };
    assert!(open >= Duration::from_millis(100), "{open:?}");
}

#[tokio::test]
async fn a_body_larger_than_any_buffer_goes_through_both_ways() {
    let large = "z".repeat(6 << 20);
    let answer = json_answer("200 OK", &format!("\"{large}\""));
    let engine = Engine::answering(answer).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let body = format!(r#"{{"model":"m","prompt":"{large}"}}"#);
    let got = proxy.exchange(&post("/v1/completions", &body)).await;
    // In chunks, too large to be held until whole; neither they nor the head have a z.
    assert!(got.starts_with("HTTP/1.1 200") && got.ends_with("0\r\n\r\n"), "{} bytes", got.len());
    assert_eq!(got.matches('z').count(), large.len());
    assert!(engine.seen()[0].body == body.as_bytes());
}
