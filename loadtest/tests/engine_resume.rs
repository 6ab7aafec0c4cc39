//! What a gateway needs to know of engines in order to continue streams, as vLLM does it: where a stream may break, what a
//! continuation says, and what stands in its way.
#![allow(clippy::unwrap_used)]

mod engine_support;

use std::io::Read;

use engine_support::{Reply, Sim, request};
use penstock_loadtest::engine::{
    generation::{Generation, Limits, Outcome, complete},
    template::{Ending, Message, render},
    tokens::{self, CHAR_HEAD, Prefix},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn prompt() -> Vec<u32> {
    render(&[Message::new("user", "hi")], Ending::Answer)
}

fn expected(ids: &[u32], max_tokens: u64) -> Outcome {
    complete(Generation::new(Prefix::of(ids), 0, Limits { max_tokens, ..Limits::default() }), u64::MAX)
}

fn chat(max_tokens: u64, more: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": max_tokens});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A chat's body with the text so far as a last message that is to be continued.
fn continued(text: &str, max_tokens: u64, more: Value) -> Value {
    let mut body = chat(max_tokens, more);
    body["messages"] = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]);
    body["continue_final_message"] = true.into();
    body["add_generation_prompt"] = false.into();
    body
}

fn under(sim: &Sim, fault: Value, path: &str, body: &Value) -> Reply {
    sim.fault(fault);
    let reply = sim.post(path, body);
    let head = "DELETE /sim/faults HTTP/1.1\r\nconnection: close\r\n\r\n";
    assert_eq!(request(sim.address, head, b"").status, 200);
    reply
}

/// The bytes of each event of a whole stream.
fn sizes(reply: &Reply) -> Vec<usize> {
    assert!(reply.whole);
    reply.text().split_inclusive("\n\n").map(str::len).collect()
}

/// The ids of every chunk, and where one of them opened a character.
fn ids(reply: &Reply) -> Vec<u32> {
    let events = reply.events();
    let all = events.iter().filter_map(|e| e["choices"][0]["token_ids"].as_array()).flatten();
    all.map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

#[test]
fn every_event_can_be_cut_at_every_byte() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let messages = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 3});
    for (path, body) in [
        (CHAT, chat(3, json!({"stream_options": {"include_usage": true}, "return_token_ids": true}))),
        (COMPLETIONS, json!({"prompt": "x", "stream": true, "max_tokens": 2})),
        ("/v1/responses", json!({"input": "hi", "stream": true, "max_output_tokens": 2})),
        ("/v1/messages", messages),
    ] {
        let sizes = sizes(&sim.post(path, &body));
        let mut before = 0;
        for (event, size) in sizes.iter().enumerate() {
            for byte in (0..=*size).step_by(if path == CHAT { 1 } else { 23 }).chain([*size]) {
                let reply = under(&sim, json!({"kind": "cut", "event": event, "byte": byte}), path, &body);
                assert_eq!((reply.whole, reply.body.len()), (false, before + byte), "{path} {event} {byte}");
            }
            before += size;
        }
        let beyond = under(&sim, json!({"kind": "cut", "event": sizes.len(), "byte": 0}), path, &body);
        assert!(beyond.whole, "{path}: there is no such event");
    }
}

#[test]
fn a_stream_breaks_after_each_token_and_after_the_last() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let body = chat(6, json!({"stream_options": {"include_usage": true}}));
    for tokens in 0..=6u64 {
        let said = expected(&prompt(), tokens.max(1)).text;
        let said = if tokens == 0 { "" } else { said.as_str() };
        for kind in ["close", "end", "error", "reset", "cut"] {
            let reply = under(&sim, json!({"kind": kind, "after_tokens": tokens}), CHAT, &body);
            if kind != "reset" {
                let events = reply.events();
                assert_eq!(reply.content(), said, "{kind} after {tokens}");
                let finished = events.iter().any(|e| e["choices"][0]["finish_reason"] == "length");
                assert_eq!(finished, tokens == 6, "{kind} after {tokens}");
                assert!(!events.iter().any(|e| e["usage"].is_object()), "{kind} after {tokens}");
                assert_eq!(reply.text().contains("[DONE]"), kind == "error");
            }
            assert_eq!(reply.whole, ["end", "error"].contains(&kind), "{kind} after {tokens}");
        }
    }
}

