//! Members cut out of bodies, against `serde_json`.

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::Value as Json;

use super::*;

fn unwanted() -> Vec<String> {
    ["kv_transfer_params", "ec_transfer_params", "priority"].map(str::to_owned).to_vec()
}

/// `body` as an engine gets it from a caller who is not trusted.
fn cleaned(body: &str) -> String {
    let facts = scan_with(body.as_bytes(), &ScanLimits::default(), None, &unwanted())
        .unwrap_or_else(|error| panic!("{body}: {error}"));
    let edits = facts.removed.into_iter().map(|range| (range, &b""[..])).collect();
    String::from_utf8(rewrite(&Bytes::from(body.to_owned()), edits).to_vec()).expect("UTF-8")
}

#[test]
fn members_go_with_one_comma_and_nothing_else_changes() {
    for (body, wanted) in [
        (r#"{"kv_transfer_params":{"a":[1,{"b":2}]},"model":"m"}"#, r#"{"model":"m"}"#),
        (r#"{"model":"m","kv_transfer_params":null}"#, r#"{"model":"m"}"#),
        (r#"{ "a" : 1 , "priority" : -1 , "model" : "m" }"#, r#"{ "a" : 1 ,  "model" : "m" }"#),
        (r#"{"model":"m" , "priority":1, "ec_transfer_params":"x" }"#, r#"{"model":"m" }"#),
        (
            r#"{"priority":1,"priority":2,"model":"m","priority":3,"a":0,"priority":4}"#,
            r#"{"model":"m","a":0}"#,
        ),
        (r#"{"\u0070riority":1,"model":"m","kv\u005ftransfer_params":[]}"#, r#"{"model":"m"}"#),
    ] {
        assert_eq!(cleaned(body), wanted, "{body}");
    }
}

#[test]
fn only_the_top_level_is_cleaned_and_only_of_what_is_listed() {
    for body in [
        r#"{"model":"m","metadata":{"priority":1},"x":[{"kv_transfer_params":1}]}"#,
        r#"{"model":"m","Priority":1,"priority ":1,"kv_transfer":"priority","priorit":1}"#,
        r#"{"messages":[{"content":"\"priority\":1,"}],"model":"m"}"#,
    ] {
        assert_eq!(cleaned(body), body);
    }
    assert_eq!(
        scan_with(br#"{"priority":1}"#, &ScanLimits::default(), None, &unwanted()),
        Err(ScanError::MissingModel)
    );
}

#[test]
fn what_the_gateway_reads_itself_is_never_removed() {
    let all = ["model", "stream", "user", "messages"].map(str::to_owned).to_vec();
    assert!(all.iter().all(|key| is_acted_on(key)) && !is_acted_on("priority"));
    let body = br#"{"model":"m","stream":true,"user":"u","messages":[]}"#;
    let facts = scan_with(body, &ScanLimits::default(), None, &all).expect("a request");
    assert_eq!((facts.removed, facts.stream), (vec![], true));
}

/// White space where JSON allows it.
fn space() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "", " ", "\n\t", "\r\n "])
}

fn value() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "1",
        "null",
        r#""priority""#,
        r#""},\"priority\":1,{\\""#,
        "[]",
        "{}",
        r#"[1, {"priority" : [2,3]} ,4]"#,
        r#"{"priority":{"kv_transfer_params":1},"x":[[[]]]}"#,
        "-1.5e3",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Members in any number, order and spelling: what is left is the others, byte for byte, with one comma between two.
    #[test]
    fn everything_else_is_byte_identical(
        members in prop::collection::vec((
            prop::sample::select(vec!["priority", "kv_transfer_params", "\\u0070riority", "ec\\u005Ftransfer_params", "a", "b", "messages"]),
            value(), space(), space(), space(), space(),
        ), 0..9),
        at in any::<prop::sample::Index>(),
        lead in space(),
    ) {
        let mut members = members;
        members.insert(at.index(members.len() + 1), ("model", r#""m""#, "", "", "", ""));
        let written: Vec<(bool, String)> = members
            .iter()
            .map(|(key, value, a, b, c, d)| {
                let unwanted = key.contains("riority") || key.contains("transfer");
                (unwanted, format!("{a}\"{key}\"{b}:{c}{value}{d}"))
            })
            .collect();
        let join = |all: bool| {
            let parts: Vec<&str> = written.iter().filter(|(unwanted, _)| all || !unwanted).map(|(_, text)| &**text).collect();
            format!("{lead}{{{}}}", parts.join(","))
        };
        let body = join(true);
        let changed = cleaned(&body);
        // White space around a comma may stay behind: apart from it, the bytes are those of the members that stay.
        let bare = |text: &str| {
            let mut inside = false;
            let mut escaped = false;
            text.chars().filter(|&c| {
                let keep = inside || !c.is_whitespace();
                if inside && !escaped && c == '\\' { escaped = true; } else {
                    if c == '"' && !escaped { inside = !inside; }
                    escaped = false;
                }
                keep
            }).collect::<String>()
        };
        prop_assert_eq!(bare(&changed), bare(&join(false)), "{}", body);
        let parsed: Json = serde_json::from_str(&changed).expect("still JSON");
        prop_assert!(parsed.as_object().is_some_and(|o| !o.contains_key("priority") && !o.contains_key("kv_transfer_params") && o["model"] == "m"));
        // And twice is once.
        prop_assert_eq!(cleaned(&changed), changed);
    }
}
