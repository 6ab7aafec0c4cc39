//! What we need to know of a `multipart/form-data` body, found in one pass, the body itself untouched.
//!
//! The audio APIs take forms: a file, and beside it `model`, which may come behind the file. The body is held whole (it
//! is within `limits.body_bytes`, and a retry needs it again), so this works on ranges of it: no part is copied, and the
//! file is searched once for the boundary (one vectorised search) and never looked at otherwise.
//!
//! Invariants: a form that is accepted ends with its closing boundary; `model` and `stream` stand in it at most once and
//! are no files, so that we and the engine cannot read different values; the ranges in [`FormFacts`] cover whole values
//! and whole parts.
//!
//! Deliberately absent: nested multiparts, `_charset_`, and what RFC 7578 deprecates.

mod head;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Range};

use memchr::memmem::Finder;

pub use self::head::boundary;
use super::request::ScanError;

/// Most parts of a form: OpenAI's transcriptions have ten fields, two of them lists.
pub const MAX_PARTS: usize = 256;

/// Longest head of a part, in bytes.
pub const MAX_PART_HEAD_BYTES: usize = 8 << 10;

/// What the form says that the gateway acts on. All ranges are byte offsets in the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormFacts {
    /// The model asked for.
    pub model: String,
    /// Where its value stands.
    pub model_range: Range<usize>,
    /// Whether a stream was asked for; absent is `false`.
    pub stream: bool,
    /// What to cut out to be rid of the fields that were to be removed, in the order of the body.
    pub removed: Vec<Range<usize>>,
}

/// How a body breaks the rules of forms. `Display` is the middle of a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormError {
    /// The content type names no boundary, or one that RFC 2046 does not allow.
    Boundary,
    /// The boundary that the content type announces is nowhere in the body.
    NoParts,
    /// The closing boundary is missing: the body was cut.
    Unfinished,
    /// More than [`MAX_PARTS`].
    TooManyParts,
    /// The head of a part is longer than [`MAX_PART_HEAD_BYTES`], or its end is missing.
    HeadTooLong {
        /// Where the part starts.
        offset: usize,
    },
    /// The head of a part is malformed, or gives the part no name.
    BadHead {
        /// Where the part starts.
        offset: usize,
    },
}

impl fmt::Display for FormError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boundary => f.write_str(
                "its Content-Type must name a boundary of 1 to 70 letters, digits and '()+_,-./:=? (let the HTTP library set it)",
            ),
            Self::NoParts => f.write_str("the boundary of its Content-Type is not in it"),
            Self::Unfinished => f.write_str("it ends without its closing boundary"),
            Self::TooManyParts => write!(f, "it has more than {MAX_PARTS} parts"),
            Self::HeadTooLong { offset } => {
                write!(f, "the head of the part at byte {offset} does not end within {MAX_PART_HEAD_BYTES} bytes")
            }
            Self::BadHead { offset } => write!(
                f,
                "the part at byte {offset} needs a header such as Content-Disposition: form-data; name=\"model\""
            ),
        }
    }
}

/// Checks that `body` is a form cut by `boundary` and finds what the gateway acts on, and the fields named in `remove`.
///
/// # Errors
/// The first thing that is wrong, in the order of the body; a missing `model` after all.
pub fn scan(
    body: &[u8],
    boundary: &str,
    max_model_bytes: usize,
    remove: &[String],
) -> Result<FormFacts, ScanError> {
    let mut facts = FormFacts { model: String::new(), model_range: 0..0, stream: false, removed: Vec::new() };
    let (mut model, mut stream) = (None, None);
    for part in Parts::new(body, boundary) {
        let part = part.map_err(ScanError::NotAForm)?;
        let value = body.get(part.content.clone()).unwrap_or_default();
        let slot = match &*part.name {
            "model" => &mut model,
            "stream" => &mut stream,
            name if remove.iter().any(|key| key == name) => {
                facts.removed.push(part.whole);
                continue;
            }
            _ => continue,
        };
        let field = if part.name == "model" { "model" } else { "stream" };
        if part.is_file {
            return Err(ScanError::WrongType { field, expected: "a plain field of the form, not a file" });
        }
        if slot.replace((part.content, value)).is_some() {
            return Err(ScanError::DuplicateKey(field));
        }
    }
    if let Some((_, value)) = stream {
        let expected = "true or false";
        facts.stream = flag(value).ok_or(ScanError::WrongType { field: "stream", expected })?;
    }
    let (range, value) = model.filter(|(_, value)| !value.is_empty()).ok_or(ScanError::MissingModelInForm)?;
    if value.len() > max_model_bytes {
        return Err(ScanError::ModelNameTooLong { limit: max_model_bytes });
    }
    std::str::from_utf8(value).map_err(|_| ScanError::ModelNotString)?.clone_into(&mut facts.model);
    facts.model_range = range;
    Ok(facts)
}

