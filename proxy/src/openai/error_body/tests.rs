use proptest::prelude::*;
use serde_json::json;

use super::*;

const OPENAI: ErrorShape = ErrorShape::OpenAi;
const ANTHROPIC: ErrorShape = ErrorShape::Anthropic;

fn openai(status: u16, body: &str) -> Value {
    let status = StatusCode::from_u16(status).expect("a status");
    let body = answer(status, b"application/json; charset=utf-8", body.as_bytes(), OPENAI).expect("changed");
    serde_json::from_slice(&body).expect("JSON")
}

#[test]
fn what_is_right_passes_byte_for_byte() {
    for body in [
        r#"{"error":{"message":"no such model","type":"NotFoundError","param":"model","code":404}}"#,
        r#" { "error" : {"message": "x" } } "#,
        r#"{"error":{"message":"{\"a\":1} is not a schema","code":null}}"#,
    ] {
        assert_eq!(
            answer(StatusCode::BAD_REQUEST, b"application/json", body.as_bytes(), OPENAI),
            None,
            "{body}"
        );
    }
    let body = br#"{"type":"error","error":{"type":"NotFoundError","message":"x"}}"#;
    assert_eq!(answer(StatusCode::NOT_FOUND, b"application/json", body, ANTHROPIC), None);
    // Not under another content type: clients go by it.
    let body = br#"{"error":{"message":"x"}}"#;
    assert!(answer(StatusCode::BAD_REQUEST, b"text/plain", body, OPENAI).is_some());
}

