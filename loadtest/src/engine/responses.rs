//! `/v1/responses`: input items to a job, tokens to typed events.
//!
//! Nothing is stored, as in vLLM without its store: `previous_response_id` is refused, and a response cannot be fetched.
//! At `max_output_tokens` the status is "incomplete", yet the last event is `response.completed`, as observed.
//!
//! As in vLLM: a last input item that is a message "in_progress" or "incomplete" is continued; the first two events come
//! with the header, the item's with its first text; and an engine that fails says nothing, its stream is cut off.

use serde_json::{Value, json};

use super::{
    args::Options,
    chat::{Origin, message},
    error::ApiError,
    generation::{Finish, Outcome, block_hashes},
    http::push_decimal,
    render::{Frame, Job, Render, Token, Usage, push_escaped, quoted},
    request::{Fields, Sampling},
    template::{Ending, Message, render},
};

/// Makes a job of a Responses request.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn job(mut fields: Fields, origin: &Origin, options: &Options) -> Result<Job, ApiError> {
    let model = fields.model(options)?;
    if let Some(id) = fields.string("previous_response_id")? {
        return Err(not_stored(&id));
    }
    let (messages, ending) = messages(&mut fields)?;
    let stream = fields.flag("stream")?;
    let sampling = Sampling::take(&mut fields, &["max_output_tokens"], "stop")?;
    if sampling.n != 1 {
        return Err(ApiError::bad("n", "The Responses API has one choice."));
    }
    let ids = render(&messages, ending);
    let (prefix, blocks) = block_hashes(&ids);
    let generations = sampling.generations(&ids, prefix, options.max_model_len)?;
    let id = format!("resp_{}", origin.id);
    let renderer = Responses {
        item: format!("msg_{}", origin.id),
        response: json!({
            "id": id, "created_at": origin.created, "instructions": null, "metadata": null, "model": model,
            "object": "response", "output": [], "parallel_tool_calls": true, "temperature": 1.0, "tool_choice": "none",
            "tools": [], "top_p": 1.0, "background": false, "max_output_tokens": sampling.max_tokens,
            "max_tool_calls": null, "previous_response_id": null, "prompt": null, "reasoning": null,
            "service_tier": "auto", "status": "in_progress", "text": null, "top_logprobs": null,
            "incomplete_details": null, "truncation": "disabled", "usage": null, "user": null,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "kv_transfer_params": null,
            "ec_transfer_params": null, "input_messages": null, "output_messages": null,
        }),
        sequence: 0,
        text: String::new(),
        finish: None,
        before: Vec::new(),
        is_open: false,
    };
    Ok(Job {
        blocks: vec![blocks; generations.len()],
        generations,
        prompt_tokens: prefix.len(),
        n: 1,
        max_tokens: sampling.max_tokens,
        stream,
        render: Box::new(renderer),
    })
}

/// The answer to whoever asks for a stored response.
pub(super) fn not_stored(id: &str) -> ApiError {
    ApiError::not_found("response_id", format!("Response with id '{id}' not found."))
}

/// The messages of the input, and whether the last one goes on.
fn messages(fields: &mut Fields) -> Result<(Vec<Message>, Ending), ApiError> {
    let (mut messages, mut ending) = (Vec::new(), Ending::Answer);
    if let Some(instructions) = fields.string("instructions")? {
        messages.push(Message::new("system", instructions));
    }
    match fields.take("input") {
        Some(Value::String(text)) => messages.push(Message::new("user", text)),
        Some(Value::Array(items)) => {
            if items.last().is_some_and(is_partial) {
                ending = Ending::Continue;
            }
            for item in items {
                messages.push(match item.get("role") {
                    Some(_) => message(first_text(item))?,
                    // A tool's result or another item without a role: its JSON is its content.
                    None => Message::new("tool", item.to_string()),
                });
            }
        }
        Some(_) => {
            return Err(ApiError::invalid("string_type", "input", "Input should be a valid string or list"));
        }
        None => return Err(ApiError::invalid("missing", "input", "Field required")),
    }
    Ok((messages, ending))
}

/// True for a message that is not finished.
fn is_partial(item: &Value) -> bool {
    let is_message = item.get("type").is_none_or(|kind| kind == "message");
    is_message && matches!(item["status"].as_str(), Some("in_progress" | "incomplete"))
}

/// Of an assistant's message in parts, vLLM reads the first one.
fn first_text(mut item: Value) -> Value {
    if item["role"] == "assistant"
        && let Some(parts) = item.get_mut("content").and_then(Value::as_array_mut)
    {
        parts.truncate(1);
    }
    item
}

