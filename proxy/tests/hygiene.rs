//! What engines hear of clients, and clients of engines: headers, ids, orders, and bodies of every size.

#![allow(clippy::unwrap_used)]

mod support;

use penstock_config::proxy::ProxyConfig;
use sha2::{Digest, Sha256};
use support::*;

async fn proxy() -> (Proxy, Engine) {
    let engine = Engine::answering(json_answer("200 OK", r#"{"ok":true}"#)).await;
    (Proxy::start(ProxyConfig::default(), &[engine.address]), engine)
}

fn key(secret: &str) -> String {
    Sha256::digest(secret).iter().map(|b| format!("{b:02x}")).collect()
}

/// The header of a request that an engine saw; names and values are in lower case there.
fn header<'a>(seen: &'a Seen, name: &str) -> Vec<&'a str> {
    let prefix = format!("{name}: ");
    seen.head.lines().filter_map(|line| line.strip_prefix(&prefix)).collect()
}

const SMUGGLED: &str = "x-hop: 1\r\nte: trailers\r\nkeep-alive: timeout=1\r\nproxy-authorization: Basic s3cret\r\n\
    upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\nx-api-key: s3cret\r\ncookie: sid=s3cret\r\n";

#[tokio::test]
async fn what_is_the_connections_stays_there_in_both_directions() {
    let answer = "HTTP/1.1 200 OK\r\nconnection: keep-alive, X-Inside\r\nx-inside: 10.0.0.1\r\nserver: uvicorn\r\n\
        keep-alive: timeout=5\r\nproxy-authenticate: Basic\r\nset-cookie: a=1\r\nx-request-id: theirs\r\n\
        endpoint-load-metrics: TEXT x=1\r\ncontent-type: application/json\r\nx-kept: yes\r\ncontent-length: 2\r\n\r\n{}";
    let engine = Engine::answering(answer.to_owned()).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let headers = format!("connection: close, X-Hop\r\n{SMUGGLED}");
    let got = proxy.exchange(&post_with(CHAT, &headers, &chat(false))).await.to_ascii_lowercase();
    let seen = engine.seen().remove(0);
    for secret in ["s3cret", "x-hop", "trailers", "h2c", "http2-settings", "\r\nkeep-alive", "close"] {
        assert!(!seen.head.contains(secret), "{secret:?} in {}", seen.head);
    }
    for inside in ["x-inside", "uvicorn", "timeout=5", "proxy-auth", "set-cookie", "theirs", "endpoint-load"]
    {
        assert!(!got.contains(inside), "{inside:?} in {got}");
    }
    assert!(got.contains("x-kept: yes"), "{got}");
    proxy.settles().await;
}

#[tokio::test]
async fn a_name_that_two_clients_chose_is_two_names_inside_and_theirs_outside() {
    let (proxy, engine) = proxy().await;
    for _ in 0..2 {
        let answer = proxy
            .exchange(&post_with(CHAT, "connection: close\r\nx-request-id: same\r\n", &chat(false)))
            .await;
        assert!(answer.contains("x-client-request-id: same\r\n"), "{answer}");
        assert!(!answer.contains("x-request-id: same\r\nx-request"), "{answer}");
    }
    let ids: Vec<String> =
        engine.seen().iter().map(|seen| header(seen, "x-request-id")[0].to_owned()).collect();
    assert!(ids[0] != ids[1] && !ids.contains(&"same".to_owned()), "{ids:?}");
    // Also on errors, and nothing that cannot be written to a log.
    let answer = proxy
        .exchange(b"GET /nope HTTP/1.1\r\nhost: g\r\nx-client-request-id: e-1\r\nconnection: close\r\n\r\n")
        .await;
    assert!(answer.contains("x-client-request-id: e-1\r\n"), "{answer}");
    let answer = proxy
        .exchange(b"GET /nope HTTP/1.1\r\nhost: g\r\nx-request-id: a b\r\nconnection: close\r\n\r\n")
        .await;
    assert!(!answer.contains("x-client-request-id"), "{answer}");
}

