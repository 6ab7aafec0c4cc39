//! The request scanner against `serde_json`: both accept the same bodies, and read the same out of them.
//!
//! The reference reads the whole document with `serde_json` and decides as the scanner's documentation says, field by field in
//! the order of the body. Where `serde_json` is stricter for a value that it builds than the grammar is (numbers beyond a
//! double, halves of surrogate pairs), only acceptance is compared.

use bytes::Bytes;
use penstock_proxy::openai::request::{RequestFacts, ScanError, ScanLimits, json_string, scan, splice};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// One level less than where `serde_json` gives up.
const LIMITS: ScanLimits = ScanLimits { max_depth: 127, max_model_bytes: 40 };

/// Panics if scanner and `serde_json` do not agree on `body`.
pub fn check(body: &[u8]) {
    let scanned = scan(body, &LIMITS);
    if let Err(ScanError::TooDeep { .. }) = scanned {
        assert!(brackets(body) > LIMITS.max_depth, "not nested that deep");
        return;
    }
    let utf8 = std::str::from_utf8(body).is_ok();
    let grammatical = utf8 && serde_json::from_slice::<IgnoredAny>(body).is_ok();
    match &scanned {
        Err(ScanError::InvalidUtf8 { .. }) => assert!(!utf8, "it is UTF-8"),
        Err(ScanError::NotJson { .. }) => assert!(utf8 && !grammatical, "serde_json takes it"),
        Err(ScanError::NotAnObject) => assert!(utf8 && !body.trim_ascii_start().starts_with(b"{")),
        Ok(_) => assert!(grammatical, "serde_json refuses it"),
        Err(_) => assert!(utf8),
    }
    let Ok(Entries(entries)) = serde_json::from_slice::<Entries>(body) else { return };
    let found = scanned.as_ref().map(Found::of).map_err(Clone::clone);
    assert_eq!(found, reference(&entries));
    if let Ok(facts) = &scanned {
        check_ranges(body, facts, &entries);
    }
}

/// More brackets than this cannot be nested.
fn brackets(body: &[u8]) -> usize {
    body.iter().filter(|byte| matches!(byte, b'[' | b'{')).count()
}

/// A replaced value is what an edited document has, and nothing else changed.
fn check_ranges(body: &[u8], facts: &RequestFacts, entries: &[(String, Value)]) {
    let body = Bytes::copy_from_slice(body);
    let slice =
        |range: &std::ops::Range<usize>| serde_json::from_slice::<Value>(&body[range.clone()]).unwrap();
    let value = |name: &str| entries.iter().find(|(key, _)| key == name).map(|(_, value)| value);
    assert_eq!(value("model"), Some(&slice(&facts.model_range)));
    assert_eq!(facts.stream_range.as_ref().map(slice).as_ref(), value("stream"));
    assert_eq!(facts.stream_options_range.as_ref().map(slice).as_ref(), value("stream_options"));
    assert_eq!(facts.user_range.as_ref().map(slice).as_ref(), value("user").filter(|user| !user.is_null()));

    let name = "org/\"other\" \u{1f680}";
    let renamed = Value::from(name);
    let spliced = splice(&body, facts.model_range.clone(), &json_string(name));
    let Entries(edited) = serde_json::from_slice(&spliced).expect("still JSON");
    assert_eq!(edited.len(), entries.len());
    for ((key, new), (old_key, old)) in edited.iter().zip(entries) {
        assert_eq!(key, old_key);
        assert_eq!(new, if key == "model" { &renamed } else { old });
    }
    let inserted = splice(&body, facts.insert_at..facts.insert_at, br#""penstock":[1],"#);
    let Entries(edited) = serde_json::from_slice(&inserted).expect("still JSON");
    assert_eq!(edited[0].0, "penstock");
    assert_eq!(&edited[1..], entries);
}

/// What the gateway acts on, positions aside.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    model: String,
    stream: bool,
    max_tokens: Option<u64>,
    n: Option<u64>,
}

impl Found {
    fn of(facts: &RequestFacts) -> Self {
        Self { model: facts.model.clone(), stream: facts.stream, max_tokens: facts.max_tokens, n: facts.n }
    }
}

const NATURAL: &str = "an integer from 0 to 18446744073709551615, or null";

/// The same decisions on the parsed document.
fn reference(entries: &[(String, Value)]) -> Result<Found, ScanError> {
    const KEYS: [&str; 8] = [
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n",
        "user",
    ];
    let mut seen = Vec::new();
    let mut model = None;
    let mut found = Found { model: String::new(), stream: false, max_tokens: None, n: None };
    for (key, value) in entries {
        let Some(field) = KEYS.into_iter().find(|known| known == key) else { continue };
        if seen.contains(&field) {
            return Err(ScanError::DuplicateKey(field));
        }
        seen.push(field);
        let wrong = |expected| Err(ScanError::WrongType { field, expected });
        match (field, value) {
            ("model", Value::String(name)) if name.len() > LIMITS.max_model_bytes => {
                return Err(ScanError::ModelNameTooLong { limit: LIMITS.max_model_bytes });
            }
            ("model", Value::String(name)) => model = Some(name.clone()),
            ("model", _) => return Err(ScanError::ModelNotString),
            ("stream", Value::Bool(stream)) => found.stream = *stream,
            ("stream_options", Value::Object(_)) | ("user", Value::String(_)) | (_, Value::Null) => {}
            ("stream", _) => return wrong("true, false or null"),
            ("stream_options", _) => return wrong("an object or null"),
            ("user", _) => return wrong("a string or null"),
            (_, value) => {
                let Some(number) = value.as_u64() else { return wrong(NATURAL) };
                let slot = if field == "n" { &mut found.n } else { &mut found.max_tokens };
                *slot = (*slot).max(Some(number));
            }
        }
    }
    found.model = model.ok_or(ScanError::MissingModel)?;
    Ok(found)
}

/// A JSON object's entries in their order, doubled keys included.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Vec<(String, Value)>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(InOrder).map(Self)
    }
}
