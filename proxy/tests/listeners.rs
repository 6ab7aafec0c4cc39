//! Sockets for clients: TLS, its certificates, PROXY protocol, and how much and how slowly clients may come.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_config::proxy::{ListenerConfig, ProxyConfig};
use rustls::version::{TLS12, TLS13};
use support::{tls::*, *};
use tempfile::TempDir;

/// The settings of a gateway with the listener "tls", whose files are in the directory.
fn with_tls(pair: &Pair, change: impl FnOnce(&mut ListenerConfig, &TempDir)) -> (ProxyConfig, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    pair.write(dir.path());
    let mut config = ProxyConfig::default();
    let mut listener = tls_listener(dir.path());
    change(&mut listener, &dir);
    config.listeners.insert("tls".into(), listener);
    (config, dir)
}

fn metric(proxy: &Proxy, series: &str) -> f64 {
    let text = proxy.gateway.metrics.render(&penstock_proxy::telemetry::metrics::State {
        snapshot: &proxy.gateway.table.load(),
        xds: &penstock_proxy::xds::status::XdsStatus::default().view(),
        draining: false,
        max_ejected_percent: 67,
        body_bytes_held: 0,
        now_ms: 0,
    });
    let line =
        text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn refused(proxy: &Proxy, listener: &str, reason: &str) -> f64 {
    let series =
        format!("penstock_proxy_connections_refused_total{{listener=\"{listener}\",reason=\"{reason}\"}}");
    metric(proxy, &series)
}

#[tokio::test]
async fn tls_carries_both_versions_of_http_as_alpn_says() {
    let authority = Authority::new();
    let engine = Engine::answering(sse(&["one", "two"])).await;
    let (config, _dir) = with_tls(&authority.pair("gateway", 2040), |_, _| {});
    let proxy = Proxy::start(config, &[engine.address]);
    let address = proxy.listeners["tls"];
    for version in [&TLS12, &TLS13] {
        for alpn in [&["http/1.1"][..], &["h2", "http/1.1"], &["h2"], &[]] {
            let client = authority.client(alpn, &[version], None);
            let mut stream = connect(&client, address).await.unwrap();
            let chosen = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
            assert_eq!(chosen.as_deref(), alpn.first().map(|first| first.as_bytes()));
            if alpn.first() == Some(&"h2") {
                let (mut sender, _task) = http2(stream).await;
                let answer = sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap();
                assert_eq!(answer.version(), http::Version::HTTP_2);
                let (status, body) = whole(answer).await;
                assert_eq!((status, body.contains("two") && body.contains("[DONE]")), (200, true), "{body}");
            } else {
                let answer = exchange(&mut stream, &post(CHAT, &chat(true))).await.unwrap();
                assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("[DONE]"), "{answer}");
            }
        }
    }
    let mut clear = tokio::net::TcpStream::connect(address).await.unwrap();
    let answer = exchange(&mut clear, &post(CHAT, &chat(true))).await.unwrap_or_default();
    assert!(!answer.contains("HTTP/1.1"), "cleartext at a TLS port gets no answer: {answer}");
    eventually("it is counted", || refused(&proxy, "tls", "tls") == 1.0).await;
    proxy.settles().await;
}

