use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const OK: &str = "HTTP/1.1 200 OK\r\n";

/// A connection and the engine's end of it.
async fn pair() -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let connection = Connection::connect(address, PATIENCE).await.expect("a connection");
    assert_eq!(connection.address(), address);
    let (engine, _) = listener.accept().await.expect("the other end");
    engine.set_nodelay(true).expect("a live socket");
    (connection, engine)
}

async fn head(connection: &mut Connection) -> Result<u16, HeadError> {
    timeout(PATIENCE, connection.read_head(|head| Ok(head.status.as_u16()))).await.expect("in time")
}

async fn body(connection: &mut Connection) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(more) = timeout(PATIENCE, connection.read_body()).await.expect("in time")? {
        body.extend_from_slice(&more);
    }
    Ok(body)
}

/// Waits until `condition` is true.
async fn eventually(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "not in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_request_is_one_write_and_the_answer_leaves_the_connection() {
    let (mut connection, mut engine) = pair().await;
    for round in 0..3 {
        connection.send(b"POST / HTTP/1.1\r\n\r\n", b"body").await.expect("sent");
        let mut request = [0; 100];
        let read = engine.read(&mut request).await.expect("a request");
        assert_eq!(&request[..read], b"POST / HTTP/1.1\r\n\r\nbody", "round {round}");
        engine.write_all(format!("{OK}content-length: 2\r\n\r\nok").as_bytes()).await.expect("answered");
        assert_eq!(head(&mut connection).await.expect("a head"), 200);
        assert!(!connection.is_reusable(), "its body has not been read");
        assert_eq!(body(&mut connection).await.expect("a body"), b"ok");
        assert!(connection.is_reusable() && connection.is_quiet());
        connection.rest();
        assert_eq!(connection.buffer.capacity(), 0);
    }
}

