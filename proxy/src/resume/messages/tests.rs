use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::model::{Answer, Event, Finish, INPUT, Relay, Stream, answers, bytes, through},
    *,
};

impl Stream for Seen {
    type Stitch = Stitch;
    fn on_event(&mut self, name: &[u8], data: &[u8]) -> Verdict {
        self.on_event(name, data)
    }
    fn plan(&self, original: &Members<'_>, answers: &Answers) -> Result<(Ask, Stitch), NoPlan> {
        self.plan(original, answers)
    }
    fn resumed(&mut self) {
        self.resumed();
    }
    fn stitch(stitch: &mut Stitch, name: &[u8], data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        stitch.on_event(name, data, out)
    }
}

/// How an engine orders a block event's keys: as vLLM's pydantic, or the index first.
#[derive(Debug, Clone, Copy)]
enum Order {
    Vllm,
    IndexFirst,
}

fn block(order: Order, kind: &'static str, index: u64, key: &str, value: &Value) -> Event {
    let data = match order {
        Order::Vllm => format!(r#"{{"type":"{kind}","{key}":{value},"index":{index}}}"#),
        Order::IndexFirst => format!(r#"{{"type":"{kind}","index":{index},"{key}":{value}}}"#),
    };
    (kind, data)
}

fn text(order: Order, text: &str) -> Event {
    block(order, "content_block_delta", 0, "delta", &json!({"type": "text_delta", "text": text}))
}

fn start(id: usize) -> Event {
    let message = json!({
        "id": format!("chatcmpl-{id}"), "type": "message", "role": "assistant", "content": [], "model": "m",
        "stop_reason": null, "stop_sequence": null, "usage": {"input_tokens": INPUT, "output_tokens": 0},
    });
    ("message_start", json!({"type": "message_start", "message": message}).to_string())
}

fn open(order: Order) -> Event {
    block(order, "content_block_start", 0, "content_block", &json!({"type": "text", "text": ""}))
}

fn end(answer: &Answer, made: u64) -> Vec<Event> {
    let (reason, sequence) = match answer.finish {
        Finish::End => ("end_turn", Value::Null),
        Finish::Length => ("max_tokens", Value::Null),
        Finish::Stop => ("stop_sequence", "S\"".into()),
    };
    let delta = json!({
        "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
        "usage": {"input_tokens": INPUT, "output_tokens": made},
    });
    vec![("message_delta", delta.to_string()), ("message_stop", json!({"type": "message_stop"}).to_string())]
}

/// `/v1/messages` of engine number `id`.
fn messages(answer: &Answer, order: Order, id: usize) -> Vec<Event> {
    let rest = answer.after("", answer.max());
    let mut events = vec![start(id)];
    if !rest.tokens.is_empty() {
        events.push(open(order));
        events.extend(rest.tokens.iter().map(|token| text(order, token)));
        events.push(("content_block_stop", json!({"type": "content_block_stop", "index": 0}).to_string()));
    }
    events.extend(end(answer, rest.made));
    events
}

/// `/v1/chat/completions`, continuing.
fn chat(answer: &Answer, ask: &Ask) -> Vec<Event> {
    let body: Value = serde_json::from_slice(&ask.body).expect("JSON");
    let last = body["messages"].as_array().and_then(|all| all.last()).expect("a message");
    assert_eq!((&last["role"], &body["continue_final_message"]), (&json!("assistant"), &json!(true)));
    let max = body["max_tokens"].as_u64().expect("a limit");
    let rest = answer.after(last["content"].as_str().expect("text"), max);
    let chunk = |delta: Value, finish: Value, stop: Value| {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish, "stop_reason": stop});
        ("", json!({"id": "chatcmpl-other", "model": "other", "choices": [choice]}).to_string())
    };
    let mut events = vec![chunk(json!({"role": "assistant", "content": ""}), Value::Null, Value::Null)];
    for token in &rest.tokens {
        events.push(chunk(json!({"content": token}), Value::Null, Value::Null));
    }
    let (finish, stop) = match rest.finish {
        Finish::End => ("stop", Value::Null),
        Finish::Length => ("length", Value::Null),
        Finish::Stop => ("stop", json!("S\"")),
    };
    events.push(chunk(json!({"content": ""}), finish.into(), stop));
    let usage = json!({"prompt_tokens": rest.prompt, "total_tokens": rest.prompt + rest.made, "completion_tokens": rest.made});
    events.push(("", json!({"id": "chatcmpl-other", "choices": [], "usage": usage}).to_string()));
    events.push(("", "[DONE]".into()));
    events
}

