//! What we need to know of a request body, found in one pass, the body itself untouched.
//!
//! Why not a DOM: a 1 MiB prompt would be parsed into thousands of allocations, only to be written back differently
//! (number forms, key order, duplicate keys). Why not search for `"model"`: the same text stands in prompts and in
//! nested objects. So the whole grammar is checked by a small state machine (a cursor, and one bit per open array or
//! object), and only keys of the top-level object are looked at, by their decoded names.
//!
//! Invariants:
//! - A body that is accepted is valid JSON; a malformed one is our 400 with its offset and never reaches an engine.
//! - A key that we act on stands at most once, so we and the engine cannot read different values.
//! - The ranges in [`RequestFacts`] cover whole values: replacing one by another JSON value leaves valid JSON.
//!
//! Against `serde_json`: nesting is limited by [`ScanLimits::max_depth`] (`serde_json`: 127 levels), UTF-8 is checked
//! also where `serde_json` ignores a value, and lone surrogate escapes are accepted, as it does for ignored values.
//!
//! Cost: one UTF-8 pass and one structure pass; one allocation, for the model's name.
//! `cargo bench -p penstock-proxy --bench scan` prints MB/s.
//!
//! Deliberately absent: any view of messages, tools or sampling parameters beyond the byte and token counts in
//! [`PromptFacts`], and the hashes of its prefixes, for a [`Chain`] that asks for them.

mod error;
mod lexer;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::{Bytes, BytesMut};

pub use error::ScanError;
pub(super) use lexer::hex_digit;
use lexer::{Lexer, Text};

use crate::routing::prefix::Chain;

/// The deepest nesting that [`ScanLimits::max_depth`] can allow.
pub const MAX_DEPTH: usize = 1024;

/// What a body may look like at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanLimits {
    /// Levels of nested arrays and objects, the top-level object included; above [`MAX_DEPTH`] means [`MAX_DEPTH`].
    pub max_depth: usize,
    /// Bytes of the model's decoded name.
    pub max_model_bytes: usize,
}

impl Default for ScanLimits {
    /// 128 levels: JSON schemas in tools reach about 20, and the engine's own parser gives up at 200.
    /// 512 bytes of name: Hugging Face allows 96 a segment.
    fn default() -> Self {
        Self { max_depth: 128, max_model_bytes: 512 }
    }
}

/// What the body says that the gateway acts on. All ranges are byte offsets of whole JSON values in the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestFacts {
    /// The model asked for, decoded.
    pub model: String,
    /// Where its value stands, quotes included.
    pub model_range: Range<usize>,
    /// Whether a stream was asked for; `null` and absent are `false`.
    pub stream: bool,
    /// Where `stream`'s value stands.
    pub stream_range: Option<Range<usize>>,
    /// The largest of `max_tokens`, `max_completion_tokens` and `max_output_tokens`.
    pub max_tokens: Option<u64>,
    /// How many choices were asked for.
    pub n: Option<u64>,
    /// Where `user`'s string stands, quotes included; `None` for `null`.
    pub user_range: Option<Range<usize>>,
    /// Where `stream_options`' value stands: an object or `null`.
    pub stream_options_range: Option<Range<usize>>,
    /// How much prompt there is.
    pub prompt: PromptFacts,
    /// Just behind the top-level `{`: where `"key":value,` can be inserted (the object is never empty: it has `model`).
    pub insert_at: usize,
}

/// The size of the prompt, for load accounting: an estimate, never a bill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PromptFacts {
    /// Bytes of all string values (decoded; keys not counted) under the top-level `messages`, `prompt`, `input`, `system`,
    /// `instructions`, `tools`, `query`, `documents`, `text_1` and `text_2`. A `data:` URL counts nothing: an image's
    /// base64 says little about its tokens.
    pub text_bytes: u64,
    /// Numbers in arrays under the top-level `prompt`, `input` and `tokens`: a prompt given as token ids.
    pub token_ids: u64,
}

impl PromptFacts {
    /// Prompt tokens, at four bytes of text a token.
    #[must_use]
    pub const fn estimated_tokens(&self) -> u64 {
        self.text_bytes / 4 + self.token_ids
    }
}

/// Checks that `body` is one JSON object and finds what the gateway acts on.
///
/// # Errors
/// The first thing that is wrong, in the order of the body (bad UTF-8 before all, a missing `model` after all).
pub fn scan(body: &[u8], limits: &ScanLimits) -> Result<RequestFacts, ScanError> {
    scan_with(body, limits, None)
}