#[tokio::test]
async fn a_body_of_any_size_is_written_whole() {
    let (mut connection, mut engine) = pair().await;
    let large: Vec<u8> = (0..8 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    let read = async {
        let mut request = vec![0; large.len() + 4];
        engine.read_exact(&mut request).await.expect("all of it");
        request
    };
    let (sent, request) = tokio::join!(connection.send(b"head", &large), read);
    sent.expect("sent");
    assert!(request[..4] == *b"head" && request[4..] == large);
}

#[tokio::test]
async fn all_that_is_there_comes_in_one_piece_and_the_buffer_serves_again() {
    let (mut connection, mut engine) = pair().await;
    engine.write_all(format!("{OK}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.expect("written");
    head(&mut connection).await.expect("a head");
    let mut places = Vec::new();
    for _ in 0..100 {
        engine.write_all(b"3\r\none\r\n3\r\ntwo\r\n5\r\nthr").await.expect("written");
        let payload = connection.read_body().await.expect("sound").expect("more");
        assert_eq!(payload, "onetwothr");
        places.push(payload.as_ptr() as usize / LEAST_ROOM);
        drop(payload);
        engine.write_all(b"ee\r\n").await.expect("written");
        assert_eq!(connection.read_body().await.expect("sound").expect("more"), "ee");
    }
    places.dedup();
    assert!(places.len() <= 3, "no new memory for each: {places:?}");
    // A part that somebody keeps is his: the buffer is another from then on.
    engine.write_all(b"1\r\na\r\n").await.expect("written");
    let kept = connection.read_body().await.expect("sound").expect("more");
    engine.write_all(b"1\r\nb\r\n0\r\n\r\n").await.expect("written");
    assert_eq!(connection.read_body().await.expect("sound").expect("more"), "b");
    assert_eq!(kept, "a");
    assert!(connection.has_ended() && connection.read_body().await.expect("sound").is_none());
    assert!(connection.is_reusable());
}

#[tokio::test]
async fn the_buffer_follows_what_comes() {
    let (mut connection, mut engine) = pair().await;
    engine.write_all(format!("{OK}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.expect("written");
    head(&mut connection).await.expect("a head");
    let large = vec![b'x'; 1 << 20];
    let write = async {
        engine.write_all(format!("{:x}\r\n", large.len()).as_bytes()).await.expect("written");
        engine.write_all(&large).await.expect("written");
        engine.write_all(b"\r\n").await.expect("written");
    };
    let read = async {
        let mut got = 0;
        while got < large.len() {
            got += connection.read_body().await.expect("sound").expect("more").len();
        }
    };
    tokio::join!(write, read);
    assert!((LEAST_ROOM * 2..=MOST_ROOM).contains(&connection.room), "{}", connection.room);
    for _ in 0..=QUIET_READS {
        engine.write_all(b"1\r\na\r\n").await.expect("written");
        assert_eq!(connection.read_body().await.expect("sound").expect("more"), "a");
    }
    assert_eq!(connection.room, LEAST_ROOM);
    assert!(connection.buffer.capacity() <= LEAST_ROOM);
}

#[tokio::test]
async fn a_body_of_known_length_gets_a_buffer_that_fits() {
    let (mut connection, mut engine) = pair().await;
    let wire = format!("{OK}content-length: 40000\r\n\r\n{}", "x".repeat(40_000));
    engine.write_all(wire.as_bytes()).await.expect("written");
    head(&mut connection).await.expect("a head");
    assert!(connection.room > 30_000 && connection.body_left() == Some(40_000));
    assert_eq!(body(&mut connection).await.expect("a body").len(), 40_000);
    assert!(connection.is_reusable() && connection.is_quiet());
}

#[tokio::test]
async fn a_lost_connection_says_whether_an_answer_had_begun() {
    for (said, begun) in [("", false), ("HTTP/1.1", true), ("HTTP/1.1 100 Continue\r\n\r\n", true)] {
        let (mut connection, mut engine) = pair().await;
        engine.write_all(said.as_bytes()).await.expect("written");
        drop(engine);
        match head(&mut connection).await {
            Err(HeadError::Lost { begun: told, .. }) => assert_eq!(told, begun, "{said:?}"),
            other => panic!("{said:?}: {other:?}"),
        }
    }
    let (mut connection, mut engine) = pair().await;
    engine.write_all(format!("{OK}content-length: 5\r\n\r\nabc").as_bytes()).await.expect("written");
    drop(engine);
    head(&mut connection).await.expect("a head");
    assert!(matches!(body(&mut connection).await, Err(BodyError::Bad(BadBody::CutShort))));
    assert!(!connection.is_reusable());
}

#[tokio::test]
async fn waiting_can_be_given_up_and_taken_up_again() {
    let (mut connection, mut engine) = pair().await;
    let wire = format!("{OK}transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n");
    let (at_head, rest) = wire.split_at(20);
    engine.write_all(at_head.as_bytes()).await.expect("written");
    let given_up = timeout(Duration::from_millis(20), connection.read_head(|_| Ok(()))).await;
    assert!(given_up.is_err());
    let (to_body, rest) = rest.split_at(rest.len() - 8);
    engine.write_all(to_body.as_bytes()).await.expect("written");
    head(&mut connection).await.expect("a head");
    assert_eq!(connection.read_body().await.expect("sound").expect("some"), "bod");
    assert!(timeout(Duration::from_millis(20), connection.read_body()).await.is_err());
    engine.write_all(rest.as_bytes()).await.expect("written");
    assert_eq!(body(&mut connection).await.expect("a body"), b"y");
}

#[tokio::test]
async fn what_happens_while_it_is_not_used_is_noticed() {
    let (connection, mut engine) = pair().await;
    assert!(connection.is_quiet());
    engine.write_all(b"out of turn").await.expect("written");
    eventually(|| !connection.is_quiet()).await;
    let (connection, engine) = pair().await;
    drop(engine);
    eventually(|| !connection.is_quiet()).await;
}

#[tokio::test]
async fn nobody_there_is_told_apart_from_a_slow_one() {
    let address = TcpListener::bind("127.0.0.1:0").await.and_then(|l| l.local_addr()).expect("a port");
    let refused = Connection::connect(address, PATIENCE).await.expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    // A queue of one that is full swallows what comes then.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let listener = socket.listen(1).expect("listening");
    let address = listener.local_addr().expect("an address");
    let mut waiting = Vec::new();
    let late = loop {
        assert!(waiting.len() < 100, "the queue is never full");
        match Connection::connect(address, Duration::from_millis(100)).await {
            Ok(connection) => waiting.push(connection),
            Err(e) => break e,
        }
    };
    assert_eq!(late.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn another_runtime_takes_over() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (first, second) = (runtime(), runtime());
    let (connection, engine) = first.block_on(pair());
    let engine = engine.into_std().expect("a socket");
    second.block_on(async {
        let mut connection = connection.move_here().expect("registered");
        let mut engine = TcpStream::from_std(engine).expect("registered");
        connection.send(b"head", b"").await.expect("sent");
        engine.read_exact(&mut [0; 4]).await.expect("read");
        engine.write_all(format!("{OK}content-length: 0\r\n\r\n").as_bytes()).await.expect("written");
        assert_eq!(head(&mut connection).await.expect("a head"), 200);
    });
}
