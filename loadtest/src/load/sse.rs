//! Server-sent events of the chat API, read without building JSON. Pure.
//!
//! [`Splitter`] cuts a byte stream into events whatever its chunks are; [`parse`] finds the few fields that matter by
//! their literal bytes. That is exact: within a JSON string every quote is escaped, so `"content":"` cannot occur in text.

use memchr::memmem;

pub(super) use crate::engine::render::{STAMP, STAMP_DIGITS};

/// Longest event; beyond it the stream is broken.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Cuts bytes into events.
#[derive(Debug, Default)]
pub struct Splitter {
    buffer: Vec<u8>,
    /// Bytes of `buffer` already given out.
    taken: usize,
}

/// An event grew beyond any sense.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

impl Splitter {
    /// Adds received bytes.
    ///
    /// # Errors
    /// [`TooLong`] if no event ends within 16 MiB.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() > MAX_EVENT_BYTES { Err(TooLong) } else { Ok(()) }
    }

    /// The next whole event without its end; comments are events too.
    pub fn next_event(&mut self) -> Option<&[u8]> {
        let rest = &self.buffer[self.taken..];
        let end = end_of_event(rest)?;
        let from = self.taken;
        self.taken += end + 2;
        Some(&self.buffer[from..from + end])
    }

    /// Takes received bytes and gives `each` the whole events, which are not copied if they came whole.
    ///
    /// # Errors
    /// [`TooLong`], or what `each` says.
    pub fn split<E: From<TooLong>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = bytes;
        if self.pending() == 0 {
            while let Some(end) = end_of_event(rest) {
                each(rest.get(..end).unwrap_or_default())?;
                rest = rest.get(end + 2..).unwrap_or_default();
            }
            if rest.is_empty() {
                return Ok(());
            }
        }
        self.push(rest)?;
        while let Some(event) = self.next_event() {
            each(event)?;
        }
        Ok(())
    }

    /// Bytes of an event that has not ended.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.taken
    }
}

/// Where the event that begins `bytes` ends: at its empty line.
fn end_of_event(bytes: &[u8]) -> Option<usize> {
    // There is seldom a line feed before it.
    memchr::memchr_iter(b'\n', bytes).find(|at| bytes.get(at + 1) == Some(&b'\n'))
}

/// What one event of a chat stream says.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A chunk with a choice: its text still escaped, and its finish reason.
    Delta {
        /// Inside of the JSON string; empty if there is none.
        content: &'a [u8],
        /// Set on the last.
        finish_reason: Option<&'a [u8]>,
    },
    /// The chunk with the usage.
    Usage {
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// Tokens of the answer.
        completion_tokens: u64,
    },
    /// `[DONE]`.
    Done,
    /// An error frame.
    Error(&'a [u8]),
    /// A comment.
    Comment,
    /// None of these.
    Unknown,
}

/// Reads one event.
pub fn parse(event: &[u8]) -> Event<'_> {
    if event.starts_with(b":") {
        return Event::Comment;
    }
    let Some(data) = event.strip_prefix(b"data: ") else { return Event::Unknown };
    if data == b"[DONE]" {
        return Event::Done;
    }
    if data.starts_with(b"{\"error\"") {
        return Event::Error(data);
    }
    if !data.starts_with(b"{") || !data.ends_with(b"}") {
        return Event::Unknown;
    }
    if memmem::find(data, b"\"choices\":[]").is_some() {
        let count = |name: &[u8]| number_after(data, name);
        return match (count(b"\"prompt_tokens\":"), count(b"\"completion_tokens\":")) {
            (Some(prompt_tokens), Some(completion_tokens)) => {
                Event::Usage { prompt_tokens, completion_tokens }
            }
            _ => Event::Unknown,
        };
    }
    if memmem::find(data, b"\"choices\":[{").is_none() {
        return Event::Unknown;
    }
    Event::Delta {
        content: string_after(data, b"\"content\":\"").unwrap_or_default(),
        finish_reason: string_after(data, b"\"finish_reason\":\""),
    }
}

/// The inside of the first string that follows `name`, still escaped.
pub(super) fn string_after<'a>(data: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let start = memmem::find(data, name)? + name.len();
    let rest = data.get(start..)?;
    let mut from = 0;
    loop {
        let at = from + memchr::memchr2(b'"', b'\\', rest.get(from..)?)?;
        if rest.get(at) == Some(&b'"') {
            return rest.get(..at);
        }
        from = at + 2;
    }
}

/// The number that follows `name`.
pub(super) fn number_after(data: &[u8], name: &[u8]) -> Option<u64> {
    let start = memmem::find(data, name)? + name.len();
    let digits = data.get(start..)?;
    let end = digits.iter().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    std::str::from_utf8(digits.get(..end)?).ok()?.parse().ok()
}

