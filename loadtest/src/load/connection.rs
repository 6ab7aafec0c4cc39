//! Connections: opening them, writing a request and reading what comes.
//!
//! All streams of a thread read into one buffer, and what it holds is looked at before anything else is read: a stream that
//! waits has no buffer of its own.
//!
//! *Cost* of a read: one system call (a short read tells tokio that there is no more), one look at the clock, one at a timer
//! that is set anew only when it fires.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::{Instant, Sleep},
};
use tokio_rustls::client::TlsStream;

use super::{
    answer::Failure,
    http1::{self, Framing, Garbled, Head},
    lane::Lane,
    stats::ns,
};
use crate::clock::now_ns;

/// Addresses of this machine from which to connect when the ports of the first run out: 127.0.0.2 to this.
const LAST_SOURCE: u8 = 9;

impl From<Garbled> for Failure {
    fn from(garbled: Garbled) -> Self {
        Self::new("cut", garbled)
    }
}

/// A connection, whatever it is wrapped in.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Opens one.
    pub(super) async fn open(lane: &Lane) -> Result<Self, Failure> {
        let failed = |e: io::Error| Failure::new("connect", e);
        let opened = tokio::time::timeout(lane.idle, async {
            let stream = connect(&lane.plan.addresses).await?;
            stream.set_nodelay(true)?;
            let Some(tls) = &lane.plan.tls else { return Ok(Self::Plain(stream)) };
            let name = ServerName::try_from(lane.plan.target.host.clone()).map_err(io::Error::other)?;
            let stream = tls.connect(name, stream).await?;
            if lane.plan.options.http2 && stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(io::Error::other("the server does not offer HTTP/2 over TLS"));
            }
            Ok(Self::Tls(Box::new(stream)))
        });
        opened.await.map_err(|_| Failure::new("timeout", "no connection"))?.map_err(failed)
    }
}

async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let refused = match TcpStream::connect(addresses).await {
        Ok(stream) => return Ok(stream),
        Err(e) => e,
    };
    let Some(to) = addresses.first().filter(|to| to.is_ipv4() && to.ip().is_loopback()) else {
        return Err(refused);
    };
    // Each pair of addresses has ports of its own, and all of 127.0.0.0/8 is this machine.
    if refused.kind() != io::ErrorKind::AddrNotAvailable {
        return Err(refused);
    }
    for last in 2..=LAST_SOURCE {
        let socket = TcpSocket::new_v4()?;
        let from = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0));
        if socket.bind(from).is_ok()
            && let Ok(stream) = socket.connect(*to).await
        {
            return Ok(stream);
        }
    }
    Err(refused)
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// How long a request waits for the next byte. The timer is set once and looked at only when it fires.
pub(super) struct Patience {
    timer: Pin<Box<Sleep>>,
    idle: Duration,
    heard_ns: u64,
}

impl Patience {
    pub(super) fn new(idle: Duration) -> Self {
        Self { timer: Box::pin(tokio::time::sleep(idle)), idle, heard_ns: now_ns() }
    }

    /// Something came.
    pub(super) const fn heard(&mut self, now_ns: u64) {
        self.heard_ns = now_ns;
    }

    /// Fails once nothing came for too long.
    pub(super) fn poll<T>(&mut self, cx: &mut Context<'_>, waiting_for: &str) -> Poll<Result<T, Failure>> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let left = ns(self.idle).saturating_sub(now_ns().saturating_sub(self.heard_ns));
            if left == 0 {
                return Poll::Ready(Err(Failure::new("timeout", format!("no {waiting_for}"))));
            }
            self.timer.as_mut().reset(Instant::now() + Duration::from_nanos(left));
        }
        Poll::Pending
    }
}

/// A connection that speaks HTTP/1.1.
#[derive(Debug)]
pub(super) struct Http1 {
    stream: Stream,
    /// What was read beyond what was needed.
    inbox: Vec<u8>,
}

impl Http1 {
    pub(super) const fn new(stream: Stream) -> Self {
        Self { stream, inbox: Vec::new() }
    }

    /// Whether a request may be sent: nobody has closed it, and nothing lies there unasked.
    pub(super) fn is_idle(&mut self) -> bool {
        let (mut byte, mut cx) = ([0; 1], Context::from_waker(Waker::noop()));
        let read = Pin::new(&mut self.stream).poll_read(&mut cx, &mut ReadBuf::new(&mut byte));
        self.inbox.is_empty() && read.is_pending()
    }

