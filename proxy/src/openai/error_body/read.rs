//! What an error says, found in any of its shapes.

use serde_json::Value;

use super::ErrorShape;

/// How many wrappings are opened.
const MAX_WRAPPINGS: usize = 4;

/// Plain text up to this many bytes is taken for a message.
const MAX_TEXT_BYTES: usize = 400;

/// What an error says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    /// Its words for the client; `None` if there are none that may be shown.
    pub(super) message: Option<String>,
    /// OpenAI's `type`.
    pub(super) kind: Option<String>,
    /// OpenAI's `param`.
    pub(super) param: Option<Value>,
    /// OpenAI's `code`, as it was: vLLM's is a number.
    pub(super) code: Option<Value>,
    /// The HTTP status, where `code` or `status` is one.
    pub(super) status: Option<u16>,
}

/// Whether a client of `shape` understands it as it is. An error wrapped in another is not right.
pub(super) fn is_right(value: &Value, shape: ErrorShape) -> bool {
    let Some(error) = value.get("error").and_then(Value::as_object) else { return false };
    let Some(message) = error.get("message").and_then(Value::as_str) else { return false };
    if error.contains_key("error") || wrapped(message).is_some() {
        return false;
    }
    let marked = value.get("type").and_then(Value::as_str) == Some("error");
    match shape {
        ErrorShape::OpenAi | ErrorShape::Responses => !marked,
        ErrorShape::Anthropic => marked && error.get("type").is_some_and(Value::is_string),
    }
}

/// What `value` says, however it is wrapped. The innermost words count, and for each other field the innermost that is there.
pub(super) fn said(value: &Value) -> Said {
    let mut said = Said::default();
    read(value, &mut said, 0);
    said
}

fn read(value: &Value, said: &mut Said, depth: usize) {
    match value {
        Value::String(text) => match wrapped(text).filter(|_| depth < MAX_WRAPPINGS) {
            Some(inner) => read(&inner, said, depth + 1),
            None => said.message = presentable(text).or(said.message.take()),
        },
        Value::Object(fields) => {
            let text = |key: &str| fields.get(key).and_then(Value::as_str);
            if let Some(kind) = text("type").filter(|kind| *kind != "error") {
                said.kind = Some(kind.to_owned());
            }
            if let Some(param) = fields.get("param").filter(|param| param.is_string()) {
                said.param = Some(param.clone());
            }
            if let Some(code) = fields.get("code").filter(|code| code.is_number() || code.is_string()) {
                said.code = Some(code.clone());
            }
            let number =
                |key: &str| fields.get(key).and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok());
            said.status = number("code").or(number("status")).or(number("status_code")).or(said.status);
            if depth > MAX_WRAPPINGS {
                return;
            }
            for key in ["message", "detail", "msg", "error"] {
                match fields.get(key) {
                    Some(Value::Array(problems)) => validation(problems, said),
                    Some(inner @ (Value::String(_) | Value::Object(_))) => read(inner, said, depth + 1),
                    _ => {}
                }
            }
        }
        Value::Array(problems) => validation(problems, said),
        _ => {}
    }
}

/// FastAPI's list of what is wrong: `[{"loc":["body","messages"],"msg":"Field required","type":"missing"}]`.
fn validation(problems: &[Value], said: &mut Said) {
    let place = |problem: &Value| {
        let words = problem.get("loc").and_then(Value::as_array)?;
        let words: Vec<String> =
            words.iter().map(|word| word.as_str().map_or_else(|| word.to_string(), str::to_owned)).collect();
        Some(words.join("."))
    };
    let sentences: Vec<String> = problems
        .iter()
        .filter_map(|problem| {
            let words = problem.get("msg").or(problem.get("message")).and_then(Value::as_str)?;
            Some(place(problem).map_or_else(|| words.to_owned(), |place| format!("{place}: {words}")))
        })
        .collect();
    if !sentences.is_empty() {
        said.param = problems.iter().find_map(place).map(Value::from).or(said.param.take());
        said.message = presentable(&sentences.join("; ")).or(said.message.take());
    }
}

/// The error that `text` holds as JSON, if it does.
fn wrapped(text: &str) -> Option<Value> {
    let text = text.trim();
    if !text.starts_with('{') {
        return None;
    }
    let value: Value = serde_json::from_str(text).ok()?;
    ["error", "message", "detail"].iter().any(|key| value.get(key).is_some()).then_some(value)
}

/// The words of a body that is not JSON.
pub(super) fn said_in_text(body: &[u8]) -> Said {
    let text = std::str::from_utf8(body).unwrap_or_default().trim();
    let fit = text.len() <= MAX_TEXT_BYTES && !text.starts_with('<');
    Said { message: if fit { presentable(text) } else { None }, ..Said::default() }
}

/// `text`, if there is any and it is nothing of the inside: a stack trace, a source file, an address.
fn presentable(text: &str) -> Option<String> {
    let text = text.trim();
    let inside = ["Traceback (most recent call last)", "File \"/", "site-packages/"];
    let binary = text.chars().any(|c| c.is_control() && !c.is_ascii_whitespace());
    let private = binary || inside.iter().any(|mark| text.contains(mark)) || names_an_address(text);
    (!text.is_empty() && !private).then(|| text.to_owned())
}

/// Whether an IP address stands in `text`, with or without a port.
fn names_an_address(text: &str) -> bool {
    let word = |c: char| c.is_ascii_hexdigit() || matches!(c, '.' | ':');
    text.split(|c: char| !word(c)).any(|part| {
        let part = part.trim_matches(|c| matches!(c, '.' | ':'));
        let host = part.rsplit_once(':').map_or(part, |(host, _)| host);
        part.len() >= 7
            && (part.parse::<std::net::IpAddr>().is_ok() || host.parse::<std::net::Ipv4Addr>().is_ok())
    })
}

/// The length of the first event, its blank line included; `None` when none ends.
pub(super) fn event_length(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let rest = bytes.get(at..)?;
        let end = memchr::memchr2(b'\n', b'\r', rest)?;
        let line_end = match rest.get(end..end + 2) {
            Some(b"\r\n") => end + 2,
            _ => end + 1,
        };
        at += line_end;
        if end == 0 {
            return Some(at);
        }
    }
}

/// What an event says that is an error and not in the shape of the API; `None` for all other events.
pub(super) fn error_in_event(event: &[u8], shape: ErrorShape) -> Option<Said> {
    let mut data: Vec<&[u8]> = Vec::new();
    let mut name: &[u8] = b"";
    for line in event.split(|byte| matches!(byte, b'\n' | b'\r')) {
        if let Some(value) = line.strip_prefix(b"data:") {
            data.push(value.strip_prefix(b" ").unwrap_or(value));
        } else if let Some(value) = line.strip_prefix(b"event:") {
            name = value.trim_ascii();
        }
    }
    let value: Value = serde_json::from_slice(&data.join(&b'\n')).ok()?;
    // Typed events of the Responses API have errors of their own shape: `{"type":"error","message":...}`.
    let typed = value.get("type").and_then(Value::as_str) == Some("error")
        && value.get("error").is_none_or(|error| !error.is_object());
    let is_error = value.get("error").is_some_and(|error| error.is_object() || error.is_string())
        || value.get("object").and_then(Value::as_str) == Some("error");
    if !is_error || typed || value.get("choices").is_some() {
        return None;
    }
    let right = match shape {
        ErrorShape::OpenAi | ErrorShape::Responses => is_right(&value, shape),
        ErrorShape::Anthropic => is_right(&value, shape) && name == b"error",
    };
    (!right).then(|| said(&value))
}
