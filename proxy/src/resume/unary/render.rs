//! The bodies, member by member, as vLLM writes them.

use super::{
    super::wire::{self, quoted},
    Block, Facts,
};
use crate::openai::span::Step::Key;

const NULL: &[u8] = b"null";

/// An object in the making.
struct Object(Vec<u8>);

impl Object {
    fn new() -> Self {
        Self(vec![b'{'])
    }

    fn with(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.extend_from_slice(&quoted(key));
        self.0.push(b':');
        self.0.extend_from_slice(value.as_ref());
        self
    }

    fn or_null(self, key: &str, value: Option<&Vec<u8>>) -> Self {
        self.with(key, value.map_or(NULL, Vec::as_slice))
    }

    fn nulls(self, keys: &[&str]) -> Self {
        keys.iter().fold(self, |object, key| object.with(key, NULL))
    }

    fn end(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

fn list(item: &[u8]) -> Vec<u8> {
    [b"[", item, b"]"].concat()
}

pub(super) fn chat(facts: &Facts, ids: bool) -> Vec<u8> {
    let reasoned = !facts.reasoning.is_empty();
    // A parser that found nothing but thoughts says that there is no content; without one it is empty.
    let content = if reasoned && facts.text.is_empty() { NULL.to_vec() } else { quoted(&facts.text) };
    let reasoning = if reasoned { quoted(&facts.reasoning) } else { NULL.to_vec() };
    let message = Object::new()
        .with("role", facts.role.as_deref().unwrap_or(br#""assistant""#))
        .with("content", content)
        .nulls(&["refusal", "annotations", "audio", "function_call"])
        .with("reasoning", reasoning)
        .end();
    let choice = Object::new()
        .with("index", b"0")
        .with("message", message)
        .with("logprobs", NULL)
        .or_null("finish_reason", facts.finish.as_ref())
        .or_null("stop_reason", facts.stop.as_ref())
        .with("token_ids", token_ids(facts, ids))
        .with("routed_experts", NULL)
        .end();
    head(facts, "chat.completion")
        .with("choices", list(&choice))
        .with("service_tier", NULL)
        .or_null("system_fingerprint", facts.fingerprint.as_ref())
        .with("usage", usage(facts))
        .with("prompt_logprobs", NULL)
        .or_null("prompt_token_ids", facts.prompt_ids.as_ref().filter(|_| ids))
        .nulls(&["prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"])
        .end()
}

pub(super) fn completion(facts: &Facts, ids: bool) -> Vec<u8> {
    let choice = Object::new()
        .with("index", b"0")
        .with("text", quoted(&facts.text))
        .with("logprobs", NULL)
        .or_null("finish_reason", facts.finish.as_ref())
        .or_null("stop_reason", facts.stop.as_ref())
        .with("token_ids", token_ids(facts, ids))
        .with("prompt_logprobs", NULL)
        .or_null("prompt_token_ids", facts.prompt_ids.as_ref().filter(|_| ids))
        .with("routed_experts", NULL)
        .end();
    head(facts, "text_completion")
        .with("choices", list(&choice))
        .with("service_tier", NULL)
        .or_null("system_fingerprint", facts.fingerprint.as_ref())
        .with("usage", usage(facts))
        .nulls(&["kv_transfer_params", "ec_transfer_params", "metrics"])
        .end()
}

/// vLLM leaves out of a message what is null.
pub(super) fn message(facts: &Facts) -> Vec<u8> {
    let mut content = vec![b'['];
    for (i, block) in facts.blocks.iter().enumerate() {
        if i > 0 {
            content.push(b',');
        }
        content.extend(match block {
            Block::Text(text) => text_block(text),
            Block::Thinking { text, signature } => {
                let block = Object::new().with("type", br#""thinking""#).with("thinking", quoted(text));
                match signature {
                    Some(signature) => block.with("signature", quoted(signature)).end(),
                    None => block.end(),
                }
            }
        });
    }
    if facts.blocks.is_empty() {
        content.extend(text_block(""));
    }
    content.push(b']');
    let message = Object::new()
        .or_null("id", facts.id.as_ref())
        .with("type", br#""message""#)
        .with("role", br#""assistant""#)
        .with("content", content)
        .or_null("model", facts.model.as_ref())
        .or_null("stop_reason", facts.finish.as_ref());
    let message = match &facts.stop {
        Some(sequence) => message.with("stop_sequence", sequence),
        None => message,
    };
    message.or_null("usage", facts.usage.as_ref()).end()
}

fn text_block(text: &str) -> Vec<u8> {
    Object::new().with("type", br#""text""#).with("text", quoted(text)).end()
}

fn head(facts: &Facts, object: &str) -> Object {
    Object::new()
        .or_null("id", facts.id.as_ref())
        .with("object", quoted(object))
        .or_null("created", facts.created.as_ref())
        .or_null("model", facts.model.as_ref())
}

fn token_ids(facts: &Facts, ids: bool) -> Vec<u8> {
    if !ids {
        return NULL.to_vec();
    }
    let ids: Vec<String> = facts.token_ids.iter().map(u32::to_string).collect();
    list(ids.join(",").as_bytes())
}

/// A stream's counts leave out what is null; those of a whole answer spell it out.
fn usage(facts: &Facts) -> Vec<u8> {
    let usage = facts.usage.as_deref().unwrap_or(b"{}");
    let member = |key| wire::raw(usage, &[Key(key)]).unwrap_or(NULL);
    let details = |key: &str, keys: &[&str]| match wire::raw(usage, &[Key(key)]) {
        None => NULL.to_vec(),
        Some(details) => keys
            .iter()
            .fold(Object::new(), |object, key| {
                object.with(key, wire::raw(details, &[Key(key)]).unwrap_or(NULL))
            })
            .end(),
    };
    Object::new()
        .with("prompt_tokens", member("prompt_tokens"))
        .with("total_tokens", member("total_tokens"))
        .with("completion_tokens", member("completion_tokens"))
        .with(
            "prompt_tokens_details",
            details("prompt_tokens_details", &["cached_tokens", "created_cache_tokens", "multimodal_tokens"]),
        )
        .with("completion_tokens_details", details("completion_tokens_details", &["reasoning_tokens"]))
        .end()
}