#[test]
fn a_frozen_stream_may_go_on_with_comments() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    sim.fault(json!({"kind": "freeze", "after_tokens": 2, "keep_alive_ms": 5}));
    let mut stream = sim.open(CHAT, &chat(9, json!({})));
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    while seen.matches(": keep-alive\n\n").count() < 3 {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "{seen}");
        seen.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    assert_eq!(seen.matches("data: ").count(), 3, "the role and two tokens: {seen}");
}

/// The trap of tokenizers' DecodeStream: a prompt that ends within a character comes back whole with the first text.
#[test]
fn from_within_a_character_the_whole_prompt_comes_back() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let whole = expected(&prompt(), 121);
    let cut = whole.ids.iter().position(|&id| id == CHAR_HEAD).unwrap() + 1;
    let seen = [&prompt()[..], &whole.ids[..cut]].concat();
    let body = |ids: &[u32]| json!({"prompt": ids, "max_tokens": 120 - cut, "stream": true, "return_token_ids": true});
    let reply = sim.post(COMPLETIONS, &body(&seen));
    let texts: Vec<Value> = reply.events().iter().map(|e| e["choices"][0]["text"].clone()).collect();
    let character = tokens::decoded(&whole.ids[cut..=cut]);
    assert_eq!(texts[0], tokens::decoded(&seen) + &character);
    assert_eq!(ids(&reply), whole.ids[cut..120], "only the text is spoilt");
    // One token earlier or later, nothing is.
    for clean in [cut - 1, cut + 1] {
        let seen = [&prompt()[..], &whole.ids[..clean]].concat();
        let text: String = sim
            .post(COMPLETIONS, &body(&seen))
            .events()
            .iter()
            .filter_map(|e| e["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(text, tokens::decoded(&whole.ids[clean..clean + 120 - cut]));
    }
    let shown = sim.post("/detokenize", &json!({"tokens": seen})).json();
    assert!(shown["prompt"].as_str().unwrap().ends_with('\u{fffd}'));
}

#[test]
fn chunks_have_exactly_the_members_that_vllm_sets() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let sorted = |text: &str| {
        let mut words: Vec<&str> = text.split(' ').collect();
        words.sort_unstable();
        words.join(" ")
    };
    let same = |value: &Value, wanted: &str| assert_eq!(sorted(&keys(value)), sorted(wanted), "{value}");
    let with_usage = json!({"include_usage": true, "continuous_usage_stats": true});

    let plain = sim.post(CHAT, &chat(2, json!({}))).events();
    same(&plain[0], "id object created model choices prompt_token_ids prompt_text");
    same(&plain[0]["choices"][0], "index delta logprobs finish_reason");
    same(&plain[1], "id object created model choices");
    same(&plain[1]["choices"][0], "index delta logprobs finish_reason token_ids");
    same(&plain[2], "id object created model choices system_fingerprint");
    same(&plain[2]["choices"][0], "index delta logprobs finish_reason stop_reason token_ids");
    let used =
        sim.post(CHAT, &chat(2, json!({"stream_options": with_usage, "return_token_ids": true}))).events();
    assert_eq!(
        (&used[0]["prompt_token_ids"], &used[1]["prompt_token_ids"]),
        (&json!(prompt()), &Value::Null)
    );
    same(&used[1]["usage"], "prompt_tokens total_tokens completion_tokens completion_tokens_details");
    same(&used[2], "id object created model choices usage");
    same(&used[3], "id object created model choices usage system_fingerprint");
    same(&used[3]["usage"], "prompt_tokens total_tokens completion_tokens");

    let completion = json!({"prompt": prompt(), "max_tokens": 2, "stream": true});
    let plain = sim.post(COMPLETIONS, &completion).events();
    same(&plain[0], "id object created model choices");
    same(&plain[0]["choices"][0], "index text logprobs finish_reason stop_reason prompt_token_ids token_ids");
    same(&plain[1], "id object created model choices system_fingerprint");
    let mut completion = completion;
    completion["stream_options"] = with_usage;
    completion["return_token_ids"] = true.into();
    let used = sim.post(COMPLETIONS, &completion).events();
    assert_eq!(used[0]["choices"][0]["prompt_token_ids"], json!(prompt()));
    assert!(used[1]["choices"][0]["prompt_token_ids"].is_null());
    same(&used[0]["usage"], "prompt_tokens total_tokens completion_tokens");
    // A continued message is its author's.
    let role =
        |more| sim.post(CHAT, &continued("a", 1, more)).events()[0]["choices"][0]["delta"]["role"].clone();
    assert_eq!(role(json!({})), "assistant");
    assert_eq!(
        role(json!({"messages": [{"role": "user", "content": "x"}]})),
        "assistant",
        "overwritten above"
    );
}

