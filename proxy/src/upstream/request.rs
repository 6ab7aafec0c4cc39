//! The request as an engine gets it: our path, the client's body byte for byte, and only those of the client's headers
//! that are the engine's business.
//!
//! Dropped: what belongs to the client's connection (hop by hop, and whatever `Connection` names), what is written anew
//! (`Host`, `Content-Length`, `X-Request-Id`), the client's credentials, and the headers that vLLM obeys without asking
//! who sent them (`X-data-parallel-rank`, `X-Session-ID`, `X-Vllm-Priority`).

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, header};
use pingora_error::Result;
use pingora_http::RequestHeader;

use crate::{downstream::respond::REQUEST_ID, openai::Api, record::EXPLAIN};

const DROPPED: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "cookie",
    // The answer must not come compressed: events are looked at, and a compressed stream is held back by its encoder.
    "accept-encoding",
    REQUEST_ID,
    EXPLAIN,
    "x-data-parallel-rank",
    "x-session-id",
    "x-vllm-priority",
];

/// Everything an attempt needs; attempts share it.
#[derive(Debug)]
pub struct EngineRequest {
    /// Which API; says how an answer ends.
    pub api: Api,
    /// Whether the client asked for a stream.
    pub stream: bool,
    /// Our name for the request, for the engine, the client and the log.
    pub request_id: String,
    /// Path and query.
    pub target: String,
    /// Forwarded headers, framing and host excepted.
    pub headers: HeaderMap,
    /// The client's body, `model` spliced if the engine knows another name.
    pub body: Bytes,
}

impl EngineRequest {
    /// The head for one engine. No allocation beyond the head itself.
    ///
    /// # Errors
    /// A header that cannot be written; not to be expected of those that were read.
    pub fn head(&self, host: &str) -> Result<RequestHeader> {
        let mut head =
            RequestHeader::build(Method::POST, self.target.as_bytes(), Some(self.headers.len() + 2))?;
        head.insert_header(header::HOST, host)?;
        for (name, value) in &self.headers {
            head.append_header(name.clone(), value.clone())?;
        }
        head.insert_header(header::CONTENT_LENGTH, self.body.len())?;
        Ok(head)
    }
}

/// The client's headers less those an engine must not get, plus our request id.
pub fn forwarded_headers(client: &HeaderMap, request_id: &str) -> HeaderMap {
    let named_by_connection: Vec<&str> = client
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .collect();
    let dropped = |name: &HeaderName| {
        DROPPED.contains(&name.as_str())
            || named_by_connection.iter().any(|n| n.eq_ignore_ascii_case(name.as_str()))
    };
    let mut headers = HeaderMap::with_capacity(client.len() + 1);
    for (name, value) in client {
        if !dropped(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    if let Ok(id) = request_id.try_into() {
        headers.insert(HeaderName::from_static(REQUEST_ID), id);
    }
    headers
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn what_belongs_to_the_connection_stays_there() {
        let client = map(&[
            ("connection", "close, X-Custom"),
            ("x-custom", "1"),
            ("transfer-encoding", "chunked"),
            ("content-type", "application/json"),
            ("traceparent", "00-a-b-01"),
        ]);
        let forwarded = forwarded_headers(&client, "id-1");
        let mut names: Vec<_> = forwarded.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "traceparent", "x-request-id"]);
    }

    #[test]
    fn credentials_and_trust_headers_never_reach_an_engine() {
        let client = map(&[
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("x-request-id", "mine"),
            ("x-data-parallel-rank", "3"),
            ("x-session-id", "s"),
            ("x-vllm-priority", "0"),
        ]);
        let forwarded = forwarded_headers(&client, "ours");
        assert_eq!(forwarded.len(), 1);
        assert_eq!(forwarded["x-request-id"], "ours");
    }

    #[test]
    fn the_head_frames_the_body_by_its_length() {
        let request = EngineRequest {
            api: Api::ChatCompletions,
            stream: true,
            request_id: "id-1".into(),
            target: "/v1/chat/completions".into(),
            headers: map(&[("content-type", "application/json")]),
            body: Bytes::from_static(b"{}"),
        };
        let head = request.head("127.0.0.1:1").expect("valid");
        assert_eq!(head.headers["host"], "127.0.0.1:1");
        assert_eq!(head.headers["content-length"], "2");
    }
}
