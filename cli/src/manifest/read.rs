//! What the readers of YAML and TOML have in common: values with the line of every field.

use std::collections::BTreeMap;

use serde_json::Value;

/// Deeper nesting than any manifest has.
pub(super) const MAX_DEPTH: usize = 32;

/// A value, and the line of every field in it by path.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Lined {
    pub(super) value: Value,
    pub(super) line: usize,
    pub(super) lines: BTreeMap<String, usize>,
}

/// Something that cannot be read, and on which line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) line: usize,
    pub(super) message: String,
}

impl Broken {
    pub(super) fn new(line: usize, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }
}

/// The path of a field inside another.
pub(super) fn inside(outer: &str, key: &str) -> String {
    if outer.is_empty() { key.to_owned() } else { format!("{outer}.{key}") }
}