fn body(answer: &Answer) -> Vec<u8> {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": answer.max(), "stream": true,
        "stop_sequences": ["S\""],
    });
    body.to_string().into_bytes()
}

fn cut_at(answer: &Answer, order: Order, cuts: &[usize]) -> Vec<u8> {
    through::<Seen>(answer, &body(answer), cuts, |number, ask| {
        if ask.path == "/v1/chat/completions" { chat(answer, ask) } else { messages(answer, order, number) }
    })
}

/// The stream as one engine would have sent it: the one that began it.
fn whole(answer: &Answer, order: Order, delivered: &[u8]) -> Vec<u8> {
    let first = (0..9).find(|id| delivered.starts_with(&bytes(&[start(*id)]))).expect("a start");
    bytes(&messages(answer, order, first))
}

fn same(answer: &Answer, order: Order, cuts: &[usize]) {
    let delivered = cut_at(answer, order, cuts);
    let expected = whole(answer, order, &delivered);
    assert_eq!(
        String::from_utf8_lossy(&delivered),
        String::from_utf8_lossy(&expected),
        "{answer:?} {cuts:?}"
    );
}

#[test]
fn a_stream_cut_anywhere_is_the_uninterrupted_one() {
    for finish in [Finish::End, Finish::Length, Finish::Stop] {
        let answer = Answer::of(&[" Hello", ",", "\n", " wörld \"x\"", " 😀"], finish);
        for order in [Order::Vllm, Order::IndexFirst] {
            for first in 0..11 {
                same(&answer, order, &[first]);
                for second in 0..11 {
                    same(&answer, order, &[first, second]);
                    same(&answer, order, &[first, second, 2]);
                }
            }
        }
    }
}

#[test]
fn an_answer_without_text_goes_on_too() {
    let answer = Answer::of(&[], Finish::End);
    (0..3).for_each(|cut| same(&answer, Order::Vllm, &[cut]));
}

proptest! {
    #[test]
    fn any_answer_cut_anywhere_is_the_uninterrupted_one(
        answer in answers(), cuts in prop::collection::vec(0usize..14, 1..4), vllm: bool,
    ) {
        same(&answer, if vllm { Order::Vllm } else { Order::IndexFirst }, &cuts);
    }

    #[test]
    fn no_bytes_panic(name in ".{0,12}", data in ".{0,40}") {
        let mut seen = Seen::default();
        let _verdict = seen.on_event(name.as_bytes(), data.as_bytes());
        let mut out = Vec::new();
        for mut stitch in [
            Stitch::again(true, true, wire::Seam::default()),
            Stitch::chat(
                stitch::Form::of(text(Order::Vllm, "x").1.as_bytes()).expect("a form"),
                stitch::Counts { input: None, seen: 1, full: false },
                wire::Seam::default(),
            ),
        ] {
            let fits = stitch.on_event(name.as_bytes(), data.as_bytes(), &mut out);
            prop_assert!(fits.is_ok(), "nothing of it is of this API");
        }
    }
}

fn lost(events: &[Event]) -> Result<(), Loss> {
    Relay::<Seen>::new().relay(events)
}

