//! Faults on demand, and how fast a vanished client is seen.
#![allow(clippy::unwrap_used)]

mod engine_support;

use std::io::Read;

use engine_support::{Reply, Sim, command, is_alive, read_reply, wait_for};
use nix::sys::signal::Signal;
use penstock_loadtest::engine::{
    generation::{Generation, Limits, complete},
    template::{Ending, Message, render},
    tokens::Prefix,
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn body(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream, "max_tokens": 30})
}

fn first_tokens(n: u64) -> String {
    let prefix = Prefix::of(&render(&[Message::new("user", "hi")], Ending::Answer));
    complete(Generation::new(prefix, 0, Limits { max_tokens: 30, ..Limits::default() }), n).text
}

/// Asks with one fault in force; the stream's reply and the unary one.
fn under(sim: &Sim, fault: Value) -> (Reply, Reply) {
    sim.fault(fault);
    let replies = (sim.post(CHAT, &body(true)), sim.post(CHAT, &body(false)));
    sim_clear(sim);
    replies
}

fn sim_clear(sim: &Sim) {
    let head = "DELETE /sim/faults HTTP/1.1\r\nconnection: close\r\n\r\n";
    assert_eq!(engine_support::request(sim.address, head, b"").status, 200);
}

#[test]
fn every_way_to_break_an_answer() {
    let sim = Sim::start(&["--sim-itl-ms", "1"]);
    let at = |kind: &str| json!({"kind": kind, "after_tokens": 7});

    let (stream, unary) = under(&sim, at("error"));
    assert!(stream.whole && stream.text().starts_with("data: {\"id\""));
    let data = stream.data();
    assert!(data[data.len() - 2].starts_with("{\"error\": {\"message\": \"EngineCore encountered an issue."));
    assert_eq!(data.last().unwrap(), "[DONE]");
    assert_eq!((unary.status, &unary.json()["error"]["code"]), (500, &json!(500)));

    let (stream, unary) = under(&sim, at("abort"));
    assert_eq!(stream.content(), first_tokens(7));
    assert_eq!(stream.events().last().unwrap()["choices"][0]["finish_reason"], "abort");
    assert_eq!((unary.status, &unary.json()["choices"][0]["finish_reason"]), (200, &json!("abort")));
    assert_eq!(unary.json()["choices"][0]["message"]["content"], first_tokens(7));

    let (stream, unary) = under(&sim, at("close"));
    assert_eq!((stream.whole, stream.content()), (false, first_tokens(7)));
    assert!(!unary.whole && unary.status == 200);

    let (stream, _) = under(&sim, at("reset"));
    assert!(!stream.whole);

    let (stream, _) = under(&sim, at("end"));
    assert!(stream.whole && !stream.text().contains("[DONE]") && stream.content() == first_tokens(7));

    let (stream, _) = under(&sim, at("garbage_sse"));
    assert!(stream.text().contains("{\"cont\n\n") && stream.text().ends_with("[DONE]\n\n"));

    let (stream, _) = under(&sim, at("garbage_http"));
    assert!(!stream.whole && stream.content() == first_tokens(7));

    for byte in [0, 1, 6, 40] {
        let (stream, unary) = under(&sim, json!({"kind": "cut", "after_tokens": 7, "byte": byte}));
        let whole = under(&sim, at("close")).0;
        assert_eq!(stream.body.len(), whole.body.len() + byte, "cut at {byte}");
        assert_eq!((unary.whole, unary.body.len()), (false, byte));
    }
}

#[test]
fn faults_before_the_response() {
    let sim = Sim::start(&[]);
    let (stream, unary) = under(&sim, json!({"kind": "status", "status": 502}));
    assert_eq!((stream.status, unary.status), (502, 502));
    assert_eq!(under(&sim, json!({"kind": "busy"})).0.json()["error"]["type"], "Service Unavailable");
    assert_eq!(under(&sim, json!({"kind": "reset"})).0.status, 0);
    assert_eq!(under(&sim, json!({"kind": "close"})).0.status, 0);
    assert!(under(&sim, json!({"kind": "garbage_http"})).0.head.starts_with("ZZ"));
    sim.fault(json!([{"kind": "status", "count": 1, "path": "/v1/embeddings"}, {"kind": "unhealthy"}]));
    assert_eq!(sim.get("/health").status, 503);
    assert_eq!(sim.post(CHAT, &body(false)).status, 200);
    assert_eq!(sim.post("/v1/embeddings", &json!({"input": "x"})).status, 500);
    assert_eq!(sim.post("/v1/embeddings", &json!({"input": "x"})).status, 200, "its count is used up");
    let bad = sim.post("/sim/faults", &json!({"kind": "explode"}));
    assert!(bad.status == 400 && bad.text().contains("explode"));
    assert_eq!(sim.post("/sim/faults", &json!({"kind": "never_ready"})).status, 400);
}

