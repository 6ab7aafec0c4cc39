//! The body of an answer, taken out of its framing. Pure: bytes in a buffer go in, payload comes out.
//!
//! Stricter than the standard asks a reader to be: lines end with CR LF and nothing else, sizes are hexadecimal digits, and what
//! breaks a rule ends the connection. Whoever reads framing generously reads something else than the next one in line.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memchr;

/// Longest line that tells a chunk's size, extensions included.
const MOST_SIZE_LINE: usize = 1 << 10;

/// Most bytes of trailers.
const MOST_TRAILERS: usize = 8 << 10;

/// How an answer's head says where its body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// After that many bytes.
    Length(u64),
    /// After the last chunk.
    Chunked,
    /// With the connection.
    UntilClose,
}

/// What a body does that none may do; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadBody {
    /// No hexadecimal number, or what follows it is no extension.
    #[error("a chunk's size cannot be read")]
    Size,
    /// More than 64 bits.
    #[error("a chunk's size is beyond all bounds")]
    TooLarge,
    /// It goes on and on.
    #[error("a line of the chunks is too long")]
    LongLine,
    /// A line ends otherwise, or a chunk does not end with one.
    #[error("no CR LF where the chunks must have one")]
    LineEnd,
    /// More than there may be.
    #[error("the trailers are too long")]
    LongTrailers,
    /// The connection ended first.
    #[error("the connection ended inside the body")]
    CutShort,
}

/// What is to come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Payload; of a chunk's, the CR LF follows.
    Payload(u64),
    UntilClose,
    Size,
    /// The CR LF behind a chunk.
    ChunkEnd,
    /// Lines of which these many bytes may come.
    Trailers(usize),
    Nothing,
}

/// Where in its body an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoder {
    next: Next,
    chunked: bool,
    /// Whether the connection's end is the body's, too.
    closes: bool,
}

impl Decoder {
    /// At the beginning.
    pub fn new(framing: Framing) -> Self {
        let (next, chunked, closes) = match framing {
            Framing::Length(0) => (Next::Nothing, false, false),
            Framing::Length(length) => (Next::Payload(length), false, false),
            Framing::Chunked => (Next::Size, true, false),
            Framing::UntilClose => (Next::UntilClose, false, true),
        };
        Self { next, chunked, closes }
    }

    /// All payload that `buffer` has, which may be none; what was read is gone from it. What follows the body stays. Payload in
    /// front of what breaks a rule comes first, and the error with the next call. A single chunk is a part of the buffer; several
    /// are moved together inside it.
    ///
    /// # Errors
    /// What is wrong with the next bytes.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Bytes, BadBody> {
        match self.next {
            Next::Nothing => return Ok(Bytes::new()),
            Next::UntilClose => return Ok(buffer.split().freeze()),
            Next::Payload(left) if !self.chunked => {
                let payload = buffer.split_to(at_most(left, buffer.len())).freeze();
                self.take(payload.len());
                return Ok(payload);
            }
            _ => {}
        }
        // Payload is collected in `start..end`; `at` is what was read.
        let (mut start, mut end, mut at) = (0, 0, 0);
        let outcome = loop {
            let rest = buffer.get(at..).unwrap_or_default();
            if let Next::Payload(left) = self.next {
                let length = at_most(left, rest.len());
                if length == 0 {
                    break Ok(());
                }
                if start == end {
                    (start, end) = (at, at + length);
                } else {
                    buffer.copy_within(at..at + length, end);
                    end += length;
                }
                at += length;
                self.take(length);
            } else {
                match self.framing(rest) {
                    Ok(0) => break Ok(()),
                    Ok(read) => at += read,
                    Err(bad) => break Err(bad),
                }
            }
        };
        if start == end {
            buffer.advance(at);
            return outcome.map(|()| Bytes::new());
        }
        buffer.advance(start);
        let payload = buffer.split_to(end - start).freeze();
        buffer.advance(at - end);
        Ok(payload)
    }

    /// Reads one piece of framing at the beginning of `rest`; its length, 0 if it is not all there.
    fn framing(&mut self, rest: &[u8]) -> Result<usize, BadBody> {
        match self.next {
            Next::Size => {
                let Some((line, read)) = line(rest, MOST_SIZE_LINE, BadBody::LongLine)? else { return Ok(0) };
                self.next = match chunk_size(line)? {
                    0 => Next::Trailers(MOST_TRAILERS),
                    size => Next::Payload(size),
                };
                Ok(read)
            }
            Next::ChunkEnd => match rest {
                [] | [b'\r'] => Ok(0),
                [b'\r', b'\n', ..] => {
                    self.next = Next::Size;
                    Ok(2)
                }
                _ => Err(BadBody::LineEnd),
            },
            Next::Trailers(left) => {
                let Some((line, read)) = line(rest, left, BadBody::LongTrailers)? else { return Ok(0) };
                self.next =
                    if line.is_empty() { Next::Nothing } else { Next::Trailers(left.saturating_sub(read)) };
                Ok(read)
            }
            Next::Payload(_) | Next::UntilClose | Next::Nothing => Ok(0),
        }
    }

    fn take(&mut self, length: usize) {
        if let Next::Payload(left) = self.next {
            self.next = match left.saturating_sub(length as u64) {
                0 if self.chunked => Next::ChunkEnd,
                0 => Next::Nothing,
                left => Next::Payload(left),
            };
        }
    }

    /// The connection has ended.
    ///
    /// # Errors
    /// The body has not.
    pub fn close(&mut self) -> Result<(), BadBody> {
        match self.next {
            Next::Nothing => Ok(()),
            Next::UntilClose => {
                self.next = Next::Nothing;
                Ok(())
            }
            _ => Err(BadBody::CutShort),
        }
    }

    /// Whether all of it has come.
    pub fn is_ended(&self) -> bool {
        self.next == Next::Nothing
    }

    /// Whether another answer may follow it.
    pub fn leaves_connection(&self) -> bool {
        self.is_ended() && !self.closes
    }

    /// Bytes that will come, where that is known.
    pub fn left(&self) -> Option<u64> {
        match self.next {
            Next::Payload(left) if !self.chunked => Some(left),
            Next::Nothing => Some(0),
            _ => None,
        }
    }
}

fn at_most(left: u64, there: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(there)
}

/// The first line of `rest` without its end, and its length with it; `None` while it is not whole.
fn line(rest: &[u8], most: usize, too_long: BadBody) -> Result<Option<(&[u8], usize)>, BadBody> {
    let Some(end) = memchr(b'\n', rest) else {
        return if rest.len() > most { Err(too_long) } else { Ok(None) };
    };
    if end >= most {
        return Err(too_long);
    }
    let line = rest.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(BadBody::LineEnd)?;
    if memchr(b'\r', line).is_some() {
        return Err(BadBody::LineEnd);
    }
    Ok(Some((line, end + 1)))
}

/// A chunk's size, and extensions, which mean nothing to us.
fn chunk_size(line: &[u8]) -> Result<u64, BadBody> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (digits, rest) = line.split_at_checked(digits).ok_or(BadBody::Size)?;
    let is_extension = rest.is_empty() || rest.trim_ascii_start().first() == Some(&b';');
    if digits.is_empty() || !is_extension {
        return Err(BadBody::Size);
    }
    digits.iter().try_fold(0u64, |size, digit| {
        let value = char::from(*digit).to_digit(16).map(u64::from).ok_or(BadBody::Size)?;
        size.checked_mul(16).and_then(|size| size.checked_add(value)).ok_or(BadBody::TooLarge)
    })
}

#[cfg(test)]
#[path = "body_tests.rs"]
mod tests;
