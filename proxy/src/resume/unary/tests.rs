use super::*;
use crate::openai::event::walk;

/// What an engine answered to one request, whole and as a stream: vLLM 0.32 with a tiny model of random weights.
struct Sample {
    api: Api,
    asked: &'static str,
    stream: &'static str,
    body: &'static str,
}

const SAMPLES: [Sample; 6] = [
    Sample {
        api: Api::ChatCompletions,
        asked: "{}",
        stream: include_str!("samples/chat.sse"),
        body: include_str!("samples/chat.json"),
    },
    Sample {
        api: Api::ChatCompletions,
        asked: r#"{"return_token_ids":true}"#,
        stream: include_str!("samples/chat.sse"),
        body: include_str!("samples/chat_ids.json"),
    },
    Sample {
        api: Api::Completions,
        asked: "{}",
        stream: include_str!("samples/completion.sse"),
        body: include_str!("samples/completion.json"),
    },
    Sample {
        api: Api::Completions,
        asked: r#"{"return_token_ids":true}"#,
        stream: include_str!("samples/completion.sse"),
        body: include_str!("samples/completion_ids.json"),
    },
    Sample {
        api: Api::Messages,
        asked: "{}",
        stream: include_str!("samples/messages.sse"),
        body: include_str!("samples/messages.json"),
    },
    Sample {
        api: Api::Responses,
        asked: "{}",
        stream: include_str!("samples/responses.sse"),
        body: include_str!("samples/responses.json"),
    },
];

fn assembled(api: Api, asked: &str, stream: &str) -> Result<Option<String>, Refusal> {
    let original = Members::of(asked.as_bytes()).expect("an object");
    let mut assembly = Assembly::new(api, &original);
    for event in walk(stream.as_bytes(), true) {
        assembly.on_event(event.name, &event.data)?;
    }
    let whole = assembly.is_whole();
    let body = assembly.body().map(|body| String::from_utf8(body).expect("UTF-8"));
    assert_eq!(body.is_some(), whole);
    Ok(body)
}

#[test]
fn the_body_is_what_the_engine_would_have_given() {
    for Sample { api, asked, stream, body } in SAMPLES {
        assert_eq!(
            assembled(api, asked, stream).expect("an answer").as_deref(),
            Some(body.trim_end()),
            "{api:?}"
        );
    }
}

#[test]
fn an_answer_that_did_not_end_is_none() {
    for Sample { api, asked, stream, .. } in SAMPLES {
        let events: Vec<&str> = stream.split_inclusive("\n\n").collect();
        for cut in 0..events.len() {
            let body = assembled(api, asked, &events[..cut].concat()).expect("so far so good");
            assert_eq!(body, None, "{api:?} {cut}");
        }
    }
}

fn chat(delta: &str) -> String {
    format!("data: {{\"id\":\"x\",\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n")
}

const CHAT_END: &str = concat!(
    r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop","stop_reason":null}]}"#,
    "\n\n",
    r#"data: {"choices":[],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":1}}}"#,
    "\n\ndata: [DONE]\n\n"
);