/// As [`scan`], and `chain` takes the prompt as it passes by: texts as they are written (escapes undecoded), token ids as
/// their digits, in the order of the body.
///
/// # Errors
/// As [`scan`].
pub fn scan_with(
    body: &[u8],
    limits: &ScanLimits,
    chain: Option<&mut Chain>,
) -> Result<RequestFacts, ScanError> {
    if simdutf8::basic::from_utf8(body).is_err() {
        let offset = std::str::from_utf8(body).err().map_or(0, |error| error.valid_up_to());
        return Err(ScanError::InvalidUtf8 { offset });
    }
    Scanner { chain, ..Scanner::new(body, limits) }.run()
}

/// `body` with the bytes of `range` replaced by `json_value`, all others as they were. An empty range inserts.
/// A range beyond the body is cut to it.
#[must_use]
pub fn splice(body: &Bytes, range: Range<usize>, json_value: &[u8]) -> Bytes {
    let (head, rest) = body.split_at(range.start.min(body.len()));
    let tail = rest.get(range.end.saturating_sub(head.len())..).unwrap_or_default();
    let mut spliced = BytesMut::with_capacity(head.len() + json_value.len() + tail.len());
    spliced.extend_from_slice(head);
    spliced.extend_from_slice(json_value);
    spliced.extend_from_slice(tail);
    spliced.freeze()
}

/// `text` as a JSON string, quotes included, for [`splice`].
#[must_use]
pub fn json_string(text: &str) -> Vec<u8> {
    serde_json::Value::from(text).to_string().into_bytes()
}

/// The top-level keys that we act on, each at most once in a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Model,
    Stream,
    StreamOptions,
    MaxTokens,
    MaxCompletionTokens,
    MaxOutputTokens,
    N,
    User,
}

impl Field {
    const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Stream => "stream",
            Self::StreamOptions => "stream_options",
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
            Self::MaxOutputTokens => "max_output_tokens",
            Self::N => "n",
            Self::User => "user",
        }
    }
}

/// What a top-level key means to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Field(Field),
    Prompt { text: bool, token_ids: bool },
    Other,
}

impl Key {
    /// The longest key below, every byte written as a `\u` escape.
    const MAX_RAW_LEN: usize = 6 * "max_completion_tokens".len();

    fn named(name: &[u8]) -> Self {
        match name {
            b"model" => Self::Field(Field::Model),
            b"stream" => Self::Field(Field::Stream),
            b"stream_options" => Self::Field(Field::StreamOptions),
            b"max_tokens" => Self::Field(Field::MaxTokens),
            b"max_completion_tokens" => Self::Field(Field::MaxCompletionTokens),
            b"max_output_tokens" => Self::Field(Field::MaxOutputTokens),
            b"n" => Self::Field(Field::N),
            b"user" => Self::Field(Field::User),
            b"prompt" | b"input" => Self::Prompt { text: true, token_ids: true },
            b"tokens" => Self::Prompt { text: false, token_ids: true },
            b"messages" | b"system" | b"instructions" | b"tools" | b"query" | b"documents" | b"text_1"
            | b"text_2" => Self::Prompt { text: true, token_ids: false },
            _ => Self::Other,
        }
    }
}

/// What a top-level value turned out to be.
#[derive(Debug, Clone, Copy)]
enum Value {
    Text(Text),
    /// Whether it is an integer without a sign.
    Number {
        natural: bool,
    },
    Bool(bool),
    Null,
    Array,
    Object,
}

struct Scanner<'a> {
    lexer: Lexer<'a>,
    limits: ScanLimits,
    /// One bit per open container: set for an object, clear for an array.
    objects: [u64; MAX_DEPTH / 64],
    depth: usize,
    /// Meaning of the top-level key under which the cursor is, and where its value starts.
    key: Key,
    value_start: usize,
    /// One bit per [`Field`] that was there.
    seen: u16,
    model: Option<String>,
    facts: RequestFacts,
    /// Takes the prompt, if anybody asked for its prefixes.
    chain: Option<&'a mut Chain>,
}

