//! WebSockets through the gateway, with a real client and a real server of them.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use penstock_config::proxy::ProxyConfig;
use sha2::{Digest, Sha256};
use support::*;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async, client_async,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        handshake::server::{Request, Response},
        protocol::frame::coding::CloseCode,
    },
};

/// An engine that sends back whatever it is told, over WebSockets.
struct Echo {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    open: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (heads, open) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicUsize>::default());
        let (seen, count) = (Arc::clone(&heads), Arc::clone(&open));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut conversations = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, count) = (Arc::clone(&seen), Arc::clone(&count));
                conversations.spawn(async move {
                    count.fetch_add(1, SeqCst);
                    echo(stream, &seen).await;
                    count.fetch_sub(1, SeqCst);
                });
            }
        });
        Self { address, heads, open, _tasks: tasks }
    }

    async fn hears_of_the_end(&self) {
        eventually("the engine's connection has ended", || self.open.load(SeqCst) == 0).await;
    }
}

#[allow(clippy::result_large_err)] // tungstenite's own signature
async fn echo(stream: TcpStream, heads: &Mutex<Vec<String>>) {
    let remember = |request: &Request, response: Response| {
        let headers = request.headers().iter().map(|(n, v)| format!("{n}: {}\n", v.to_str().unwrap()));
        heads.lock().unwrap().push(format!("{}\n{}", request.uri(), headers.collect::<String>()));
        Ok(response)
    };
    let Ok(mut socket) = accept_hdr_async(stream, remember).await else { return };
    while let Some(Ok(message)) = socket.next().await {
        if matches!(&message, Message::Text(text) if text.as_str() == "die") {
            return;
        }
        let said = message.is_text() || message.is_binary();
        if said && socket.send(message).await.is_err() {
            return;
        }
    }
}

type Socket = WebSocketStream<TcpStream>;

