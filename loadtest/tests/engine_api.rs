//! What clients see of the simulator: shapes, tokens, refusals, bodies.
#![allow(clippy::unwrap_used)]

mod engine_support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use engine_support::{PATIENCE, Sim, command, post_head, read_reply, request, wait_for};
use penstock_loadtest::engine::{
    generation::{Generation, Limits, complete},
    template::{Ending, Message, render},
    tokens::{self, Prefix},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn chat(stream: bool, more: Value) -> Value {
    let mut body =
        json!({"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "stream": stream});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn prompt() -> Vec<u32> {
    render(&[Message::new("user", "hi")], Ending::Answer)
}

fn expected(ids: &[u32], max_tokens: u64) -> penstock_loadtest::engine::generation::Outcome {
    complete(Generation::new(Prefix::of(ids), 0, Limits { max_tokens, ..Limits::default() }), u64::MAX)
}

#[test]
fn a_chat_says_what_the_pure_functions_say() {
    let sim = Sim::start(&[]);
    let wanted = expected(&prompt(), 50);
    let stream = sim.post(
        CHAT,
        &chat(
            true,
            json!({"max_tokens": 50, "return_token_ids": true, "stream_options": {"include_usage": true}}),
        ),
    );
    assert!(
        stream.head.contains("server: uvicorn")
            && stream.head.contains("content-type: text/event-stream; charset=utf-8")
    );
    assert_eq!(stream.content(), wanted.text);
    let events = stream.events();
    assert_eq!(events[0]["prompt_token_ids"], json!(prompt()));
    let ids: Vec<u32> = events
        .iter()
        .filter_map(|e| e["choices"][0]["token_ids"][0].as_u64())
        .map(|id| u32::try_from(id).unwrap())
        .collect();
    assert_eq!(ids, wanted.ids);
    let usage = json!({"prompt_tokens": prompt().len(), "total_tokens": prompt().len() + 50, "completion_tokens": 50});
    assert_eq!(events.last().unwrap()["usage"], usage);
    assert_eq!(stream.data().last().unwrap(), "[DONE]");
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "length");

    let unary = sim.post(CHAT, &chat(false, json!({"max_tokens": 50}))).json();
    assert_eq!(unary["choices"][0]["message"]["content"], wanted.text);
    assert_eq!(unary["usage"]["completion_tokens"], 50);
}

#[test]
fn a_continuation_from_any_prefix_is_exact_by_ids_and_by_text() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let whole = expected(&prompt(), 40);
    for cut in (0..40).step_by(3) {
        let ids = [&prompt()[..], &whole.ids[..cut]].concat();
        let by_ids = sim.post("/v1/completions", &json!({"prompt": ids, "max_tokens": 40 - cut})).json();
        let so_far = tokens::decoded(&whole.ids[..cut]);
        assert_eq!(
            so_far.clone() + by_ids["choices"][0]["text"].as_str().unwrap(),
            whole.text,
            "ids from {cut}"
        );
        let left = 40 - tokens::encoded(&so_far).len();
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": so_far}]);
        let by_text = chat(
            true,
            json!({"messages": messages, "max_tokens": left, "continue_final_message": true, "add_generation_prompt": false}),
        );
        assert_eq!(so_far + &sim.post(CHAT, &by_text).content(), whole.text, "text from {cut}");
    }
}

#[test]
fn an_open_ended_chat_stops_by_itself_and_so_does_its_continuation() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let whole = sim.post(CHAT, &chat(false, json!({"return_token_ids": true}))).json();
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let ids = whole["choices"][0]["token_ids"].as_array().unwrap();
    assert!((16..=130).contains(&ids.len()));
    let seen = [json!(prompt()).as_array().unwrap(), &ids[..10]].concat();
    let room = (8 << 20) - seen.len();
    let rest = sim
        .post("/v1/completions", &json!({"prompt": seen, "max_tokens": room, "return_token_ids": true}))
        .json();
    assert_eq!(rest["choices"][0]["token_ids"], json!(ids[10..]));
    assert_eq!(rest["choices"][0]["finish_reason"], "stop");
}

