//! HTTP/1.1 as it is spoken with engines: one connection, one request at a time, in clear.
//!
//! Our own because each event of each stream comes through here, and engines are asked in one way only. The rules are in
//! [`head`] and [`body`], pure; what waits for its next request is in [`pool`]. What is here reads and writes:
//!
//! - A request is one write, head and body together, the body from where it lies.
//! - A read takes all that is there into the connection's one buffer, and [`Connection::poll_body`] gives out all payload that
//!   came with it as a part of that buffer: no copy, no allocation. The buffer is used again once that part is dropped. A read
//!   that does not fill it is not followed by another: the socket has been emptied, and wakes us when there is more.
//! - The buffer begins small, since a proxy holds thousands of streams that say a few hundred bytes at a time; it doubles with
//!   each read that fills it, and shrinks again when reads have stayed small. A connection in the pool has none.
//!
//! All calls may be given up at any time, and taken up again but for [`Connection::send`]. Dropping a connection closes it.

pub mod body;
pub mod head;
pub mod pool;

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};

use self::{
    body::{BadBody, Decoder, Framing},
    head::{BadHead, Head},
};

/// The buffer of a connection at first: an event of a stream fits in several times, and thousands of streams have one each.
const LEAST_ROOM: usize = 2 << 10;

/// The largest buffer.
const MOST_ROOM: usize = 64 << 10;

/// Small reads after which a buffer that has grown is given up.
const QUIET_READS: u32 = 32;

/// A connection to an engine.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    /// Read, and not yet looked at or given out.
    buffer: BytesMut,
    /// How large it should be.
    room: usize,
    /// Reads in a row that would have fitted into a much smaller one.
    quiet: u32,
    /// Whether the last read filled it: there may be more.
    filled: bool,
    body: Decoder,
    keeps_alive: bool,
    /// Whether anything of the answer has come.
    begun: bool,
}

/// Why no head came.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The connection was lost. `begun`: some bytes of an answer had come.
    #[error("{error}")]
    Lost {
        /// What the system said.
        error: io::Error,
        /// Whether anything of the answer had come.
        begun: bool,
    },
    /// What came is no answer.
    #[error(transparent)]
    Bad(#[from] BadHead),
}

