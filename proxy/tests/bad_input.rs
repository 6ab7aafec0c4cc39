//! What clients get wrong, and what they are told. The engine must never hear of any of it.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use penstock_config::proxy::ProxyConfig;
use sha2::{Digest, Sha256};
use support::*;

async fn proxy() -> (Proxy, Engine) {
    let engine = Engine::answering(json_answer("200 OK", r#"{"ok":true}"#)).await;
    let mut config = ProxyConfig::default();
    config.limits.body_bytes = 1 << 20;
    config.limits.body_idle_ms = 150;
    (Proxy::start(config, &[engine.address]), engine)
}

/// Status, `error.code`, and whether the connection can be used again.
async fn refused(proxy: &Proxy, request: &[u8]) -> (u16, String, bool) {
    let mut client = Client::connect(proxy.address).await;
    client.send(request).await;
    let answer = client.read_answer().await;
    let status = answer[9..12].parse().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"));
    let error = &body["error"];
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{answer}");
    assert!(error["type"].is_string() && error.as_object().unwrap().contains_key("param"), "{answer}");
    let keep_alive = !head.to_ascii_lowercase().contains("connection: close");
    if keep_alive {
        client.send(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n").await;
        let next = client.read_answer().await;
        assert!(next.starts_with("HTTP/1.1 200"), "after {status}: {next}");
    }
    (status, error["code"].as_str().unwrap().to_owned(), keep_alive)
}

#[tokio::test]
async fn bodies_that_are_not_what_the_api_takes() {
    let (proxy, engine) = proxy().await;
    let deep = format!(r#"{{"model":"m","x":{}1{}}}"#, "[".repeat(200), "]".repeat(200));
    for (body, status) in [
        ("", 400),
        ("{", 400),
        ("not json", 400),
        ("[]", 400),
        (r#"{"messages":[]}"#, 400),
        (r#"{"model":7}"#, 400),
        (r#"{"model":null}"#, 400),
        (r#"{"model":"m","model":"other"}"#, 400),
        (r#"{"model":"m","stream":"yes"}"#, 400),
        (r#"{"model":"m"} trailing"#, 400),
        (r#"{"messages":[{"role":"user","content":"{\"model\":\"m\"}"}]}"#, 400),
        (r#"{"nested":{"model":"m"}}"#, 400),
        (&deep, 400),
        (r#"{"model":"unknown-to-us"}"#, 404),
    ] {
        let (got, code, keep_alive) = refused(&proxy, &post_with(CHAT, "", body)).await;
        assert_eq!(got, status, "{body}: {code}");
        assert!(keep_alive, "{body}: the connection could be used again");
    }
    assert!(engine.seen().is_empty());
    proxy.settles().await;
}

#[tokio::test]
async fn an_unknown_model_lists_nothing_private() {
    let (proxy, _engine) = proxy().await;
    let answer = proxy.exchange(&post(CHAT, r#"{"model":"zzz"}"#)).await;
    assert!(answer.contains("model_not_found") && answer.contains("zzz"), "{answer}");
    assert!(!answer.contains("127.0.0.1") && !answer.contains("\"m\""), "{answer}");
}

#[tokio::test]
async fn paths_methods_and_media_types() {
    let (proxy, engine) = proxy().await;
    for (request, status, code) in [
        ("POST /v1/nonsense HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n", 404, "unknown_url"),
        ("POST /sleep HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n", 404, "unknown_url"),
        ("GET /metrics HTTP/1.1\r\nhost: g\r\n\r\n", 404, "unknown_url"),
        ("GET /v1/chat/completions HTTP/1.1\r\nhost: g\r\n\r\n", 405, "method_not_allowed"),
        (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}",
            415,
            "unsupported_media_type",
        ),
        (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 2\r\n\r\n{}",
            415,
            "unsupported_media_type",
        ),
    ] {
        let (got, got_code, keep_alive) = refused(&proxy, request.as_bytes()).await;
        assert_eq!((got, got_code.as_str()), (status, code), "{request}");
        assert!(keep_alive, "{request}");
    }
    assert!(engine.seen().is_empty());
}

#[tokio::test]
async fn anthropics_routes_get_anthropics_shape() {
    let (proxy, _engine) = proxy().await;
    let answer = proxy.exchange(&post("/v1/messages", r#"{"model":"zzz"}"#)).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains(r#"{"type":"error","error":{"type":"not_found_error""#), "{answer}");
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_sent_and_while_it_is() {
    let (proxy, engine) = proxy().await;
    let big = "x".repeat((1 << 20) + 1);
    let (status, code, keep_alive) = refused(&proxy, &post_with(CHAT, "", &big)).await;
    assert_eq!((status, code.as_str(), keep_alive), (413, "request_too_large", true));
    let mut chunked =
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..20 {
        chunked.extend(chunk(&"y".repeat(64 << 10)).into_bytes());
    }
    chunked.extend(b"0\r\n\r\n");
    let (status, code, _) = refused(&proxy, &chunked).await;
    assert_eq!((status, code.as_str()), (413, "request_too_large"));
    assert!(engine.seen().is_empty());
    proxy.settles().await;
}

#[tokio::test]
async fn an_upload_that_stops_is_told_so() {
    let (proxy, engine) = proxy().await;
    for head in ["content-length: 1000", "transfer-encoding: chunked"] {
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n{head}\r\n\r\n5\r\n{{\"mod\r\n"
        );
        let answer = proxy.exchange(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("request_timeout"), "{head}: {answer}");
    }
    assert!(engine.seen().is_empty());
    proxy.settles().await;
}

#[tokio::test]
async fn broken_framing_and_heads() {
    let (proxy, _engine) = proxy().await;
    let bad_chunk = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n{{}}\r\n"
    );
    let many: String = (0..300).map(|i| format!("x-{i}: 1\r\n")).collect();
    for (request, status) in [
        (bad_chunk, 400),
        ("GET /v1/models HTTP/1.1\r\nthis is no header\r\n\r\n".to_owned(), 400),
        (format!("GET /v1/models HTTP/1.1\r\nhost: g\r\nx: {}\r\n\r\n", "a".repeat(40_000)), 431),
        (format!("GET /v1/models HTTP/1.1\r\nhost: g\r\n{many}\r\n"), 431),
        (
            format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n{{}}"),
            400,
        ),
    ] {
        let mut client = Client::connect(proxy.address).await;
        client.send(request.as_bytes()).await;
        let answer = client.read_answer().await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{status} expected for {request:.80}: {answer}"
        );
        assert!(answer.contains(r#"{"error":{"message":"#), "{answer}");
    }
    proxy.settles().await;
}

#[tokio::test]
async fn expect_100_continue_is_answered_before_the_body() {
    let (proxy, engine) = proxy().await;
    let mut client = Client::connect(proxy.address).await;
    let body = chat(false);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.send(head.as_bytes()).await;
    client.read_until("HTTP/1.1 100 Continue\r\n\r\n").await;
    client.received.clear();
    client.send(body.as_bytes()).await;
    assert!(client.read_answer().await.starts_with("HTTP/1.1 200"));
    assert!(!engine.seen()[0].head.contains("expect"));
    // Refused without asking for the body.
    let refused = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        64 << 20
    );
    client.send(refused.as_bytes()).await;
    let answer = client.read_to_end().await;
    assert!(answer.starts_with("HTTP/1.1 413") && !answer.contains("100 Continue"), "{answer}");
}

#[tokio::test]
async fn keys_are_asked_for_when_there_are_any() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    let hash: String = Sha256::digest(b"open sesame").iter().map(|b| format!("{b:02x}")).collect();
    config.auth.keys = vec![format!("alice:{hash}")];
    let proxy = Proxy::start(config, &[engine.address]);
    for (header, status) in [
        ("", "401"),
        ("authorization: Bearer wrong\r\n", "401"),
        ("authorization: Bearer open sesame\r\n", "200"),
        ("x-api-key: open sesame\r\n", "200"),
    ] {
        let answer =
            proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{header}"), &chat(false))).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{header:?}: {answer}");
    }
    let health = proxy.exchange(b"GET /healthz HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n").await;
    assert!(health.ends_with("ok\n"), "{health}");
}

#[tokio::test]
async fn requests_can_be_pipelined() {
    let (proxy, engine) = proxy().await;
    let mut client = Client::connect(proxy.address).await;
    let one = post_with(CHAT, "", &chat(false));
    client.send(&[one.clone(), one.clone(), one].concat()).await;
    for _ in 0..3 {
        assert!(client.read_answer().await.ends_with(r#"{"ok":true}"#));
    }
    assert_eq!(engine.seen().len(), 3);
}

#[tokio::test]
async fn before_the_first_snapshot_the_answer_is_503() {
    let gateway = penstock_proxy::gateway::Gateway::new(ProxyConfig::default()).unwrap();
    assert!(!gateway.table.load().loaded);
    let (proxy, _engine) = proxy().await;
    proxy.gateway.table.apply(&Default::default());
    let (status, code, _) = refused(&proxy, &post_with(CHAT, "", &chat(false))).await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
    tokio::time::timeout(Duration::from_secs(1), proxy.settles()).await.unwrap();
}