#[test]
fn what_is_no_whole_answer_is_refused() {
    let of = |api, stream: &str| assembled(api, "{}", stream).err();
    let call = chat(r#"{"tool_calls":[{"index":0}]}"#);
    assert_eq!(of(Api::ChatCompletions, &call), Some(Refusal::ToolCall));
    for api in [Api::ChatCompletions, Api::Completions, Api::Messages, Api::Responses] {
        assert_eq!(of(api, "data: {\n\n"), Some(Refusal::Unreadable), "{api:?}");
        assert_eq!(
            of(api, "data: {\"error\":{\"message\":\"m\"}}\n\n"),
            Some(Refusal::Unreadable),
            "{api:?}"
        );
    }
    assert_eq!(of(Api::Completions, "data: {}\n\n"), Some(Refusal::Unreadable));
    let block = |kind: &str| {
        format!("data: {{\"type\":\"content_block_start\",\"content_block\":{{\"type\":\"{kind}\"}}}}\n\n")
    };
    assert_eq!(of(Api::Messages, &block("tool_use")), Some(Refusal::ToolCall));
    assert_eq!(of(Api::Messages, &block("surprise")), Some(Refusal::Unreadable));
    assert_eq!(of(Api::Embeddings, "data: {}\n\n"), Some(Refusal::Api));
}

#[test]
fn thoughts_and_cached_tokens_have_their_places() {
    let stream =
        [&chat(r#"{"role":"assistant","content":""}"#), &chat(r#"{"reasoning":"h\n"}"#), CHAT_END].concat();
    let body = assembled(Api::ChatCompletions, "{}", &stream).expect("an answer").expect("a whole one");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(body["choices"][0]["message"]["reasoning"], "h\n");
    assert_eq!(body["choices"][0]["message"]["content"], Value::Null);
    let details =
        serde_json::json!({"cached_tokens": 1, "created_cache_tokens": null, "multimodal_tokens": null});
    assert_eq!(body["usage"]["prompt_tokens_details"], details);

    let event = |data: &str| format!("data: {data}\n\n");
    let stream = [
        event(r#"{"type":"message_start","message":{"id":"i","model":"m"}}"#),
        event(r#"{"type":"content_block_start","content_block":{"type":"thinking","thinking":""}}"#),
        event(r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"h"}}"#),
        event(r#"{"type":"content_block_delta","delta":{"type":"signature_delta","signature":"s"}}"#),
        event(r#"{"type":"content_block_start","content_block":{"type":"text","text":""}}"#),
        event(r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"t"}}"#),
        event(
            r#"{"type":"message_delta","delta":{"stop_reason":"stop_sequence","stop_sequence":"S"},"usage":{"input_tokens":1}}"#,
        ),
        event(r#"{"type":"message_stop"}"#),
    ];
    assert_eq!(
        assembled(Api::Messages, "{}", &stream.concat()).expect("an answer").expect("a whole one"),
        concat!(
            r#"{"id":"i","type":"message","role":"assistant","content":[{"type":"thinking","thinking":"h","signature":"s"},"#,
            r#"{"type":"text","text":"t"}],"model":"m","stop_reason":"stop_sequence","stop_sequence":"S","usage":{"input_tokens":1}}"#
        )
    );
}

fn streamed(api: Api, body: &str) -> Option<String> {
    let original = Members::of(body.as_bytes()).expect("an object");
    as_stream(api, &original).map(|body| String::from_utf8(body).expect("UTF-8"))
}

#[test]
fn a_request_for_a_whole_answer_becomes_one_for_a_stream() {
    let options = r#""stream":true,"stream_options":{"include_usage":true},"return_token_ids":true"#;
    assert_eq!(
        streamed(
            Api::ChatCompletions,
            r#"{"n":1,"temperature":1e-05,"stream":false,"response_format":{"type":"text"}}"#
        ),
        Some(format!(r#"{{"n":1,"temperature":1e-05,"response_format":{{"type":"text"}},{options}}}"#))
    );
    for prompt in [r#""x""#, "[1,2]", r#"["x"]"#, "[[1,2]]"] {
        let expected = format!("{{\"prompt\":{prompt},{options}}}");
        assert_eq!(streamed(Api::Completions, &format!("{{\"prompt\":{prompt}}}")), Some(expected));
    }
    assert_eq!(streamed(Api::Messages, r#"{"a":1}"#).as_deref(), Some(r#"{"a":1,"stream":true}"#));
    assert_eq!(streamed(Api::Responses, r#"{"a":1}"#).as_deref(), Some(r#"{"a":1,"stream":true}"#));
}

#[test]
fn what_is_not_equivalent_is_no_stream() {
    for api in [Api::ChatCompletions, Api::Completions, Api::Messages, Api::Responses, Api::Embeddings] {
        for body in [
            r#"{"prompt":"x","stream":true}"#,
            r#"{"prompt":"x","stream_options":{}}"#,
            r#"{"prompt":"x","tools":[{}]}"#,
            r#"{"prompt":"x","kv_transfer_params":{"a":1}}"#,
        ] {
            assert_eq!(streamed(api, body), None, "{api:?} {body}");
        }
    }
    for setting in [
        "\"n\":2",
        "\"best_of\":2",
        "\"echo\":true",
        "\"use_beam_search\":true",
        "\"prompt_logprobs\":0",
        "\"return_prompt_text\":true",
        "\"logprobs\":1",
    ] {
        for api in [Api::ChatCompletions, Api::Completions] {
            assert_eq!(streamed(api, &format!("{{\"prompt\":\"x\",{setting}}}")), None, "{api:?} {setting}");
        }
    }
    assert_eq!(streamed(Api::ChatCompletions, r#"{"modalities":["text","audio"]}"#), None);
    assert!(streamed(Api::ChatCompletions, r#"{"logprobs":false}"#).is_some());
    for prompt in ["[]", r#"["x","y"]"#, "[[1],[2]]", "5", r#"[1,"x"]"#] {
        assert_eq!(streamed(Api::Completions, &format!("{{\"prompt\":{prompt}}}")), None, "{prompt}");
    }
    for setting in [r#""background":true"#, r#""include":["x"]"#, r#""previous_response_id":"x""#] {
        assert_eq!(streamed(Api::Responses, &format!("{{{setting}}}")), None, "{setting}");
    }
}
