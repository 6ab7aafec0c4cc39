//! The query of `/v1/realtime`: the one place where a model is named in the URL.
//!
//! Values are percent-decoded, and `+` is a space, as in a form. The query that an engine gets is the client's, byte for
//! byte, unless the engine knows the model under another name; then that value alone is replaced.

use std::{borrow::Cow, ops::Range};

use super::request::{ScanError, hex_digit};

/// What the query says that the gateway acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryFacts {
    /// The model asked for, decoded.
    pub model: String,
    /// Where its value stands in the query, as written.
    pub model_range: Range<usize>,
}

/// Finds `model` in `query`, which comes without its `?`.
///
/// # Errors
/// `model` is missing or empty, there more than once, longer than `max_model_bytes`, or not UTF-8.
pub fn scan(query: &str, max_model_bytes: usize) -> Result<QueryFacts, ScanError> {
    let mut found = None;
    let mut start = 0;
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if form_decode(key).as_deref() == Some("model") {
            if found.is_some() {
                return Err(ScanError::DuplicateKey("model"));
            }
            let end = start + pair.len();
            found = Some((end - value.len()..end, value));
        }
        start += pair.len() + 1;
    }
    let Some((model_range, value)) = found.filter(|(_, value)| !value.is_empty()) else {
        return Err(ScanError::MissingModelInUrl);
    };
    let model = form_decode(value).ok_or(ScanError::ModelNotString)?.into_owned();
    if model.len() > max_model_bytes {
        return Err(ScanError::ModelNameTooLong { limit: max_model_bytes });
    }
    Ok(QueryFacts { model, model_range })
}

/// `text` as a value in a query.
#[must_use]
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn form_decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('+') {
        return percent_decode(text);
    }
    percent_decode(&text.replace('+', " ")).map(|decoded| Cow::Owned(decoded.into_owned()))
}

/// `text` with its escapes decoded; `None` where one is not two hex digits, or the result is not UTF-8.
#[must_use]
pub fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let (high, low) = (hex_digit(bytes.next()?)?, hex_digit(bytes.next()?)?);
        decoded.push(high << 4 | low);
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(query: &str) -> Result<String, ScanError> {
        scan(query, 64).map(|facts| facts.model)
    }

    #[test]
    fn the_model_is_found_wherever_it_stands_and_however_it_is_written() {
        for query in [
            "model=org/m",
            "x=1&model=org%2fm",
            "model=org%2Fm&x",
            "&&mod%65l=org/m&",
            "amodel=z&model=org/m",
        ] {
            assert_eq!(model(query), Ok("org/m".to_owned()), "{query}");
        }
        assert_eq!(model("model=a+b%20c%2Bd"), Ok("a b c+d".to_owned()));
        let facts = scan("x=1&model=m%31&y", 64).expect("a model");
        assert_eq!(facts.model_range, 10..14);
    }

    #[test]
    fn what_is_wrong_is_told() {
        for query in ["", "model", "model=", "x=1", "Model=m", "%zz=m"] {
            assert_eq!(model(query), Err(ScanError::MissingModelInUrl), "{query}");
        }
        assert_eq!(model("model=a&model=a"), Err(ScanError::DuplicateKey("model")));
        assert_eq!(model("model=%ff"), Err(ScanError::ModelNotString));
        assert_eq!(model("model=%4"), Err(ScanError::ModelNotString));
        assert_eq!(
            model(&format!("model={}", "x".repeat(65))),
            Err(ScanError::ModelNameTooLong { limit: 64 })
        );
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(name in "\\PC{1,20}", before in "[a-z=&%]{0,9}") {
            let query = format!("{before}&model={}", encode(&name));
            if let Ok(facts) = scan(&query, 512) {
                prop_assert_eq!(&facts.model, &name);
                let written = encode(&name);
                prop_assert_eq!(&query[facts.model_range], written.as_str());
            }
            prop_assert_eq!(model_of(&encode(&name)), Some(name));
        }

        #[test]
        fn no_query_panics(query in "\\PC{0,40}") {
            drop(scan(&query, 8));
        }
    }

    fn model_of(value: &str) -> Option<String> {
        scan(&format!("model={value}"), 512).ok().map(|facts| facts.model)
    }
}
