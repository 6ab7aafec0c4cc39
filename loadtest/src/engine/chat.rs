//! `/v1/chat/completions`: from messages to a job, and from tokens to chat chunks.

use serde_json::Value;

use super::{
    args::Options,
    error::ApiError,
    generation::{Finish, Outcome, block_hashes},
    logprobs::{self, Logprobs},
    parser::{Parser, Part},
    render::{Frame, Job, Render, Token, Usage, push_escaped, push_finish, push_ids, quoted},
    request::{Fields, Sampling, StreamUsage},
    template::{Ending, Message, render},
    tokens,
};

/// The start of a tool call: the one that an answer can have.
const TOOL_CALL: &str = "\"id\":\"chatcmpl-tool-0\",\"type\":\"function\"";

/// What is known of a request before its body.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// Id without its prefix, from X-Request-Id or random.
    pub(super) id: String,
    /// Unix time, s.
    pub(super) created: u64,
    /// `vllm-VERSION-HASH`.
    pub(super) fingerprint: String,
}

/// What a chat request asks about.
pub(super) struct Asked {
    /// The prompt's ids.
    pub(super) ids: Vec<u32>,
    /// Whose message the answer is: the assistant's, or its who is continued.
    role: String,
    /// The first tool that may be called.
    tool: Option<String>,
}

/// Makes a job of a chat request.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn job(mut fields: Fields, origin: &Origin, options: &Options) -> Result<Job, ApiError> {
    let (model, asked, stream) =
        (fields.model(options)?, asked(&mut fields, options)?, fields.flag("stream")?);
    let usage = StreamUsage::take(&mut fields, stream, options)?;
    let return_ids = fields.flag("return_token_ids")?;
    let top = logprobs::of_chat(&mut fields)?;
    let sampling = Sampling::take(&mut fields, &["max_completion_tokens", "max_tokens"], "stop")?;
    let (prefix, blocks) = block_hashes(&asked.ids);
    let generations = sampling.generations(&asked.ids, prefix, options.max_model_len)?;
    let choices = generations.len();
    let id = format!("chatcmpl-{}", origin.id);
    let renderer = Chat {
        role: asked.role,
        prompt_ids: return_ids.then_some(asked.ids),
        logprobs: top.map(|top| Logprobs::new(top, vec![prefix; choices])),
        parser: parser(options, asked.tool),
        ..Chat::new(&id, &model, origin, usage, choices)
    };
    Ok(Job {
        blocks: vec![blocks; choices],
        generations,
        prompt_tokens: prefix.len(),
        n: sampling.n,
        max_tokens: sampling.max_tokens,
        stream,
        render: Box::new(renderer),
    })
}

/// How this engine parses an answer to a request with that tool.
pub(super) fn parser(options: &Options, tool: Option<String>) -> Parser {
    Parser::new(options.sim.reasoning_tokens, options.sim.tool_call_tokens, tool)
}

/// Takes what a chat request asks about out.
///
/// # Errors
/// 400, naming the field.
pub(super) fn asked(fields: &mut Fields, options: &Options) -> Result<Asked, ApiError> {
    let messages = match fields.take("messages") {
        Some(Value::Array(items)) => items.into_iter().map(message).collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err(ApiError::invalid("list_type", "messages", "Input should be a valid list")),
        None => return Err(ApiError::invalid("missing", "messages", "Field required")),
    };
    let Some(last) = messages.last() else {
        return Err(ApiError::bad("messages", "messages must have at least one element"));
    };
    let tool = tool(fields, options)?;
    let continues = fields.flag("continue_final_message")?;
    let answers = fields.optional_flag("add_generation_prompt")?.unwrap_or(true);
    let ending = match (continues, answers) {
        (true, true) => {
            let message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
            return Err(ApiError::bad("continue_final_message", message));
        }
        (true, false) => Ending::Continue,
        (false, true) => Ending::Answer,
        (false, false) => Ending::Closed,
    };
    let role = if answers { "assistant".into() } else { last.role.clone() };
    Ok(Asked { ids: render(&messages, ending), role, tool })
}

/// The name of the first tool, if it may be called.
fn tool(fields: &mut Fields, options: &Options) -> Result<Option<String>, ApiError> {
    let tools = fields.take("tools").filter(|t| t.as_array().is_none_or(|t| !t.is_empty()));
    let refused = fields.take("tool_choice") == Some("none".into());
    let Some(tools) = tools.filter(|_| !refused) else { return Ok(None) };
    if !options.auto_tool_choice {
        let message =
            "\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set";
        return Err(ApiError::bad("tool_choice", message));
    }
    let first = tools.get(0);
    let name = first.and_then(|tool| tool.pointer("/function/name").or_else(|| tool.get("name")));
    Ok(Some(name.and_then(Value::as_str).unwrap_or("tool").to_string()))
}