#[test]
fn choices_prompts_and_stop_strings() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let many = sim.post("/v1/completions", &json!({"prompt": ["a", "b"], "n": 2, "max_tokens": 3})).json();
    let texts: Vec<&str> =
        many["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts[0], expected(&tokens::encoded("a"), 3).text);
    assert_eq!(texts[2], expected(&tokens::encoded("b"), 3).text);
    assert_ne!(texts[0], texts[1]);
    assert_eq!(many["usage"]["completion_tokens"], 12);
    let all = expected(&prompt(), 60).text;
    let stop = &all[all.len() / 2..all.len() / 2 + 7];
    if all.is_char_boundary(all.len() / 2) {
        let reply = sim.post(CHAT, &chat(true, json!({"max_tokens": 60, "stop": [stop]})));
        assert_eq!(reply.content(), all[..all.find(stop).unwrap()]);
        let last = reply.events().pop().unwrap();
        assert_eq!(
            (&last["choices"][0]["finish_reason"], &last["choices"][0]["stop_reason"]),
            (&json!("stop"), &json!(stop))
        );
    }
    let streams = sim.post(CHAT, &chat(true, json!({"max_tokens": 5, "n": 3})));
    assert_eq!(streams.events().iter().filter(|e| e["choices"][0]["finish_reason"] == "length").count(), 3);
}