#[test]
fn every_way_to_die_is_seen() {
    let begun = [start(0), open(Order::Vllm), text(Order::Vllm, "a")];
    let after = |name: &'static str, data: &str| lost(&[&begun[..], &[(name, data.to_owned())]].concat());
    let delta = |reason: &str| format!(r#"{{"type":"message_delta","delta":{{"stop_reason":{reason}}}}}"#);
    assert_eq!(after("message_delta", &delta("null")), Err(Loss::Aborted));
    assert_eq!(after("message_delta", &delta("\"abort\"")), Err(Loss::Aborted));
    assert_eq!(after("message_delta", &delta("\"error\"")), Err(Loss::ErrorEvent));
    assert_eq!(after("message_stop", r#"{"type":"message_stop"}"#), Err(Loss::Unfinished));
    assert_eq!(after("", "[DONE]"), Err(Loss::Unfinished));
    let error = |kind: &str| format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"m"}}}}"#);
    assert_eq!(after("error", &error("internal_error")), Err(Loss::ErrorEvent));
    assert_eq!(after("error", &error("overloaded_error")), Err(Loss::ErrorEvent));
    assert_eq!(after("error", &error("invalid_request_error")), Ok(()), "no other engine would do better");
    for garbage in ["", "{", "{}", "[]", "1", r#"{"type":"surprise"}"#, r#"{"choices":[]}"#] {
        assert_eq!(after("", garbage), Err(Loss::Garbage), "{garbage}");
    }
    assert_eq!(
        after("ping", r#"{"type":"message_stop"}"#),
        Err(Loss::Garbage),
        "it is not what it is called"
    );
    assert_eq!(after("message_start", &start(1).1), Err(Loss::Garbage), "it began twice");
    assert_eq!(after("ping", r#"{"type":"ping"}"#), Ok(()));
}

#[test]
fn a_continuation_may_die_of_its_own() {
    let answer = Answer::of(&[" a", " b", " c"], Finish::End);
    let continuation = |events: &[Event]| {
        let mut relay = Relay::<Seen>::new();
        relay.relay(&messages(&answer, Order::Vllm, 0)[..3]).expect("a beginning");
        let ask = relay.ask(&body(&answer), &answer).expect("a plan");
        assert_eq!(ask.recomputed, 1);
        let lost = relay.relay(events);
        (lost, relay)
    };
    let error = ("", r#"{"error":{"message":"m","type":"InternalServerError","code":500}}"#.to_owned());
    assert_eq!(continuation(&[error]).0, Err(Loss::ErrorEvent));
    assert_eq!(continuation(&[("", "{garbage".to_owned())]).0, Err(Loss::Garbage));
    assert_eq!(continuation(&[("", r#"{"x":1}"#.to_owned())]).0, Err(Loss::Garbage));
    let finish = |reason: &str| {
        let choice = json!({"index": 0, "delta": {}, "finish_reason": reason, "stop_reason": null});
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 1}});
        [("", json!({"choices": [choice]}).to_string()), ("", usage.to_string())]
    };
    assert_eq!(continuation(&finish("abort")).0, Err(Loss::Aborted));
    let (unfinished, relay) = continuation(&[("", "[DONE]".to_owned())]);
    assert_eq!(unfinished, Ok(()));
    assert!(!String::from_utf8_lossy(&relay.delivered).contains("message_stop"), "no end that is none");
}

fn refused(events: &[Event], more: Value) -> Option<Refusal> {
    let mut body = json!({"model": "m", "max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let answer = Answer::of(&["a"], Finish::End);
    let mut relay = Relay::<Seen>::new();
    relay.relay(events).expect("nothing is wrong with it");
    relay.ask(body.to_string().as_bytes(), &answer).err()
}

#[test]
fn what_would_be_wrong_is_refused() {
    let order = Order::Vllm;
    let begun = [start(0), open(order), text(order, "a")];
    let with = |more: Value| refused(&begun, more);
    assert_eq!(with(json!({})), None);
    assert_eq!(
        with(json!({"output_config": {"format": {"type": "json_schema"}}})),
        Some(Refusal::StructuredOutput)
    );
    assert_eq!(with(json!({"tools": [], "tool_choice": {"type": "any"}})), Some(Refusal::StructuredOutput));
    assert_eq!(with(json!({"kv_transfer_params": {"a": 1}})), Some(Refusal::EngineState));
    assert_eq!(with(json!({"max_tokens": null})), Some(Refusal::Body));
    assert_eq!(with(json!({"messages": [{"role": "system", "content": "x"}]})), Some(Refusal::Body));
    let blocks = |role: &str, block: Value| with(json!({"messages": [{"role": role, "content": [block]}]}));
    assert_eq!(blocks("user", json!({"type": "document"})), Some(Refusal::Body));
    assert_eq!(blocks("assistant", json!({"type": "tool_result", "content": "x"})), Some(Refusal::Body));
    assert_eq!(with(json!({"system": 5})), Some(Refusal::Body));
    assert_eq!(with(json!({"tools": [{"name": "x"}]})), Some(Refusal::Body));

    let opened = |kind: &str| {
        let block = block(order, "content_block_start", 0, "content_block", &json!({"type": kind}));
        refused(&[start(0), block], json!({}))
    };
    assert_eq!(opened("thinking"), Some(Refusal::Reasoning));
    assert_eq!(opened("tool_use"), Some(Refusal::ToolCall));
    assert_eq!(opened("surprise"), Some(Refusal::Unreadable));
    let delta = |kind: &str| block(order, "content_block_delta", 0, "delta", &json!({"type": kind}));
    assert_eq!(refused(&[start(0), delta("surprise_delta")], json!({})), Some(Refusal::Unreadable));
    assert_eq!(refused(&[start(0), delta("input_json_delta")], json!({})), Some(Refusal::ToolCall));
}

#[test]
fn the_request_is_what_vllm_makes_of_it() {
    let body = json!({
        "model": "m", "max_tokens": 20, "stream": true, "temperature": 0, "top_k": 3, "stop_sequences": ["x"],
        "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "x-anthropic-billing-header: 1"},
            {"type": "text", "text": "brief."}],
        "thinking": {"type": "disabled"}, "metadata": {"user_id": "u"},
        "tools": [{"name": "f", "description": "d", "input_schema": {"properties": {}}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look:"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I call."}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
                "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]},
        ],
    })
    .to_string();
    let original = Members::of(body.as_bytes()).expect("an object");
    let chat = request::Chat::of(&original).expect("understood").continued("So ", 17);
    let chat: Value = serde_json::from_slice(&chat).expect("JSON");
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}});
    let call = json!({"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
    let function =
        json!({"name": "f", "description": "d", "parameters": {"properties": {}, "type": "object"}});
    let expected = json!({
        "model": "m", "temperature": 0, "top_k": 3, "stop": ["x"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, image]},
            {"role": "assistant", "reasoning": "hm", "tool_calls": [call], "content": "I call."},
            {"role": "tool", "tool_call_id": "t1", "content": "1\n2"},
            {"role": "assistant", "content": "So "},
        ],
        "max_tokens": 17, "reasoning_effort": "none",
        "tools": [{"type": "function", "function": function}], "tool_choice": "auto",
        "stream": true, "stream_options": {"include_usage": true},
        "continue_final_message": true, "add_generation_prompt": false,
    });
    assert_eq!(chat, expected);
}

#[test]
fn a_call_behind_the_cut_is_a_block_of_its_own() {
    let answer = Answer::of(&[" a", " b"], Finish::End);
    let mut relay = Relay::<Seen>::new();
    relay.relay(&messages(&answer, Order::Vllm, 0)[..3]).expect("a beginning");
    relay.ask(&body(&answer), &answer).expect("a plan");
    let chunk = |delta: Value| ("", json!({"choices": [{"index": 0, "delta": delta}]}).to_string());
    let call = |call: Value| chunk(json!({"tool_calls": [call]}));
    relay
        .relay(&[
            chunk(json!({"content": " b"})),
            call(json!({"index": 0, "id": "t", "function": {"name": "f", "arguments": ""}})),
            call(json!({"index": 0, "function": {"arguments": "{\"x\":"}})),
            chunk(json!({"content": "!"})),
            call(json!({"index": 0, "function": {"arguments": "1}"}})),
            ("", r#"{"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls","stop_reason":null}]}"#.to_owned()),
            ("", r#"{"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}"#.to_owned()),
            ("", "[DONE]".to_owned()),
        ])
        .expect("it fits");
    let delivered = String::from_utf8(relay.delivered).expect("UTF-8");
    let data: Vec<&str> = delivered.lines().filter_map(|line| line.strip_prefix("data: ")).skip(3).collect();
    assert_eq!(
        data,
        [
            r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":" b"},"index":0}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"t","name":"f","input":{}},"index":1}"#,
            r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{\"x\":"},"index":1}"#,
            r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"1}"},"index":1}"#,
            r#"{"type":"content_block_stop","index":1}"#,
            r#"{"type":"content_block_start","content_block":{"type":"text","text":""},"index":2}"#,
            r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"!"},"index":2}"#,
            r#"{"type":"content_block_stop","index":2}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"input_tokens":3,"output_tokens":6,"cache_read_input_tokens":4}}"#,
            r#"{"type":"message_stop"}"#,
        ]
    );
    assert_eq!(relay.seen.tokens(), Some(6));
}

#[test]
fn a_continuation_that_thinks_does_not_fit() {
    let answer = Answer::of(&[" a", " b"], Finish::End);
    let mut relay = Relay::<Seen>::new();
    relay.relay(&messages(&answer, Order::Vllm, 0)[..3]).expect("a beginning");
    let original = body(&answer);
    let original = Members::of(&original).expect("an object");
    let answers = Answers { tokens: Some(1), ..Answers::default() };
    let (_, mut stitch) = relay.seen.plan(&original, &answers).expect("a plan");
    let thought = br#"{"choices":[{"index":0,"delta":{"reasoning":"hm"}}]}"#;
    assert_eq!(stitch.on_event(b"", thought, &mut Vec::new()), Err(Refusal::Mismatch));
}