/// The numbers of the first list that follows `name`; none if there is no list.
pub(super) fn numbers_after(data: &[u8], name: &[u8]) -> Option<Vec<u32>> {
    let start = memmem::find(data, name)? + name.len();
    let list = data.get(start..)?.strip_prefix(b"[")?;
    let end = memchr::memchr(b']', list)?;
    let numbers = std::str::from_utf8(list.get(..end)?).ok()?.split(',');
    numbers.filter(|number| !number.is_empty()).map(|number| number.parse().ok()).collect()
}

/// True for an error that says what it is: an object with a message and a type.
pub fn is_typed(error: &[u8]) -> bool {
    let has = |name: &[u8]| {
        memmem::find(error, name).is_some_and(|at| !error[at + name.len()..].starts_with(b"\""))
    };
    [&b"\"message\": \""[..], b"\"message\":\""].iter().any(|name| has(name))
        && [&b"\"type\": \""[..], b"\"type\":\""].iter().any(|name| has(name))
}

/// Appends the text of the inside of a JSON string. None if it is none.
pub fn unescape(inside: &[u8], text: &mut String) -> Option<()> {
    if memchr::memchr(b'\\', inside).is_none() {
        text.push_str(std::str::from_utf8(inside).ok()?);
        return Some(());
    }
    let whole = [b"\"", inside, b"\""].concat();
    text.push_str(&serde_json::from_slice::<String>(&whole).ok()?);
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_matters() {
        let delta =
            br#"data: {"id":"x","choices":[{"index":0,"delta":{"content":" a\"b\\"},"finish_reason":null}]}"#;
        assert_eq!(parse(delta), Event::Delta { content: br#" a\"b\\"#, finish_reason: None });
        let last = br#"data: {"choices":[{"delta":{"content":""},"finish_reason":"length"}]}"#;
        assert_eq!(parse(last), Event::Delta { content: b"", finish_reason: Some(b"length") });
        let usage =
            br#"data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":8,"completion_tokens":5}}"#;
        assert_eq!(parse(usage), Event::Usage { prompt_tokens: 3, completion_tokens: 5 });
        assert_eq!(parse(b"data: [DONE]"), Event::Done);
        assert_eq!(parse(b": keep-alive"), Event::Comment);
        assert!(matches!(parse(br#"data: {"error": {"message": "x"}}"#), Event::Error(_)));
        assert!(is_typed(br#"data: {"error": {"message": "x", "type": "y"}}"#));
        assert!(
            !is_typed(br#"data: {"error":{"message":"","type":"y"}}"#) && !is_typed(b"data: {\"error\":1}")
        );
        assert_eq!(numbers_after(b"\"a\":[],\"b\":[1,23]}", b"\"b\":"), Some(vec![1, 23]));
        assert_eq!(numbers_after(b"\"a\":[],\"b\":null}", b"\"a\":"), Some(vec![]));
        assert_eq!(numbers_after(b"\"a\":null", b"\"a\":"), None);
        for garbage in ["", "data: {\"choices\":[{\"delta\":", "nonsense", "data: []"] {
            assert_eq!(parse(garbage.as_bytes()), Event::Unknown, "{garbage}");
        }
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_chunks(events in proptest::collection::vec("[a-z](\n?[a-z]){0,4}", 1..9), cut in 1usize..7) {
            let bytes: Vec<u8> = events.iter().flat_map(|e| format!("{e}\n\n").into_bytes()).collect();
            let mut splitter = Splitter::default();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(cut) {
                splitter.push(chunk).unwrap();
                while let Some(event) = splitter.next_event() {
                    seen.push(String::from_utf8(event.to_vec()).unwrap());
                }
            }
            prop_assert_eq!(splitter.pending(), 0);
            prop_assert_eq!(&seen, &events);
            let mut seen = Vec::new();
            for chunk in bytes.chunks(cut) {
                let each = |event: &[u8]| -> Result<(), TooLong> {
                    seen.push(String::from_utf8(event.to_vec()).unwrap());
                    Ok(())
                };
                splitter.split(chunk, each).unwrap();
            }
            prop_assert_eq!(splitter.pending(), 0);
            prop_assert_eq!(seen, events);
        }

        #[test]
        fn parsing_takes_anything(bytes: Vec<u8>) {
            parse(&bytes);
            let mut text = String::new();
            unescape(&bytes, &mut text);
        }

        #[test]
        fn unescapes_json(text: String) {
            let json = serde_json::to_string(&text).unwrap();
            let mut back = String::new();
            unescape(&json.as_bytes()[1..json.len() - 1], &mut back).unwrap();
            prop_assert_eq!(back, text);
        }
    }
}
