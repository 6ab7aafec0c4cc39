use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::openai::request::rewrite;

const AUDIO: &str = "\u{0}\u{1}RIFF\r\n--not\r\n--Xx\r\n--X -";

fn part(name: &str, value: &str) -> String {
    format!("--X\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
}

fn file(value: &str) -> String {
    format!(
        "--X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n{value}\r\n"
    )
}

fn form(parts: &[String]) -> String {
    format!("{}--X--\r\n", parts.concat())
}

fn facts(body: &str) -> Result<FormFacts, ScanError> {
    scan(body.as_bytes(), "X", 64, &["vllm_xargs".to_owned()])
}

fn not_a_form(body: &str) -> FormError {
    match facts(body) {
        Err(ScanError::NotAForm(error)) => error,
        other => panic!("{body:?}: {other:?}"),
    }
}

#[test]
fn the_model_is_found_before_and_behind_the_file() {
    for parts in [
        vec![part("model", "m"), file(AUDIO), part("stream", "True")],
        vec![file(AUDIO), part("language", "en"), part("stream", "1"), part("model", "m")],
    ] {
        for body in [form(&parts), format!("a preamble\r\n{}", form(&parts)), form(&parts) + "an epilogue"] {
            let facts = facts(&body).unwrap_or_else(|e| panic!("{body:?}: {e}"));
            assert_eq!((&*facts.model, facts.stream), ("m", true), "{body:?}");
            assert_eq!(&body[facts.model_range], "m");
            assert!(facts.removed.is_empty());
        }
    }
}

#[test]
fn what_stands_inside_the_file_is_no_field() {
    let nested = file("x\r\n--Y\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n--Y--");
    assert_eq!(facts(&form(&[nested.clone(), part("model", "m")])).map(|f| f.model), Ok("m".to_owned()));
    assert_eq!(facts(&form(&[nested])), Err(ScanError::MissingModelInForm));
}

#[test]
fn fields_that_we_act_on_stand_once_and_are_plain() {
    assert_eq!(
        facts(&form(&[part("model", "m"), part("model", "m")])),
        Err(ScanError::DuplicateKey("model"))
    );
    assert_eq!(
        facts(&form(&[part("stream", "true"), part("model", "m"), part("stream", "false")])),
        Err(ScanError::DuplicateKey("stream"))
    );
    assert!(matches!(
        facts(&form(&[part("model", "m"), part("stream", "maybe")])),
        Err(ScanError::WrongType { field: "stream", .. })
    ));
    let model_file =
        "--X\r\nContent-Disposition: form-data; name=\"model\"; filename=\"m\"\r\n\r\nm\r\n".to_owned();
    assert!(matches!(facts(&form(&[model_file])), Err(ScanError::WrongType { field: "model", .. })));
    assert_eq!(facts(&form(&[part("model", "")])), Err(ScanError::MissingModelInForm));
    assert_eq!(facts(&form(&[part("Model", "m")])), Err(ScanError::MissingModelInForm));
    assert_eq!(
        facts(&form(&[part("model", &"m".repeat(65))])),
        Err(ScanError::ModelNameTooLong { limit: 64 })
    );
}

#[test]
fn malformed_forms_are_refused_with_the_reason() {
    for body in ["", "model=m", "--Y\r\n\r\n", "--X", "--X\n\nmodel\n--X--"] {
        assert_eq!(not_a_form(body), FormError::NoParts, "{body:?}");
    }
    let cut = form(&[part("model", "m"), file("audio")]);
    assert_eq!(not_a_form(&cut[..cut.len() - 8]), FormError::Unfinished);
    assert_eq!(
        not_a_form("--X\r\nContent-Disposition: form-data; name=a\r\n"),
        FormError::HeadTooLong { offset: 5 }
    );
    let long = format!("--X\r\nX: {}\r\n\r\n\r\n--X--", "y".repeat(9 << 10));
    assert_eq!(not_a_form(&long), FormError::HeadTooLong { offset: 5 });
    assert_eq!(not_a_form("--X\r\n\r\nm\r\n--X--"), FormError::BadHead { offset: 5 });
    assert_eq!(
        not_a_form("--X\r\nContent-Type: text/plain\r\n\r\nm\r\n--X--"),
        FormError::BadHead { offset: 5 }
    );
    let many: Vec<_> = (0..=MAX_PARTS).map(|i| part(&format!("f{i}"), "")).collect();
    assert_eq!(not_a_form(&form(&many)), FormError::TooManyParts);
    assert_eq!(facts("--X--"), Err(ScanError::MissingModelInForm));
}

#[test]
fn sentences_name_what_is_accepted() {
    assert!(ScanError::NotAForm(FormError::BadHead { offset: 5 }).to_string().contains("name=\"model\""));
    assert_eq!(
        ScanError::NotAForm(FormError::Unfinished).to_string(),
        "The request body is not valid multipart/form-data: it ends without its closing boundary."
    );
}

proptest! {
    /// Whatever the contents and their order: the model is found, can be replaced, and unwanted fields can be cut out, with
    /// all other parts as they were.
    #[test]
    fn fields_are_found_replaced_and_cut_out(
        contents in prop::collection::vec((prop::sample::select(vec!["file", "vllm_xargs", "prompt"]), "[\\-X\r\na]{0,12}"), 0..6),
        at in any::<prop::sample::Index>(),
    ) {
        let contents: Vec<_> = contents.into_iter().filter(|(_, value)| !format!("\r\n{value}\r\n").contains("\r\n--X")).collect();
        let mut parts: Vec<_> = contents.iter().map(|(name, value)| part(name, value)).collect();
        parts.insert(at.index(parts.len() + 1), part("model", "m"));
        let body = Bytes::from(form(&parts));
        let found = scan(&body, "X", 64, &["vllm_xargs".to_owned()]).expect("a form");
        prop_assert_eq!(&*found.model, "m");
        let mut edits: Vec<_> = found.removed.iter().cloned().map(|range| (range, &b""[..])).collect();
        edits.push((found.model_range, b"other"));
        let changed = rewrite(&body, edits);
        let wanted: Vec<_> = parts.iter().filter(|p| !p.contains("vllm_xargs")).map(|p| p.replace("\"model\"\r\n\r\nm", "\"model\"\r\n\r\nother")).collect();
        let wanted = form(&wanted);
        let sent = String::from_utf8_lossy(&changed).into_owned();
        prop_assert_eq!(sent.trim_start(), wanted.as_str());
        prop_assert_eq!(scan(&changed, "X", 64, &[]).expect("still a form").model, "other");
    }

    #[test]
    fn no_body_panics(body in prop::collection::vec(prop::sample::select(b"--X\r\n: ;=\"name=modelContent-Disposition: form-data".to_vec()), 0..200)) {
        drop(scan(&body, "X", 8, &["n".to_owned()]));
    }
}