#[test]
fn the_other_apis_say_the_same() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let wanted = expected(&prompt(), 9).text;
    let responses =
        sim.post("/v1/responses", &json!({"input": "hi", "max_output_tokens": 9, "stream": true}));
    let last = responses.events().pop().unwrap();
    assert_eq!(last["type"], "response.completed");
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], wanted);
    assert_eq!(last["response"]["status"], "incomplete");
    let sequence: Vec<u64> =
        responses.events().iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(sequence, (0..sequence.len() as u64).collect::<Vec<_>>());
    let body =
        json!({"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9});
    assert_eq!(sim.post("/v1/messages", &body).json()["content"][0]["text"], wanted);
    assert_eq!(sim.post("/v1/messages/count_tokens", &body).json()["input_tokens"], prompt().len());
    let tokenized = sim.post("/tokenize", &body).json();
    assert_eq!(tokenized["tokens"], json!(prompt()));
    let text = json!({"tokens": sim.post("/tokenize", &json!({"prompt": "größe 🎈"})).json()["tokens"]});
    assert_eq!(sim.post("/detokenize", &text).json()["prompt"], "größe 🎈");
    let embedding = sim.post("/v1/embeddings", &json!({"input": ["a", "b"]})).json();
    assert_eq!(embedding["data"].as_array().unwrap().len(), 2);
    let ranked =
        sim.post("/v1/rerank", &json!({"query": "q", "documents": ["a", "b", "c"], "top_n": 2})).json();
    assert_eq!(ranked["results"].as_array().unwrap().len(), 2);
    assert_eq!(sim.get("/version").json()["version"], "0.32.0");
    assert_eq!(sim.get("/v1/models").json()["data"][0]["id"], "sim-model");
}

#[test]
fn refusals_have_the_shapes_of_vllm() {
    let sim = Sim::start(&["--max-model-len", "100"]);
    let long = "x".repeat(1000);
    for (path, body, status, kind, param) in [
        (CHAT, "{\"model\":".to_string(), 400, "Bad Request", Value::Null),
        (CHAT, "[]".to_string(), 400, "Bad Request", Value::Null),
        (CHAT, "{}".to_string(), 400, "Bad Request", json!("body.messages")),
        (CHAT, chat(true, json!({"model": "other"})).to_string(), 404, "NotFoundError", json!("model")),
        (CHAT, chat(true, json!({"model": 5})).to_string(), 400, "Bad Request", json!("body.model")),
        (
            CHAT,
            chat(true, json!({"max_tokens": 101})).to_string(),
            400,
            "BadRequestError",
            json!("max_tokens"),
        ),
        (
            CHAT,
            chat(false, json!({"stream_options": {}})).to_string(),
            400,
            "BadRequestError",
            json!("stream_options"),
        ),
        (
            CHAT,
            chat(true, json!({"continue_final_message": true})).to_string(),
            400,
            "BadRequestError",
            json!("continue_final_message"),
        ),
        (CHAT, chat(true, json!({"tools": [{}]})).to_string(), 400, "BadRequestError", json!("tool_choice")),
        (
            "/v1/completions",
            json!({"prompt": long}).to_string(),
            400,
            "BadRequestError",
            json!("input_tokens"),
        ),
        ("/v1/completions", json!({"prompt": [1, -1]}).to_string(), 400, "BadRequestError", json!("prompt")),
        ("/v1/completions", json!({"prompt": ""}).to_string(), 400, "BadRequestError", json!("prompt")),
        (
            "/v1/responses",
            json!({"input": "x", "previous_response_id": "r"}).to_string(),
            404,
            "NotFoundError",
            json!("response_id"),
        ),
        ("/inference/v1/generate", "{}".to_string(), 403, "PermissionDeniedError", Value::Null),
    ] {
        let reply = sim.post_bytes(path, body.as_bytes());
        let error = &reply.json()["error"];
        assert_eq!((reply.status, &error["type"], &error["param"]), (status, &json!(kind), &param), "{body}");
        assert_eq!(error["code"], status, "{body}");
    }
    let anthropic = sim.post("/v1/messages", &json!({"messages": [{"role": "user", "content": "x"}]}));
    assert_eq!((anthropic.status, &anthropic.json()["type"]), (400, &json!("error")));
    assert_eq!(sim.get("/nope").json(), json!({"detail": "Not Found"}));
    let wrong_method = sim.get(CHAT);
    assert_eq!((wrong_method.status, wrong_method.json()), (405, json!({"detail": "Method Not Allowed"})));
    let wrong_type = request(
        sim.address,
        &post_head(CHAT, 2, "connection: close\r\n").replace("application/json", "text/plain"),
        b"{}",
    );
    assert_eq!(wrong_type.status, 400);
    for bytes in [
        "NONSENSE\r\n\r\n",
        "POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        assert_eq!(request(sim.address, bytes, b"").status, 400, "{bytes:?}");
    }
    let huge = request(sim.address, &post_head(CHAT, 65 << 20, ""), b"");
    assert_eq!(huge.status, 413);
}

#[test]
fn bodies_arrive_byte_for_byte_by_length_and_by_chunks() {
    let small = Sim::start(&["--sim-speed", "0", "--sim-sha256"]);
    let large = Sim::start(&["--sim-speed", "0"]);
    for (sim, size) in [(&small, 10), (&small, 1 << 20), (&large, 20 << 20)] {
        let text: String = "The quick \\\"brown\\\" fox. ".chars().cycle().take(size).collect();
        let text = text.trim_end_matches('\\');
        let body = format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}],\"max_tokens\":1,\"model\":\"sim-model\"}}"
        );
        let hash = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(body.as_bytes()));
        assert_eq!(sim.post_bytes(CHAT, body.as_bytes()).status, 200);
        assert_eq!(sim.last_record()["body_xxh3"], hash.as_str());
        let mut chunked = Vec::new();
        for (i, part) in body.as_bytes().chunks(70_001).enumerate() {
            let extension = if i % 2 == 0 { "" } else { ";x=y" };
            chunked.extend_from_slice(format!("{:x}{extension}\r\n", part.len()).as_bytes());
            chunked.extend_from_slice(part);
            chunked.extend_from_slice(b"\r\n");
        }
        chunked.extend_from_slice(b"0\r\ntrailer: x\r\n\r\n");
        let head = post_head(CHAT, 0, "connection: close\r\n")
            .replace("content-length: 0", "transfer-encoding: chunked");
        assert_eq!(request(sim.address, &head, &chunked).status, 200);
        let record = sim.last_record();
        assert_eq!((&record["body_xxh3"], &record["body_bytes"]), (&json!(hash), &json!(body.len())));
        assert_eq!(record["body_sha256"].is_string(), size < 20 << 20);
    }
}