impl<'a> Scanner<'a> {
    fn new(body: &'a [u8], limits: &ScanLimits) -> Self {
        Self {
            lexer: Lexer::new(body),
            limits: ScanLimits { max_depth: limits.max_depth.min(MAX_DEPTH), ..*limits },
            objects: [0; MAX_DEPTH / 64],
            depth: 0,
            key: Key::Other,
            value_start: 0,
            seen: 0,
            model: None,
            facts: RequestFacts {
                model: String::new(),
                model_range: 0..0,
                stream: false,
                stream_range: None,
                max_tokens: None,
                n: None,
                user_range: None,
                stream_options_range: None,
                prompt: PromptFacts::default(),
                insert_at: 0,
            },
            chain: None,
        }
    }

    fn run(mut self) -> Result<RequestFacts, ScanError> {
        self.lexer.skip_whitespace();
        match self.lexer.peek() {
            Some(b'{') => {}
            Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => {
                return Err(ScanError::NotAnObject);
            }
            _ => return Err(self.lexer.expected("a JSON object")),
        }
        self.facts.insert_at = self.lexer.pos + 1;
        self.document()?;
        self.lexer.skip_whitespace();
        if self.lexer.peek().is_some() {
            return Err(self.lexer.expected("nothing more after the object"));
        }
        self.facts.model = self.model.ok_or(ScanError::MissingModel)?;
        Ok(self.facts)
    }

    /// Walks from the opening brace to behind its closing one.
    fn document(&mut self) -> Result<(), ScanError> {
        loop {
            // The cursor stands before a value.
            let mut value = match self.value()? {
                Some(value) => value,
                None => continue,
            };
            // The cursor stands behind a value: go up as long as containers end here.
            loop {
                match self.depth {
                    0 => return Ok(()),
                    1 => self.on_top_level_value(value)?,
                    _ => {}
                }
                let object = self.in_object();
                self.lexer.skip_whitespace();
                match self.lexer.peek() {
                    Some(b',') => {
                        self.lexer.pos += 1;
                        self.lexer.skip_whitespace();
                        if object {
                            self.object_key("a string key")?;
                        }
                        break;
                    }
                    Some(b'}') if object => value = Value::Object,
                    Some(b']') if !object => value = Value::Array,
                    _ if object => return Err(self.lexer.expected("',' or '}'")),
                    _ => return Err(self.lexer.expected("',' or ']'")),
                }
                self.close();
            }
        }
    }

    /// Takes the value at the cursor; `None` when it opened a container whose first value now stands at the cursor.
    #[inline]
    fn value(&mut self) -> Result<Option<Value>, ScanError> {
        match self.lexer.peek() {
            Some(b'"') => {
                let text = self.lexer.string()?;
                self.on_text(text);
                Ok(Some(Value::Text(text)))
            }
            Some(b'-' | b'0'..=b'9') => {
                let start = self.lexer.pos;
                let natural = self.lexer.number()?;
                if !self.in_object() {
                    let count = 1 + self.lexer.number_run();
                    self.on_token_ids(count, start);
                }
                Ok(Some(Value::Number { natural }))
            }
            Some(b'{') => {
                self.open(true)?;
                if self.lexer.peek() == Some(b'}') {
                    self.close();
                    return Ok(Some(Value::Object));
                }
                self.object_key("a string key or '}'")?;
                Ok(None)
            }
            Some(b'[') => {
                self.open(false)?;
                if self.lexer.peek() == Some(b']') {
                    self.close();
                    return Ok(Some(Value::Array));
                }
                Ok(None)
            }
            Some(b't') => self.lexer.literal("true").map(|()| Some(Value::Bool(true))),
            Some(b'f') => self.lexer.literal("false").map(|()| Some(Value::Bool(false))),
            Some(b'n') => self.lexer.literal("null").map(|()| Some(Value::Null)),
            _ => Err(self.lexer.expected("a value")),
        }
    }

    /// Takes a key and its colon, up to the value.
    #[inline]
    fn object_key(&mut self, expected: &'static str) -> Result<(), ScanError> {
        if self.lexer.peek() != Some(b'"') {
            return Err(self.lexer.expected(expected));
        }
        let name = self.lexer.string()?;
        if self.depth == 1 {
            self.on_top_level_key(name)?;
        }
        self.lexer.skip_whitespace();
        if self.lexer.peek() != Some(b':') {
            return Err(self.lexer.expected("':'"));
        }
        self.lexer.pos += 1;
        self.lexer.skip_whitespace();
        if self.depth == 1 {
            self.value_start = self.lexer.pos;
        }
        Ok(())
    }

