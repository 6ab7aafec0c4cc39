//! Where a value stands in a JSON text, by its path, without a DOM: so that single places of an event or a body can be
//! changed and all other bytes stay as their author wrote them.
//!
//! The text is meant to be JSON already ([`is_json`] tells); of one that is not, anything may be found or nothing, but
//! nothing panics. Keys are compared as they are written: none that we look for needs an escape.

use std::ops::Range;

/// One step of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// A member of an object.
    Key(&'a str),
    /// An element of an array, counted from 0.
    At(usize),
}

/// Whether `text` is one JSON value.
#[must_use]
pub fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

/// Where the value at `path` stands in `json`.
#[must_use]
pub fn find(json: &[u8], path: &[Step<'_>]) -> Option<Range<usize>> {
    let start = skip_blank(json, 0);
    if path.is_empty() {
        return value(json, start);
    }
    // Members are entered by where they start: what stands behind the one that is looked for is not looked at.
    let mut range = start..json.len();
    for step in path {
        range = match *step {
            Step::Key(key) => members(json, &range).find(|(name, _)| *name == key.as_bytes())?.1,
            Step::At(index) => elements(json, &range).nth(index)?,
        };
    }
    Some(range)
}

/// The value at `path`, as it is written.
#[must_use]
pub fn get<'a>(json: &'a [u8], path: &[Step<'_>]) -> Option<&'a [u8]> {
    json.get(find(json, path)?)
}

/// The members of the object at `range`: raw keys and where their values stand.
pub fn members<'a>(
    json: &'a [u8],
    range: &Range<usize>,
) -> impl Iterator<Item = (&'a [u8], Range<usize>)> + use<'a> {
    let mut at = enter(json, range, b'{');
    std::iter::from_fn(move || {
        let key = value(json, at?)?;
        let name = json.get(key.start + 1..key.end.checked_sub(1)?)?;
        let colon = skip_blank(json, key.end);
        let found = value(json, colon + usize::from(json.get(colon) == Some(&b':')))?;
        at = next(json, found.end);
        Some((name, found))
    })
}

/// Where the elements of the array at `range` stand.
pub fn elements(json: &[u8], range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut at = enter(json, range, b'[');
    std::iter::from_fn(move || {
        let found = value(json, at?)?;
        at = next(json, found.end);
        Some(found)
    })
}

/// The numbers of an array of token ids; `None` if it is anything else.
#[must_use]
pub fn token_ids(array: &[u8]) -> Option<Vec<u32>> {
    serde_json::from_slice(array).ok()
}

/// The inside of a string that stands there, as it is written: its quotes off.
#[must_use]
pub fn string(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

fn enter(json: &[u8], range: &Range<usize>, opening: u8) -> Option<usize> {
    if json.get(range.start) != Some(&opening) {
        return None;
    }
    let inside = skip_blank(json, range.start + 1);
    (!matches!(json.get(inside), Some(b'}' | b']') | None)).then_some(inside)
}

/// Behind the comma that follows at `at`, if one does.
fn next(json: &[u8], at: usize) -> Option<usize> {
    let comma = skip_blank(json, at);
    (json.get(comma) == Some(&b',')).then_some(comma + 1)
}

fn skip_blank(json: &[u8], at: usize) -> usize {
    let rest = json.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count()
}

/// Bytes that open or close something, by their value: a prompt's ids are a long value without any of them.
const NESTS: [bool; 256] = {
    let (mut table, mut at) = ([false; 256], 0);
    let bytes = b"\"{[}]";
    while at < bytes.len() {
        table[bytes[at] as usize] = true;
        at += 1;
    }
    table
};

/// Where the value that starts behind the blanks at `at` stands.
fn value(json: &[u8], at: usize) -> Option<Range<usize>> {
    let start = skip_blank(json, at);
    let end = match json.get(start)? {
        b'"' => string_end(json, start)?,
        b'[' if let Some(end) = flat_array_end(json, start) => end,
        b'{' | b'[' => {
            let (mut depth, mut at) = (0usize, start);
            loop {
                let rest = json.get(at..)?;
                at += rest.iter().position(|byte| NESTS[usize::from(*byte)])?;
                match json.get(at)? {
                    b'"' => at = string_end(json, at)?,
                    b'{' | b'[' => (depth, at) = (depth + 1, at + 1),
                    _ => (depth, at) = (depth.checked_sub(1)?, at + 1),
                }
                if depth == 0 {
                    break at;
                }
            }
        }
        _ => {
            let rest = json.get(start..)?;
            let end = rest
                .iter()
                .position(|byte| matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t'));
            start + end.unwrap_or(rest.len())
        }
    };
    (end > start).then_some(start..end)
}

/// Behind the array that starts there, if it holds neither strings nor arrays nor objects: a prompt's ids are long.
fn flat_array_end(json: &[u8], start: usize) -> Option<usize> {
    let inside = json.get(start + 1..)?;
    let length = memchr::memchr(b']', inside)?;
    memchr::memchr3(b'"', b'[', b'{', inside.get(..length)?).is_none().then_some(start + 1 + length + 1)
}

/// Behind the closing quote of the string whose opening one is at `start`.
pub(crate) fn string_end(json: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        at += memchr::memchr2(b'"', b'\\', json.get(at..)?)?;
        match json.get(at) {
            Some(b'"') => return Some(at + 1),
            _ => at += 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::{Step::*, *};

    fn text<'a>(json: &'a str, path: &[Step<'_>]) -> Option<&'a str> {
        find(json.as_bytes(), path).map(|range| &json[range])
    }

    #[test]
    fn values_are_found_where_they_stand() {
        let json = r#" { "a" : [1, {"b\"":"}]"}, [ ] ,-2.5e3], "c":{"d":"x\\", "e" : null},"f":"" } "#;
        assert_eq!(text(json, &[Key("a"), At(0)]), Some("1"));
        assert_eq!(text(json, &[Key("a"), At(1)]), Some(r#"{"b\"":"}]"}"#));
        assert_eq!(text(json, &[Key("a"), At(2)]), Some("[ ]"));
        assert_eq!(text(json, &[Key("a"), At(3)]), Some("-2.5e3"));
        assert_eq!(text(json, &[Key("a"), At(4)]), None);
        assert_eq!(text(json, &[Key("c"), Key("d")]), Some(r#""x\\""#));
        assert_eq!(text(json, &[Key("c"), Key("e")]), Some("null"));
        assert_eq!(text(json, &[Key("f")]), Some(r#""""#));
        assert_eq!(text(json, &[Key("g")]), None);
        assert_eq!(text(json, &[At(0)]), None);
        assert_eq!(string(get(json.as_bytes(), &[Key("f")]).expect("there")), Some(&b""[..]));
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a\"\\\\{}\\[\\],: é]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec(("[a-c]{1,2}", inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn all_members_and_elements_are_found(json in json(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&json) } else { serde_json::to_string(&json) };
            let text = text.expect("JSON");
            let whole = find(text.as_bytes(), &[]).expect("a value");
            let read = |range: Range<usize>| serde_json::from_str::<Value>(&text[range]).expect("JSON");
            match &json {
                Value::Object(map) => {
                    let found: Vec<Value> = members(text.as_bytes(), &whole).map(|(_, range)| read(range)).collect();
                    prop_assert_eq!(found, map.values().cloned().collect::<Vec<_>>());
                }
                Value::Array(items) => {
                    let found: Vec<Value> = elements(text.as_bytes(), &whole).map(read).collect();
                    prop_assert_eq!(&found, items);
                }
                other => prop_assert_eq!(&read(whole), other),
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(prop::sample::select(b"{}[]\",:\\a1 ".to_vec()), 0..40)) {
            drop(find(&bytes, &[Key("a"), At(1), Key("a")]));
            prop_assert!(!is_json(&bytes) || find(&bytes, &[]).is_some());
        }
    }
}