#[test]
fn every_shape_becomes_openais() {
    for (status, body, message, kind, param, code) in [
        (
            401,
            r#"{"error":"Unauthorized"}"#,
            "Unauthorized",
            "authentication_error",
            json!(null),
            json!(null),
        ),
        (
            400,
            r#"{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}"#,
            "too long",
            "BadRequestError",
            json!(null),
            json!(400),
        ),
        (413, r#"{"detail":"Too big"}"#, "Too big", "invalid_request_error", json!(null), json!(null)),
        (
            422,
            r#"{"detail":[{"loc":["body","messages",0],"msg":"Field required","type":"missing"},{"loc":["body","n"],"msg":"bad"}]}"#,
            "body.messages.0: Field required; body.n: bad",
            "invalid_request_error",
            json!("body.messages.0"),
            json!(null),
        ),
        (500, "Internal Server Error", "Internal Server Error", "upstream_error", json!(null), json!(null)),
        (500, r#""just a string""#, "just a string", "upstream_error", json!(null), json!(null)),
        (400, r#"{"message":"m","code":"x"}"#, "m", "invalid_request_error", json!(null), json!("x")),
        (
            404,
            r#"{"type":"error","error":{"type":"not_found_error","message":"gone"}}"#,
            "gone",
            "not_found_error",
            json!(null),
            json!(null),
        ),
    ] {
        let error = &openai(status, body)["error"];
        assert_eq!(error["message"], message, "{body}");
        assert_eq!(error["type"], kind, "{body}");
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{body}");
    }
}

#[test]
fn wrapped_errors_are_unwrapped() {
    let inner = r#"{"error":{"message":"the real one","type":"BadRequestError","param":"n","code":400}}"#;
    for body in [
        format!(r#"{{"error":{{"message":{},"type":"api_error","code":"500"}}}}"#, Value::from(inner)),
        format!(r#"{{"error":{inner}}}"#),
        format!(r#"{{"error":{}}}"#, Value::from(inner)),
        format!(r#"{{"detail":{}}}"#, json!({"detail": inner})),
    ] {
        let error = &openai(400, &body)["error"];
        assert_eq!(
            (&error["message"], &error["type"], &error["param"], &error["code"]),
            (&json!("the real one"), &json!("BadRequestError"), &json!("n"), &json!(400)),
            "{body}"
        );
    }
}

#[test]
fn nothing_of_the_inside_is_shown() {
    for body in [
        "<html><body><h1>502 Bad Gateway</h1>nginx</body></html>",
        "",
        "\u{0}\u{ff}",
        "Traceback (most recent call last):\n  File \"/usr/lib/python3/x.py\", line 1\nKeyError: 'x'",
        "Cannot connect to host 10.1.2.3:8000",
        "no route to 192.168.0.1.",
        "connect to fd00::12:1 failed",
        r#"{"detail":"upstream http://172.16.0.9:8000/v1 refused"}"#,
        r#"{"message":"File \"/opt/x/site-packages/vllm/y.py\""}"#,
        "[]",
        "{}",
    ] {
        let error = &openai(502, body)["error"];
        assert_eq!(error["message"], "The engine answered 502 (Bad Gateway) and gave no reason.", "{body}");
    }
    let long = "x".repeat(500);
    assert!(openai(500, &long)["error"]["message"].as_str().is_some_and(|m| m.len() < 100));
    // Versions, times and ratios are no addresses.
    for fine in ["needs vLLM 0.32.0", "at 12:30:59", "0.5 of 1.25"] {
        assert_eq!(openai(400, fine)["error"]["message"], fine);
    }
}

#[test]
fn anthropics_clients_get_anthropics_shape_and_types() {
    let body = answer(
        StatusCode::BAD_REQUEST,
        b"application/json",
        br#"{"error":{"message":"bad","type":"BadRequestError","code":400}}"#,
        ANTHROPIC,
    )
    .expect("changed");
    assert_eq!(&body[..], br#"{"type":"error","error":{"type":"invalid_request_error","message":"bad"}}"#);
}

#[test]
fn an_api_that_the_engine_does_not_have_is_named_as_that() {
    let error = &openai(404, r#"{"detail":"Not Found"}"#)["error"];
    assert_eq!(error["message"], "The engine of this model does not serve this API.");
    assert_eq!(error["code"], "not_served_by_model");
    assert_eq!(openai(405, r#"{"detail":"Method Not Allowed"}"#)["error"]["code"], "not_served_by_model");
}

#[test]
fn errors_that_hide_behind_a_200_are_found() {
    let status = |body: &str| hidden(body.as_bytes()).map(|status| status.as_u16());
    for (body, found) in [
        (r#"{"error":{"message":"Network connection lost"}}"#, Some(502)),
        (r#"{"error":"Network connection lost"}"#, Some(502)),
        (r#" { "error" : {"message":"bad","code":400}}"#, Some(400)),
        (r#"{"object":"error","message":"m","code":503}"#, Some(503)),
        (r#"{"error":{"message":"m","code":200}}"#, Some(502)),
        (r#"{"error":null,"id":"resp_1","output":[]}"#, None),
        (r#"{"object":"list","data":[]}"#, None),
        (r#"{"error":{"code":1},"choices":[]}"#, None),
        (r#"{"id":"x","error":{"message":"m"}}"#, None),
        ("not json", None),
        ("", None),
    ] {
        assert_eq!(status(body), found, "{body}");
    }
}

fn events(text: &str, shape: ErrorShape) -> Option<String> {
    normalise_events(text.as_bytes(), shape).map(|bytes| String::from_utf8(bytes.to_vec()).expect("UTF-8"))
}

#[test]
fn only_error_events_of_the_wrong_shape_are_replaced() {
    let good = "data: {\"choices\":[]}\n\n";
    let right = "data: {\"error\": {\"message\": \"m\", \"code\": 500}}\n\n";
    for fine in [
        good.to_owned(),
        right.to_owned(),
        format!(": ping\r\n\r\n{good}{right}data: [DONE]\n\n"),
        String::new(),
    ] {
        assert_eq!(events(&fine, OPENAI), None, "{fine}");
    }
    let typed = "event: error\ndata: {\"type\":\"error\",\"message\":\"m\",\"code\":\"x\"}\n\n";
    assert_eq!(events(typed, OPENAI), None, "the Responses API has its own");
    for wrong in [
        "data: {\"object\":\"error\",\"message\":\"m\",\"type\":\"X\",\"code\":400}",
        "data:{\"error\":\"m\"}",
        "data: {\"error\":{\"message\":\"{\\\"error\\\":\\\"m\\\"}\"}}",
    ] {
        for end in ["\n\n", "\r\n\r\n"] {
            let changed = events(&format!("{good}{wrong}{end}data: [DONE]\n\n"), OPENAI).expect(wrong);
            let (before, after) = changed.split_once(good).expect("the good event stays");
            assert_eq!(before, "");
            assert!(after.starts_with("data: {\"error\":{\"message\":\"m\","), "{after}");
            assert!(after.ends_with("}}\n\ndata: [DONE]\n\n"), "{after}");
        }
    }
    let changed = events(right, ANTHROPIC).expect("OpenAI's shape on Anthropic's route");
    assert_eq!(
        changed,
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"m\"}}\n\n"
    );
    assert_eq!(events(&changed, ANTHROPIC), None);
}

proptest! {
    /// Whatever an engine says, the client gets its shape with a message in it, and what it gets is right.
    #[test]
    fn every_body_becomes_a_right_one(body in ".{0,80}", status in 400u16..600, wrap in 0..4u8, json in any::<bool>()) {
        let body = match wrap {
            0 => body,
            1 => json!({"error": body}).to_string(),
            2 => json!({"error": {"message": {"detail": [body]}, "error": body}}).to_string(),
            _ => json!({"error": {"message": body}}).to_string(),
        };
        let status = StatusCode::from_u16(status).expect("a status");
        for shape in [OPENAI, ANTHROPIC] {
            let sent = normalise(status, json, body.as_bytes(), shape);
            let sent = sent.as_deref().unwrap_or(body.as_bytes());
            prop_assert_eq!(normalise(status, true, sent, shape), None, "{}", body);
        }
    }

    #[test]
    fn no_events_panic(bytes in prop::collection::vec(prop::sample::select(b"data: {}\"error\":[]\r\n".to_vec()), 0..120)) {
        drop(normalise_events(&bytes, OPENAI));
        prop_assert!(hidden(&bytes).is_none_or(|status| status.as_u16() >= 400));
    }
}
