//! HTTP/2 clients: limits, abuse, and how they are told to go.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_config::proxy::ProxyConfig;
use support::{tls::*, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

async fn client(
    proxy: &Proxy,
) -> (
    hyper::client::conn::http2::SendRequest<http_body_util::Full<bytes::Bytes>>,
    tokio::task::JoinHandle<hyper::Result<()>>,
) {
    http2(TcpStream::connect(proxy.address).await.unwrap()).await
}

/// An engine whose streams last until the gateway closes them.
async fn endless() -> Engine {
    Engine::start(|_| vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::UntilClosed])
        .await
}

#[tokio::test]
async fn prior_knowledge_in_clear_and_many_streams_on_one_connection() {
    let engine = Engine::answering(sse(&["one", "two"])).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let (sender, _task) = client(&proxy).await;
    let answers = (0..50).map(|_| {
        let mut sender = sender.clone();
        async move { whole(sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap()).await }
    });
    for (status, body) in futures_util::future::join_all(answers).await {
        assert_eq!((status, body.contains("[DONE]")), (200, true), "{body}");
    }
    assert_eq!(proxy.gateway.lifecycle.connections(), 1);
    proxy.settles().await;
}

#[tokio::test]
async fn a_drain_tells_them_to_go_away_and_lets_their_streams_finish() {
    let engine = Engine::start(|_| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        vec![Step::Send(head.into()), Step::Pause(Duration::from_millis(500)), Step::Send(rest.into())]
    })
    .await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let (mut sender, connection) = client(&proxy).await;
    let answer = sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap();
    let (mut idle_sender, idle) = client(&proxy).await;
    whole(idle_sender.send_request(h2_post("/nothing", "")).await.unwrap()).await;
    let (config, hurry) = Default::default();
    let drain = proxy.gateway.lifecycle.drain(&config, &hurry);
    let (cut, (status, body)) = tokio::join!(drain, whole(answer));
    assert_eq!((cut, status), (0, 200));
    assert!(body.contains("two") && body.contains("[DONE]"), "{body}");
    for connection in [connection, idle] {
        timeout(PATIENCE, connection).await.expect("the connection ends").unwrap().expect("in good order");
    }
}

#[tokio::test]
async fn a_hand_over_sends_them_away_too() {
    let engine = Engine::answering(sse(&["one"])).await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let (mut sender, connection) = client(&proxy).await;
    whole(sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap()).await;
    let mut kept = Client::connect(proxy.address).await;
    kept.send(&post_with(CHAT, "", &chat(true))).await;
    kept.read_until("0\r\n\r\n").await;
    kept.received.clear();
    let handed_over = proxy.gateway.lifecycle.hand_over(Duration::from_secs(3_600));
    let clients = async {
        timeout(PATIENCE, connection).await.expect("the connection ends").unwrap().expect("in good order");
        eventually("the listener is closed", || std::net::TcpStream::connect(proxy.address).is_err()).await;
        // An HTTP/1 client may still use the connection that it kept, once.
        kept.send(&post_with(CHAT, "", &chat(true))).await;
        let answer = kept.read_to_end().await.to_ascii_lowercase();
        assert!(answer.contains("connection: close") && answer.contains("[done]"), "{answer}");
    };
    timeout(PATIENCE, async { tokio::join!(handed_over, clients) })
        .await
        .expect("nothing is left to wait for");
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_with_a_stream_is_not() {
    let engine = endless().await;
    let mut config = ProxyConfig::default();
    config.public.keepalive_s = 1;
    let proxy = Proxy::start(config, &[engine.address]);
    let (mut busy_sender, mut busy) = client(&proxy).await;
    let stream = busy_sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap();
    let (_idle_sender, idle) = client(&proxy).await;
    let began = Instant::now();
    drop(timeout(PATIENCE, idle).await.expect("the idle connection ends"));
    assert!(began.elapsed() >= Duration::from_millis(800), "it had its time");
    assert!(timeout(Duration::from_millis(1_500), &mut busy).await.is_err(), "a stream keeps its connection");
    drop(stream);
    drop(timeout(PATIENCE, busy).await.expect("idle now"));
    proxy.settles().await;
}

#[tokio::test]
async fn streams_on_a_connection_are_limited_and_further_ones_wait() {
    let engine = endless().await;
    let mut config = ProxyConfig::default();
    config.limits.http2_streams = 2;
    let proxy = Proxy::start(config, &[engine.address]);
    let (sender, _task) = client(&proxy).await;
    let mut first = sender.clone();
    let one = first.send_request(h2_post(CHAT, &chat(true))).await.unwrap();
    let _two = first.send_request(h2_post(CHAT, &chat(true))).await.unwrap();
    let mut third = sender.clone();
    let waiting = tokio::spawn(async move { third.send_request(h2_post(CHAT, &chat(true))).await.map(drop) });
    eventually("two are served", || proxy.gateway.lifecycle.inflight() == 2).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(proxy.gateway.lifecycle.inflight(), 2, "the third waits");
    drop(one);
    timeout(PATIENCE, waiting).await.expect("its turn comes").unwrap().unwrap();
}

#[tokio::test]
async fn headers_over_the_limit_get_431() {
    let proxy = Proxy::start(ProxyConfig::default(), &[nobody().await]);
    let (mut sender, _task) = client(&proxy).await;
    for bytes in [40_000, 120_000] {
        let mut request = h2_post(CHAT, "{}");
        request.headers_mut().insert("x-large", "v".repeat(bytes).parse().unwrap());
        match sender.send_request(request).await {
            Ok(answer) => assert_eq!(whole(answer).await.0, 431, "{bytes}"),
            // What the peer's settings forbid is not even sent.
            Err(e) => assert!(bytes > 2 * ProxyConfig::default().limits.header_bytes, "{bytes}: {e}"),
        }
    }
    proxy.settles().await;
}

/// Streams opened and reset at once, as fast as they can be written (CVE-2023-44487).
#[tokio::test]
async fn rapid_resets_end_the_connection_and_no_other() {
    let engine = endless().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut stream = TcpStream::connect(proxy.address).await.unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&settings).await.unwrap();
    // :method GET, :scheme http, :path /, :authority x, out of HPACK's static table.
    let block = [0x82, 0x86, 0x84, 0x41, 0x01, b'x'];
    let mut flood = Vec::new();
    for id in (1..20_001_u32).step_by(2) {
        flood.extend([0, 0, 6, 1, 5]);
        flood.extend(id.to_be_bytes());
        flood.extend(block);
        flood.extend([0, 0, 4, 3, 0]);
        flood.extend(id.to_be_bytes());
        flood.extend(8_u32.to_be_bytes());
    }
    let (mut reader, mut writer) = stream.into_split();
    let flooding = async {
        // It is cut off before all is written, or right after.
        drop(writer.write_all(&flood).await);
    };
    let reading = async {
        let mut seen = Vec::new();
        drop(
            timeout(PATIENCE, reader.read_to_end(&mut seen)).await.expect("the gateway ends the connection"),
        );
        seen
    };
    let ((), seen) = tokio::join!(flooding, reading);
    let calm = 11_u32.to_be_bytes(); // ENHANCE_YOUR_CALM
    assert!(
        seen.is_empty() || contains(&seen, &calm),
        "it says why, unless the reset overtakes it: {seen:?}"
    );
    eventually("the connection is gone", || proxy.gateway.lifecycle.connections() == 0).await;
    proxy.settles().await;
    let (mut sender, _task) = client(&proxy).await;
    assert_eq!(sender.send_request(h2_post(CHAT, &chat(true))).await.unwrap().status(), 200);
}