#[test]
fn limits_are_those_of_vllm() {
    let sim = Sim::start(&["--sim-speed", "0", "--max-model-len", "100"]);
    let unary =
        |max_tokens: Value| json!({"prompt": vec![5; 60], "max_tokens": max_tokens, "ignore_eos": true});
    let made =
        |max_tokens| sim.post(COMPLETIONS, &unary(max_tokens)).json()["usage"]["completion_tokens"].clone();
    assert_eq!(made(Value::Null), 16);
    assert_eq!(made(json!(100)), 40, "cut down to the context");
    let refused = sim.post(COMPLETIONS, &unary(json!(101)));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("max_tokens")));
    let chat = chat(1, json!({"max_tokens": null, "ignore_eos": true, "stream": false}));
    let usage = sim.post(CHAT, &chat).json()["usage"].clone();
    assert_eq!(usage["total_tokens"], 100, "a chat fills the context");
    let full = sim.post(COMPLETIONS, &json!({"prompt": vec![5; 100], "max_tokens": 1}));
    assert_eq!((full.status, &full.json()["error"]["param"]), (400, &json!("max_tokens")));
}

#[test]
fn log_probabilities_follow_from_the_prefix_in_every_way_to_continue() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let of = |reply: &Reply| -> Vec<Value> {
        let events = reply.events();
        let all = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array());
        all.flatten().cloned().collect()
    };
    let asked = json!({"logprobs": true, "top_logprobs": 3});
    let whole = of(&sim.post(CHAT, &chat(30, asked.clone())));
    assert_eq!(whole.len(), 30);
    assert_eq!(whole[0]["top_logprobs"].as_array().unwrap().len(), 3);
    let outcome = expected(&prompt(), 30);
    let cut = (5..15).find(|&cut| outcome.ids[cut - 1] != CHAR_HEAD).unwrap();
    let so_far = tokens::decoded(&outcome.ids[..cut]);
    assert_eq!(of(&sim.post(CHAT, &continued(&so_far, 30 - cut as u64, asked))), whole[cut..]);
    // By ids, the same numbers in the shape of completions.
    let seen = [&prompt()[..], &outcome.ids[..cut]].concat();
    let rest = sim.post(COMPLETIONS, &json!({"prompt": seen, "max_tokens": 30 - cut, "logprobs": 3})).json();
    let rest = &rest["choices"][0]["logprobs"];
    for (at, token) in whole[cut..].iter().enumerate() {
        assert_eq!((&rest["tokens"][at], &rest["token_logprobs"][at]), (&token["token"], &token["logprob"]));
        assert_eq!(rest["top_logprobs"][at].as_object().unwrap().len(), 3);
    }
    assert_eq!(rest["text_offset"][0], 0, "counted from where the continuation began");
    for (path, more) in
        [(CHAT, json!({"top_logprobs": 3})), (CHAT, json!({"logprobs": true, "top_logprobs": 21}))]
    {
        assert_eq!(sim.post(path, &chat(3, more)).status, 400);
    }
}

