//! What a whole answer of an engine really is, and how a client gets to see it.

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};

use super::{client::Whole, request::EngineRequest};
use crate::openai::{
    Api, ErrorShape, error_body,
    usage::{BodyFacts, FinishReason},
};

/// Looks behind the status of `whole`. An error inside a 200 gets the status it should have had.
///
/// # Errors
/// For the log: the answer is none, and another engine may give one.
pub(super) fn judge(whole: &mut Whole, request: &EngineRequest) -> Result<(), String> {
    if whole.head.status == StatusCode::OK && !request.upgrades() && request.api.answers_json() {
        if let Some(status) = error_body::hidden(&whole.body) {
            set_status(whole, status);
            return match status.is_client_error() {
                true => Ok(()),
                false => Err(format!("an error inside a 200: {status}")),
            };
        }
        if matches!(request.api, Api::ChatCompletions | Api::Completions) && was_broken_off(&whole.body) {
            set_status(whole, StatusCode::BAD_GATEWAY);
            whole.body = Bytes::new();
            return Err("the engine gave the request up".to_owned());
        }
        if is_text(whole) && !whole.body.is_empty() {
            set_status(whole, StatusCode::BAD_GATEWAY);
            return Err("text inside a 200 where JSON belongs".to_owned());
        }
    }
    if request.upgrades() && is_refused_upgrade(whole) {
        // The framework under vLLM refuses a WebSocket on an unknown path without a word.
        whole.body = (&br#"{"detail":"Not Found"}"#[..]).into();
        set_status(whole, StatusCode::NOT_FOUND);
    }
    Ok(())
}

/// Brings an error into the shape of the API; whatever is right, or no error, stays as it is.
pub fn normalise(whole: &mut Whole, shape: ErrorShape) {
    let status = whole.head.status;
    if !status.is_client_error() && !status.is_server_error() {
        return;
    }
    let content_type = whole.head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let encoded = whole.head.headers.contains_key(header::CONTENT_ENCODING);
    if let Some(body) = error_body::answer(status, content_type.unwrap_or_default(), &whole.body, shape) {
        whole.body = body;
        // A content type that is a constant can be written.
        drop(whole.head.insert_header(header::CONTENT_TYPE, "application/json"));
        if encoded {
            whole.head.remove_header(&header::CONTENT_ENCODING);
        }
    }
}

fn set_status(whole: &mut Whole, status: StatusCode) {
    // A status that is one can be set.
    drop(whole.head.set_status(status));
}

/// Whether an engine that was stopped gave a part of the answer for all of it.
fn was_broken_off(body: &[u8]) -> bool {
    let mut facts = BodyFacts::default();
    facts.push(body);
    facts.finish_reason().is_some_and(FinishReason::is_failure)
}

fn is_text(whole: &Whole) -> bool {
    let value = whole.head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    value.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"text/"))
}

fn is_refused_upgrade(whole: &Whole) -> bool {
    let status = whole.head.status;
    matches!(status, StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED)
        && whole.body.trim_ascii().is_empty()
}

#[cfg(test)]
mod tests {

    use http::HeaderMap;
    use pingora_http::ResponseHeader;

    use super::*;
    use crate::openai::Api;

    fn whole(status: u16, content_type: &'static str, body: &'static str) -> Whole {
        let mut head = ResponseHeader::build(status, None).expect("a head");
        head.insert_header(header::CONTENT_TYPE, content_type).expect("a header");
        Whole { head, body: Bytes::from_static(body.as_bytes()) }
    }

    fn judged(api: Api, mut whole: Whole) -> (u16, bool) {
        let request = EngineRequest {
            api,
            stream: false,
            request_id: String::new(),
            target: String::new(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            resume: None,
            whole: None,
        };
        let fine = judge(&mut whole, &request).is_ok();
        (whole.head.status.as_u16(), fine)
    }

    #[test]
    fn an_answer_that_is_none_is_found_out() {
        let json = "application/json";
        for (api, answer, status, fine) in [
            (Api::ChatCompletions, whole(200, json, r#"{"id":"c","choices":[]}"#), 200, true),
            (Api::ChatCompletions, whole(200, json, r#"{"error":{"message":"lost"}}"#), 502, false),
            (Api::ChatCompletions, whole(200, json, r#"{"error":{"message":"bad","code":400}}"#), 400, true),
            (Api::Messages, whole(200, "text/plain", "Network connection lost"), 502, false),
            (Api::Messages, whole(200, "text/html", ""), 200, true),
            (Api::Transcriptions, whole(200, "text/plain", "hello"), 200, true),
            (Api::Speech, whole(200, "audio/wav", "RIFF"), 200, true),
            (Api::Realtime, whole(403, "text/plain", ""), 404, true),
            (Api::Realtime, whole(401, "text/plain", ""), 401, true),
        ] {
            let body = answer.body.clone();
            assert_eq!(judged(api, answer), (status, fine), "{api:?} {body:?}");
        }
    }

    #[test]
    fn only_errors_are_rewritten() {
        let mut fine = whole(200, "text/plain", "hello");
        normalise(&mut fine, ErrorShape::OpenAi);
        assert_eq!(fine.body, "hello");
        let mut error = whole(500, "text/plain", "Internal Server Error");
        normalise(&mut error, ErrorShape::OpenAi);
        assert_eq!(error.head.headers["content-type"], "application/json");
        assert!(error.body.starts_with(br#"{"error":{"message":"Internal Server Error""#));
    }
}