#[test]
fn slow_makes_tokens_slower() {
    let sim = Sim::start(&["--sim-itl-ms", "2", "--sim-jitter-percent", "0"]);
    let timed = || {
        let started = std::time::Instant::now();
        assert!(sim.post(CHAT, &body(true)).whole);
        started.elapsed()
    };
    let normal = timed();
    sim.fault(json!({"kind": "slow", "factor": 20}));
    assert!(timed() > normal + std::time::Duration::from_millis(700));
}

/// The client leaves in every phase: the engine sees it within 50 ms and forgets the request.
#[test]
fn a_vanished_client_is_seen_within_50_ms_in_every_phase() {
    for (phase, flags, stream) in [
        ("hanging", &["--sim-fault", "hang"][..], true),
        ("queued", &["--max-num-seqs", "1", "--sim-itl-ms", "5000"], true),
        ("in prefill", &["--sim-ttft-ms", "60000"], true),
        ("decoding", &["--sim-itl-ms", "20"], true),
        ("unthrottled", &["--sim-speed", "0"], true),
        ("unary", &["--sim-itl-ms", "1000"], false),
        ("frozen", &["--sim-fault", "freeze:after_tokens=3"], true),
    ] {
        let sim = Sim::start(flags);
        let mut request = body(stream);
        request["max_tokens"] = json!(4_000_000);
        let _holder = (phase == "queued").then(|| {
            let holder = sim.open(CHAT, &request);
            wait_for("the first to run", || sim.state()["running"] == 1);
            holder
        });
        let before = sim.state()["requests"].as_u64().unwrap();
        let mut client = sim.open(CHAT, &request);
        wait_for(phase, || sim.state()["requests"].as_u64().unwrap() > before);
        if ["decoding", "unthrottled", "frozen"].contains(&phase) {
            let mut some = [0; 600];
            client.read_exact(&mut some).unwrap();
        }
        let now_us = || {
            u64::try_from(
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros(),
            )
            .unwrap()
        };
        let left_us = now_us();
        drop(client);
        wait_for("the end of the record", || sim.last_record()["outcome"] == "disconnect");
        let seen_us = sim.last_record()["disconnect_seen_unix_us"].as_u64().unwrap();
        assert!(seen_us.saturating_sub(left_us) < 50_000, "{phase}: {} µs", seen_us - left_us);
        let still = u64::from(phase == "queued");
        // The batch looks at its sequences once in a while.
        wait_for("the books", || {
            let state = sim.state();
            state["in_flight"] == still && state["waiting"] == 0
        });
    }
}

#[test]
fn crashes() {
    let mut sim = Sim::start(&[]);
    let core = sim.core_pid.unwrap();
    let mut stream = {
        sim.fault(json!({"kind": "crash", "after_tokens": 5, "code": 137}));
        sim.open(CHAT, &body(true))
    };
    let reply = read_reply(&mut stream);
    assert_eq!((reply.whole, reply.content()), (false, first_tokens(5)));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&sim.wait()), Some(Signal::SIGKILL as i32));
    assert!(is_alive(core), "an orphan, as vLLM leaves one");
    let mut sim = Sim::start(&["--sim-fault", "crash:code=3,count=1"]);
    assert_eq!(sim.post(CHAT, &body(true)).status, 0);
    assert_eq!(sim.wait().code(), Some(3));
    let mut loading = command(&[
        "--port",
        "0",
        "--sim-load-ms",
        "1",
        "--sim-fault",
        "crash_on_load:code=9",
        "--sim-no-core",
    ])
    .spawn()
    .unwrap();
    assert_eq!(loading.wait().unwrap().code(), Some(9));
}
