//! `/v1/audio`: forms with a file to text, and text to a file.
//!
//! A transcription is a function of the file's bytes, made of the same tokens as any other answer, so that a test can prove
//! that the file arrived as it was sent. Speech is a WAV file of a length that depends on the text. Neither means anything.
//!
//! Forms are taken apart by the plain rules, not by the gateway's reader, so that one can be held against the other.

use bytes::Bytes;
use memchr::memmem;
use serde_json::{Map, Value, json};

use super::{
    args::Options,
    error::ApiError,
    generation::{Generation, Limits, complete},
    http::{Head, Response},
    record::unix_us,
    request::Fields,
    tokens::{self, Prefix},
};

/// Tokens of a transcription at most.
const MAX_TOKENS: u64 = 24;

/// Bytes of a second of sound: 16 kHz, 16 bits.
const BYTES_A_SECOND: usize = 32_000;

/// A form taken apart: its plain fields, and its file.
struct Form {
    fields: Map<String, Value>,
    file: Option<Bytes>,
}

/// What the sound of these bytes says: the text of every transcription and translation of them.
#[must_use]
pub fn heard(file: &[u8]) -> String {
    let hash = xxhash_rust::xxh3::xxh3_64(file);
    let prefix = Prefix::of(&tokens::encoded(&format!("{hash:016x}")));
    let limits = Limits { max_tokens: MAX_TOKENS, ..Limits::default() };
    complete(Generation::new(prefix, 0, limits), u64::MAX).text
}

/// Answers `/v1/audio/transcriptions` and `/v1/audio/translations`.
pub(super) fn transcribe(head: &Head, body: &Bytes, options: &Options) -> Response {
    transcription(head, body, options)
        .unwrap_or_else(|error| Response::json(error.status, error.openai_body()))
}

fn transcription(head: &Head, body: &Bytes, options: &Options) -> Result<Response, ApiError> {
    let Form { fields, file } = form(head, body)?;
    let is_true =
        |name: &str| fields.get(name).and_then(Value::as_str).is_some_and(|v| v == "true" || v == "True");
    let stream = is_true("stream");
    let mut fields = Fields::of(fields);
    let model = fields.model(options)?;
    let file = file.ok_or_else(|| ApiError::invalid("missing", "file", "Field required"))?;
    let text = heard(&file);
    let format = fields.string("response_format")?;
    let seconds = file.len().div_ceil(BYTES_A_SECOND);
    if stream {
        return Ok(streamed(&text, &model));
    }
    Ok(match format.as_deref() {
        None | Some("json") => {
            let usage = json!({"type": "duration", "seconds": seconds});
            Response::json(200, json!({"text": text, "usage": usage}).to_string())
        }
        Some("text") => Response::text(200, text),
        Some("verbose_json") => {
            let segment = json!({"id": 0, "start": 0.0, "end": seconds, "text": text});
            let whole = json!({"language": "en", "duration": seconds.to_string(), "text": text, "segments": [segment]});
            Response::json(200, whole.to_string())
        }
        Some(other) => {
            return Err(ApiError::bad(
                "response_format",
                format!("`{other}` is not a known response_format"),
            ));
        }
    })
}

fn streamed(text: &str, model: &str) -> Response {
    let id = format!("trsc-{:016x}", fastrand::u64(..));
    let created = unix_us() / 1_000_000;
    let chunk = |delta: &str, finish: Value| {
        let choice = json!({"delta": {"content": delta}, "finish_reason": finish});
        let chunk = json!({"id": id, "object": "transcription.chunk", "created": created, "model": model, "choices": [choice]});
        format!("data: {chunk}\n\n")
    };
    let mut body: String = text.split_inclusive(' ').map(|word| chunk(word, Value::Null)).collect();
    body.push_str(&chunk("", json!("stop")));
    body.push_str("data: [DONE]\n\n");
    Response { content_type: "text/event-stream; charset=utf-8", ..Response::text(200, body) }
}

/// Answers `/v1/audio/speech`: silence, a tenth of a second for each letter.
pub(super) fn speak(mut fields: Fields, options: &Options) -> Result<Response, ApiError> {
    fields.model(options)?;
    let input = fields.string("input")?;
    let text = input.ok_or_else(|| ApiError::invalid("missing", "input", "Field required"))?;
    let samples = text.chars().count().min(600) * BYTES_A_SECOND / 10;
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
    let mut wav = [&b"RIFF"[..], &length(36 + samples), b"WAVEfmt ", &length(16)].concat();
    // PCM, one channel, 16 kHz, 32 kB/s, 2 bytes a sample of 16 bits.
    wav.extend([1, 0, 1, 0, 0x80, 0x3e, 0, 0, 0, 0x7d, 0, 0, 2, 0, 16, 0]);
    wav.extend([&b"data"[..], &length(samples)].concat());
    wav.resize(wav.len() + samples, 0);
    Ok(Response { content_type: "audio/wav", ..Response::text(200, wav) })
}

fn form(head: &Head, body: &Bytes) -> Result<Form, ApiError> {
    let media = head.header("content-type").unwrap_or("");
    let boundary = media
        .strip_prefix("multipart/form-data")
        .and_then(|rest| rest.split_once("boundary="))
        .map(|(_, rest)| rest.split(';').next().unwrap_or("").trim().trim_matches('"'))
        .filter(|boundary| !boundary.is_empty())
        .ok_or_else(|| ApiError::bad("", "Missing boundary in multipart."))?;
    let broken = || ApiError::bad("", "There was an error parsing the body");
    let delimiter = format!("--{boundary}");
    let line = format!("\r\n{delimiter}");
    let mut rest =
        body.strip_prefix(delimiter.as_bytes()).map(|rest| body.slice_ref(rest)).ok_or_else(broken)?;
    let mut form = Form { fields: Map::new(), file: None };
    while !rest.starts_with(b"--") {
        let part = rest.strip_prefix(b"\r\n").map(|part| rest.slice_ref(part)).ok_or_else(broken)?;
        let head_end = memmem::find(&part, b"\r\n\r\n").ok_or_else(broken)?;
        let end =
            memmem::find(&part, line.as_bytes()).filter(|end| *end >= head_end + 4).ok_or_else(broken)?;
        let content = part.slice(head_end + 4..end);
        let part_head = String::from_utf8_lossy(part.get(..head_end).unwrap_or_default()).into_owned();
        let value = |key: &str| {
            let (_, after) = part_head.split_once(&format!("{key}=\""))?;
            after.split_once('"').map(|(value, _)| value.to_owned())
        };
        let name = value(" name").ok_or_else(broken)?;
        if value("filename").is_some() {
            form.file = Some(content);
        } else {
            form.fields.insert(name, Value::from(String::from_utf8_lossy(&content).into_owned()));
        }
        rest = part.slice(end + line.len()..);
    }
    Ok(form)
}