#[test]
fn connections_are_kept_and_closed_as_uvicorn_does() {
    let sim = Sim::start(&[]);
    let mut stream = sim.open(CHAT, &chat(true, json!({"max_tokens": 2})));
    assert!(read_reply(&mut stream).whole);
    // Two at once: the second is answered after the first.
    let body = chat(false, json!({"max_tokens": 1})).to_string();
    let one = post_head(CHAT, body.len(), "x-request-id: mine\r\n") + &body;
    stream.write_all((one.clone() + &one).as_bytes()).unwrap();
    let mut both = Vec::new();
    while both.windows(16).filter(|w| *w == b"chat.completion\"").count() < 2 {
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).unwrap();
        both.extend_from_slice(&buffer[..n]);
    }
    assert!(String::from_utf8_lossy(&both).contains("\"id\":\"chatcmpl-mine\""));
    let idle_from = Instant::now();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!((4..8).contains(&idle_from.elapsed().as_secs()), "{:?}", idle_from.elapsed());
    // Expect: 100-continue.
    let mut stream = TcpStream::connect(sim.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(post_head(CHAT, body.len(), "expect: 100-continue\r\n").as_bytes()).unwrap();
    let mut buffer = [0; 25];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(read_reply(&mut stream).status, 200);
}

#[test]
fn the_prefix_cache_is_hit_and_counted() {
    let sim = Sim::start(&["--enable-prompt-tokens-details", "--sim-speed", "0"]);
    let body = json!({"prompt": "word ".repeat(200), "max_tokens": 1});
    let cached = |reply: Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached(sim.post("/v1/completions", &body).json()), None);
    let hit = cached(sim.post("/v1/completions", &body).json()).unwrap();
    assert!(hit >= 16 && hit % 16 == 0);
    let metrics = sim.get("/metrics").text();
    assert!(
        metrics.contains(&format!(
            "vllm:prefix_cache_hits_total{{engine=\"0\",model_name=\"sim-model\"}} {hit}"
        )),
        "{metrics}"
    );
    assert!(metrics.contains("vllm:generation_tokens_total{engine=\"0\",model_name=\"sim-model\"} 2"));
}

#[test]
fn a_full_queue_answers_503_and_counts_it() {
    let sim = Sim::start(&["--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--sim-itl-ms", "1000"]);
    let long = chat(true, json!({"max_tokens": 1000}));
    let _first = sim.open(CHAT, &long);
    wait_for("the first to run", || sim.state()["running"] == 1);
    let _second = sim.open(CHAT, &long);
    wait_for("the second to wait", || sim.state()["waiting"] == 1);
    let third = sim.post(CHAT, &long);
    assert_eq!((third.status, &third.json()["error"]["type"]), (503, &json!("Service Unavailable")));
    let metrics = sim.get("/metrics").text();
    assert!(metrics.contains(
        "vllm:admission_rejections_total{model_name=\"sim-model\",reason=\"max_num_queued_reqs\"} 1"
    ));
    assert!(metrics.contains("vllm:num_requests_waiting{engine=\"0\",model_name=\"sim-model\"} 1"));
}

#[test]
fn keys_guard_the_api_and_nothing_else() {
    let sim = Sim::start(&["--api-key", "secret"]);
    assert_eq!(sim.get("/v1/models").json(), json!({"error": "Unauthorized"}));
    assert_eq!(sim.get("/metrics").status, 200);
    let with = "GET /v1/models HTTP/1.1\r\nauthorization: Bearer secret\r\nconnection: close\r\n\r\n";
    assert_eq!(request(sim.address, with, b"").status, 200);
}

#[test]
fn development_paths_exist_only_on_request() {
    let sim = Sim::start(&[]);
    assert_eq!(sim.post("/sleep", &json!({})).status, 404);
    let sim = Sim::start(&["--sim-dev-mode"]);
    assert_eq!(sim.post("/sleep?level=2", &json!({})).json(), json!({"status": "sleeping", "level": 2}));
    assert_eq!(sim.get("/is_sleeping").json()["is_sleeping"], true);
    let mut stream = sim.open(CHAT, &chat(true, json!({"max_tokens": 3})));
    wait_for("the request", || sim.state()["in_flight"] == 1);
    sim.post("/wake_up", &json!({}));
    assert!(read_reply(&mut stream).whole);
}

#[test]
fn nothing_listens_before_the_model_is_loaded() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = free.port().to_string();
    let mut child = command(&["--port", &port, "--sim-load-ms", "700", "--sim-no-core"]).spawn().unwrap();
    let started = Instant::now();
    wait_for("the port", || TcpStream::connect(free).is_ok());
    assert!(started.elapsed() >= Duration::from_millis(650), "{:?}", started.elapsed());
    child.kill().unwrap();
    child.wait().unwrap();
}
