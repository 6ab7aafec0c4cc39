//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API as vLLM serves it.
//!
//! The id keeps vLLM's `chatcmpl-` prefix; a stream ends with `message_stop`, not `[DONE]`. A last message of the
//! assistant is no prefill: vLLM 0.32 closes it and begins a new answer behind it. Blocks open with their first text, so
//! an answer without any has none in a stream, and an empty one in a body.

use serde_json::{Value, json};

use super::{
    args::Options,
    chat::{self, Origin},
    error::ApiError,
    generation::{Finish, Outcome, block_hashes},
    parser::{Parser, Part},
    render::{Frame, Job, Render, Token, Usage, push_escaped},
    request::{Fields, Sampling},
    template::{Ending, Message, render},
    tokens,
};

/// Makes a job of a Messages request.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn job(mut fields: Fields, origin: &Origin, options: &Options) -> Result<Job, ApiError> {
    let model = fields.model(options)?;
    let ids = prompt(&mut fields)?;
    let tools = fields.take("tools");
    let tool = tools.as_ref().and_then(|tools| tools.get(0)?.get("name")?.as_str().map(String::from));
    let stream = fields.flag("stream")?;
    let sampling = Sampling::take(&mut fields, &["max_tokens"], "stop_sequences")?;
    if sampling.max_tokens.is_none() {
        return Err(ApiError::invalid("missing", "max_tokens", "Field required"));
    }
    if sampling.n != 1 {
        return Err(ApiError::bad("n", "The Messages API has one choice."));
    }
    let (prefix, blocks) = block_hashes(&ids);
    let generations = sampling.generations(&ids, prefix, options.max_model_len)?;
    Ok(Job {
        blocks: vec![blocks; generations.len()],
        generations,
        prompt_tokens: prefix.len(),
        n: 1,
        max_tokens: sampling.max_tokens,
        stream,
        render: Box::new(Messages {
            id: format!("chatcmpl-{}", origin.id),
            model,
            finish: Finish::End,
            parser: chat::parser(options, tool),
            made: 0,
            block: 0,
            open: None,
        }),
    })
}

