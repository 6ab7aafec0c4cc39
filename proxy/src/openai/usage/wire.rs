//! The few fields we read of the events that end a stream, as the engines write them.

use serde::{Deserialize, de::DeserializeOwned};

/// Longest error message kept, in bytes.
const MAX_MESSAGE_BYTES: usize = 256;

/// Reads one value from the start of `json`; what does not parse is as good as empty.
pub(super) fn parse<T: DeserializeOwned + Default>(json: &[u8]) -> T {
    T::deserialize(&mut serde_json::Deserializer::from_slice(json)).unwrap_or_default()
}

/// The `usage` object in the dialects of OpenAI's completions, its responses, and Anthropic.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    input_tokens_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    pub(super) fn counts(&self) -> super::Usage {
        let details = self.prompt_tokens_details.as_ref().or(self.input_tokens_details.as_ref());
        super::Usage {
            prompt: self.prompt_tokens.or(self.input_tokens),
            completion: self.completion_tokens.or(self.output_tokens),
            cached: details.and_then(|details| details.cached_tokens).or(self.cache_read_input_tokens),
        }
    }
}

/// Anthropic's `message_start` (usage inside `message`) and `message_delta` (usage beside `delta`).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct MessageEvent {
    message: Option<Message>,
    delta: Option<Delta>,
    usage: Option<Usage>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    usage: Option<Usage>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta {
    stop_reason: Option<String>,
}

impl MessageEvent {
    pub(super) fn usage(&self) -> super::Usage {
        let inner = self.message.as_ref().and_then(|message| message.usage.as_ref());
        self.usage.as_ref().or(inner).map(Usage::counts).unwrap_or_default()
    }

    pub(super) fn stop_reason(&self) -> Option<&str> {
        self.delta.as_ref()?.stop_reason.as_deref()
    }
}

/// The three events that end a response.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ResponseEvent {
    response: Option<Response>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Response {
    status: Option<String>,
    usage: Option<Usage>,
    incomplete_details: Option<Incomplete>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Incomplete {
    reason: Option<String>,
}

impl ResponseEvent {
    pub(super) fn usage(&self) -> super::Usage {
        self.response
            .as_ref()
            .and_then(|response| response.usage.as_ref())
            .map(Usage::counts)
            .unwrap_or_default()
    }

    pub(super) fn status(&self) -> Option<&str> {
        self.response.as_ref()?.status.as_deref()
    }

    pub(super) fn incomplete_reason(&self) -> Option<&str> {
        self.response.as_ref()?.incomplete_details.as_ref()?.reason.as_deref()
    }
}

/// An error in any of the shapes engines use: `{"error":{"message"}}`, `{"error":"..."}`, `{"message"}`, and inside
/// `response`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ErrorEvent {
    error: Option<ErrorBody>,
    message: Option<String>,
    response: Option<FailedResponse>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FailedResponse {
    error: Option<ErrorBody>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ErrorBody {
    Text(String),
    Object {
        #[serde(default)]
        message: Option<String>,
    },
}

/// The message of an error event, cut to what a log line holds.
pub(super) fn error_message(json: &[u8]) -> String {
    let event: ErrorEvent = parse(json);
    let message = [event.error, event.response.and_then(|response| response.error)]
        .into_iter()
        .flatten()
        .find_map(|body| match body {
            ErrorBody::Text(text) => Some(text),
            ErrorBody::Object { message } => message,
        })
        .or(event.message);
    let mut message = message.unwrap_or_else(|| "an error without a message".to_owned());
    let cut = (0..=MAX_MESSAGE_BYTES.min(message.len())).rev().find(|&at| message.is_char_boundary(at));
    message.truncate(cut.unwrap_or_default());
    message
}