/// One message, its parts joined.
///
/// # Errors
/// 400 if it has no role, or parts that are no text.
pub(super) fn message(item: Value) -> Result<Message, ApiError> {
    let Value::Object(mut item) = item else {
        return Err(ApiError::invalid("dict_type", "messages", "Input should be a valid dictionary"));
    };
    let Some(Value::String(role)) = item.remove("role") else {
        return Err(ApiError::invalid("missing", "messages", "A message needs a role that is a string"));
    };
    let mut content = match item.remove("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.into_iter().map(part).collect::<Result<String, _>>()?,
        Some(_) => {
            return Err(ApiError::invalid(
                "string_type",
                "messages",
                "Content should be a string or a list of parts",
            ));
        }
    };
    if let Some(calls) = item.remove("tool_calls").filter(|c| !c.is_null()) {
        content.push_str(&calls.to_string());
    }
    Ok(Message { role, content })
}

fn part(part: Value) -> Result<String, ApiError> {
    match part {
        Value::String(text) => Ok(text),
        Value::Object(mut part) => match part.remove("text") {
            Some(Value::String(text)) => Ok(text),
            _ => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("unknown");
                Err(ApiError::bad("messages", format!("At most 0 {kind}(s) may be provided in one prompt.")))
            }
        },
        _ => Err(ApiError::invalid("dict_type", "messages", "A part of a message should be a dictionary")),
    }
}

/// Renders chat chunks.
struct Chat {
    /// The object's start, up to `created` and `model`.
    head: String,
    /// Before the delta of choice i, from `data:`.
    before: Vec<Vec<u8>>,
    /// Tokens of choice i so far.
    made: Vec<u64>,
    fingerprint: String,
    usage: StreamUsage,
    role: String,
    prompt_ids: Option<Vec<u32>>,
    logprobs: Option<Logprobs>,
    parser: Parser,
}

impl Chat {
    fn new(id: &str, model: &str, origin: &Origin, usage: StreamUsage, choices: usize) -> Self {
        let rest = format!("\"created\":{},\"model\":{}", origin.created, quoted(model));
        let head = format!("{{\"id\":{},\"object\":\"chat.completion.chunk\",{rest}", quoted(id));
        let before = |i| format!("data: {head},\"choices\":[{{\"index\":{i},\"delta\":{{").into_bytes();
        Self {
            before: (0..choices).map(before).collect(),
            made: vec![0; choices],
            head,
            fingerprint: origin.fingerprint.clone(),
            usage,
            role: "assistant".into(),
            prompt_ids: None,
            logprobs: None,
            parser: Parser::default(),
        }
    }

    fn push_usage(&self, out: &mut Vec<u8>, usage: Usage) {
        if self.usage.continuous {
            out.extend_from_slice(b",\"usage\":");
            Usage { cached: 0, ..usage }.push_openai(out);
            out.pop();
            out.extend_from_slice(b",\"completion_tokens_details\":null}");
        }
    }

    /// Appends the inside of a delta with this text.
    fn push_delta(&self, out: &mut Vec<u8>, part: Part, text: &str) {
        match part {
            Part::Content => out.extend_from_slice(b"\"content\":\""),
            Part::Reasoning => out.extend_from_slice(b"\"reasoning\":\""),
            Part::Call { first: true } => {
                let start = format!("\"tool_calls\":[{{{TOOL_CALL},\"index\":0,\"function\":{{\"name\":");
                out.extend_from_slice(start.as_bytes());
                out.extend_from_slice(quoted(self.parser.tool()).as_bytes());
                out.extend_from_slice(b",\"arguments\":\"");
            }
            Part::Call { first: false } => {
                out.extend_from_slice(b"\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"");
            }
        }
        push_escaped(out, text);
        out.extend_from_slice(if matches!(part, Part::Call { .. }) { b"\"}}]" } else { b"\"" });
    }

    fn push_logprobs(&mut self, out: &mut Vec<u8>, choice: usize, ids: &[u32]) {
        match &mut self.logprobs {
            Some(logprobs) => logprobs.push_chat(out, choice, ids),
            None => out.extend_from_slice(b"null"),
        }
    }

    /// The `finish_reason` of a choice of so many tokens.
    fn reason(&self, finish: &Finish, tokens: u64) -> &'static str {
        if self.parser.calls(tokens) && finish.reason() == "stop" { "tool_calls" } else { finish.reason() }
    }
}