#[tokio::test]
async fn a_listener_without_http2_does_not_offer_it() {
    let authority = Authority::new();
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let (config, _dir) = with_tls(&authority.pair("gateway", 2040), |listener, _| listener.http2 = false);
    let proxy = Proxy::start(config, &[engine.address]);
    let client = authority.client(&["h2", "http/1.1"], &[&TLS13], None);
    let mut stream = connect(&client, proxy.listeners["tls"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(exchange(&mut stream, &post(CHAT, &chat(false))).await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn without_a_client_certificate_nobody_comes_in_where_one_is_asked_for() {
    let (authority, clients, others) = (Authority::new(), Authority::new(), Authority::new());
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let (config, _dir) = with_tls(&authority.pair("gateway", 2040), |listener, dir| {
        let file = dir.path().join("ca.pem");
        std::fs::write(&file, clients.pem()).unwrap();
        listener.client_ca = file.display().to_string();
    });
    let proxy = Proxy::start(config, &[engine.address]);
    let tried = async |own: Option<Pair>| {
        let client = authority.client(&["http/1.1"], &[&TLS13], own.as_ref());
        let mut stream = connect(&client, proxy.listeners["tls"]).await?;
        exchange(&mut stream, &post(CHAT, &chat(false))).await
    };
    assert!(tried(Some(clients.pair("alice", 2040))).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(tried(None).await.is_err());
    assert!(tried(Some(others.pair("mallory", 2040))).await.is_err());
    eventually("both are counted", || refused(&proxy, "tls", "client_certificate") == 2.0).await;
    assert_eq!(engine.seen().len(), 1);
}

#[tokio::test]
async fn certificates_are_replaced_under_an_open_stream_and_bad_ones_are_not_taken() {
    let authority = Authority::new();
    let (first, second) = (authority.pair("first", 2040), authority.pair("second", 2041));
    let (config, dir) = with_tls(&first, |_, _| {});
    let engine = Engine::start(|_| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        vec![Step::Send(head.into()), Step::Pause(Duration::from_millis(500)), Step::Send(rest.into())]
    })
    .await;
    let mut proxy = Proxy::start(config, &[engine.address]);
    let client = authority.client(&["http/1.1"], &[&TLS13], None);
    let address = proxy.listeners["tls"];
    let now = penstock_proxy::listener::reload::now_unix_s();

    let mut stream = connect(&client, address).await.unwrap();
    let of_first = shown(&stream);
    tokio::io::AsyncWriteExt::write_all(&mut stream, &post(CHAT, &chat(true))).await.unwrap();
    read_until(&mut stream, "one").await;

    assert_eq!(proxy.watched[0].look(now), Ok(None), "nothing has changed");
    // The certificate comes before its key, as it may when files are written one after the other.
    std::fs::write(dir.path().join("tls.crt"), &second.certificate).unwrap();
    assert!(proxy.watched[0].look(now).unwrap_err().contains("not the key of the certificate"));
    assert_eq!(proxy.watched[0].look(now), Ok(None), "told once");
    assert_eq!(shown(&connect(&client, address).await.unwrap()), of_first, "the old pair stays in use");
    second.write(dir.path());
    let expires = proxy.watched[0].look(now).unwrap().expect("a new pair").expires_unix_s;
    assert_eq!(expires, rcgen::date_time_ymd(2041, 1, 1).unix_timestamp());
    let of_second = shown(&connect(&client, address).await.unwrap());
    assert_ne!(of_second, of_first, "new connections see the new certificate");

    authority.pair("late", 2021).write(dir.path());
    assert!(proxy.watched[0].look(now).unwrap_err().contains("it has expired"));
    std::fs::remove_file(dir.path().join("tls.crt")).unwrap();
    assert!(proxy.watched[0].look(now).unwrap_err().contains("tls.crt does not exist"));
    assert_eq!(shown(&connect(&client, address).await.unwrap()), of_second);

    let rest = read_until(&mut stream, "[DONE]").await;
    assert!(rest.contains("two"), "the stream from before goes on: {rest}");
}

#[tokio::test]
async fn the_proxy_protocol_is_asked_for_where_the_listener_says_so() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    config.limits.handshake_ms = 300;
    let edge =
        ListenerConfig { listen: "127.0.0.1:0".into(), proxy_protocol: true, ..ListenerConfig::default() };
    config.listeners.insert("edge".into(), edge);
    let proxy = Proxy::start(config, &[engine.address]);
    let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x30\x39\0\x50";
    let tried = async |begin: &[u8]| {
        let mut stream = tokio::net::TcpStream::connect(proxy.listeners["edge"]).await.unwrap();
        exchange(&mut stream, &[begin, &post(CHAT, &chat(false))].concat()).await.unwrap_or_default()
    };
    assert!(tried(header).await.starts_with("HTTP/1.1 200"));
    assert_eq!(tried(b"").await, "", "a head is no PROXY header");
    assert_eq!(tried(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n").await, "");
    eventually("both are counted", || refused(&proxy, "edge", "proxy_header") == 2.0).await;
    let mut silent = Client::connect(proxy.listeners["edge"]).await;
    silent.send(&header[..20]).await;
    assert_eq!(silent.read_to_end().await, "");
    eventually("so is silence", || refused(&proxy, "edge", "handshake_timeout") == 1.0).await;
    // The plain listener takes no such header from strangers.
    let mut plain = tokio::net::TcpStream::connect(proxy.address).await.unwrap();
    let answer = exchange(&mut plain, &[header, &post(CHAT, &chat(false))[..]].concat()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn a_head_has_to_arrive_in_time_and_an_idle_connection_may_wait() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    config.limits.head_ms = 400;
    let proxy = Proxy::start(config, &[engine.address]);
    let ended = async |bytes: &[u8]| {
        let mut client = Client::connect(proxy.address).await;
        let began = Instant::now();
        client.send(bytes).await;
        let answer = client.read_to_end().await;
        (answer, began.elapsed())
    };
    let (garbage, took) = ended(b"GARBAGE\r\n\r\n").await;
    assert!(garbage.starts_with("HTTP/1.1 400") && took < Duration::from_millis(350), "{took:?}: {garbage}");
    for slow in ["GET /v1/models HTTP/1.1\r\nhost: x\r\n", "POST ", "GARBAGE"] {
        let (answer, took) = ended(slow.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 408") && answer.contains("headers_timeout"),
            "{slow:?}: {answer}"
        );
        assert!(took >= Duration::from_millis(350), "{slow:?} had its time: {took:?}");
    }
    for half in ["", "PRI", "PRI * HTTP/2.0\r\n\r\n"] {
        assert_eq!(ended(half.as_bytes()).await.0, "", "{half:?} is no head yet: closed");
    }
    eventually("counted", || refused(&proxy, "public", "silent") == 3.0).await;
    let (short, _) = ended(b"GET / HTTP/1.0\r\n\r\n").await;
    assert!(short.starts_with("HTTP/1.1 404"), "shorter than HTTP/2's preface: {short}");

    // Drop by drop: the deadline is the whole head's.
    let mut client = Client::connect(proxy.address).await;
    let trickle = async {
        let mut sent = 0;
        while tokio::io::AsyncWriteExt::write_all(&mut client.stream, b"x").await.is_ok() && sent < 100 {
            sent += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sent
    };
    assert!(trickle.await < 100, "cut off while it still sends");

    // A connection that has had its answer idles as long as keep-alive says; its next head has its own deadline.
    let mut client = Client::connect(proxy.address).await;
    client.send(&post_with(CHAT, "", &chat(false))).await;
    client.read_answer().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    client.send(&post_with(CHAT, "", &chat(false))).await;
    assert!(client.read_answer().await.starts_with("HTTP/1.1 200"));
    client.send(b"POST ").await;
    assert!(client.read_to_end().await.starts_with("HTTP/1.1 408"));
    proxy.settles().await;
}

#[tokio::test]
async fn beyond_the_limit_connections_are_closed_at_once_until_there_is_room() {
    let engine = Engine::answering(json_answer("200 OK", "{}")).await;
    let mut config = ProxyConfig::default();
    config.limits.connections = 3;
    let proxy = Proxy::start(config, &[engine.address]);
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(proxy.address).await;
        client.send(&post_with(CHAT, "", &chat(false))).await;
        client.read_answer().await;
        clients.push(client);
    }
    assert_eq!(metric(&proxy, "penstock_proxy_connections_open{listener=\"public\"}"), 3.0);
    let mut fourth = Client::connect(proxy.address).await;
    assert_eq!(fourth.read_to_end().await, "");
    assert_eq!(refused(&proxy, "public", "limit"), 1.0);
    clients[0].send(&post_with(CHAT, "", &chat(false))).await;
    assert!(clients[0].read_answer().await.starts_with("HTTP/1.1 200"), "the others are served");
    clients.clear();
    eventually("room again", || proxy.gateway.lifecycle.connections() == 0).await;
    assert!(proxy.exchange(&post(CHAT, &chat(false))).await.starts_with("HTTP/1.1 200"));
}