#[test]
fn answers_may_begin_with_reasoning_and_a_tool_call() {
    let sim = Sim::start(&[
        "--sim-speed=0",
        "--sim-reasoning-tokens=4",
        "--sim-tool-call-tokens=3",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    ]);
    let wanted = expected(&prompt(), 12);
    let text = |from: usize, to: usize| tokens::decoded(&wanted.ids[from..to]);
    let tools = json!({"tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]});
    let events = sim.post(CHAT, &chat(12, tools.clone())).events();
    let join = |name: &str| -> String {
        events.iter().filter_map(|e| e["choices"][0]["delta"].pointer(name)?.as_str()).collect()
    };
    assert_eq!(join("/reasoning"), text(0, 4));
    assert_eq!(join("/tool_calls/0/function/arguments"), text(4, 7));
    assert_eq!(join("/tool_calls/0/function/name"), "look");
    assert_eq!(join("/content"), text(7, 12));
    let mut unary = chat(12, tools);
    unary["stream"] = false.into();
    let message = sim.post(CHAT, &unary).json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning"], &message["content"]), (&json!(text(0, 4)), &json!(text(7, 12))));
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], text(4, 7));
    // Without tools there is nothing to call.
    let plain = sim.post(CHAT, &chat(12, json!({})));
    assert_eq!(plain.content(), text(4, 12));
    let anthropic = json!({
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "stream": true,
        "tools": [{"name": "look", "input_schema": {}}],
    });
    let events = sim.post("/v1/messages", &anthropic).events();
    let blocks: Vec<&str> = events.iter().filter_map(|e| e["content_block"]["type"].as_str()).collect();
    assert_eq!(blocks, ["thinking", "tool_use", "text"]);
    let joined: String = events.iter().filter_map(|e| e["delta"]["text"].as_str()).collect();
    assert_eq!(joined, text(7, 12));
}

#[test]
fn responses_continue_what_is_in_progress_and_messages_never() {
    let sim = Sim::start(&["--sim-speed", "0"]);
    let whole = expected(&prompt(), 30);
    let cut = (5..15).find(|&cut| whole.ids[cut - 1] != CHAR_HEAD).unwrap();
    let so_far = tokens::decoded(&whole.ids[..cut]);
    let last = |status: &str| {
        json!({
            "type": "message", "role": "assistant", "status": status,
            "content": [{"type": "output_text", "text": so_far}, {"type": "output_text", "text": "unread"}],
        })
    };
    let responses = |status: &str, stream: bool| {
        json!({
            "input": [{"role": "user", "content": "hi"}, last(status)], "max_output_tokens": 30 - cut, "stream": stream,
        })
    };
    for status in ["in_progress", "incomplete"] {
        let events = sim.post("/v1/responses", &responses(status, true)).events();
        let text: String = events.iter().filter_map(|e| e["delta"].as_str()).collect();
        assert_eq!(so_far.clone() + &text, whole.text, "{status}");
    }
    let other = sim.post("/v1/responses", &responses("completed", false)).json();
    let text = other["output"][0]["content"][0]["text"].as_str().unwrap().to_string();
    assert_ne!(so_far.clone() + &text, whole.text);
    // What such an engine says of its end: nothing.
    let reply = under(
        &sim,
        json!({"kind": "error", "after_tokens": 3}),
        "/v1/responses",
        &responses("in_progress", true),
    );
    assert!(!reply.whole && !reply.text().contains("error"), "{}", reply.text());

    let anthropic = json!({
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": so_far}], "max_tokens": 30 - cut,
    });
    let text =
        sim.post("/v1/messages", &anthropic).json()["content"][0]["text"].as_str().unwrap().to_string();
    assert_ne!(so_far + &text, whole.text);
    let mut anthropic = anthropic;
    anthropic["stream"] = true.into();
    let aborted =
        under(&sim, json!({"kind": "abort", "after_tokens": 2}), "/v1/messages", &anthropic).events();
    let delta = aborted.iter().find(|e| e["type"] == "message_delta").unwrap();
    assert_eq!(delta["delta"]["stop_reason"], Value::Null);
}
