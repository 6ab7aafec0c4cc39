//! An error written in the shape of an API.

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use super::{ErrorShape, read::Said};
use crate::error::{anthropic_type, openai_type};

/// The body of an answer.
pub(super) fn body(status: StatusCode, said: &Said, shape: ErrorShape) -> Bytes {
    value(status, said, shape).to_string().into()
}

/// An event of a stream.
pub(super) fn event(status: StatusCode, said: &Said, shape: ErrorShape) -> Vec<u8> {
    let name = match shape {
        ErrorShape::OpenAi | ErrorShape::Responses => "",
        ErrorShape::Anthropic => "event: error\n",
    };
    format!("{name}data: {}\n\n", value(status, said, shape)).into_bytes()
}

fn value(status: StatusCode, said: &Said, shape: ErrorShape) -> Value {
    let message = said.message.clone().unwrap_or_else(|| {
        let reason = status.canonical_reason().unwrap_or("an error");
        format!("The engine answered {} ({reason}) and gave no reason.", status.as_u16())
    });
    match shape {
        ErrorShape::OpenAi | ErrorShape::Responses => json!({"error": {
            "message": message,
            "type": said.kind.as_deref().unwrap_or_else(|| openai_type(status.as_u16())),
            "param": said.param,
            "code": said.code,
        }}),
        // Anthropic's types are a closed list: an engine's own would be news to their clients.
        ErrorShape::Anthropic => json!({"type": "error", "error": {
            "type": anthropic_type(status.as_u16()),
            "message": message,
        }}),
    }
}
