//! The members of a request's body, as they are written: to read a few, leave some out, put others in.

use std::ops::Range;

use serde_json::Value;

use super::Refusal;
use crate::openai::span;

/// A JSON object that can be written again with other members.
#[derive(Debug, Clone)]
pub struct Members<'a> {
    body: &'a [u8],
    members: Vec<(&'a [u8], Range<usize>)>,
}

impl<'a> Members<'a> {
    /// The members of `body`.
    ///
    /// # Errors
    /// [`Refusal::Body`]: it is no JSON object.
    pub fn of(body: &'a [u8]) -> Result<Self, Refusal> {
        if !span::is_json(body) {
            return Err(Refusal::Body);
        }
        let whole = span::find(body, &[]).filter(|range| body.get(range.start) == Some(&b'{'));
        let members = span::members(body, &whole.ok_or(Refusal::Body)?).collect();
        Ok(Self { body, members })
    }

    /// A member's value as it is written; `None` where it is absent or `null`. The last counts, as it does for engines.
    #[must_use]
    pub fn raw(&self, key: &str) -> Option<&'a [u8]> {
        let (_, range) = self.members.iter().rev().find(|(name, _)| *name == key.as_bytes())?;
        self.body.get(range.clone()).filter(|value| *value != b"null")
    }

    /// A member's value, parsed.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<Value> {
        serde_json::from_slice(self.raw(key)?).ok()
    }

    /// A number that counts something.
    #[must_use]
    pub fn count(&self, key: &str) -> Option<u64> {
        self.value(key)?.as_u64()
    }

    /// Whether a flag is set.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        self.raw(key) == Some(b"true")
    }

    /// Whether a number is there that is not 0.
    #[must_use]
    pub fn is_nonzero(&self, key: &str) -> bool {
        self.value(key).is_some_and(|value| value.as_f64() != Some(0.0))
    }

    /// Whether a value is there that is neither `false` nor empty.
    #[must_use]
    pub fn is_set(&self, key: &str) -> bool {
        self.value(key).is_some_and(|value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(members) => !members.is_empty(),
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        })
    }

    /// The object again, as it was written, less the members called one of `without`, with `added` behind.
    #[must_use]
    pub fn write(&self, without: &[&str], added: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let more: usize = added.iter().map(|(key, value)| key.len() + value.len() + 4).sum();
        let mut out = Vec::with_capacity(self.body.len() + more);
        out.push(b'{');
        let is_out = |name: &[u8]| {
            without.iter().any(|key| key.as_bytes() == name)
                || added.iter().any(|(key, _)| key.as_bytes() == name)
        };
        for (name, range) in self.members.iter().filter(|(name, _)| !is_out(name)) {
            member(&mut out, name, self.body.get(range.clone()).unwrap_or(b"null"));
        }
        for (key, value) in added {
            member(&mut out, key.as_bytes(), value);
        }
        out.push(b'}');
        out
    }
}

fn member(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    if out.len() > 1 {
        out.push(b',');
    }
    out.push(b'"');
    out.extend_from_slice(key);
    out.extend_from_slice(b"\":");
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_and_written_as_they_are() {
        let body = br#"{ "model": "m", "temperature": 1e-05, "n": 1, "stop": [], "x": null, "stream":true, "k\"": {} }"#;
        let members = Members::of(body).expect("an object");
        assert_eq!(members.raw("temperature"), Some(&b"1e-05"[..]));
        assert_eq!((members.raw("x"), members.count("n"), members.flag("stream")), (None, Some(1), true));
        assert!(!members.is_set("stop") && members.is_nonzero("n") && !members.is_nonzero("x"));
        let written = members.write(&["stop", "x"], &[("n", b"2".to_vec()), ("new", b"[1]".to_vec())]);
        assert_eq!(
            String::from_utf8(written).expect("UTF-8"),
            r#"{"model":"m","temperature":1e-05,"stream":true,"k\"":{},"n":2,"new":[1]}"#
        );
    }

    #[test]
    fn only_objects_have_members() {
        for body in ["", "[]", "{", "\"x\"", "{}x"] {
            assert_eq!(Members::of(body.as_bytes()).err(), Some(Refusal::Body), "{body}");
        }
        assert_eq!(Members::of(b"{}").expect("one").write(&[], &[]), b"{}");
    }
}
