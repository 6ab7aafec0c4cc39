//! JSON's grammar, and what passes by at its top level.

use std::ops::Range;

use super::{
    MAX_DEPTH, PromptFacts, RequestFacts, ScanError, ScanLimits,
    keys::{Field, Key},
    lexer::{Lexer, Text},
};
use crate::routing::prefix::Chain;

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

/// One walk over a body.
pub(super) struct Scanner<'a> {
    lexer: Lexer<'a>,
    limits: ScanLimits,
    /// One bit per open container: set for an object, clear for an array.
    objects: [u64; MAX_DEPTH / 64],
    depth: usize,
    /// Meaning of the top-level key under which the cursor is, and where its value starts.
    key: Key,
    key_start: usize,
    value_start: usize,
    /// Top-level keys to be cut out, and whether the member before the cursor is one of them.
    remove: &'a [String],
    removing: bool,
    /// Where the last top-level member that stays ends.
    kept_end: usize,
    /// One bit per [`Field`] that was there.
    seen: u16,
    model: Option<String>,
    facts: RequestFacts,
    /// Takes the prompt, if anybody asked for its prefixes.
    chain: Option<&'a mut Chain>,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(
        body: &'a [u8],
        limits: &ScanLimits,
        chain: Option<&'a mut Chain>,
        remove: &'a [String],
    ) -> Self {
        Self {
            lexer: Lexer::new(body),
            limits: ScanLimits { max_depth: limits.max_depth.min(MAX_DEPTH), ..*limits },
            objects: [0; MAX_DEPTH / 64],
            depth: 0,
            key: Key::Other,
            key_start: 0,
            value_start: 0,
            remove,
            removing: false,
            kept_end: 0,
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
                return_token_ids: None,
                echo: false,
                prompt: PromptFacts::default(),
                removed: Vec::new(),
                insert_at: 0,
            },
            chain,
        }
    }

    pub(super) fn run(mut self) -> Result<RequestFacts, ScanError> {
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
        if self.removing
            && let Some(last) = self.facts.removed.last_mut()
        {
            // The comma to go with it is the one before. There is one: the model stays.
            last.start = self.kept_end;
        }
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
                        if self.removing && self.depth == 1 {
                            self.remove_comma();
                        }
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
        self.key_start = name.start - 1;
        self.key = match name.escaped {
            false => Key::of(raw, self.remove),
            true if raw.len() <= Key::MAX_RAW_LEN => Key::of(self.lexer.decode(name).as_bytes(), self.remove),
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
        let key = std::mem::replace(&mut self.key, Key::Other);
        if key == Key::Removed {
            self.remove_member();
            return Ok(());
        }
        self.removing = false;
        self.kept_end = self.lexer.pos;
        let Key::Field(field) = key else { return Ok(()) };
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
            // What they may be, the engine says.
            (Field::ReturnTokenIds, value) => {
                self.facts.return_token_ids = Some((range, matches!(value, Value::Bool(true))));
            }
            (Field::Echo, value) => self.facts.echo = !matches!(value, Value::Null | Value::Bool(false)),
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

    /// The member that ends at the cursor goes; its comma is not read yet. Neighbours go in one piece.
    fn remove_member(&mut self) {
        let end = self.lexer.pos;
        match self.facts.removed.last_mut() {
            Some(last) if self.removing => last.end = end,
            _ => self.facts.removed.push(Range { start: self.key_start, end }),
        }
        self.removing = true;
    }

    /// The comma before the cursor follows a member that goes.
    fn remove_comma(&mut self) {
        if let Some(last) = self.facts.removed.last_mut() {
            last.end = self.lexer.pos;
        }
    }
}

const NATURAL: &str = "an integer from 0 to 18446744073709551615, or null";
