//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API as vLLM serves it.
//!
//! The id keeps vLLM's `chatcmpl-` prefix; a stream ends with `message_stop`, not `[DONE]`. A last message of the
//! assistant is a prefill: the answer continues it.

use serde_json::{Value, json};

use super::{
    args::Options,
    chat::{self, Origin},
    error::ApiError,
    generation::{Finish, Outcome, block_hashes},
    render::{Frame, Job, Render, Token, Usage, push_escaped},
    request::{Fields, Sampling},
    template::{Ending, Message, render},
};

/// Makes a job of a Messages request.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn job(mut fields: Fields, origin: &Origin, options: &Options) -> Result<Job, ApiError> {
    let model = fields.model(options)?;
    let ids = prompt(&mut fields)?;
    let stream = fields.flag("stream")?;
    let sampling = Sampling::take(&mut fields, &["max_tokens"], "stop_sequences")?;
    if sampling.max_tokens.is_none() {
        return Err(ApiError::invalid("missing", "max_tokens", "Field required"));
    }
    if sampling.n != 1 {
        return Err(ApiError::bad("n", "The Messages API has one choice."));
    }
    let (prefix, blocks) = block_hashes(&ids);
    let generations = sampling.generations(prefix, options.max_model_len)?;
    Ok(Job {
        blocks: vec![blocks; generations.len()],
        generations,
        prompt_tokens: prefix.len(),
        n: 1,
        max_tokens: sampling.max_tokens,
        stream,
        render: Box::new(Messages { id: format!("chatcmpl-{}", origin.id), model, finish: Finish::End }),
    })
}

/// The body of a count_tokens response.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn count_tokens(mut fields: Fields, options: &Options) -> Result<String, ApiError> {
    fields.model(options)?;
    Ok(json!({"input_tokens": prompt(&mut fields)?.len()}).to_string())
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
    let prefill = messages.last().is_some_and(|m| m.role == "assistant");
    Ok(render(&messages, if prefill { Ending::Continue } else { Ending::Answer }))
}

struct Messages {
    id: String,
    model: String,
    finish: Finish,
}

/// Anthropic's words for why it ended: `stop_reason` and `stop_sequence`.
fn stop(finish: &Finish) -> (&'static str, Value) {
    match finish {
        Finish::Length => ("max_tokens", Value::Null),
        Finish::StopString(stop) => ("stop_sequence", stop.as_str().into()),
        Finish::End | Finish::StopToken(_) => ("end_turn", Value::Null),
        Finish::Abort => ("abort", Value::Null),
    }
}

impl Messages {
    fn event(frame: &mut Frame, kind: &str, data: &Value) {
        frame.event(|out| out.extend_from_slice(format!("event: {kind}\ndata: {data}\n\n").as_bytes()));
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
        let block = json!({"type": "text", "text": ""});
        Self::event(
            frame,
            "content_block_start",
            &json!({"type": "content_block_start", "index": 0, "content_block": block}),
        );
    }

    fn token(&mut self, frame: &mut Frame, token: &Token<'_>) {
        if let Some(finish) = token.finish {
            self.finish = finish.clone();
        }
        if token.text.is_empty() {
            return;
        }
        frame.event(|out| {
            out.extend_from_slice(
                b"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"",
            );
            push_escaped(out, token.text);
            out.extend_from_slice(b"\"}}\n\n");
        });
    }

    fn close(&mut self, frame: &mut Frame, usage: Usage) {
        Self::event(frame, "content_block_stop", &json!({"type": "content_block_stop", "index": 0}));
        let (reason, sequence) = stop(&self.finish);
        let delta = json!({
            "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion},
        });
        Self::event(frame, "message_delta", &delta);
        Self::event(frame, "message_stop", &json!({"type": "message_stop"}));
    }

    fn error(&mut self, frame: &mut Frame, error: &ApiError) {
        frame.event(|out| {
            out.extend_from_slice(format!("event: error\ndata: {}\n\n", error.anthropic_body()).as_bytes())
        });
    }

    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8> {
        let Some(outcome) = outcomes.first() else { return Vec::new() };
        let (reason, sequence) = stop(&outcome.finish);
        let body = json!({
            "id": self.id, "type": "message", "role": "assistant",
            "content": [{"type": "text", "text": outcome.text}], "model": self.model,
            "stop_reason": reason, "stop_sequence": sequence,
            "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion},
        });
        body.to_string().into_bytes()
    }

    fn error_body(&self, error: &ApiError) -> String {
        error.anthropic_body()
    }
}
