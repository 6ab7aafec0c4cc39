//! What the APIs that are continued by text share: their events, their errors, and the seam of two texts.

use std::ops::Range;

use bytes::Bytes;

use crate::openai::{
    request::{json_string, rewrite},
    span::{self, Step},
};

/// Appends one event; `name` is empty where the API names none.
pub(super) fn event(out: &mut Vec<u8>, name: &[u8], data: &[u8]) {
    if !name.is_empty() {
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(name);
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
}

/// The string at `path`, decoded.
pub(super) fn text(data: &[u8], path: &[Step<'_>]) -> Option<String> {
    serde_json::from_slice(span::get(data, path)?).ok()
}

/// The count at `path`.
pub(super) fn count(data: &[u8], path: &[Step<'_>]) -> Option<u64> {
    serde_json::from_slice(span::get(data, path)?).ok()
}

/// The value at `path` as it is written; `None` where it is absent or `null`.
pub(super) fn raw<'a>(data: &'a [u8], path: &[Step<'_>]) -> Option<&'a [u8]> {
    span::get(data, path).filter(|value| *value != b"null")
}

/// `text` as JSON, as engines write it.
pub(super) fn quoted(text: &str) -> Vec<u8> {
    json_string(text)
}

/// Values that take the place of others; those whose place is absent are left out.
#[derive(Debug, Default)]
pub(super) struct Edits(Vec<(Range<usize>, Vec<u8>)>);

impl Edits {
    /// Puts `value` at `path`, if something stands there.
    pub(super) fn set(&mut self, data: &[u8], path: &[Step<'_>], value: impl Into<Vec<u8>>) {
        if let Some(range) = span::find(data, path) {
            self.0.push((range, value.into()));
        }
    }

    /// `data` with all of them made.
    pub(super) fn make(&self, data: &[u8]) -> Bytes {
        let edits = self.0.iter().map(|(range, value)| (range.clone(), value.as_slice())).collect();
        rewrite(&Bytes::copy_from_slice(data), edits)
    }
}

/// Whether an event is an error, and if so whether the request is to blame, so that no other engine would do better.
pub(super) fn error(name: &[u8], data: &[u8]) -> Option<Blame> {
    let inner = raw(data, &[Step::Key("error")]);
    let marked = |key| text(data, &[Step::Key(key)]).as_deref() == Some("error");
    if inner.is_none() && name != b"error" && !marked("type") && !marked("object") {
        return None;
    }
    let error = inner.unwrap_or(data);
    let status = ["code", "status"].into_iter().find_map(|key| count(error, &[Step::Key(key)]));
    let kind = text(error, &[Step::Key("type")]).unwrap_or_default();
    let is_clients = match status {
        Some(408 | 409 | 425 | 429 | 499) => false,
        Some(status) => (400..500).contains(&status),
        None => CLIENTS_ERRORS.contains(&kind.as_str()),
    };
    Some(if is_clients { Blame::Request } else { Blame::Engine })
}

/// `type`s of errors that the request brought upon itself, in Anthropic's words and in vLLM's.
const CLIENTS_ERRORS: [&str; 9] = [
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "BadRequestError",
    "BadRequest",
    "NotFoundError",
    "UnprocessableEntityError",
];

/// Who is to blame for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blame {
    /// The request: any engine would say so.
    Request,
    /// The engine.
    Engine,
}

/// Where a text that has been seen meets the one that continues it.
///
/// Some chat templates trim the last message, others do not, and the gateway cannot tell. So a text is continued without the
/// white space at its end: every template then gives the same prompt, the engine writes that white space again, and here it
/// is taken off. Where the engine chose other white space, that is dropped too: the client has had its own.
#[derive(Debug, Clone, Default)]
pub(super) struct Seam {
    /// White space that the client has and the engine has still to write again; `None` behind the seam.
    gap: Option<String>,
}

impl Seam {
    /// Cuts `seen` into what the engine is told and the seam.
    pub(super) fn of(seen: &str) -> (&str, Self) {
        let told = seen.trim_end();
        let gap = seen.get(told.len()..).filter(|gap| !gap.is_empty());
        (told, Self { gap: gap.map(str::to_owned) })
    }

    /// What of the continuation's next piece is new to the client.
    pub(super) fn new_text<'a>(&mut self, piece: &'a str) -> &'a str {
        let Some(gap) = &mut self.gap else { return piece };
        let same: usize =
            gap.chars().zip(piece.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        gap.drain(..same);
        let rest = piece.get(same..).unwrap_or_default();
        let rest = if gap.is_empty() { rest } else { rest.trim_start() };
        if !rest.is_empty() {
            self.gap = None;
        }
        rest
    }

    /// Whether what comes is new as it is.
    pub(super) const fn is_closed(&self) -> bool {
        self.gap.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(seen: &str, pieces: &[&str]) -> String {
        let (told, mut seam) = Seam::of(seen);
        assert_eq!(told, seen.trim_end());
        pieces.iter().map(|piece| seam.new_text(piece).to_owned()).collect()
    }

    #[test]
    fn white_space_at_a_seam_comes_once() {
        assert_eq!(through("a", &[" b", " c"]), " b c");
        assert_eq!(through("a \n", &[" ", "\n", "\nb"]), "\nb");
        assert_eq!(through("a \n", &[" \n  b"]), "  b");
        assert_eq!(through("a\n\n", &[" ", "b"]), "b");
        assert_eq!(through("a\n\n", &["b", " c"]), "b c");
        assert_eq!(through("\n", &["\n", "\n", "b"]), "\nb");
    }

    #[test]
    fn errors_are_told_apart_by_blame() {
        let blame = |name: &str, data: &str| error(name.as_bytes(), data.as_bytes());
        assert_eq!(blame("", r#"{"id":"x","error":null}"#), None);
        assert_eq!(blame("", r#"{"error":{"message":"m","code":500}}"#), Some(Blame::Engine));
        assert_eq!(blame("", r#"{"error":{"message":"m","code":400}}"#), Some(Blame::Request));
        assert_eq!(blame("", r#"{"error":{"message":"m","code":429}}"#), Some(Blame::Engine));
        assert_eq!(
            blame("error", r#"{"type":"error","error":{"type":"internal_error"}}"#),
            Some(Blame::Engine)
        );
        assert_eq!(
            blame("error", r#"{"type":"error","error":{"type":"invalid_request_error"}}"#),
            Some(Blame::Request)
        );
        assert_eq!(blame("", r#"{"object":"error","code":503}"#), Some(Blame::Engine));
        assert_eq!(blame("", r#"{"error":"words"}"#), Some(Blame::Engine));
    }
}
