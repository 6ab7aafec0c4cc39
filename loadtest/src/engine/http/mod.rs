//! HTTP/1.1 as uvicorn speaks it, written by hand over one TCP stream.
//!
//! Why not hyper: the faults are about bytes (a chunk that is no chunk, an event cut at byte b, a reset instead of an
//! end), and the price of an event is one `write` whose size and moment the simulator must choose; hyper merges frames
//! and owns the socket. Heads are parsed by `httparse`, the same parser.
//!
//! Lower-case header names, `date` and `server: uvicorn` first, keep-alive with an idle time of five seconds,
//! `Expect: 100-continue`, chunked bodies both ways. A peer that closes or half-closes is gone, as for uvicorn.
//! Absent: HTTP/2, TLS, trailers, a timeout within a request body (uvicorn has none).

mod request;

use std::{
    cell::RefCell,
    io,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use tokio::net::TcpStream;

pub(super) use self::request::{BodyError, Head, HeadError};

/// Idle time after which uvicorn closes a connection.
pub(super) const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(5);
/// Longest request body.
pub(super) const MAX_BODY_BYTES: u64 = 64 << 20;
/// Pipelined bytes taken while a response is being written.
const MAX_PIPELINED_BYTES: usize = 64 << 10;

/// The peer is gone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    stream: TcpStream,
    inbox: BytesMut,
    /// Bytes to send; [`Conn::flush`] empties it.
    pub(super) out: Vec<u8>,
    sent: usize,
}

/// A whole response.
#[derive(Debug)]
pub(super) struct Response {
    /// HTTP status.
    pub(super) status: u16,
    /// Value of content-type; empty = none.
    pub(super) content_type: &'static str,
    /// More headers, each a whole line with its end.
    pub(super) headers: String,
    /// The body.
    pub(super) body: Vec<u8>,
}

impl Response {
    /// JSON with a status.
    pub(super) fn json(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, content_type: "application/json", headers: String::new(), body: body.into() }
    }

    /// Plain text with a status.
    pub(super) fn text(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", headers: String::new(), body: body.into() }
    }

    /// An empty 200.
    pub(super) const fn empty() -> Self {
        Self { status: 200, content_type: "", headers: String::new(), body: Vec::new() }
    }
}

