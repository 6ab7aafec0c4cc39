//! Reading requests: the head by `httparse`, the body by length or by chunks.

use std::{io, ops::Range};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::{Conn, Gone, KEEP_ALIVE_IDLE, MAX_BODY_BYTES};

/// Most header fields, as vLLM sets it for h11.
const MAX_HEADERS: usize = 256;
/// Longest head. vLLM allows 4 MiB; nothing here needs it.
const MAX_HEAD_BYTES: usize = 1 << 20;
/// Longest line that announces a chunk, extensions included.
const MAX_CHUNK_LINE: usize = 4096;
/// Room made at once for a body of known length.
const BODY_STEP: usize = 4 << 20;

/// Why there is no next request.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::engine) enum HeadError {
    /// The peer closed between requests, or idled too long: close quietly.
    Closed,
    /// Not HTTP: answer 400 and close.
    Invalid,
}

/// Why there is no body.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::engine) enum BodyError {
    /// The peer is gone before the end.
    Gone,
    /// Longer than [`MAX_BODY_BYTES`].
    TooLarge,
    /// Chunks that are no chunks.
    Invalid,
}

impl From<Gone> for BodyError {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// A request's head, its bytes kept as they came.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Head {
    bytes: Bytes,
    method: Range<usize>,
    target: Range<usize>,
    fields: Vec<(Range<usize>, Range<usize>)>,
    http_10: bool,
}

impl Head {
    /// Parses a head that `bytes` holds whole.
    fn parse(bytes: Bytes) -> Option<Self> {
        let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut slots);
        if !request.parse(&bytes).ok()?.is_complete() {
            return None;
        }
        let base = bytes.as_ptr().addr();
        let range = |part: &[u8]| {
            let start = part.as_ptr().addr() - base;
            start..start + part.len()
        };
        let fields = request.headers.iter().map(|h| (range(h.name.as_bytes()), range(h.value))).collect();
        let (method, target) = (range(request.method?.as_bytes()), range(request.path?.as_bytes()));
        let http_10 = request.version == Some(0);
        Some(Self { bytes, method, target, fields, http_10 })
    }

    /// `GET`, `POST` and so on.
    pub(in crate::engine) fn method(&self) -> &str {
        self.text(&self.method)
    }

    /// The path without its query.
    pub(in crate::engine) fn path(&self) -> &str {
        let target = self.text(&self.target);
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    /// The value of a query parameter, not unescaped.
    pub(in crate::engine) fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.text(&self.target).split_once('?')?;
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// The first value of a header, if it is UTF-8.
    pub(in crate::engine) fn header(&self, name: &str) -> Option<&str> {
        self.headers().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// All headers in order; values that are not UTF-8 are empty.
    pub(in crate::engine) fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(name, value)| (self.text(name), self.text(value)))
    }

    /// True if the connection may serve another request.
    pub(in crate::engine) fn keep_alive(&self) -> bool {
        let connection = self.header("connection").unwrap_or("");
        let has = |word: &str| connection.split(',').any(|w| w.trim().eq_ignore_ascii_case(word));
        if self.http_10 { has("keep-alive") } else { !has("close") }
    }

    /// True if the body comes in chunks.
    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().ends_with("chunked"))
    }

    fn text(&self, range: &Range<usize>) -> &str {
        self.bytes.get(range.clone()).and_then(|b| std::str::from_utf8(b).ok()).unwrap_or("")
    }
}

impl Conn {
    /// Reads the next head; waits [`KEEP_ALIVE_IDLE`] for it at most.
    ///
    /// # Errors
    /// [`HeadError`].
    pub(in crate::engine) async fn read_head(&mut self) -> Result<Head, HeadError> {
        let mut searched = 0;
        loop {
            // An empty line before a request is allowed.
            while self.inbox.starts_with(b"\r\n") {
                self.inbox.advance(2);
            }
            if let Some(at) = memchr::memmem::find(&self.inbox[searched..], b"\r\n\r\n") {
                // Copied, so that a remembered head does not keep the whole read buffer alive.
                let head = Bytes::copy_from_slice(&self.inbox[..searched + at + 4]);
                self.inbox.advance(head.len());
                return Head::parse(head).ok_or(HeadError::Invalid);
            }
            searched = self.inbox.len().saturating_sub(3);
            if self.inbox.len() > MAX_HEAD_BYTES {
                return Err(HeadError::Invalid);
            }
            let idle = self.inbox.is_empty();
            match tokio::time::timeout(KEEP_ALIVE_IDLE, self.fill()).await {
                Ok(Ok(())) => {}
                Ok(Err(Gone)) if idle => return Err(HeadError::Closed),
                Ok(Err(Gone)) => return Err(HeadError::Invalid),
                Err(_) => return Err(HeadError::Closed),
            }
        }
    }

