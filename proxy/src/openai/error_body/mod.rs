//! An engine's error, in whatever shape it came, in the shape of the API.
//!
//! vLLM alone answers in five: `{"error":{"message",...}}`; `{"error":"Unauthorized"}` from its middleware; `{"detail":...}`
//! from the framework under it; `{"object":"error","message":...}` in older versions; plain text when all else fails. Proxies
//! and sidecars before an engine add HTML, and some wrap one error in another. A client's library understands one shape, and
//! shows nothing for the others.
//!
//! What is already right passes byte for byte ([`normalise`] says `None`). Of anything else the status stays, and of its words
//! those that were meant for a client: never HTML, a stack trace, a path or an address of the inside.
//!
//! An error can also hide in an answer that says 200 ([`hidden`]), or in an event of the wrong shape ([`normalise_events`]).

mod read;
mod render;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;

use self::read::{Said, is_right, said};
use super::ErrorShape;

/// An answer over this many bytes is not looked into for a hidden error.
const HIDDEN_BYTES: usize = 16 << 10;

/// The body to send instead of `body`, as JSON, for an answer with an error `status`; `None` where it is right as it is.
#[must_use]
pub fn normalise(status: StatusCode, is_json: bool, body: &[u8], shape: ErrorShape) -> Option<Bytes> {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    if is_json && parsed.as_ref().is_some_and(|value| is_right(value, shape)) {
        return None;
    }
    let said = match &parsed {
        Some(value) => said(value),
        None => read::said_in_text(body),
    };
    Some(render::body(status, &said, shape))
}

/// The status of an error that hides in the whole body of a 200; `None` if it is an answer. The status is the one that the
/// error names, else 502.
#[must_use]
pub fn hidden(body: &[u8]) -> Option<StatusCode> {
    let start = body.trim_ascii_start();
    // What an answer begins with is cheap to see; only what may be an error is parsed.
    let rest = start.strip_prefix(b"{")?.trim_ascii_start();
    if body.len() > HIDDEN_BYTES || !(rest.starts_with(br#""error""#) || rest.starts_with(br#""object""#)) {
        return None;
    }
    let value: Value = serde_json::from_slice(body).ok()?;
    let is_error = match value.get("error") {
        Some(error) => error.is_object() || error.is_string(),
        None => value.get("object").and_then(Value::as_str) == Some("error"),
    };
    let answers =
        ["choices", "output", "data", "content", "results"].iter().any(|key| value.get(key).is_some());
    if !is_error || answers {
        return None;
    }
    let named = said(&value).status.and_then(|code| StatusCode::from_u16(code).ok());
    Some(named.filter(|s| s.is_client_error() || s.is_server_error()).unwrap_or(StatusCode::BAD_GATEWAY))
}

/// The body for an answer with a 4xx or 5xx status, and whether its content type must become JSON: as [`normalise`], and one
/// thing more. An engine that has no such route says "Not Found" and nothing else; the client hears what is missing.
#[must_use]
pub fn answer(status: StatusCode, content_type: &[u8], body: &[u8], shape: ErrorShape) -> Option<Bytes> {
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_json = essence.eq_ignore_ascii_case(b"application/json");
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) && no_such_route(body) {
        let said = Said {
            message: Some("The engine of this model does not serve this API.".to_owned()),
            code: Some(Value::from("not_served_by_model")),
            ..Said::default()
        };
        return Some(render::body(status, &said, shape));
    }
    normalise(status, is_json, body, shape)
}

/// Whether it is the word of a web framework that knows no such path, or not with this method.
fn no_such_route(body: &[u8]) -> bool {
    let value: Option<Value> = if body.len() < 256 { serde_json::from_slice(body).ok() } else { None };
    let detail = value.as_ref().and_then(|value| value.get("detail")).and_then(Value::as_str);
    matches!(detail, Some("Not Found" | "Method Not Allowed"))
}

/// Whole events, those that are errors of the wrong shape replaced; `None` if there are none. Meant for the few bytes in which
/// an error has been seen, not for every chunk.
#[must_use]
pub fn normalise_events(events: &[u8], shape: ErrorShape) -> Option<Bytes> {
    let mut written: Option<Vec<u8>> = None;
    let mut rest = events;
    let mut at = 0;
    while let Some(length) = read::event_length(rest) {
        let (event, after) = rest.split_at(length);
        let replaced = read::error_in_event(event, shape).map(|said| {
            let status = said.status.and_then(|code| StatusCode::from_u16(code).ok());
            let status =
                status.filter(|status| status.as_u16() >= 400).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            render::event(status, &said, shape)
        });
        match (&mut written, replaced) {
            (None, None) => {}
            (None, Some(new)) => written = Some([events.get(..at).unwrap_or_default(), &new].concat()),
            (Some(written), Some(new)) => written.extend_from_slice(&new),
            (Some(written), None) => written.extend_from_slice(event),
        }
        at += length;
        rest = after;
    }
    written.map(|mut written| {
        written.extend_from_slice(rest);
        written.into()
    })
}