/// A truth value as engines read it from a form.
fn flag(value: &[u8]) -> Option<bool> {
    let is = |words: &[&str]| words.iter().any(|word| value.eq_ignore_ascii_case(word.as_bytes()));
    if is(&["true", "1", "on", "yes", "t", "y"]) {
        Some(true)
    } else if is(&["false", "0", "off", "no", "f", "n", ""]) {
        Some(false)
    } else {
        None
    }
}

/// One part of a form.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    name: String,
    /// Whether it has a file name.
    is_file: bool,
    content: Range<usize>,
    /// From the boundary before it to the one behind it: what to cut out to be rid of it.
    whole: Range<usize>,
}

/// The parts of a form, in order. Ends after the closing boundary or the first error.
struct Parts<'a> {
    body: &'a [u8],
    /// CR LF `--boundary`
    delimiter: Finder<'a>,
    /// Where the delimiter before the next part starts, and where its line ends; `None` at the end.
    at: Option<(usize, usize)>,
    begun: bool,
    count: usize,
}

/// What stands behind a delimiter.
enum Line {
    /// Another part, from this offset on.
    Part(usize),
    Close,
}

impl<'a> Parts<'a> {
    fn new(body: &'a [u8], boundary: &str) -> Self {
        let delimiter = Finder::new(&[b"\r\n--", boundary.as_bytes()].concat()).into_owned();
        Self { body, delimiter, at: None, begun: false, count: 0 }
    }

    /// The next delimiter at or behind `from`: where it starts, and what is behind it. Text that merely begins as a
    /// delimiter does is content.
    fn delimiter_from(&self, mut from: usize) -> Option<(usize, Line)> {
        loop {
            let start = from + self.delimiter.find(self.body.get(from..)?)?;
            let behind = start + self.delimiter.needle().len();
            if let Some(line) = self.line(behind) {
                return Some((start, line));
            }
            from = behind;
        }
    }

    /// The rest of a delimiter's line, if it is one.
    fn line(&self, behind: usize) -> Option<Line> {
        let rest = self.body.get(behind..)?;
        if rest.starts_with(b"--") {
            return Some(Line::Close);
        }
        let padding = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        rest.get(padding..)?.starts_with(b"\r\n").then_some(Line::Part(behind + padding + 2))
    }

    /// The first delimiter: at the start of the body it has no line end before it.
    fn first(&self) -> Option<(usize, Line)> {
        let needle = self.delimiter.needle();
        let bare = needle.get(2..).unwrap_or_default();
        if self.body.starts_with(bare)
            && let Some(line) = self.line(bare.len())
        {
            return Some((0, line));
        }
        self.delimiter_from(0)
    }

    fn step(&mut self) -> Result<Option<Part>, FormError> {
        if !self.begun {
            self.begun = true;
            match self.first().ok_or(FormError::NoParts)? {
                (start, Line::Part(head)) => self.at = Some((start, head)),
                (_, Line::Close) => return Ok(None),
            }
        }
        let Some((before, head)) = self.at.take() else { return Ok(None) };
        self.count += 1;
        if self.count > MAX_PARTS {
            return Err(FormError::TooManyParts);
        }
        let rest = self.body.get(head..).unwrap_or_default();
        let (length, fields) =
            head::parse(rest.get(..rest.len().min(MAX_PART_HEAD_BYTES)).unwrap_or_default())
                .ok_or(FormError::HeadTooLong { offset: head })?;
        let (name, is_file) = fields.ok_or(FormError::BadHead { offset: head })?;
        let content = head + length;
        // The line end before a delimiter belongs to it: an empty content shares the head's last one.
        let (end, line) = self.delimiter_from(content - 2).ok_or(FormError::Unfinished)?;
        if let Line::Part(next) = line {
            self.at = Some((end, next));
        }
        Ok(Some(Part { name, is_file, content: content..end.max(content), whole: before..end }))
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Part, FormError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().inspect_err(|_| self.at = None).transpose()
    }
}
