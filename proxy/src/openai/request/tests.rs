use proptest::prelude::*;
use serde::de::IgnoredAny;
use serde_json::{Map, Value as Json, json};

use bytes::Bytes;

use super::*;

fn facts(body: &str) -> RequestFacts {
    scan(body.as_bytes(), &ScanLimits::default()).unwrap_or_else(|error| panic!("{body}: {error}"))
}

fn error(body: impl AsRef<[u8]>) -> ScanError {
    let body = body.as_ref();
    scan(body, &ScanLimits::default()).expect_err(&String::from_utf8_lossy(body))
}

#[test]
fn finds_what_the_gateway_acts_on_with_the_model_last() {
    let body = r#" { "messages":[{"role":"user","content":"hi, \"model\": \"no\""}], "stream" : true ,"max_tokens":7,
        "max_completion_tokens": 9, "n":2,"user":"u-1","stream_options":{"include_usage":true}, "x":[1,{}], "model":"org\/m" }"#;
    let facts = facts(body);
    assert_eq!(facts.model, "org/m");
    assert_eq!(&body[facts.model_range], r#""org\/m""#);
    assert_eq!((facts.stream, facts.max_tokens, facts.n), (true, Some(9), Some(2)));
    assert_eq!(facts.stream_range.map(|range| &body[range]), Some("true"));
    assert_eq!(facts.user_range.map(|range| &body[range]), Some(r#""u-1""#));
    assert_eq!(facts.stream_options_range.map(|range| &body[range]), Some(r#"{"include_usage":true}"#));
    assert_eq!(facts.insert_at, 2);
    assert_eq!(facts.prompt.text_bytes, ("user".len() + r#"hi, "model": "no""#.len()) as u64);
}

#[test]
fn a_model_anywhere_but_at_the_top_is_never_taken() {
    for body in [
        r#"{"messages":[{"role":"user","content":"{\"model\":\"x\"}"}]}"#,
        r#"{"metadata":{"model":"x"}}"#,
        r#"{"a":[{"model":"x"}],"b":{"c":{"model":"x"}}}"#,
        r#"{"Model":"x","model ":"x","models":"x","mode":"l","\"model\"":"x"}"#,
        r#"{"x":"model","y":"model"}"#,
        "{}",
    ] {
        assert_eq!(error(body), ScanError::MissingModel, "{body}");
    }
    assert_eq!(facts(r#"{"metadata":{"model":"x"},"model":"y","z":{"model":"x"}}"#).model, "y");
}

#[test]
fn keys_are_compared_decoded() {
    assert_eq!(facts(r#"{"mod\u0065l":"x","\u0073tream":true}"#).model, "x");
    assert!(facts(r#"{"model":"x","\u0073tream":true}"#).stream);
    assert_eq!(error(r#"{"mod\u0065l":"x","model":"y"}"#), ScanError::DuplicateKey("model"));
    assert_eq!(facts(r#"{"model":"\ud83d\ude80\u00e9\n","\ud800":1}"#).model, "🚀é\n");
    assert_eq!(facts(r#"{"model":"a\ud83db\ude80\ud83d\u0041"}"#).model, "a\u{fffd}b\u{fffd}\u{fffd}A");
}

#[test]
fn a_key_that_we_act_on_stands_once_others_are_the_engines_affair() {
    for key in [
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n",
        "user",
    ] {
        let body = format!(r#"{{"{key}":null,"x":{{"{key}":1}},"{key}":null}}"#);
        let expected = if key == "model" { ScanError::ModelNotString } else { ScanError::DuplicateKey(key) };
        assert_eq!(error(&body), expected);
    }
    assert_eq!(error(r#"{"model":"a","model":"a"}"#), ScanError::DuplicateKey("model"));
    assert_eq!(
        facts(r#"{"model":"a","temperature":1,"temperature":2,"prompt":"xy","prompt":"z"}"#)
            .prompt
            .text_bytes,
        3
    );
}

#[test]
fn wrong_types_are_named() {
    for (body, field) in [
        (r#"{"model":"m","stream":"true"}"#, "stream"),
        (r#"{"model":"m","stream":1}"#, "stream"),
        (r#"{"model":"m","stream_options":[]}"#, "stream_options"),
        (r#"{"model":"m","max_tokens":-1}"#, "max_tokens"),
        (r#"{"model":"m","max_tokens":1.0}"#, "max_tokens"),
        (r#"{"model":"m","max_completion_tokens":1e3}"#, "max_completion_tokens"),
        (r#"{"model":"m","max_output_tokens":"5"}"#, "max_output_tokens"),
        (r#"{"model":"m","max_tokens":18446744073709551616}"#, "max_tokens"),
        (r#"{"model":"m","n":[1]}"#, "n"),
        (r#"{"model":"m","user":{}}"#, "user"),
    ] {
        let error = error(body);
        assert_eq!((error.param(), error.code()), (Some(field), "invalid_type"), "{body}");
        assert!(error.to_string().contains(field), "{error}");
    }
    for body in [r#"{"model":1}"#, r#"{"model":null}"#, r#"{"model":["m"]}"#, r#"{"model":{"model":"m"}}"#] {
        assert_eq!(error(body), ScanError::ModelNotString);
    }
    let nulls =
        facts(r#"{"model":"m","stream":null,"max_tokens":null,"n":null,"user":null,"stream_options":null}"#);
    assert_eq!((nulls.stream, nulls.max_tokens, nulls.n, nulls.user_range), (false, None, None, None));
    assert!(nulls.stream_options_range.is_some() && nulls.stream_range.is_some());
    assert_eq!(facts(r#"{"model":"m","max_tokens":18446744073709551615}"#).max_tokens, Some(u64::MAX));
}

#[test]
fn malformed_json_is_refused_with_the_place_and_what_belongs_there() {
    let at =
        |offset, expected, found: &str| ScanError::NotJson { offset, expected, found: found.bytes().next() };
    for (body, expected) in [
        ("", at(0, "a JSON object", "")),
        ("  \n", at(3, "a JSON object", "")),
        ("model=x", at(0, "a JSON object", "m")),
        ("{", at(1, "a string key or '}'", "")),
        (r#"{"model":"m""#, at(12, "',' or '}'", "")),
        (r#"{"model":"m",}"#, at(13, "a string key", "}")),
        (r#"{"model" "m"}"#, at(9, "':'", "\"")),
        (r#"{"model":}"#, at(9, "a value", "}")),
        (r#"{"model":"m"} x"#, at(14, "nothing more after the object", "x")),
        (r#"{"a":[1,]}"#, at(8, "a value", "]")),
        (r#"{"a":[1 2]}"#, at(8, "',' or ']'", "2")),
        (r#"{"a":[1}"#, at(7, "',' or ']'", "}")),
        (r#"{"a":tru}"#, at(8, "true", "}")),
        (r#"{"a":nul"#, at(8, "null", "")),
        (r#"{"a":01}"#, at(6, "',' or '}'", "1")),
        (r#"{"a":[1,02]}"#, at(9, "',' or ']'", "2")),
        (r#"{"a":-}"#, at(6, "a digit", "}")),
        (r#"{"a":1.}"#, at(7, "a digit", "}")),
        (r#"{"a":1e+}"#, at(8, "a digit", "}")),
        (r#"{"a":NaN}"#, at(5, "a value", "N")),
        (r#"{"a":"x"#, at(7, "'\"' at the end of a string", "")),
        (r#"{"a":"\x"}"#, at(7, r#"one of " \ / b f n r t u after a backslash"#, "x")),
        (r#"{"a":"\u12g4"}"#, at(10, "four hex digits after \\u", "g")),
        ("{\"a\":\"\n\"}", at(6, "an escape in place of a raw control character", "\n")),
    ] {
        assert_eq!(error(body), expected, "{body}");
        assert!(serde_json::from_str::<IgnoredAny>(body).is_err(), "{body}");
    }
    assert_eq!(
        error([b"{\"model\":\"".as_slice(), b"\xff\"}"].concat()),
        ScanError::InvalidUtf8 { offset: 10 }
    );
    for body in ["[1]", "\"model\"", " 1", "null", "true", "-0"] {
        assert_eq!(error(body), ScanError::NotAnObject, "{body}");
    }
}

#[test]
fn errors_are_sentences_for_the_client() {
    let sentence = |body: &str| error(body).to_string();
    assert_eq!(
        sentence(r#"{"model":}"#),
        "The request body is not valid JSON: expected a value at byte 9, found '}'."
    );
    assert_eq!(
        sentence(r#"{"model":"#),
        "The request body is not valid JSON: it ends at byte 9, where a value was expected."
    );
    assert!(sentence("{\"model\":\"\u{1}\"}").ends_with("found byte 0x01."));
    assert_eq!(error("{}").param(), Some("model"));
}

#[test]
fn limits_hold_to_the_level_and_the_byte() {
    let nested =
        |levels: usize| format!(r#"{{"a":{}{},"model":"m"}}"#, "[".repeat(levels), "]".repeat(levels));
    assert!(scan(nested(127).as_bytes(), &ScanLimits::default()).is_ok());
    assert_eq!(error(nested(128)), ScanError::TooDeep { limit: 128 });
    let deep = ScanLimits { max_depth: usize::MAX, ..ScanLimits::default() };
    assert!(scan(nested(MAX_DEPTH - 1).as_bytes(), &deep).is_ok());
    assert_eq!(scan(nested(MAX_DEPTH).as_bytes(), &deep), Err(ScanError::TooDeep { limit: MAX_DEPTH }));
    assert_eq!(
        scan(b"{}", &ScanLimits { max_depth: 0, ..deep }),
        Err(ScanError::TooDeep { limit: 0 }),
        "a limit that allows nothing"
    );

    let limits = ScanLimits { max_model_bytes: 4, ..ScanLimits::default() };
    assert!(scan(r#"{"model":"\u6c34x"}"#.as_bytes(), &limits).is_ok());
    let long = scan(r#"{"model":"\u6c34xy"}"#.as_bytes(), &limits);
    assert_eq!(long, Err(ScanError::ModelNameTooLong { limit: 4 }));
}

#[test]
fn prompts_are_sized_as_text_and_as_token_ids() {
    let prompt = |body: &str| facts(body).prompt;
    let sized = |text_bytes, token_ids| PromptFacts { text_bytes, token_ids };
    assert_eq!(prompt(r#"{"model":"m","prompt":[12,345, 6,0,  7]}"#), sized(0, 5));
    assert_eq!(prompt(r#"{"model":"m","prompt":[[1,2],[3]],"logit_bias":[4]}"#), sized(0, 3));
    assert_eq!(prompt(r#"{"model":"m","input":["ab","c"],"metadata":{"x":"long"}}"#), sized(3, 0));
    assert_eq!(prompt(r#"{"model":"m","prompt":"\u6c34\ud83d\ude80\n\u00e9\u0041"}"#), sized(11, 0));
    assert_eq!(
        prompt(r#"{"model":"m","messages":[{"image_url":{"url":"data:image/png;base64,AAAA"}}]}"#),
        sized(0, 0)
    );
    assert_eq!(sized(400, 5).estimated_tokens(), 105);
}

#[test]
fn every_length_of_string_and_number_is_read_alike() {
    for length in 0..300 {
        let text = "é".repeat(length / 2) + &"x".repeat(length % 2);
        let digits = format!("1{}", "0".repeat(length % 40));
        let body = format!(
            r#"{{"prompt":["{text}",{digits},{digits}, {digits}],"k{text}":"\"{text}","model":"m"}}"#
        );
        assert_eq!(
            facts(&body).prompt,
            PromptFacts { text_bytes: text.len() as u64, token_ids: 3 },
            "{body}"
        );
        for (from, to) in [("k", "\u{1}"), ("[\"", "[\"\u{1f}"), (r#""\""#, r#""\"\z"#)] {
            let broken = body.replacen(from, to, 1);
            assert!(matches!(error(&broken), ScanError::NotJson { .. }), "{broken:?}");
        }
    }
}

/// A JSON value with text that needs care.
fn json_value() -> impl Strategy<Value = Json> {
    let text = prop_oneof!["[a-z\"\\\\/\u{8}\n\u{1f}é水🚀]{0,9}", "[ -~]{0,90}", Just("model".to_owned())];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u32>().prop_map(Json::from),
        (any::<i32>(), prop::sample::select(vec![0.125, 1.0, 1e20]))
            .prop_map(|(n, unit)| json!(f64::from(n % 512) * unit)),
        text.clone().prop_map(Json::from),
    ];
    leaf.prop_recursive(6, 60, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Json::from),
            prop::collection::vec((prop_oneof![text.clone(), "model|stream|prompt"], inner), 0..6)
                .prop_map(|pairs| Json::Object(pairs.into_iter().collect())),
        ]
    })
}

prop_compose! {
    /// A request with known and unknown fields in any order, mostly of types that are right.
    fn request()(
        mut pairs in prop::collection::vec((prop_oneof!["prompt|input|messages|system|tokens", "n|[a-z]{1,5}"], json_value()), 0..5),
        stream in prop::option::of(prop_oneof![4 => any::<bool>().prop_map(Json::from), 1 => json_value()]),
        max_tokens in prop::option::of(prop_oneof![4 => any::<u64>().prop_map(Json::from), 1 => json_value()]),
        user in prop::option::of(prop_oneof![4 => "[a-z\"]{0,5}".prop_map(Json::from), 1 => json_value()]),
        model in prop_oneof![8 => "[a-z/\\\\é]{0,9}".prop_map(Json::from), 1 => json_value()],
        at in any::<prop::sample::Index>(),
    ) -> Map<String, Json> {
        pairs.insert(at.index(pairs.len() + 1), ("model".to_owned(), model));
        for (key, value) in [("stream", stream), ("max_tokens", max_tokens), ("user", user)] {
            pairs.extend(value.map(|value| (key.to_owned(), value)));
        }
        pairs.into_iter().collect()
    }
}

/// Writes JSON with white space and escapes wherever the grammar allows them.
fn render(value: &Json, rng: &mut fastrand::Rng, out: &mut String) {
    fn space(rng: &mut fastrand::Rng, out: &mut String) {
        let spaces = ["", "", "", " ", "\n  ", "\t", "\r\n"];
        out.push_str(rng.choice(spaces).unwrap_or_default());
    }
    fn text(text: &str, rng: &mut fastrand::Rng, out: &mut String) {
        let style = rng.u8(..3);
        out.push('"');
        for character in text.chars() {
            let short = "\"\"\\\\//\u{8}b\u{c}f\nn\rr\tt"
                .as_bytes()
                .chunks(2)
                .find(|pair| char::from(pair[0]) == character);
            let must = character < ' ' || matches!(character, '"' | '\\');
            if style == 2 && rng.u8(..3) == 0 || must && (short.is_none() || rng.bool()) {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let digits = format!("\\u{unit:04x}");
                    out.push_str(&if rng.bool() { digits.replace('b', "B") } else { digits });
                }
            } else if let Some(pair) = short.filter(|_| must || rng.bool()) {
                out.extend(['\\', char::from(pair[1])]);
            } else {
                out.push(character);
            }
        }
        out.push('"');
    }
    space(rng, out);
    match value {
        Json::String(string) => text(string, rng, out),
        Json::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                render(item, rng, out);
            }
            space(rng, out);
            out.push(']');
        }
        Json::Object(fields) => {
            out.push('{');
            for (index, (key, field)) in fields.iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                space(rng, out);
                text(key, rng, out);
                space(rng, out);
                out.push(':');
                render(field, rng, out);
            }
            space(rng, out);
            out.push('}');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
    space(rng, out);
}

fn text_bytes(value: &Json) -> u64 {
    match value {
        Json::String(text) if text.starts_with("data:") => 0,
        Json::String(text) => text.len() as u64,
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}

fn token_ids(value: &Json) -> u64 {
    match value {
        Json::Array(items) => items.iter().map(|item| u64::from(item.is_number()) + token_ids(item)).sum(),
        Json::Object(fields) => fields.values().map(token_ids).sum(),
        _ => 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn facts_are_those_of_serde_json_however_the_body_is_written(request in request(), seed in any::<u64>()) {
        let mut body = String::new();
        render(&Json::Object(request.clone()), &mut fastrand::Rng::with_seed(seed), &mut body);
        let parsed: Json = serde_json::from_str(&body).expect("the writer writes JSON");
        prop_assert_eq!(&parsed, &Json::Object(request.clone()), "{}", body);

        let get = |key: &str| request.get(key).filter(|value| !value.is_null());
        let fine = get("model").is_some_and(Json::is_string)
            && get("stream").is_none_or(Json::is_boolean)
            && get("max_tokens").is_none_or(Json::is_u64)
            && get("n").is_none_or(Json::is_u64)
            && get("user").is_none_or(Json::is_string);
        let facts = match scan(body.as_bytes(), &ScanLimits::default()) {
            Ok(facts) => facts,
            Err(error) => {
                prop_assert!(!fine && error.param().is_some(), "{} for {}", error, body);
                return Ok(());
            }
        };
        prop_assert!(fine, "{}", body);
        prop_assert_eq!(Some(facts.model.as_str()), request["model"].as_str());
        prop_assert_eq!(facts.stream, get("stream") == Some(&Json::Bool(true)));
        prop_assert_eq!(facts.max_tokens, get("max_tokens").and_then(Json::as_u64));
        prop_assert_eq!(facts.n, get("n").and_then(Json::as_u64));
        let value_at = |range: Range<usize>| serde_json::from_str::<Json>(&body[range]).expect("a whole value");
        prop_assert_eq!(&value_at(facts.model_range.clone()), &request["model"]);
        prop_assert_eq!(facts.user_range.map(value_at), get("user").cloned());
        prop_assert_eq!(facts.stream_range.map(value_at), request.get("stream").cloned());
        let sum = |keys: &[&str], of: fn(&Json) -> u64| -> u64 { keys.iter().filter_map(|key| request.get(*key)).map(of).sum() };
        prop_assert_eq!(facts.prompt.text_bytes, sum(&["prompt", "input", "messages", "system"], text_bytes));
        prop_assert_eq!(facts.prompt.token_ids, sum(&["prompt", "input", "tokens"], token_ids));

        let spliced = splice(&Bytes::from(body.clone()), facts.model_range.clone(), &json_string("new \"name\""));
        let mut renamed = request.clone();
        renamed["model"] = "new \"name\"".into();
        prop_assert_eq!(serde_json::from_slice::<Json>(&spliced).expect("JSON"), Json::Object(renamed));
        prop_assert!(spliced.starts_with(&body.as_bytes()[..facts.model_range.start]));
        prop_assert!(spliced.ends_with(&body.as_bytes()[facts.model_range.end..]));
        let inserted = splice(&Bytes::from(body), facts.insert_at..facts.insert_at, br#""zzzzzz":[1],"#);
        prop_assert_eq!(&serde_json::from_slice::<Json>(&inserted).expect("JSON")["zzzzzz"], &json!([1]));
    }

    #[test]
    fn damaged_bodies_are_judged_as_serde_json_judges_them(
        request in request(), seed in any::<u64>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\",:\\u0123e-. \n".to_vec())]), 1..6),
    ) {
        let mut body = String::new();
        render(&Json::Object(request), &mut fastrand::Rng::with_seed(seed), &mut body);
        let mut body = body.into_bytes();
        for (at, what, byte) in damage {
            let at = at.index(body.len() + 1);
            match what {
                0 => body.insert(at, byte),
                1 if at < body.len() => body[at] = byte,
                _ => body.truncate(body.len().max(1) - usize::from(at % 7 == 0)),
            }
        }
        let theirs = serde_json::from_slice::<IgnoredAny>(&body).is_ok() && std::str::from_utf8(&body).is_ok();
        match scan(&body, &ScanLimits::default()) {
            Err(ScanError::NotJson { offset, .. }) => prop_assert!(!theirs && offset <= body.len()),
            Err(ScanError::InvalidUtf8 { offset }) => prop_assert!(std::str::from_utf8(&body[..offset]).is_ok() && !theirs),
            Err(_) => {} // Found before the end of the body: the rest was not judged.
            Ok(_) => prop_assert!(theirs, "{}", String::from_utf8_lossy(&body)),
        }
    }

    #[test]
    fn random_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200), start in 0..250usize, end in 0..250usize) {
        prop_assert!(scan(&body, &ScanLimits::default()).is_err(), "no chance that this is a request");
        let (from, to) = (start.min(body.len()), end.min(body.len()).max(start.min(body.len())));
        let expected = [&body[..from], b"value", &body[to..]].concat();
        prop_assert_eq!(splice(&Bytes::from(body), start..end, b"value"), expected);
    }
}