/// The body of a count_tokens response.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn count_tokens(mut fields: Fields, options: &Options) -> Result<String, ApiError> {
    fields.model(options)?;
    let tokens = prompt(&mut fields)?.len();
    Ok(json!({"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}).to_string())
}

fn prompt(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let mut messages = Vec::new();
    match fields.take("system") {
        None => {}
        Some(Value::String(text)) => messages.push(Message::new("system", text)),
        Some(parts @ Value::Array(_)) => {
            messages.push(chat::message(json!({"role": "system", "content": parts}))?)
        }
        Some(_) => {
            return Err(ApiError::invalid("string_type", "system", "Input should be a valid string or list"));
        }
    }
    match fields.take("messages") {
        Some(Value::Array(items)) if !items.is_empty() => {
            for item in items {
                messages.push(chat::message(item)?);
            }
        }
        Some(Value::Array(_)) => {
            return Err(ApiError::bad("messages", "messages must have at least one element"));
        }
        Some(_) => return Err(ApiError::invalid("list_type", "messages", "Input should be a valid list")),
        None => return Err(ApiError::invalid("missing", "messages", "Field required")),
    }
    Ok(render(&messages, Ending::Answer))
}

/// A kind of block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    ToolUse,
}

impl Block {
    const fn of(part: Part) -> Self {
        match part {
            Part::Content => Self::Text,
            Part::Reasoning => Self::Thinking,
            Part::Call { .. } => Self::ToolUse,
        }
    }

    /// How its content is called in a delta, and the delta.
    const fn delta(self) -> (&'static str, &'static str) {
        match self {
            Self::Text => ("text", "text_delta"),
            Self::Thinking => ("thinking", "thinking_delta"),
            Self::ToolUse => ("partial_json", "input_json_delta"),
        }
    }
}

struct Messages {
    id: String,
    model: String,
    finish: Finish,
    parser: Parser,
    /// Tokens so far.
    made: u64,
    /// Index of the block that is open, or comes next.
    block: u64,
    open: Option<Block>,
}

impl Messages {
    fn event(frame: &mut Frame, kind: &str, data: &Value) {
        frame.event(|out| out.extend_from_slice(format!("event: {kind}\ndata: {data}\n\n").as_bytes()));
    }

    /// Anthropic's words for why it ended: `stop_reason` and `stop_sequence`.
    fn stop(&self, finish: &Finish, tokens: u64) -> (Value, Value) {
        match finish {
            Finish::Length => ("max_tokens".into(), Value::Null),
            Finish::Abort => (Value::Null, Value::Null),
            Finish::StopString(stop) => ("stop_sequence".into(), stop.as_str().into()),
            _ if self.parser.calls(tokens) => ("tool_use".into(), Value::Null),
            Finish::End | Finish::StopToken(_) => ("end_turn".into(), Value::Null),
        }
    }

    /// The block as it begins.
    fn empty(&self, block: Block) -> Value {
        match block {
            Block::Text => json!({"type": "text", "text": ""}),
            Block::Thinking => json!({"type": "thinking", "thinking": ""}),
            Block::ToolUse => {
                json!({"type": "tool_use", "id": "chatcmpl-tool-0", "name": self.parser.tool(), "input": {}})
            }
        }
    }

    fn close_block(&mut self, frame: &mut Frame) {
        let Some(block) = self.open.take() else { return };
        let index = self.block;
        if block == Block::Thinking {
            let delta = json!({"type": "signature_delta", "signature": self.id});
            let data = json!({"type": "content_block_delta", "index": index, "delta": delta});
            Self::event(frame, "content_block_delta", &data);
        }
        Self::event(frame, "content_block_stop", &json!({"type": "content_block_stop", "index": index}));
        self.block += 1;
    }
}

impl Render for Messages {
    fn open(&mut self, frame: &mut Frame, usage: Usage) {
        let message = json!({
            "id": self.id, "type": "message", "role": "assistant", "content": [], "model": self.model,
            "stop_reason": null, "stop_sequence": null,
            "usage": {"input_tokens": usage.prompt, "output_tokens": 0},
        });
        Self::event(frame, "message_start", &json!({"type": "message_start", "message": message}));
    }

    fn token(&mut self, frame: &mut Frame, token: &Token<'_>) {
        if let Some(finish) = token.finish {
            self.finish = finish.clone();
        }
        let block = Block::of(self.parser.part(self.made));
        self.made += u64::from(token.id.is_some());
        if token.text.is_empty() {
            return;
        }
        if self.open != Some(block) {
            self.close_block(frame);
            self.open = Some(block);
            let start = json!({"type": "content_block_start", "index": self.block, "content_block": self.empty(block)});
            Self::event(frame, "content_block_start", &start);
        }
        let (name, delta) = block.delta();
        let index = self.block;
        frame.event(|out| {
            let start = format!(
                "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":{index},\"delta\":{{\"type\":\"{delta}\",\"{name}\":\""
            );
            out.extend_from_slice(start.as_bytes());
            push_escaped(out, token.text);
            out.extend_from_slice(b"\"}}\n\n");
        });
    }

    fn close(&mut self, frame: &mut Frame, usage: Usage) {
        self.close_block(frame);
        let (reason, sequence) = self.stop(&self.finish, self.made);
        let delta = json!({
            "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion},
        });
        Self::event(frame, "message_delta", &delta);
        Self::event(frame, "message_stop", &json!({"type": "message_stop"}));
    }

    fn error(&mut self, frame: &mut Frame, error: &ApiError) -> bool {
        // Whatever it was: vLLM's converter from chats fails on it.
        let data = json!({"type": "error", "error": {"type": "internal_error", "message": error.message}});
        Self::event(frame, "error", &data);
        true
    }

    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8> {
        let Some(outcome) = outcomes.first() else { return Vec::new() };
        let (reason, sequence) = self.stop(&outcome.finish, outcome.ids.len() as u64);
        let [thinking, call, _] = self.parser.split(&outcome.ids).map(tokens::decoded);
        let text = outcome.text.get(thinking.len() + call.len()..).unwrap_or_default();
        let mut content = Vec::new();
        if !thinking.is_empty() {
            content.push(json!({"type": "thinking", "thinking": thinking, "signature": self.id}));
        }
        if !text.is_empty() || thinking.is_empty() && call.is_empty() {
            content.push(json!({"type": "text", "text": text}));
        }
        if !call.is_empty() {
            let mut block = self.empty(Block::ToolUse);
            block["input"] = json!({"text": call});
            content.push(block);
        }
        let mut body = json!({
            "id": self.id, "type": "message", "role": "assistant", "content": content, "model": self.model,
        });
        // What is null is left out of a body.
        for (name, value) in [("stop_reason", reason), ("stop_sequence", sequence)] {
            if !value.is_null() {
                body[name] = value;
            }
        }
        body["usage"] = json!({"input_tokens": usage.prompt, "output_tokens": usage.completion});
        body.to_string().into_bytes()
    }

    fn error_body(&self, error: &ApiError) -> String {
        error.anthropic_body()
    }
}