impl Conn {
    /// Takes over an accepted stream.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, inbox: BytesMut::new(), out: Vec::new(), sent: 0 }
    }

    /// Appends a whole response to `out`.
    pub(super) fn respond(&mut self, response: &Response, keep_alive: bool) {
        let length = response.body.len();
        self.head(response.status, response.content_type, &response.headers, keep_alive, Some(length));
        self.out.extend_from_slice(&response.body);
    }

    /// Appends the head of a chunked response to `out`.
    pub(super) fn begin_stream(&mut self, headers: &str) {
        self.head(200, "text/event-stream; charset=utf-8", headers, true, None);
    }

    /// Appends a head: a length, or chunked.
    pub(super) fn head(
        &mut self,
        status: u16,
        content_type: &str,
        headers: &str,
        keep_alive: bool,
        length: Option<usize>,
    ) {
        let reason = http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or("");
        let head = &mut self.out;
        head.extend_from_slice(b"HTTP/1.1 ");
        push_decimal(head, u64::from(status));
        head.push(b' ');
        head.extend_from_slice(reason.as_bytes());
        head.extend_from_slice(b"\r\ndate: ");
        push_date(head);
        head.extend_from_slice(b"\r\nserver: uvicorn\r\n");
        match length {
            Some(length) => {
                head.extend_from_slice(b"content-length: ");
                push_decimal(head, u64::try_from(length).unwrap_or(u64::MAX));
            }
            None => head.extend_from_slice(b"transfer-encoding: chunked"),
        }
        if !content_type.is_empty() {
            head.extend_from_slice(b"\r\ncontent-type: ");
            head.extend_from_slice(content_type.as_bytes());
        }
        head.extend_from_slice(b"\r\nvary: Origin\r\n");
        head.extend_from_slice(headers.as_bytes());
        if !keep_alive {
            head.extend_from_slice(b"connection: close\r\n");
        }
        head.extend_from_slice(b"\r\n");
    }

    /// Sends all of `out`.
    ///
    /// # Errors
    /// [`Gone`] if the peer closed, even while nothing can be written.
    pub(super) async fn flush(&mut self) -> Result<(), Gone> {
        // Most writes fit the socket's buffer at once: no future, no registration.
        if self.write_some()? {
            return Ok(());
        }
        std::future::poll_fn(|cx| {
            loop {
                if self.poll_gone(cx).is_ready() || ready!(self.stream.poll_write_ready(cx)).is_err() {
                    return Poll::Ready(Err(Gone));
                }
                match self.write_some() {
                    Ok(true) => return Poll::Ready(Ok(())),
                    Ok(false) => {}
                    Err(gone) => return Poll::Ready(Err(gone)),
                }
            }
        })
        .await
    }

    /// Writes what fits now; true if that was all.
    fn write_some(&mut self) -> Result<bool, Gone> {
        while self.sent < self.out.len() {
            match self.stream.try_write(&self.out[self.sent..]) {
                Ok(0) => return Err(Gone),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Gone),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Ready when the peer has closed. Bytes it sends meanwhile are kept for the next request.
    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.inbox.len() < MAX_PIPELINED_BYTES {
            if ready!(self.stream.poll_read_ready(cx)).is_err() {
                return Poll::Ready(());
            }
            self.inbox.reserve(1024);
            match self.stream.try_read_buf(&mut self.inbox) {
                Ok(0) => return Poll::Ready(()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Returns when the peer has closed.
    pub(super) async fn gone(&mut self) {
        std::future::poll_fn(|cx| self.poll_gone(cx)).await;
    }

    /// The stream beneath, and what has been read from it beyond the request: for a protocol that takes over.
    pub(super) fn raw(&mut self) -> (&mut TcpStream, Vec<u8>) {
        (&mut self.stream, self.inbox.split().to_vec())
    }

    /// Makes the coming drop of the connection a TCP reset. What is in `out` is not sent.
    pub(super) fn reset(&mut self) {
        self.out.clear();
        self.sent = 0;
        if let Err(e) = self.stream.set_zero_linger() {
            super::log(&format!("cannot arrange a reset: {e}"));
        }
    }
}

/// Appends `data` as one chunk of a chunked body.
pub(super) fn push_chunk(out: &mut Vec<u8>, data: &[u8]) {
    push_chunk_size(out, data.len());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// Appends the line that announces a chunk of `size` bytes.
pub(super) fn push_chunk_size(out: &mut Vec<u8>, size: usize) {
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[size >> (digit * 4) & 15]);
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends a decimal number.
pub(super) fn push_decimal(out: &mut Vec<u8>, number: u64) {
    if number >= 10 {
        push_decimal(out, number / 10);
    }
    out.push(b"0123456789"[(number % 10) as usize]);
}

/// Appends the time now, rendered once a second.
fn push_date(out: &mut Vec<u8>) {
    thread_local! {
        static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    DATE.with_borrow_mut(|(rendered, text)| {
        if *rendered != second || text.is_empty() {
            *text = httpdate::fmt_http_date(now);
            *rendered = second;
        }
        out.extend_from_slice(text.as_bytes());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_chunks() {
        for (size, wanted) in [(0, "0"), (9, "9"), (16, "10"), (180, "b4"), (4096, "1000")] {
            let mut out = Vec::new();
            push_chunk_size(&mut out, size);
            assert_eq!(out, format!("{wanted}\r\n").into_bytes());
        }
        let mut out = Vec::new();
        push_decimal(&mut out, 0);
        push_decimal(&mut out, 1203);
        push_chunk(&mut out, b"ab");
        assert_eq!(out, b"012032\r\nab\r\n");
    }
}
