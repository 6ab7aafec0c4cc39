//! A client's connection as pingora reads and writes it: TCP, or TLS over TCP.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use bytes::{Buf, BufMut, BytesMut};
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest,
    UniqueID, UniqueIDType, raw_connect::ProxyDigest, tls::SslDigest,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::server::TlsStream;

use super::HeadClock;

/// Small writes are joined up to this many bytes, until they are flushed or a larger one follows and takes them along.
const WRITE_BUFFER_BYTES: usize = 4_096;

/// Slices written at once, what waited included.
const MOST_SLICES: usize = 8;

/// Bytes read at most while looking for the protocol: a usual head.
const FIRST_READ_BYTES: usize = 4_096;

/// How long a client may take to let us say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);

/// What an HTTP/2 client begins with (RFC 9113, section 3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is under HTTP.
#[derive(Debug)]
pub enum Transport {
    /// Cleartext.
    Tcp(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

macro_rules! either {
    ($transport:expr, $stream:ident => $call:expr) => {
        match $transport {
            Transport::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Transport::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), stream => stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => stream.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    stream: Transport,
    /// Small writes that have not gone out yet. Given up with each flush: an idle connection, or one whose events pass it by,
    /// holds no memory for it.
    pending: BytesMut,
    /// Bytes that were read to learn the protocol, and are read again.
    first: BytesMut,
    alpn: Option<ALPN>,
    digest: Option<Arc<SslDigest>>,
    clock: Arc<HeadClock>,
}

/// What a connection turned out to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1, as far as can be told from the first bytes.
    Http1,
    /// HTTP/2.
    Http2,
    /// Nothing: it was closed before that could be told.
    Closed,
}

impl Connection {
    /// A connection whose protocol is not known yet. `clock` hears of every read.
    pub fn new(transport: Transport, clock: Arc<HeadClock>) -> Self {
        let digest = match &transport {
            Transport::Tcp(_) => None,
            Transport::Tls(stream) => Some(Arc::new(ssl_digest(stream))),
        };
        Self {
            stream: transport,
            pending: BytesMut::new(),
            first: BytesMut::new(),
            alpn: None,
            digest,
            clock,
        }
    }

    /// Reads until it is clear what the client speaks; `http2` says whether it may be HTTP/2. What was read is read again
    /// later. Without a deadline of its own.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn protocol(&mut self, http2: bool) -> io::Result<Protocol> {
        let negotiated = match &self.stream {
            Transport::Tcp(_) => None,
            Transport::Tls(stream) => stream.get_ref().1.alpn_protocol().map(|alpn| alpn == b"h2"),
        };
        // Under TLS, ALPN decides (RFC 9113, section 3.2); a client that did not use it speaks HTTP/1.
        let http2 = http2 && negotiated.unwrap_or(self.digest.is_none());
        self.first.reserve(FIRST_READ_BYTES);
        loop {
            if let Some(protocol) = told_by(&self.first, http2) {
                self.alpn = (protocol == Protocol::Http2).then_some(ALPN::H2);
                return Ok(protocol);
            }
            let mut space = (&mut self.first).limit(FIRST_READ_BYTES);
            if self.stream.read_buf(&mut space).await? == 0 {
                return Ok(Protocol::Closed);
            }
        }
    }
}

/// What `bytes`, the first of a connection, say; `None` while it needs more.
fn told_by(bytes: &[u8], http2: bool) -> Option<Protocol> {
    let common = bytes.len().min(H2_PREFACE.len());
    if bytes.is_empty() {
        None
    } else if !http2 || bytes[..common] != H2_PREFACE[..common] {
        Some(Protocol::Http1)
    } else if common == H2_PREFACE.len() {
        Some(Protocol::Http2)
    } else {
        None
    }
}

fn ssl_digest(stream: &TlsStream<TcpStream>) -> SslDigest {
    let session = stream.get_ref().1;
    let cipher = session.negotiated_cipher_suite().map_or("", |suite| suite.suite().as_str().unwrap_or(""));
    let version = session.protocol_version().and_then(|version| version.as_str()).unwrap_or("");
    SslDigest::new(cipher, version, None, None, Vec::new())
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.first.has_remaining() {
            let length = this.first.len().min(buf.remaining());
            buf.put_slice(&this.first[..length]);
            this.first.advance(length);
            if this.first.is_empty() {
                this.first = BytesMut::new(); // gives the memory back
            }
            this.clock.bytes_came();
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        this.clock.bytes_came();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.pending.has_remaining() {
            let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &this.pending))?;
            this.went_out(written)?;
        }
        this.pending = BytesMut::new();
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length: usize = bufs.iter().map(|buf| buf.len()).sum();
        loop {
            if this.pending.len() + length <= WRITE_BUFFER_BYTES {
                bufs.iter().for_each(|buf| this.pending.put_slice(buf));
                return Poll::Ready(Ok(length));
            }
            if this.pending.is_empty() {
                return Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
            }
            // What waits and what comes, a head and its body, in one write.
            let (ours, mut all) = (this.pending.len(), [io::IoSlice::new(&[]); MOST_SLICES]);
            all[0] = io::IoSlice::new(&this.pending);
            let taken = bufs.len().min(MOST_SLICES - 1);
            all[1..=taken].copy_from_slice(&bufs[..taken]);
            let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, &all[..=taken]))?;
            this.went_out(written.min(ours))?;
            if written > ours {
                return Poll::Ready(Ok(written - ours));
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

impl Connection {
    /// Takes note that so much of what waited has been written.
    fn went_out(&mut self, written: usize) -> io::Result<()> {
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.pending.advance(written);
        Ok(())
    }

    /// The socket, where bytes may be written past this connection: it is in clear, and nothing waits to be written before.
    pub fn clear_socket(&self) -> Option<&TcpStream> {
        match &self.stream {
            Transport::Tcp(socket) if self.pending.is_empty() => Some(socket),
            _ => None,
        }
    }
}

#[async_trait]
impl Shutdown for Connection {
    async fn shutdown(&mut self) {
        // The client may have closed it already. Under TLS a farewell has to be written, and nobody may take it.
        drop(timeout(FAREWELL, AsyncWriteExt::shutdown(&mut self.stream)).await);
    }
}

impl UniqueID for Connection {
    fn id(&self) -> UniqueIDType {
        self.as_raw_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.tcp().as_raw_fd()
    }
}

impl Ssl for Connection {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.digest.clone()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.alpn.clone()
    }
}

/// The protocol is found out by [`Connection::protocol`]; pingora has no reason to peek.
impl Peek for Connection {}

// What pingora would log with. Who the client is stands in `downstream::peer::Peer`.
impl GetTimingDigest for Connection {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Connection {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Connection {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell_http2_from_http1_as_early_as_they_can() {
        assert_eq!(told_by(b"", true), None);
        for end in 1..H2_PREFACE.len() {
            assert_eq!(told_by(&H2_PREFACE[..end], true), None, "{end}");
            assert_eq!(told_by(&H2_PREFACE[..end], false), Some(Protocol::Http1), "{end}");
            let mut other = H2_PREFACE[..end].to_vec();
            other[end - 1] ^= 1;
            assert_eq!(told_by(&other, true), Some(Protocol::Http1), "{end}");
        }
        assert_eq!(told_by(H2_PREFACE, true), Some(Protocol::Http2));
        assert_eq!(told_by(&[H2_PREFACE, b"more"].concat(), true), Some(Protocol::Http2));
        assert_eq!(told_by(b"G", true), Some(Protocol::Http1));
        assert_eq!(told_by(b"POST /v1", true), Some(Protocol::Http1));
    }
}