    /// Reads the body that belongs to `head`.
    ///
    /// # Errors
    /// [`BodyError`]; the connection cannot be used further then.
    pub(in crate::engine) async fn read_body(&mut self, head: &Head) -> Result<Bytes, BodyError> {
        let chunked = head.is_chunked();
        let length = match head.header("content-length").map(|v| v.trim().parse::<u64>()) {
            _ if chunked => None,
            None => return Ok(Bytes::new()),
            Some(Ok(length)) if length > MAX_BODY_BYTES => return Err(BodyError::TooLarge),
            Some(Ok(length)) => Some(usize::try_from(length).map_err(|_| BodyError::TooLarge)?),
            Some(Err(_)) => return Err(BodyError::Invalid),
        };
        let waits = head.header("expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue"));
        if waits && self.inbox.is_empty() {
            self.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.flush().await?;
        }
        match length {
            Some(length) => self.read_exactly(length).await,
            None => self.read_chunks().await,
        }
    }

    async fn read_exactly(&mut self, length: usize) -> Result<Bytes, BodyError> {
        let mut body = self.inbox.split_to(length.min(self.inbox.len()));
        while body.len() < length {
            let left = length - body.len();
            if body.capacity() == body.len() {
                body.reserve(left.min(BODY_STEP));
            }
            let mut window = bytes::BufMut::limit(&mut body, left);
            match self.stream.read_buf(&mut window).await {
                Ok(0) | Err(_) => return Err(BodyError::Gone),
                Ok(_) => {}
            }
        }
        Ok(body.freeze())
    }

    async fn read_chunks(&mut self) -> Result<Bytes, BodyError> {
        let mut body = BytesMut::new();
        loop {
            let line = self.read_line().await?;
            let digits = line.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
            let size = std::str::from_utf8(digits).ok().and_then(|d| usize::from_str_radix(d, 16).ok());
            let size = size.filter(|_| !digits.starts_with(b"+")).ok_or(BodyError::Invalid)?;
            if size == 0 {
                while !self.read_line().await?.is_empty() {}
                return Ok(body.freeze());
            }
            let total = u64::try_from(body.len().saturating_add(size)).unwrap_or(u64::MAX);
            if total > MAX_BODY_BYTES {
                return Err(BodyError::TooLarge);
            }
            let mut left = size;
            while left > 0 {
                if self.inbox.is_empty() {
                    self.fill().await?;
                }
                let take = left.min(self.inbox.len());
                body.extend_from_slice(&self.inbox[..take]);
                self.inbox.advance(take);
                left -= take;
            }
            if !self.read_line().await?.is_empty() {
                return Err(BodyError::Invalid);
            }
        }
    }

    /// One line without its end.
    async fn read_line(&mut self) -> Result<Bytes, BodyError> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.inbox) {
                let line = self.inbox.split_to(end + 1).freeze();
                let line = line.slice(..end);
                return line.strip_suffix(b"\r").map(|l| line.slice_ref(l)).ok_or(BodyError::Invalid);
            }
            if self.inbox.len() > MAX_CHUNK_LINE {
                return Err(BodyError::Invalid);
            }
            self.fill().await?;
        }
    }

    /// Reads something into the inbox.
    async fn fill(&mut self) -> Result<(), Gone> {
        if self.inbox.capacity() - self.inbox.len() < 1024 {
            self.inbox.reserve(16 << 10);
        }
        loop {
            match self.stream.read_buf(&mut self.inbox).await {
                Ok(0) => return Err(Gone),
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Gone),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Option<Head> {
        Head::parse(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn finds_its_parts() {
        let head = head("POST /sim/x?limit=5&id=a HTTP/1.1\r\nHost: h\r\nX-Request-Id: abc\r\n\r\n").unwrap();
        assert_eq!((head.method(), head.path(), head.query("limit")), ("POST", "/sim/x", Some("5")));
        assert_eq!(head.header("x-request-id"), Some("abc"));
        assert!(head.keep_alive());
    }

    #[test]
    fn keep_alive_follows_version_and_header() {
        for (text, wanted) in [
            ("GET / HTTP/1.1\r\nconnection: Close\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", true),
        ] {
            assert_eq!(head(text).unwrap().keep_alive(), wanted, "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_head() {
        for text in
            ["HELLO\r\n\r\n", "GET /\r\n\r\n", "GET / HTTP/1.1\r\nbad header\r\n\r\n", "\u{0}\r\n\r\n"]
        {
            assert!(head(text).is_none(), "{text:?}");
        }
    }
}
