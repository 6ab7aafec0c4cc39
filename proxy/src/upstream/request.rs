//! The request as an engine gets it: our path, the client's body byte for byte, and the headers of [`super::headers`].

use std::fmt::Write;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;

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

    /// The head for one engine, as it is written to it, in one allocation.
    ///
    /// None of its parts can end a line and begin another: names and values of fields were checked when they became ones, the
    /// target is part of a parsed URL or of our own making, and `host` could be resolved to an address.
    pub fn head(&self, host: &str) -> BytesMut {
        const FRAMING_BYTES: usize = 96;
        let fields = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
        let length = self.target.len() + host.len() + fields.sum::<usize>() + FRAMING_BYTES;
        let mut head = BytesMut::with_capacity(length);
        head.put_slice(if self.upgrades() { b"GET " } else { b"POST " });
        head.put_slice(self.target.as_bytes());
        head.put_slice(b" HTTP/1.1\r\nhost: ");
        head.put_slice(host.as_bytes());
        for (name, value) in &self.headers {
            head.put_slice(b"\r\n");
            head.put_slice(name.as_str().as_bytes());
            head.put_slice(b": ");
            head.put_slice(value.as_bytes());
        }
        if self.upgrades() {
            head.put_slice(b"\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n");
        } else {
            let written = write!(head, "\r\ncontent-length: {}\r\n\r\n", self.body.len());
            debug_assert!(written.is_ok(), "writing to memory cannot fail");
        }
        head
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
                http::header::CONTENT_TYPE,
                http::HeaderValue::from_static("application/json"),
            )]),
            body: Bytes::from_static(b"{}"),
            resume: None,
            whole: None,
        }
    }

    fn head(api: Api) -> String {
        let head = request(api).head("127.0.0.1:1");
        assert!(head.capacity() < head.len() + 100, "no second allocation, and none too large");
        String::from_utf8(head.to_vec()).expect("text")
    }

    #[test]
    fn the_head_frames_the_body_by_its_length() {
        assert_eq!(
            head(Api::ChatCompletions),
            "POST /v1/x HTTP/1.1\r\nhost: 127.0.0.1:1\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
        );
    }

    #[test]
    fn a_websocket_is_asked_for_without_a_body() {
        assert_eq!(
            head(Api::Realtime),
            "GET /v1/x HTTP/1.1\r\nhost: 127.0.0.1:1\r\ncontent-type: application/json\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
        );
    }
}