async fn connect_with(proxy: &Proxy, query: &str, headers: &[(&'static str, &str)]) -> Result<Socket, Error> {
    let mut request = format!("ws://{}/v1/realtime{query}", proxy.address).into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(proxy.address).await.unwrap();
    timeout(PATIENCE, client_async(request, stream)).await.unwrap().map(|(socket, _)| socket)
}

async fn connect(proxy: &Proxy) -> Socket {
    connect_with(proxy, "?model=m", &[]).await.unwrap()
}

async fn next(socket: &mut Socket) -> Option<Message> {
    timeout(PATIENCE, socket.next()).await.unwrap().map(Result::unwrap)
}

/// The close frame that comes next: its code and reason.
async fn goodbye(socket: &mut Socket) -> (CloseCode, String) {
    match next(socket).await {
        Some(Message::Close(Some(frame))) => (frame.code, frame.reason.as_str().to_owned()),
        other => panic!("no goodbye but {other:?}"),
    }
}

#[tokio::test]
async fn a_conversation_goes_both_ways_and_ends_in_order() {
    let engine = Echo::start().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let headers = [("x-session-affinity", "s-1"), ("x-vllm-priority", "1"), ("x-request-id", "mine")];
    let mut socket = connect_with(&proxy, "?intent=x&model=m", &headers).await.unwrap();
    assert_eq!(proxy.gateway.lifecycle.inflight(), 1);
    for size in [0, 1, 125, 126, 65_535, 65_536, 1 << 20] {
        let bytes: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (mut sink, mut source) = (&mut socket).split();
        let message = Message::binary(bytes.clone());
        let (sent, got) = tokio::join!(sink.send(message), timeout(PATIENCE, source.next()));
        sent.unwrap();
        assert!(got.unwrap().unwrap().unwrap().into_data() == bytes, "{size} bytes");
    }
    socket.send(Message::text(r#"{"type":"session.update"}"#)).await.unwrap();
    assert_eq!(next(&mut socket).await.unwrap().into_text().unwrap(), r#"{"type":"session.update"}"#);
    socket.close(None).await.unwrap();
    while next_or_end(&mut socket).await.is_some() {}
    let head = engine.heads.lock().unwrap()[0].clone();
    assert!(
        head.starts_with("/v1/realtime?intent=x&model=m\n") && head.contains("x-session-affinity: s-1"),
        "{head}"
    );
    assert!(
        !head.contains("x-vllm-priority")
            && !head.contains("mine")
            && head.contains("x-forwarded-for: 127.0.0.1"),
        "{head}"
    );
    engine.hears_of_the_end().await;
    proxy.settles().await;
    assert_eq!(proxy.gateway.metrics.attempt_failures.with_label_values(&["mid_stream"]).get(), 0);
}

async fn next_or_end(socket: &mut Socket) -> Option<Message> {
    timeout(PATIENCE, socket.next()).await.unwrap().and_then(Result::ok)
}

const CONSENT: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

fn handshake(more: &str) -> String {
    format!(
        "GET /v1/realtime?model=m HTTP/1.1\r\nhost: g\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
}

#[tokio::test]
async fn a_consent_that_comes_at_once_and_with_frames_tears_nothing_down() {
    // Pingora's own proxy ends the upgrade when the 101 is there before the empty request body has ended (#946).
    let engine = Engine::start(|_| {
        vec![
            Step::Send([CONSENT.as_bytes(), b"\x81\x05hello"].concat()),
            Step::Pause(Duration::from_millis(50)),
            Step::Send(b"\x81\x05again".to_vec()),
            Step::UntilClosed,
        ]
    })
    .await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    for more in ["", "content-length: 0\r\n"] {
        let mut client = Client::connect(proxy.address).await;
        client.send(handshake(more).as_bytes()).await;
        let text = client.read_until("again").await;
        assert!(text.starts_with("HTTP/1.1 101") && text.contains("\r\n\r\n\u{fffd}\u{5}hello"), "{text:?}");
        assert_eq!(text.to_ascii_lowercase().matches("upgrade: websocket").count(), 1, "{text}");
        assert_eq!(proxy.gateway.lifecycle.inflight(), 1);
        drop(client);
        proxy.settles().await;
    }
    let seen = engine.seen();
    assert!(
        seen.iter().all(|s| s.head.contains("connection: upgrade") && !s.head.contains("content-length")),
        "{seen:?}"
    );
    eventually("both are closed at the engine", || engine.closed_at().len() == 2).await;
}

#[tokio::test]
async fn a_client_that_could_not_wait_is_heard() {
    let engine = Echo::start().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    // A masked text frame "hi", mask 0, right behind the handshake.
    client.send(&[handshake("").as_bytes(), b"\x81\x82\0\0\0\0hi"].concat()).await;
    client.read_until("\u{2}hi").await;
}

#[tokio::test]
async fn what_is_no_handshake_is_refused_in_words() {
    let engine = Echo::start().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let plain = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n".to_owned();
    let old = handshake("").replace("version: 13", "version: 8");
    for (request, status, code) in [
        (plain, 426, "websocket_required"),
        (old, 426, "websocket_required"),
        (handshake("content-length: 4\r\n") + "body", 426, "websocket_required"),
        (handshake("").replace("?model=m", ""), 400, "missing_model"),
        (handshake("").replace("?model=m", "?model=m&model=n"), 400, "duplicate_key"),
        (handshake("").replace("?model=m", "?model=zzz"), 404, "model_not_found"),
        (handshake("").replace("GET", "POST"), 405, "method_not_allowed"),
    ] {
        let mut client = Client::connect(proxy.address).await;
        client.send(request.as_bytes()).await;
        let answer = client.read_answer().await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(code),
            "{request}: {answer}"
        );
        assert_eq!(status == 426, answer.to_ascii_lowercase().contains("upgrade: websocket\r\n"), "{answer}");
    }
    assert!(engine.heads.lock().unwrap().is_empty());
    proxy.settles().await;
}

#[tokio::test]
async fn an_engines_refusal_is_passed_on_and_a_failure_is_retried() {
    let refuse = |answer: &str| Engine::answering(answer.to_owned());
    let empty = "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n";
    for (answer, status, code) in [
        (empty.to_owned(), 404, "not_served_by_model"),
        (json_answer("404 Not Found", r#"{"detail":"Not Found"}"#), 404, "not_served_by_model"),
        (json_answer("400 Bad Request", r#"{"error":"no audio here"}"#), 400, "no audio here"),
    ] {
        let engine = refuse(&answer).await;
        let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
        match connect_with(&proxy, "?model=m", &[]).await {
            Err(Error::Http(response)) => {
                let body = String::from_utf8(response.body().clone().unwrap_or_default()).unwrap();
                assert_eq!(response.status(), status, "{body}");
                assert!(
                    body.starts_with(r#"{"error":{"message":"#) && body.contains(code),
                    "{answer}: {body}"
                );
            }
            other => panic!("{answer}: {other:?}"),
        }
        proxy.settles().await;
    }
    let busy = refuse(&json_answer("503 Service Unavailable", r#"{"error":{"message":"busy"}}"#)).await;
    let broken = Engine::start(|_| vec![Step::Reset]).await;
    let echo = Echo::start().await;
    let proxy =
        Proxy::start(ProxyConfig::default(), &[busy.address, broken.address, nobody().await, echo.address]);
    let mut config = ProxyConfig::default();
    config.upstream.attempts = 4;
    let patient = Proxy::start(config, &[busy.address, broken.address, nobody().await, echo.address]);
    for _ in 0..6 {
        let mut socket = connect(&patient).await;
        socket.send(Message::text("hi")).await.unwrap();
        assert_eq!(next(&mut socket).await.unwrap().into_text().unwrap(), "hi");
    }
    patient.settles().await;
    proxy.settles().await;
}

#[tokio::test]
async fn a_model_named_inside_is_the_one_that_the_engine_knows() {
    let engine = Echo::start().await;
    let tables = vec![table("org/base", &[engine.address])];
    let state = fleet(tables, vec![route("alias", &[("org/base", 1)], &[])]);
    let proxy = Proxy::start_on(ProxyConfig::default(), &state);
    let mut socket = connect_with(&proxy, "?model=alias", &[]).await.unwrap();
    let audio = r#"{"type":"input_audio_buffer.append","audio":"AAAA","model":"alias"}"#;
    for (said, heard) in [
        (r#"{"type":"session.update","model":"alias"}"#, r#"{"type":"session.update","model":"org/base"}"#),
        (audio, audio),
        (
            r#"{"type":"session.update","session":{"model":"alias"}}"#,
            r#"{"type":"session.update","session":{"model":"org/base"}}"#,
        ),
    ] {
        socket.send(Message::text(said)).await.unwrap();
        assert_eq!(next(&mut socket).await.unwrap().into_text().unwrap(), heard);
    }
    socket.send(Message::binary(vec![7; 70_000])).await.unwrap();
    assert_eq!(next(&mut socket).await.unwrap().into_data().len(), 70_000);
    assert!(engine.heads.lock().unwrap()[0].starts_with("/v1/realtime?model=org%2Fbase\n"));
    socket.close(None).await.unwrap();
    while next_or_end(&mut socket).await.is_some() {}
    proxy.settles().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_engine() {
    let engine = Echo::start().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut socket = connect(&proxy).await;
    socket.send(Message::text("hi")).await.unwrap();
    next(&mut socket).await;
    drop(socket);
    engine.hears_of_the_end().await;
    proxy.settles().await;
    eventually("it is counted", || proxy.gateway.metrics.client_disconnects.get() == 1).await;
}

#[tokio::test]
async fn an_engine_that_dies_is_told_of_in_a_close_frame() {
    let engine = Echo::start().await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut socket = connect(&proxy).await;
    socket.send(Message::text("die")).await.unwrap();
    assert_eq!(goodbye(&mut socket).await, (CloseCode::Error, "the engine was lost".to_owned()));
    proxy.settles().await;
    assert_eq!(proxy.gateway.metrics.attempt_failures.with_label_values(&["mid_stream"]).get(), 1);
}

#[tokio::test]
async fn a_half_frame_is_never_followed_by_a_frame_of_ours() {
    let engine =
        Engine::start(|_| vec![Step::Send([CONSENT.as_bytes(), b"\x81\x7d1234"].concat()), Step::Close])
            .await;
    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut client = Client::connect(proxy.address).await;
    client.send(handshake("").as_bytes()).await;
    client.read_to_end().await;
    assert!(client.received.ends_with(b"\x81\x7d1234"), "{:?}", String::from_utf8_lossy(&client.received));
    proxy.settles().await;
}

#[tokio::test]
async fn at_the_last_call_and_after_long_silence_clients_are_told_to_go() {
    let engine = Echo::start().await;
    let mut config = ProxyConfig::default();
    config.limits.websocket_idle_ms = 400;
    let proxy = Proxy::start(config, &[engine.address]);
    let mut socket = connect(&proxy).await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(150)).await; // longer together than the limit
        socket.send(Message::text("hi")).await.unwrap();
        assert!(next(&mut socket).await.unwrap().is_text());
    }
    let (code, reason) = goodbye(&mut socket).await;
    assert_eq!((code, reason.as_str()), (CloseCode::Away, "nothing was said for too long"));
    engine.hears_of_the_end().await;

    let proxy = Proxy::start(ProxyConfig::default(), &[engine.address]);
    let mut socket = connect(&proxy).await;
    proxy.gateway.lifecycle.cut().cancel();
    let (code, reason) = goodbye(&mut socket).await;
    assert_eq!((code, reason.as_str()), (CloseCode::Away, "the gateway is stopping"));
    engine.hears_of_the_end().await;
    proxy.settles().await;
}

#[tokio::test]
async fn a_browsers_key_is_a_subprotocol_and_stays_here() {
    let engine = Echo::start().await;
    let mut config = ProxyConfig::default();
    let hash: String = Sha256::digest(b"s3cret").iter().map(|b| format!("{b:02x}")).collect();
    config.auth.keys = vec![format!("alice:{hash}")];
    let proxy = Proxy::start(config, &[engine.address]);
    let refused = connect_with(&proxy, "?model=m", &[]).await;
    assert!(matches!(&refused, Err(Error::Http(r)) if r.status() == 401), "{refused:?}");
    let mut client = Client::connect(proxy.address).await;
    let protocols = "sec-websocket-protocol: realtime, openai-insecure-api-key.s3cret\r\n";
    client.send(handshake(protocols).as_bytes()).await;
    client.read_until("HTTP/1.1 101").await;
    eventually("the engine saw it", || !engine.heads.lock().unwrap().is_empty()).await;
    let head = engine.heads.lock().unwrap()[0].clone();
    assert!(head.contains("sec-websocket-protocol: realtime\n") && !head.contains("s3cret"), "{head}");
}