    #[inline]
    fn open(&mut self, object: bool) -> Result<(), ScanError> {
        if self.depth >= self.limits.max_depth {
            return Err(ScanError::TooDeep { limit: self.limits.max_depth });
        }
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if object {
            self.objects[word] |= bit;
        } else {
            self.objects[word] &= !bit;
        }
        self.depth += 1;
        self.lexer.pos += 1;
        self.lexer.skip_whitespace();
        Ok(())
    }

    /// Takes the bracket at the cursor, which ends the innermost container.
    #[inline]
    const fn close(&mut self) {
        self.depth -= 1;
        self.lexer.pos += 1;
    }

    #[inline]
    const fn in_object(&self) -> bool {
        match self.depth.checked_sub(1) {
            Some(top) => self.objects[top / 64] >> (top % 64) & 1 == 1,
            None => false,
        }
    }

    fn on_top_level_key(&mut self, name: Text) -> Result<(), ScanError> {
        let raw = self.lexer.bytes.get(name.start..name.end).unwrap_or_default();
        self.key = match name.escaped {
            false => Key::named(raw),
            true if raw.len() <= Key::MAX_RAW_LEN => Key::named(self.lexer.decode(name).as_bytes()),
            true => Key::Other,
        };
        if let Key::Field(field) = self.key {
            let bit = 1u16 << field as u16;
            if self.seen & bit != 0 {
                return Err(ScanError::DuplicateKey(field.name()));
            }
            self.seen |= bit;
        }
        Ok(())
    }

    /// Every string value, in the order of the body.
    #[inline]
    fn on_text(&mut self, text: Text) {
        if matches!(self.key, Key::Prompt { text: true, .. }) {
            let raw = self.lexer.bytes.get(text.start..text.end).unwrap_or_default();
            if !raw.starts_with(b"data:") {
                self.facts.prompt.text_bytes += (raw.len() - text.saved) as u64;
            }
            if let Some(chain) = &mut self.chain {
                chain.push(raw);
            }
        }
    }

    /// Every run of numbers in an array, in the order of the body; it ends at the cursor.
    #[inline]
    fn on_token_ids(&mut self, count: u64, start: usize) {
        if matches!(self.key, Key::Prompt { token_ids: true, .. }) {
            self.facts.prompt.token_ids += count;
            if let Some(chain) = &mut self.chain {
                chain.push(self.lexer.bytes.get(start..self.lexer.pos).unwrap_or_default());
            }
        }
    }

    fn on_top_level_value(&mut self, value: Value) -> Result<(), ScanError> {
        let Key::Field(field) = std::mem::replace(&mut self.key, Key::Other) else { return Ok(()) };
        let range = self.value_start..self.lexer.pos;
        let wrong = |expected| ScanError::WrongType { field: field.name(), expected };
        match (field, value) {
            (Field::Model, Value::Text(text)) => {
                let limit = self.limits.max_model_bytes;
                if text.end - text.start - text.saved > limit {
                    return Err(ScanError::ModelNameTooLong { limit });
                }
                self.model = Some(self.lexer.decode(text));
                self.facts.model_range = range;
            }
            (Field::Model, _) => return Err(ScanError::ModelNotString),
            (Field::Stream, Value::Bool(stream)) => {
                self.facts.stream = stream;
                self.facts.stream_range = Some(range);
            }
            (Field::Stream, Value::Null) => self.facts.stream_range = Some(range),
            (Field::Stream, _) => return Err(wrong("true, false or null")),
            (Field::StreamOptions, Value::Object | Value::Null) => {
                self.facts.stream_options_range = Some(range);
            }
            (Field::StreamOptions, _) => return Err(wrong("an object or null")),
            (Field::User, Value::Text(_)) => self.facts.user_range = Some(range),
            (Field::User, Value::Null) => {}
            (Field::User, _) => return Err(wrong("a string or null")),
            (_, Value::Null) => {}
            (_, Value::Number { natural: true }) => {
                let digits = self.lexer.bytes.get(range).unwrap_or_default();
                let number = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
                let number = number.ok_or_else(|| wrong(NATURAL))?;
                let facts = &mut self.facts;
                let slot = if field == Field::N { &mut facts.n } else { &mut facts.max_tokens };
                *slot = (*slot).max(Some(number));
            }
            (_, _) => return Err(wrong(NATURAL)),
        }
        Ok(())
    }
}

const NATURAL: &str = "an integer from 0 to 18446744073709551615, or null";