impl Render for Chat {
    fn open(&mut self, frame: &mut Frame, usage: Usage) {
        for i in 0..self.before.len() {
            frame.event(|out| {
                let start = format!("data: {},\"choices\":[{{\"index\":{i},\"delta\":{{\"role\":", self.head);
                out.extend_from_slice(start.as_bytes());
                out.extend_from_slice(quoted(&self.role).as_bytes());
                out.extend_from_slice(b",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]");
                self.push_usage(out, usage);
                out.extend_from_slice(b",\"prompt_token_ids\":");
                push_optional_ids(out, self.prompt_ids.as_ref());
                out.extend_from_slice(b",\"prompt_text\":null}\n\n");
            });
        }
    }

    fn token(&mut self, frame: &mut Frame, token: &Token<'_>) {
        let part = self.parser.part(self.made[token.choice]);
        self.made[token.choice] += u64::from(token.id.is_some());
        frame.event(|out| {
            out.extend_from_slice(&self.before[token.choice]);
            self.push_delta(out, part, token.text);
            out.extend_from_slice(b"},\"logprobs\":");
            self.push_logprobs(out, token.choice, token.id.as_slice());
            out.push(b',');
            match token.finish {
                None => out.extend_from_slice(b"\"finish_reason\":null"),
                Some(finish) => push_finish(out, finish, self.reason(finish, self.made[token.choice])),
            }
            out.extend_from_slice(b",\"token_ids\":");
            match self.prompt_ids {
                None => out.extend_from_slice(b"null"),
                Some(_) => push_ids(out, token.id.as_slice()),
            }
            out.extend_from_slice(b"}]");
            self.push_usage(out, token.usage);
            if token.finish.is_some() && !self.usage.at_end {
                push_fingerprint(out, &self.fingerprint);
            }
            out.extend_from_slice(b"}\n\n");
        });
    }

    fn close(&mut self, frame: &mut Frame, usage: Usage) {
        close_stream(frame, self.usage.at_end.then_some(usage), &self.head, &self.fingerprint);
    }

    fn error(&mut self, frame: &mut Frame, error: &ApiError) -> bool {
        break_stream(frame, error);
        true
    }

    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8> {
        let head = self.head.replacen("chat.completion.chunk", "chat.completion", 1);
        let mut out = format!("{head},\"choices\":[").into_bytes();
        for (i, outcome) in outcomes.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let [reasoning, call, _] = self.parser.split(&outcome.ids).map(tokens::decoded);
            // What stop strings cut off is missing at the end of the text alone.
            let content = outcome.text.get(reasoning.len() + call.len()..).unwrap_or_default();
            let role = quoted(&self.role);
            out.extend_from_slice(
                format!("{comma}{{\"index\":{i},\"message\":{{\"role\":{role},\"content\":\"").as_bytes(),
            );
            push_escaped(&mut out, content);
            out.extend_from_slice(
                b"\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null",
            );
            if !call.is_empty() {
                let (tool, call) = (quoted(self.parser.tool()), quoted(&call));
                let function = format!(
                    ",\"tool_calls\":[{{{TOOL_CALL},\"function\":{{\"name\":{tool},\"arguments\":{call}}}}}]"
                );
                out.extend_from_slice(function.as_bytes());
            }
            let reasoning = if reasoning.is_empty() { "null".into() } else { quoted(&reasoning) };
            out.extend_from_slice(format!(",\"reasoning\":{reasoning}}},\"logprobs\":").as_bytes());
            self.push_logprobs(&mut out, i, &outcome.ids);
            out.push(b',');
            push_finish(&mut out, &outcome.finish, self.reason(&outcome.finish, outcome.ids.len() as u64));
            out.extend_from_slice(b",\"token_ids\":");
            push_optional_ids(&mut out, self.prompt_ids.as_ref().map(|_| &outcome.ids));
            out.extend_from_slice(b",\"routed_experts\":null}");
        }
        out.extend_from_slice(b"],\"service_tier\":null");
        push_fingerprint(&mut out, &self.fingerprint);
        out.extend_from_slice(b",\"usage\":");
        push_unary_usage(&mut out, usage);
        out.extend_from_slice(b",\"prompt_logprobs\":null,\"prompt_token_ids\":");
        push_optional_ids(&mut out, self.prompt_ids.as_ref());
        out.extend_from_slice(
            b",\"prompt_text\":null,\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}",
        );
        out
    }
}

/// Ends a stream of chunks, after one with the usage if that is wanted.
pub(super) fn close_stream(frame: &mut Frame, usage: Option<Usage>, head: &str, fingerprint: &str) {
    if let Some(usage) = usage {
        frame.event(|out| {
            out.extend_from_slice(format!("data: {head},\"choices\":[],\"usage\":").as_bytes());
            usage.push_openai(out);
            push_fingerprint(out, fingerprint);
            out.extend_from_slice(b"}\n\n");
        });
    }
    frame.done();
}