    /// Writes a request. An answer that comes before its end ends it.
    pub(super) async fn write(
        &mut self,
        lane: &Lane,
        request: &[u8],
        patience: &mut Patience,
    ) -> Result<(), Failure> {
        let mut written = 0;
        std::future::poll_fn(|cx| {
            while written < request.len() {
                let rest = request.get(written..).unwrap_or_default();
                match Pin::new(&mut self.stream).poll_write(cx, rest) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(Failure::new("send", "closed"))),
                    Poll::Ready(Ok(bytes)) => {
                        written += bytes;
                        patience.heard(now_ns());
                    }
                    // Who closes without reading all may have said why.
                    Poll::Ready(Err(e)) => match self.poll_inbox(lane, cx) {
                        Poll::Ready(Ok(true)) => return Poll::Ready(Ok(())),
                        _ => return Poll::Ready(Err(Failure::new("send", e))),
                    },
                    Poll::Pending => {
                        return match self.poll_inbox(lane, cx) {
                            Poll::Ready(Ok(true)) => Poll::Ready(Ok(())),
                            Poll::Ready(Ok(false)) => Poll::Ready(Err(Failure::new("send", "closed"))),
                            Poll::Ready(Err(e)) => Poll::Ready(Err(Failure::new("send", e))),
                            Poll::Pending => patience.poll(cx, "progress of the request"),
                        };
                    }
                }
            }
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(flushed) => Poll::Ready(flushed.map_err(|e| Failure::new("send", e))),
                Poll::Pending => patience.poll(cx, "progress of the request"),
            }
        })
        .await
    }

    /// Reads into the inbox; false at the end.
    fn poll_inbox(&mut self, lane: &Lane, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut shared = lane.buffer.borrow_mut();
        let mut buffer = ReadBuf::new(&mut shared);
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        self.inbox.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(!buffer.filled().is_empty()))
    }

    /// Reads the head of the response; what follows it stays in the inbox.
    pub(super) async fn head(&mut self, lane: &Lane, patience: &mut Patience) -> Result<Head, Failure> {
        loop {
            while let Some(head) = http1::head(&self.inbox).map_err(|e| Failure::new("send", e))? {
                self.inbox.drain(..head.length);
                if !(100..200).contains(&head.status) {
                    return Ok(head);
                }
            }
            let more = std::future::poll_fn(|cx| match self.poll_inbox(lane, cx) {
                Poll::Ready(read) => Poll::Ready(read.map_err(|e| Failure::new("send", e))),
                Poll::Pending => patience.poll(cx, "response header"),
            });
            if !more.await? {
                return Err(Failure::new("send", "closed without an answer"));
            }
            patience.heard(now_ns());
        }
    }

    /// Reads the body to its end and gives `take` its bytes with the time at which they were there; whether the connection
    /// may be used again, as far as it goes.
    pub(super) async fn body(
        &mut self,
        lane: &Lane,
        mut framing: Framing,
        patience: &mut Patience,
        mut take: impl FnMut(&[u8], u64) -> Result<(), Failure>,
    ) -> Result<bool, Failure> {
        let inbox = std::mem::take(&mut self.inbox);
        let mut left = 0;
        if !inbox.is_empty() {
            let now_ns = now_ns();
            left = framing.feed(&inbox, |bytes| take(bytes, now_ns))?;
        }
        while !framing.is_over() {
            let read = std::future::poll_fn(|cx| {
                let mut shared = lane.buffer.borrow_mut();
                let mut buffer = ReadBuf::new(&mut shared);
                match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                    Poll::Pending => patience.poll(cx, "event"),
                    Poll::Ready(Err(e)) => Poll::Ready(Err(Failure::new("cut", e))),
                    Poll::Ready(Ok(())) if buffer.filled().is_empty() => Poll::Ready(Ok(None)),
                    Poll::Ready(Ok(())) => {
                        let now_ns = now_ns();
                        patience.heard(now_ns);
                        let fed = framing.feed(buffer.filled(), |bytes| take(bytes, now_ns));
                        Poll::Ready(fed.map(Some))
                    }
                }
            });
            match read.await? {
                Some(behind) => left = behind,
                None if framing.may_close() => return Ok(false),
                None => return Err(Failure::new("cut", "closed before the end of the body")),
            }
        }
        Ok(left == 0)
    }
}