struct Responses {
    /// Id of the one output item.
    item: String,
    response: Value,
    sequence: u64,
    text: String,
    finish: Option<Finish>,
    /// A delta event up to its text.
    before: Vec<u8>,
    /// The item's first events are out.
    is_open: bool,
}

impl Responses {
    /// Opens the item, with its first text.
    fn open_item(&mut self, frame: &mut Frame) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        let item = self.message("", "in_progress");
        self.event(frame, "response.output_item.added", json!({"item": item, "output_index": 0}));
        let place = json!({"content_index": 0, "item_id": self.item, "output_index": 0, "part": {
            "annotations": [], "text": "", "type": "output_text", "logprobs": [],
        }});
        self.event(frame, "response.content_part.added", place);
        self.before = format!(
            "event: response.output_text.delta\ndata: {{\"content_index\":0,\"item_id\":{},\"logprobs\":[],\
             \"output_index\":0,\"type\":\"response.output_text.delta\",\"delta\":\"",
            quoted(&self.item)
        )
        .into_bytes();
    }

    fn event(&mut self, frame: &mut Frame, kind: &str, mut data: Value) {
        data["sequence_number"] = self.sequence.into();
        data["type"] = kind.into();
        self.sequence += 1;
        frame.event(|out| out.extend_from_slice(format!("event: {kind}\ndata: {data}\n\n").as_bytes()));
    }

    fn part(text: &str) -> Value {
        json!({"annotations": [], "text": text, "type": "output_text", "logprobs": null})
    }

    fn message(&self, text: &str, status: &str) -> Value {
        let content = if status == "in_progress" { json!([]) } else { json!([Self::part(text)]) };
        json!({
            "id": self.item, "content": content, "role": "assistant", "status": status, "type": "message", "phase": null,
        })
    }

    /// The response object at its end.
    fn finished(&self, text: &str, finish: &Finish, usage: Usage) -> Value {
        let mut response = self.response.clone();
        let (status, details) = match finish {
            Finish::Length => ("incomplete", json!({"reason": "max_output_tokens"})),
            Finish::Abort => ("cancelled", Value::Null),
            Finish::End | Finish::StopString(_) | Finish::StopToken(_) => ("completed", Value::Null),
        };
        response["status"] = status.into();
        response["incomplete_details"] = details;
        if !text.is_empty() {
            response["output"] = json!([self.message(text, "completed")]);
        }
        response["usage"] = json!({
            "input_tokens": usage.prompt, "input_tokens_details": {
                "cached_tokens": usage.cached, "cache_write_tokens": 0, "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": usage.completion, "output_tokens_details": {
                "reasoning_tokens": 0, "tool_output_tokens": 0, "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": usage.prompt + usage.completion,
        });
        response
    }
}

impl Render for Responses {
    fn greet(&mut self, frame: &mut Frame) {
        let response = self.response.clone();
        self.event(frame, "response.created", json!({"response": response}));
        self.event(frame, "response.in_progress", json!({"response": response}));
    }

    fn open(&mut self, _frame: &mut Frame, _usage: Usage) {}

    fn token(&mut self, frame: &mut Frame, token: &Token<'_>) {
        self.finish = token.finish.cloned();
        if token.text.is_empty() {
            return;
        }
        self.open_item(frame);
        self.text.push_str(token.text);
        frame.event(|out| {
            out.extend_from_slice(&self.before);
            push_escaped(out, token.text);
            out.extend_from_slice(b"\",\"sequence_number\":");
            push_decimal(out, self.sequence);
            out.extend_from_slice(b"}\n\n");
        });
        self.sequence += 1;
    }

    fn close(&mut self, frame: &mut Frame, usage: Usage) {
        let text = std::mem::take(&mut self.text);
        if self.is_open {
            let item = self.item.clone();
            let done =
                json!({"content_index": 0, "item_id": item, "logprobs": [], "output_index": 0, "text": text});
            self.event(frame, "response.output_text.done", done);
            let part =
                json!({"content_index": 0, "item_id": item, "output_index": 0, "part": Self::part(&text)});
            self.event(frame, "response.content_part.done", part);
            let message = self.message(&text, "completed");
            self.event(frame, "response.output_item.done", json!({"item": message, "output_index": 0}));
        }
        let finish = self.finish.take().unwrap_or(Finish::End);
        let response = self.finished(&text, &finish, usage);
        self.event(frame, "response.completed", json!({"response": response}));
    }

    fn error(&mut self, _frame: &mut Frame, _error: &ApiError) -> bool {
        false
    }

    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8> {
        let Some(outcome) = outcomes.first() else { return Vec::new() };
        self.finished(&outcome.text, &outcome.finish, usage).to_string().into_bytes()
    }
}
