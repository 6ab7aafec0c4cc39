//! What an answer says of itself, found without a parser, against what `serde_json` was told to write.
//!
//! An input chooses the numbers, the reasons, the framing and the cuts, and above all the texts: whatever a model may say
//! (needles of the search included) must not change what is found. As raw bytes the input must not panic either.

use bytes::Bytes;
use penstock_proxy::openai::{
    event::EventSplitter,
    usage::{BodyFacts, FinishReason, StreamFacts, Terminal, Usage},
};
use serde_json::{Value, json};

const REASONS: [(&str, FinishReason); 4] = [
    ("stop", FinishReason::Stop),
    ("length", FinishReason::Length),
    ("tool_calls", FinishReason::ToolCalls),
    ("abort", FinishReason::Abort),
];

/// Panics if something is found that was not said, or the other way round.
pub fn check(input: &[u8]) {
    StreamFacts::default().observe(input);
    let mut body = BodyFacts::default();
    body.push(input);
    let _any = (body.usage(), body.finish_reason());

    let Some((choices, text)) = input.split_at_checked(6) else { return };
    let text = String::from_utf8_lossy(text);
    let reason = REASONS[usize::from(choices[0] % 4)];
    let usage = Usage {
        prompt: Some(u64::from(choices[1]) << (choices[2] % 50)),
        completion: Some(u64::from(choices[2])),
        cached: (choices[3] % 2 == 1).then_some(u64::from(choices[3])),
    };
    check_chat(&text, reason, usage, choices);
    check_body(&text, reason, usage, choices);
    check_messages(&text, usage, choices);
}

fn counts(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
        "prompt_tokens_details": usage.cached.map(|cached| json!({"cached_tokens": cached})),
    })
}

/// The stream's facts, read in chunks of some size.
fn observed(stream: &str, choices: &[u8]) -> StreamFacts {
    let stream = match choices[4] % 3 {
        0 => stream.to_owned(),
        1 => stream.replace('\n', "\r\n"),
        _ => stream.replace('\n', "\r"),
    };
    let (mut splitter, mut facts) = (EventSplitter::default(), StreamFacts::default());
    for chunk in stream.as_bytes().chunks(usize::from(choices[5]) + 1) {
        if let Some(whole) = splitter.push(Bytes::copy_from_slice(chunk)).expect("small") {
            facts.observe(&whole);
        }
    }
    facts
}

fn check_chat(text: &str, (word, reason): (&str, FinishReason), usage: Usage, choices: &[u8]) {
    let delta = |content: &str, finish: Option<&str>| {
        let choice =
            json!({"index": 0, "delta": {"content": content}, "logprobs": null, "finish_reason": finish});
        format!("data: {}\n\n", json!({"id": text, "choices": [choice], "usage": null}))
    };
    let last = json!({"id": "c", "choices": [], "usage": counts(usage)});
    let stream = [
        delta(text, None),
        ": a comment\n\n".into(),
        delta(text, Some(word)),
        format!("data: {last}\n\ndata: [DONE]\n\n"),
    ];
    let wanted = StreamFacts {
        events: 4,
        finish_reason: Some(reason),
        finished_choices: 1,
        usage,
        terminal: Some(Terminal::Done),
        error: None,
        begun: true,
    };
    assert_eq!(observed(&stream.concat(), choices), wanted);
}

fn check_body(text: &str, (word, reason): (&str, FinishReason), usage: Usage, choices: &[u8]) {
    let body = json!({
        "id": text, "choices": [{"message": {"content": text}, "finish_reason": word}], "usage": counts(usage),
    });
    let mut facts = BodyFacts::default();
    for chunk in body.to_string().as_bytes().chunks(usize::from(choices[5]) + 1) {
        facts.push(chunk);
    }
    assert_eq!((facts.usage(), facts.finish_reason()), (usage, Some(reason)));
}

fn check_messages(text: &str, usage: Usage, choices: &[u8]) {
    let event = |kind: &str, data: Value| format!("event: {kind}\ndata: {data}\n\n");
    let start =
        json!({"input_tokens": usage.prompt, "output_tokens": 0, "cache_read_input_tokens": usage.cached});
    let stream = [
        event("message_start", json!({"type": "message_start", "message": {"id": text, "usage": start}})),
        event("content_block_delta", json!({"type": "content_block_delta", "delta": {"text": text}})),
        event(
            "message_delta",
            json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": usage.completion}}),
        ),
        event("message_stop", json!({"type": "message_stop"})),
    ];
    let facts = observed(&stream.concat(), choices);
    assert_eq!(facts.usage, usage);
    assert_eq!(facts.terminal, Some(Terminal::MessageStop));
    assert!(facts.succeeded(), "{facts:?}");
}