#[tokio::test]
async fn where_a_request_comes_from_is_our_word_not_the_clients() {
    let (proxy, engine) = proxy().await;
    let claims = "connection: close\r\nx-forwarded-for: 1.2.3.4\r\nx-forwarded-proto: https\r\nx-forwarded-host: evil\r\n\
        x-real-ip: 1.2.3.4\r\nforwarded: for=1.2.3.4\r\n";
    proxy.exchange(&post_with(CHAT, claims, &chat(false))).await;
    let seen = engine.seen().remove(0);
    assert_eq!(header(&seen, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(header(&seen, "x-forwarded-proto"), ["http"]);
    assert_eq!(header(&seen, "x-forwarded-host"), ["gateway"]);
    assert!(!seen.head.contains("1.2.3.4") && !seen.head.contains("evil"), "{}", seen.head);
}

#[tokio::test]
async fn a_trace_goes_on_with_a_span_of_ours_and_garbage_ends_here() {
    let (proxy, engine) = proxy().await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    for (headers, goes_on) in [
        (format!("traceparent: 00-{trace}-00f067aa0ba902b7-01\r\ntracestate: a=1,b=2\r\n"), true),
        (format!("traceparent: 00-{trace}-0000000000000000-01\r\ntracestate: a=1\r\n"), false),
        ("traceparent: garbage\r\ntracestate: a=1\r\n".to_owned(), false),
        (String::new(), false),
    ] {
        proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{headers}"), &chat(false))).await;
        let seen = engine.seen().pop().unwrap();
        let parents = header(&seen, "traceparent");
        if goes_on {
            let [version, id, span, flags] = parents[0].split('-').collect::<Vec<_>>()[..] else {
                panic!("{parents:?}")
            };
            assert_eq!((version, id, flags), ("00", trace, "01"));
            assert!(span != "00f067aa0ba902b7" && span.len() == 16);
            assert_eq!(header(&seen, "tracestate"), ["a=1,b=2"]);
        } else {
            assert!(!seen.head.contains("trace"), "{headers}: {}", seen.head);
        }
    }
}

const ORDERS: &str = "x-data-parallel-rank: 1\r\nx-session-id: s\r\nx-vllm-priority: -9\r\n";

#[tokio::test]
async fn orders_to_engines_are_taken_from_trusted_keys_only() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    config.auth.keys = vec![format!("alice:{}", key("alice")), format!("batch:{}:trusted", key("batch"))];
    let proxy = Proxy::start(config, &[engine.address]);
    let body = "{ \"kv_transfer_params\": {\"do_remote_prefill\":true}, \"model\":\"m\",\"priority\" : -9 ,\n \"metadata\":{\"priority\":1},\
        \"messages\":[{\"role\":\"user\",\"content\":\"\\\"priority\\\":1,\"}],\"ec_transfer_params\":null, \"kv_transfer_params\":1 }";
    let clean = "{  \"model\":\"m\",\n \"metadata\":{\"priority\":1},\
        \"messages\":[{\"role\":\"user\",\"content\":\"\\\"priority\\\":1,\"}] }";
    for (caller, wanted, ordered) in [("alice", clean, false), ("batch", body, true)] {
        let headers = format!("connection: close\r\nauthorization: Bearer {caller}\r\n{ORDERS}");
        let answer = proxy.exchange(&post_with(CHAT, &headers, body)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let seen = engine.seen().pop().unwrap();
        assert_eq!(String::from_utf8(seen.body.clone()).unwrap(), wanted, "{caller}");
        for name in ["x-data-parallel-rank", "x-session-id", "x-vllm-priority"] {
            assert_eq!(header(&seen, name).len(), usize::from(ordered), "{caller} {name}");
        }
    }
    assert_eq!(proxy.gateway.metrics.untrusted_fields.get(), 3);
}

#[tokio::test]
async fn without_keys_nobody_is_trusted() {
    let (proxy, engine) = proxy().await;
    let body = r#"{"model":"m","kv_transfer_params":{"x":1}}"#;
    proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{ORDERS}"), body)).await;
    let seen = engine.seen().remove(0);
    assert_eq!(seen.body, br#"{"model":"m"}"#);
    assert!(!seen.head.contains("x-vllm-priority"), "{}", seen.head);
}

#[tokio::test]
async fn a_list_of_orders_can_be_changed_but_not_to_what_we_read_ourselves() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    config.trust.remove_fields = vec!["cache_salt".into()];
    config.trust.remove_headers = vec![];
    let proxy = Proxy::start(config.clone(), &[engine.address]);
    let body = r#"{"cache_salt":"x","model":"m","priority":1}"#;
    proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{ORDERS}"), body)).await;
    let seen = engine.seen().remove(0);
    assert_eq!(seen.body, br#"{"model":"m","priority":1}"#);
    assert_eq!(header(&seen, "x-vllm-priority"), ["-9"]);
    config.trust.remove_fields = vec!["stream".into()];
    let error = penstock_proxy::gateway::Gateway::new(config).expect_err("stream is ours");
    assert!(error.contains("trust.remove_fields") && error.contains("stream"), "{error}");
}

#[tokio::test]
async fn bodies_of_every_size_arrive_as_they_were_sent() {
    let (proxy, engine) = proxy().await;
    let mut client = Client::connect(proxy.address).await;
    // Where others have cliffs: 32 KiB (envoy), 64 KiB (pingora, ext-auth), 4 MiB (gRPC).
    for size in [32 << 10, 64 << 10, 4 << 20] {
        for size in [size - 1, size, size + 1] {
            let empty = r#"{"messages":[{"role":"user","content":""}],"model":"m"}"#;
            let text = "x".repeat(size - empty.len());
            let body = empty.replace("\"\"", &format!("\"{text}\""));
            assert_eq!(body.len(), size);
            client.send(&post_with(CHAT, "", &body)).await;
            let answer = client.read_answer().await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{size}: {answer}");
            assert!(engine.seen().pop().unwrap().body == body.as_bytes(), "{size}");
        }
    }
    proxy.settles().await;
}

#[tokio::test]
async fn one_connection_serves_good_and_bad_requests_in_any_order() {
    let (proxy, engine) = proxy().await;
    let mut client = Client::connect(proxy.address).await;
    for round in 0..20 {
        client.send(&post_with(CHAT, "", &chat(false))).await;
        assert!(client.read_answer().await.starts_with("HTTP/1.1 200"), "round {round}");
        let (request, status) = match round % 4 {
            0 => (post_with(CHAT, "", "{\"model\":"), "400"),
            1 => (post_with(CHAT, "content-encoding: gzip\r\n", "\u{1f}\u{8b}"), "415"),
            2 => (post_with("/sleep", "", "{}"), "404"),
            _ => (post_with(CHAT, "", r#"{"model":"other"}"#), "404"),
        };
        client.send(&request).await;
        let answer = client.read_answer().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "round {round}: {answer}");
    }
    assert_eq!(engine.seen().len(), 20);
    proxy.settles().await;
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_name() {
    let (proxy, engine) = proxy().await;
    for encoding in ["gzip", "zstd", "br"] {
        let headers = format!("connection: close\r\ncontent-encoding: {encoding}\r\n");
        let answer = proxy.exchange(&post_with(CHAT, &headers, "\u{28}\u{b5}")).await;
        assert!(answer.starts_with("HTTP/1.1 415") && answer.contains(encoding), "{answer}");
        assert!(
            answer.contains("unsupported_content_encoding") && answer.contains("uncompressed"),
            "{answer}"
        );
        assert!(answer.to_ascii_lowercase().contains("accept-encoding: identity"), "{answer}");
    }
    assert!(engine.seen().is_empty());
}