/// Ends a stream with an error inside it, as vLLM does.
pub(super) fn break_stream(frame: &mut Frame, error: &ApiError) {
    frame.event(|out| out.extend_from_slice(format!("data: {}\n\n", error.in_band()).as_bytes()));
    frame.done();
}

/// Appends the engine's fingerprint to an object.
pub(super) fn push_fingerprint(out: &mut Vec<u8>, fingerprint: &str) {
    out.extend_from_slice(b",\"system_fingerprint\":\"");
    out.extend_from_slice(fingerprint.as_bytes());
    out.push(b'"');
}

/// Appends ids, or null.
pub(super) fn push_optional_ids(out: &mut Vec<u8>, ids: Option<&Vec<u32>>) {
    match ids {
        Some(ids) => push_ids(out, ids),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends the usage of a unary response, where vLLM spells the absent details out.
pub(super) fn push_unary_usage(out: &mut Vec<u8>, usage: Usage) {
    usage.push_openai(out);
    out.pop();
    if usage.cached == 0 {
        out.extend_from_slice(b",\"prompt_tokens_details\":null");
    }
    out.extend_from_slice(b",\"completion_tokens_details\":null}");
}

/// The reason a list of outcomes gives for /metrics and records: that of the first.
pub(super) fn first_reason(outcomes: &[Outcome]) -> &'static str {
    outcomes.first().map_or("stop", |o| o.finish.reason())
}

/// vLLM's `system_fingerprint` of an engine.
pub(super) fn fingerprint(model: &str) -> String {
    let hash = xxhash_rust::xxh3::xxh3_64(model.as_bytes()) >> 32;
    format!("vllm-{}-{hash:08x}", super::VLLM_VERSION)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::generation::Finish, *};

    #[test]
    fn parts_are_joined_and_others_refused() {
        let joined =
            message(json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}))
                .unwrap();
        assert_eq!(joined, Message::new("user", "ab"));
        assert_eq!(message(json!({"role": "assistant", "content": null})).unwrap().content, "");
        let image =
            message(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}));
        assert!(image.unwrap_err().message.contains("0 image_url"));
        assert!(message(json!({"content": "x"})).is_err());
        assert!(message(json!({"role": "user", "content": 5})).is_err());
        assert!(message(json!("x")).is_err());
    }

    #[test]
    fn chunks_are_json_of_the_expected_shape() {
        let origin = Origin { id: "x".into(), created: 7, fingerprint: "f".into() };
        let usage = StreamUsage { at_end: true, continuous: false };
        let mut chat =
            Chat { prompt_ids: Some(vec![1, 2]), ..Chat::new("chatcmpl-x", "m\"", &origin, usage, 1) };
        let mut frame = Frame::default();
        let counts = Usage { prompt: 2, completion: 1, cached: 0 };
        chat.open(&mut frame, counts);
        chat.token(&mut frame, &Token { choice: 0, id: Some(5), text: "\"a", finish: None, usage: counts });
        chat.token(
            &mut frame,
            &Token { choice: 0, id: Some(6), text: "b", finish: Some(&Finish::Length), usage: counts },
        );
        chat.close(&mut frame, counts);
        let text = String::from_utf8(frame.out).unwrap();
        let events: Vec<Value> = text
            .lines()
            .filter_map(|l| l.strip_prefix("data: "))
            .filter(|d| *d != "[DONE]")
            .map(|d| serde_json::from_str(d).unwrap())
            .collect();
        assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(events[0]["prompt_token_ids"], json!([1, 2]));
        assert_eq!(events[1]["choices"][0]["delta"]["content"], "\"a");
        assert_eq!(events[1]["choices"][0]["token_ids"], json!([5]));
        assert_eq!(events[2]["choices"][0]["finish_reason"], "length");
        assert_eq!(events[3]["usage"]["total_tokens"], 3);
        assert_eq!(events.iter().filter(|e| e.get("system_fingerprint").is_some()).count(), 1);
        assert!(events[0]["prompt_text"].is_null() && events[1].get("usage").is_none());
        assert!(text.ends_with("data: [DONE]\n\n\r\n"));
        let whole = Outcome { text: "hi\n".into(), ids: vec![5], finish: Finish::StopString("x".into()) };
        let body: Value = serde_json::from_slice(&chat.unary(&[whole], counts)).unwrap();
        assert_eq!(body["choices"][0]["message"]["content"], "hi\n");
        assert_eq!(body["choices"][0]["stop_reason"], "x");
        assert_eq!(body["object"], "chat.completion");
    }
}
