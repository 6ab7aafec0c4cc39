//! DR30: clients that stop reading cost bounded memory and nobody else anything, and lose their engines' work in time.

use std::time::{Duration, Instant};

use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_loadtest::load::sse::Splitter;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::{SETTLED, fleet::Fleet, plan::Plan, storm};

/// Clients that stop reading, half of them over HTTP/2.
const STALLED: u64 = 20;
/// `limits.write_stall_ms`.
const STALL: Duration = Duration::from_secs(3);

fn body() -> String {
    // 200,000 tokens are more than 40 MB of events, and the engine makes them as fast as they are taken.
    r#"{"messages":[{"role":"user","content":"all of it"}],"max_tokens":200000,"ignore_eos":true,"stream":true,"model":"sim-model"}"#.into()
}

/// A stream over HTTP/1.1 whose client accepts little at a time.
async fn open(fleet: &Fleet) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    let mut stream = socket.connect(fleet.up.address("public").parse().unwrap()).await.unwrap();
    let body = body();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut first = [0; 1];
    stream.read_exact(&mut first).await.unwrap();
    stream
}

/// What keeps a stream over HTTP/2 open, unread.
struct Unread {
    _sender: hyper::client::conn::http2::SendRequest<String>,
    _response: hyper::Response<hyper::body::Incoming>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

async fn open_h2(fleet: &Fleet) -> Unread {
    let stream = TcpStream::connect(fleet.up.address("public")).await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    // Smallest windows: what is not read soon fills them.
    builder.initial_stream_window_size(16 << 10).initial_connection_window_size(64 << 10);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(async move { connection.await.unwrap_or_default() });
    let request = Request::post("http://x/v1/chat/completions").header("content-type", "application/json");
    let response = sender.send_request(request.body(body()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    Unread { _sender: sender, _response: response, connection }
}

/// Reads 2 KiB now and then, for longer than a stalled client is borne; counts the events.
async fn trickle(mut stream: TcpStream) -> usize {
    let (mut splitter, mut events, mut buffer) = (Splitter::default(), 0, [0; 2 << 10]);
    let opened = Instant::now();
    while opened.elapsed() < STALL + Duration::from_secs(2) {
        let read = timeout(STALL, stream.read(&mut buffer)).await.expect("bytes keep coming").unwrap();
        assert!(read > 0, "a client that reads slowly was cut off after {:?}", opened.elapsed());
        splitter.push(&buffer[..read]).unwrap();
        while splitter.next_event().is_some() {
            events += 1;
        }
        sleep(Duration::from_millis(20)).await;
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_stop_reading_cost_nobody_else_anything() {
    let stall_ms = STALL.as_millis().to_string();
    let fleet = Fleet::start(
        &[
            "--engines=1",
            "--engine-arg=--sim-speed=0",
            "--engine-arg=--max-model-len=400000",
            "--engine-arg=--max-num-seqs=128",
        ],
        &[("PENSTOCK_PROXY__LIMITS__WRITE_STALL_MS", &stall_ms)],
    );
    let quiet = storm(&fleet, 8, 0..100, |n| Plan::staying(1, n)).await;
    assert_eq!((quiet.count("good"), quiet.wrong), (100, Vec::new()), "{:?}", quiet.outcomes);
    let before = fleet.holdings();

    let trickle = tokio::spawn(trickle(open(&fleet).await));
    let (mut stalled, mut stalled_h2) = (Vec::new(), Vec::new());
    for _ in 0..STALLED / 2 {
        stalled.push(open(&fleet).await);
        stalled_h2.push(open_h2(&fleet).await);
    }

    // The others do not notice, and one that reads slowly but steadily is not cut off.
    let others = storm(&fleet, 8, 100..400, |n| Plan::staying(1, n)).await;
    assert_eq!((others.count("good"), others.wrong), (300, Vec::new()), "{:?}", others.outcomes);
    let held = fleet.holdings();
    eprintln!("before {before:?}, with {STALLED} stalled streams {held:?}");
    assert!(held.rss_mib < before.rss_mib + 64, "{held:?} after {before:?}");
    let events = trickle.await.unwrap();
    assert!(events > 100, "{events} events");

    // Those that read nothing lose their place, and their engine is told, though they are still connected.
    fleet.settles(SETTLED).await;
    assert!(fleet.metric("penstock_proxy_client_disconnects_total").await >= STALLED as f64);
    drop((stalled, stalled_h2));
    fleet.descriptors_fall_to(before.fds).await;
    fleet.up.stop();
}
