//! P7: a client that leaves is seen by its engine within 50 ms, whatever it was waiting for.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use support::{Up, eventually};

const SOON: Duration = Duration::from_secs(20);
/// Disconnects a phase; the median is what counts, since one of them may meet a busy machine.
const ROUNDS: usize = 9;
const LIMIT: Duration = Duration::from_millis(50);

fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_micros()).unwrap()
}

fn http(address: &str, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

fn records(engine: &str) -> Vec<Value> {
    let answer: Value = serde_json::from_str(&http(engine, "GET", "/sim/requests?limit=10", "")).unwrap();
    let records = answer["requests"].as_array().unwrap();
    records.iter().filter(|r| r["path"] == "/v1/chat/completions").cloned().collect()
}

/// Sends a request, leaves once `left_when` has come (empty: once the engine has the request), and tells how long the
/// engine took to see it.
fn leave(up: &Up, engine: &str, stream: bool, left_when: &str) -> Duration {
    http(engine, "DELETE", "/sim/requests", "");
    let body = json!({
        "messages": [{"role": "user", "content": "hello"}], "stream": stream, "max_tokens": 4000, "model": "sim-model",
    })
    .to_string();
    let mut client = TcpStream::connect(up.address("public")).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    write!(
        client,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    if left_when.is_empty() {
        eventually("the engine has the request", SOON, || (!records(engine).is_empty()).then_some(()));
    } else {
        let mut received = Vec::new();
        while !String::from_utf8_lossy(&received).contains(left_when) {
            let mut buffer = [0; 4096];
            let n = client.read(&mut buffer).unwrap();
            assert!(n > 0, "closed early: {}", String::from_utf8_lossy(&received));
            received.extend_from_slice(&buffer[..n]);
        }
    }
    let left = unix_us();
    drop(client);
    let record = eventually("the engine has seen the end", SOON, || {
        records(engine).into_iter().find(|r| r["outcome"] != "running")
    });
    assert_eq!(record["outcome"], "disconnect", "{record}");
    Duration::from_micros(record["disconnect_seen_unix_us"].as_u64().unwrap().saturating_sub(left))
}

#[test]
fn an_engine_sees_within_50_ms_that_its_client_has_left() {
    let up = Up::start(&["--engines", "1", "--engine-arg=--sim-itl-ms=20"]);
    let engine = up.json["engines"][0]["address"].as_str().unwrap().to_owned();
    let hang = r#"{"kind":"hang"}"#;
    for (phase, fault, stream, left_when) in [
        ("waiting for the first token", hang, true, ""),
        ("waiting for a unary answer", hang, false, ""),
        ("unary, while tokens are made", "", false, ""),
        ("streaming", "", true, "\"content\":\" "),
    ] {
        if !fault.is_empty() {
            let answer = http(&engine, "POST", "/sim/faults", fault);
            assert!(answer.contains("hang"), "{answer}");
        }
        let mut took: Vec<Duration> = (0..ROUNDS).map(|_| leave(&up, &engine, stream, left_when)).collect();
        took.sort();
        eprintln!("{phase}: median {:?}, slowest {:?}", took[ROUNDS / 2], took[ROUNDS - 1]);
        assert!(took[ROUNDS / 2] < LIMIT, "{phase}: {took:?}");
        http(&engine, "DELETE", "/sim/faults", "");
    }
    let state: Value = serde_json::from_str(&http(&engine, "GET", "/sim/state", "")).unwrap();
    assert_eq!(state["in_flight"], 0, "{state}");
    up.stop();
}

#[test]
fn a_client_that_leaves_in_its_upload_never_reaches_an_engine() {
    let up = Up::start(&["--engines", "1"]);
    let engine = up.json["engines"][0]["address"].as_str().unwrap().to_owned();
    http(&engine, "DELETE", "/sim/requests", "");
    let mut client = TcpStream::connect(up.address("public")).unwrap();
    client
        .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"mod")
        .unwrap();
    drop(client);
    let private = up.address("proxy_private");
    eventually("the proxy has seen it", SOON, || {
        http(&private, "GET", "/metrics", "")
            .contains("penstock_proxy_client_disconnects_total 1")
            .then_some(())
    });
    assert!(records(&engine).is_empty());
    up.stop();
}
