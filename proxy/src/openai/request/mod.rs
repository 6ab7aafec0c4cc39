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
//! - Cutting out all of [`RequestFacts::removed`] leaves valid JSON that differs in those members only.
//!
//! Against `serde_json`: nesting is limited by [`ScanLimits::max_depth`] (`serde_json`: 127 levels), UTF-8 is checked
//! also where `serde_json` ignores a value, and lone surrogate escapes are accepted, as it does for ignored values.
//!
//! Cost: one UTF-8 pass and one structure pass; one allocation, for the model's name.
//! `cargo bench -p penstock-proxy --bench scan` prints MB/s.
//!
//! By file: `lexer` knows JSON's tokens, `scanner` its grammar, `keys` what a top-level key means to us, `rewrite` changes
//! single places of a body.
//!
//! Deliberately absent: any view of messages, tools or sampling parameters beyond the byte and token counts in
//! [`PromptFacts`], and the hashes of its prefixes, for a [`Chain`] that asks for them.

mod error;
mod keys;
mod lexer;
#[cfg(test)]
mod removal_tests;
mod rewrite;
mod scanner;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use self::{
    error::ScanError,
    keys::{MAX_REMOVED_KEY_BYTES, is_acted_on},
    rewrite::{Edit, json_string, rewrite, splice},
};
pub(super) use lexer::hex_digit;

use self::scanner::Scanner;
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
    /// Where `return_token_ids`' value stands, and whether it is `true`.
    pub return_token_ids: Option<(Range<usize>, bool)>,
    /// Whether `echo` asks for the prompt in the answer.
    pub echo: bool,
    /// How much prompt there is.
    pub prompt: PromptFacts,
    /// What to cut out to be rid of the members that were to be removed: key, value and one comma, in the order of the body.
    pub removed: Vec<Range<usize>>,
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
    scan_with(body, limits, None, &[])
}

/// As [`scan`], and two things more. `chain` takes the prompt as it passes by: texts as they are written (escapes undecoded),
/// token ids as their digits, in the order of the body. Top-level members whose key is in `remove` are found, all of them;
/// keys that the gateway acts on ([`is_acted_on`]) and those over [`MAX_REMOVED_KEY_BYTES`] never are.
///
/// # Errors
/// As [`scan`].
pub fn scan_with(
    body: &[u8],
    limits: &ScanLimits,
    chain: Option<&mut Chain>,
    remove: &[String],
) -> Result<RequestFacts, ScanError> {
    if simdutf8::basic::from_utf8(body).is_err() {
        let offset = std::str::from_utf8(body).err().map_or(0, |error| error.valid_up_to());
        return Err(ScanError::InvalidUtf8 { offset });
    }
    Scanner::new(body, limits, chain, remove).run()
}
