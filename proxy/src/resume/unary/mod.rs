//! Whole answers through streams: a client that wants one body is served from a stream, which can be resumed.
//!
//! [`as_stream`] turns the request into the one for the stream, where the two are equivalent; [`Assembly`] takes the events
//! that a client of the stream would see and gives the body that the engine would have given. Its fields and their order
//! are those of vLLM 0.32. What only a whole answer has (`kv_transfer_params`, `routed_experts`, `metrics`) is null, as it is of an engine
//! that was not told to fill it in.

mod render;
#[cfg(test)]
mod tests;

use serde_json::Value;

use super::{Refusal, body::Members, wire};
use crate::openai::{
    Api,
    span::{
        self,
        Step::{At, Key},
    },
};

/// The body that asks for the stream in place of the whole answer; `None` where the two would not be equivalent, or the request
/// is for a stream already.
#[must_use]
pub fn as_stream(api: Api, original: &Members<'_>) -> Option<Vec<u8>> {
    let one = |key| original.raw(key).is_none_or(|value| value == b"1");
    let absent = |keys: &[&str]| keys.iter().all(|key| original.raw(key).is_none());
    let unset = |keys: &[&str]| keys.iter().all(|key| !original.is_set(key));
    let everywhere =
        ["stream", "stream_options", "kv_transfer_params", "ec_transfer_params", "tools", "functions"];
    if !unset(&everywhere) || original.raw("stream_options").is_some() {
        return None;
    }
    let chunks = one("n") && one("best_of") && absent(&["prompt_logprobs", "prompt_embeds"]);
    let chunks = chunks && unset(&["use_beam_search", "echo", "return_prompt_text", "audio", "suffix"]);
    let asked: &[(&str, Vec<u8>)] = &[
        ("stream", b"true".to_vec()),
        ("stream_options", br#"{"include_usage":true}"#.to_vec()),
        ("return_token_ids", b"true".to_vec()),
    ];
    let equivalent = match api {
        Api::ChatCompletions => {
            let audio = original.value("modalities").is_some_and(|kinds| kinds.to_string().contains("audio"));
            chunks && !audio && unset(&["logprobs"]) && absent(&["top_logprobs"])
        }
        Api::Completions => chunks && absent(&["logprobs"]) && is_one_prompt(&original.value("prompt")?),
        Api::Messages => true,
        Api::Responses => {
            unset(&["background", "include", "previous_response_id", "enable_response_messages"])
        }
        _ => false,
    };
    let asked = if matches!(api, Api::Messages | Api::Responses) { asked.get(..1)? } else { asked };
    equivalent.then(|| original.write(&[], asked))
}

fn is_one_prompt(prompt: &Value) -> bool {
    match prompt {
        Value::String(_) => true,
        Value::Array(items) => match items.as_slice() {
            [Value::String(_)] => true,
            [Value::Array(ids)] => ids.iter().all(Value::is_number),
            ids => !ids.is_empty() && ids.iter().all(Value::is_number),
        },
        _ => false,
    }
}

/// A whole answer in the making.
#[derive(Debug)]
pub struct Assembly {
    api: Api,
    /// Whether the client asked for token ids.
    ids: bool,
    facts: Facts,
    whole: bool,
}

/// What the events said; single values as they were written.
#[derive(Debug, Default)]
struct Facts {
    id: Option<Vec<u8>>,
    created: Option<Vec<u8>>,
    model: Option<Vec<u8>>,
    role: Option<Vec<u8>>,
    fingerprint: Option<Vec<u8>>,
    /// Of chat: `content`; of text completions: `text`.
    text: String,
    reasoning: String,
    finish: Option<Vec<u8>>,
    stop: Option<Vec<u8>>,
    usage: Option<Vec<u8>>,
    prompt_ids: Option<Vec<u8>>,
    token_ids: Vec<u32>,
    /// Blocks of Anthropic's messages.
    blocks: Vec<Block>,
    /// The response at its end.
    response: Option<Vec<u8>>,
}

/// One block of a message's content.
#[derive(Debug)]
enum Block {
    Text(String),
    Thinking { text: String, signature: Option<String> },
}

impl Assembly {
    /// For the answer to `original`, a request of `api`.
    #[must_use]
    pub fn new(api: Api, original: &Members<'_>) -> Self {
        Self { api, ids: original.flag("return_token_ids"), facts: Facts::default(), whole: false }
    }

    /// Takes in the next event of the stream.
    ///
    /// # Errors
    /// It is no part of an answer that could be given as a whole.
    pub fn on_event(&mut self, name: &[u8], data: &[u8]) -> Result<(), Refusal> {
        if data == b"[DONE]" {
            self.whole |= self.facts.finish.is_some() && self.facts.usage.is_some();
            return Ok(());
        }
        if !span::is_json(data) || wire::error(name, data).is_some() {
            return Err(Refusal::Unreadable);
        }
        match self.api {
            Api::ChatCompletions => self.facts.chat(data),
            Api::Completions => self.facts.completion(data),
            Api::Messages => {
                self.whole |= kind_of(data) == b"message_stop" && self.facts.finish.is_some();
                self.facts.message(data)
            }
            Api::Responses => {
                if matches!(kind_of(data), b"response.completed" | b"response.incomplete") {
                    self.facts.response = raw(data, &[Key("response")]);
                    self.whole = self.facts.response.is_some();
                }
                Ok(())
            }
            _ => Err(Refusal::Api),
        }
    }

    /// Whether the stream has said all that the body says.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// The body; `None` if the answer is not whole.
    #[must_use]
    pub fn body(self) -> Option<Vec<u8>> {
        if !self.whole {
            return None;
        }
        Some(match self.api {
            Api::ChatCompletions => render::chat(&self.facts, self.ids),
            Api::Completions => render::completion(&self.facts, self.ids),
            Api::Messages => render::message(&self.facts),
            _ => self.facts.response?,
        })
    }
}

fn kind_of(data: &[u8]) -> &[u8] {
    span::get(data, &[Key("type")]).and_then(span::string).unwrap_or_default()
}

fn raw(data: &[u8], path: &[span::Step<'_>]) -> Option<Vec<u8>> {
    wire::raw(data, path).map(<[u8]>::to_vec)
}

/// Keeps the value at `path`, if one is there.
fn keep(slot: &mut Option<Vec<u8>>, data: &[u8], path: &[span::Step<'_>]) {
    if let Some(value) = wire::raw(data, path) {
        *slot = Some(value.to_vec());
    }
}

impl Facts {
    /// What chunks of both kinds of completions have.
    fn chunk(&mut self, data: &[u8]) {
        if self.id.is_none() {
            keep(&mut self.id, data, &[Key("id")]);
            keep(&mut self.created, data, &[Key("created")]);
            keep(&mut self.model, data, &[Key("model")]);
        }
        keep(&mut self.fingerprint, data, &[Key("system_fingerprint")]);
        keep(&mut self.usage, data, &[Key("usage")]);
        let [choices, first] = [Key("choices"), At(0)];
        if let Some(finish) = raw(data, &[choices, first, Key("finish_reason")]) {
            self.finish = Some(finish);
            self.stop = raw(data, &[choices, first, Key("stop_reason")]);
        }
        keep(&mut self.prompt_ids, data, &[Key("prompt_token_ids")]);
        keep(&mut self.prompt_ids, data, &[choices, first, Key("prompt_token_ids")]);
        let ids = wire::raw(data, &[choices, first, Key("token_ids")]).and_then(span::token_ids);
        self.token_ids.extend(ids.unwrap_or_default());
    }

    fn chat(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if span::get(data, &[Key("choices")]).is_none() {
            return Err(Refusal::Unreadable);
        }
        self.chunk(data);
        let path = |key| [Key("choices"), At(0), Key("delta"), Key(key)];
        let calls = wire::raw(data, &path("tool_calls")).is_some_and(|calls| calls != b"[]");
        if calls || wire::raw(data, &path("function_call")).is_some() {
            return Err(Refusal::ToolCall);
        }
        keep(&mut self.role, data, &path("role"));
        self.text.push_str(&wire::text(data, &path("content")).unwrap_or_default());
        self.reasoning.push_str(&wire::text(data, &path("reasoning")).unwrap_or_default());
        Ok(())
    }

    fn completion(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if span::get(data, &[Key("choices")]).is_none() {
            return Err(Refusal::Unreadable);
        }
        self.chunk(data);
        self.text.push_str(&wire::text(data, &[Key("choices"), At(0), Key("text")]).unwrap_or_default());
        Ok(())
    }

    fn message(&mut self, data: &[u8]) -> Result<(), Refusal> {
        match kind_of(data) {
            b"message_start" => {
                keep(&mut self.id, data, &[Key("message"), Key("id")]);
                keep(&mut self.model, data, &[Key("message"), Key("model")]);
            }
            b"content_block_start" => {
                let kind = wire::text(data, &[Key("content_block"), Key("type")]);
                self.blocks.push(match kind.as_deref() {
                    Some("text") => Block::Text(String::new()),
                    Some("thinking") => Block::Thinking { text: String::new(), signature: None },
                    Some("tool_use") => return Err(Refusal::ToolCall),
                    _ => return Err(Refusal::Unreadable),
                });
            }
            b"content_block_delta" => {
                let delta = |key| wire::text(data, &[Key("delta"), Key(key)]);
                match self.blocks.last_mut() {
                    Some(Block::Text(text)) => text.push_str(&delta("text").ok_or(Refusal::Unreadable)?),
                    Some(Block::Thinking { text, signature }) => {
                        text.push_str(&delta("thinking").unwrap_or_default());
                        *signature = delta("signature").or(signature.take());
                    }
                    None => return Err(Refusal::Unreadable),
                }
            }
            b"message_delta" => {
                keep(&mut self.finish, data, &[Key("delta"), Key("stop_reason")]);
                keep(&mut self.stop, data, &[Key("delta"), Key("stop_sequence")]);
                keep(&mut self.usage, data, &[Key("usage")]);
            }
            _ => {}
        }
        Ok(())
    }
}