/// Why a body does not go on.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke.
    #[error(transparent)]
    Lost(#[from] io::Error),
    /// What came is no body, or not all of one.
    #[error(transparent)]
    Bad(#[from] BadBody),
}

impl Connection {
    /// A new connection, made within `patience`.
    ///
    /// # Errors
    /// What the system says, or `TimedOut`.
    pub async fn connect(address: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = timeout(patience, TcpStream::connect(address))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("not within {patience:?}")))??;
        // A request is one write; whatever is left of it should not wait for the engine's acknowledgement.
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            address,
            buffer: BytesMut::new(),
            room: LEAST_ROOM,
            quiet: 0,
            filled: false,
            body: Decoder::new(Framing::Length(0)),
            keeps_alive: false,
            begun: false,
        })
    }

    /// Whose it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a request. After an error, or if it was given up, the connection is of no use.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.begun = false;
        let mut parts = [IoSlice::new(head), IoSlice::new(body)];
        let mut left = &mut parts[..];
        IoSlice::advance_slices(&mut left, 0); // parts that are empty
        while !left.is_empty() {
            match self.stream.try_write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Waits for the head of the answer and makes of it what `take` makes of it. Heads of interim answers are passed over.
    ///
    /// # Errors
    /// [`HeadError`].
    pub async fn read_head<T>(
        &mut self,
        take: impl Fn(Head<'_>) -> Result<T, BadHead>,
    ) -> Result<T, HeadError> {
        loop {
            // Nothing can be said of a head before the end of a line: small pieces cost no more than large ones.
            while let Some((meaning, taken)) = head::parse(&self.buffer, |head| match head.is_interim() {
                true => Ok(None),
                false => take(head).map(Some),
            })? {
                self.buffer.advance(meaning.length);
                let Some(taken) = taken else { continue };
                self.body = Decoder::new(meaning.framing);
                self.keeps_alive = meaning.keeps_alive;
                if let Some(left) = self.body.left() {
                    let left = usize::try_from(left).unwrap_or(MOST_ROOM).saturating_sub(self.buffer.len());
                    // A byte more, so that the last read does not fill it.
                    self.room = left.saturating_add(1).clamp(self.room, MOST_ROOM);
                }
                return Ok(taken);
            }
            loop {
                let known = self.buffer.len();
                let read = poll_fn(|cx| self.poll_fill(cx)).await;
                match read {
                    Ok(0) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                    Ok(_) => self.begun = true,
                    Err(e) => return Err(self.lost(e)),
                }
                let new = self.buffer.get(known..).unwrap_or_default();
                if memchr::memchr(b'\n', new).is_some() || self.buffer.len() >= head::MOST_BYTES {
                    break;
                }
            }
        }
    }

    fn lost(&self, error: io::Error) -> HeadError {
        HeadError::Lost { error, begun: self.begun }
    }

    /// All payload of the body that is there; `None` once the body has ended in order. After an error the same again.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyError>> {
        loop {
            if !self.buffer.is_empty() {
                let payload = self.body.decode(&mut self.buffer)?;
                if !payload.is_empty() {
                    return Poll::Ready(Ok(Some(payload)));
                }
            }
            if self.body.is_ended() {
                return Poll::Ready(Ok(None));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                self.body.close()?;
            }
        }
    }

    /// Waits for [`Self::poll_body`].
    ///
    /// # Errors
    /// [`BodyError`].
    pub async fn read_body(&mut self) -> Result<Option<Bytes>, BodyError> {
        poll_fn(|cx| self.poll_body(cx)).await
    }

    /// Whether all of the body has been given out; known with its last bytes.
    pub fn has_ended(&self) -> bool {
        self.body.is_ended()
    }

    /// Whether [`Self::poll_body`] may have something without waiting: where not, asking is in vain.
    pub fn has_more(&self) -> bool {
        self.filled || !self.buffer.is_empty() || self.body.is_ended()
    }

    /// Bytes of the body that are still to come, where its head told.
    pub fn body_left(&self) -> Option<u64> {
        self.body.left()
    }

    /// Whether the answer has ended in order and the engine waits for another request.
    pub fn is_reusable(&self) -> bool {
        self.keeps_alive && self.body.leaves_connection() && self.buffer.is_empty()
    }

    /// Gives its buffer up until it is used again.
    pub fn rest(&mut self) {
        self.buffer = BytesMut::new();
        self.room = LEAST_ROOM;
        self.quiet = 0;
    }

    /// Whether nothing has happened on it while it was not used.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0];
        self.stream.try_read(&mut byte).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    }

    /// Registers it with this thread's runtime.
    ///
    /// # Errors
    /// The system's, after which it is closed.
    pub fn move_here(self) -> io::Result<Self> {
        let stream = TcpStream::from_std(self.stream.into_std()?)?;
        Ok(Self { stream, ..self })
    }

    /// The connection itself, once it speaks another protocol, and what has been read of that.
    pub fn into_parts(self) -> (TcpStream, Bytes) {
        (self.stream, self.buffer.freeze())
    }

    /// Reads what is there, behind what the buffer has; 0 at the connection's end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let held = self.buffer.len();
        if held == 0 && self.quiet >= QUIET_READS {
            self.rest();
        }
        let spare = self.buffer.capacity() - held;
        if held == 0 || spare < self.room / 2 {
            // With nothing held this goes back to the buffer's beginning, if nobody holds a part of it.
            self.buffer.reserve(self.room.saturating_sub(held).max(LEAST_ROOM / 2));
        }
        let spare = self.buffer.capacity() - held;
        self.filled = false;
        let read = ready!(pin!(self.stream.read_buf(&mut self.buffer)).poll(cx))?;
        self.filled = read == spare;
        if self.filled {
            self.room = (self.room * 2).min(MOST_ROOM);
        }
        self.quiet = if read * 4 < self.room && self.room > LEAST_ROOM { self.quiet + 1 } else { 0 };
        Poll::Ready(Ok(read))
    }
}

#[cfg(test)]
mod tests;
