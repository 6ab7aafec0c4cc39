//! The request as an engine gets it: our path, the client's body byte for byte, and the headers of [`super::headers`].

use bytes::Bytes;
use http::{HeaderMap, Method, header};
use pingora_error::Result;
use pingora_http::RequestHeader;

use crate::{openai::Api, resume::chunks::Wishes};

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
    /// What its stream's tracker is to know; `None` for a stream that nobody will continue.
    pub resume: Option<Wishes>,
    /// The body that asks for the answer in one piece, where `body` asks for a stream in its place.
    pub whole: Option<Bytes>,
}

impl EngineRequest {
    /// Whether it asks the engine to change to a WebSocket.
    pub fn upgrades(&self) -> bool {
        self.api == Api::Realtime
    }

    /// The head for one engine. No allocation beyond the head itself.
    ///
    /// # Errors
    /// A header that cannot be written; not to be expected of those that were read.
    pub fn head(&self, host: &str) -> Result<RequestHeader> {
        let method = if self.upgrades() { Method::GET } else { Method::POST };
        let mut head = RequestHeader::build(method, self.target.as_bytes(), Some(self.headers.len() + 3))?;
        head.insert_header(header::HOST, host)?;
        for (name, value) in &self.headers {
            head.append_header(name.clone(), value.clone())?;
        }
        if self.upgrades() {
            head.insert_header(header::CONNECTION, "Upgrade")?;
            head.insert_header(header::UPGRADE, "websocket")?;
        } else {
            head.insert_header(header::CONTENT_LENGTH, self.body.len())?;
        }
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(api: Api) -> EngineRequest {
        EngineRequest {
            api,
            stream: true,
            request_id: "id-1".into(),
            target: "/v1/x".into(),
            headers: HeaderMap::from_iter([(
                header::CONTENT_TYPE,
                http::HeaderValue::from_static("application/json"),
            )]),
            body: Bytes::from_static(b"{}"),
            resume: None,
            whole: None,
        }
    }

    #[test]
    fn the_head_frames_the_body_by_its_length() {
        let head = request(Api::ChatCompletions).head("127.0.0.1:1").expect("valid");
        assert_eq!((&head.method, head.raw_path()), (&Method::POST, &b"/v1/x"[..]));
        assert_eq!(head.headers["host"], "127.0.0.1:1");
        assert_eq!(head.headers["content-length"], "2");
        assert!(!head.headers.contains_key("upgrade"));
    }

    #[test]
    fn a_websocket_is_asked_for_without_a_body() {
        let head = request(Api::Realtime).head("127.0.0.1:1").expect("valid");
        assert_eq!(head.method, Method::GET);
        assert_eq!(
            (&head.headers["connection"], &head.headers["upgrade"]),
            (&"Upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert!(!head.headers.contains_key("content-length"));
    }
}
