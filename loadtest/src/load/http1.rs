//! HTTP/1.1 responses as bytes: their head, and what of the rest is the body. Pure.
//!
//! Written by hand because the generator shares its processors with what it measures: one read of the socket, one pass over
//! its bytes, no task, channel or buffer between. Heads are read by `httparse`, as hyper does.

use memchr::memchr;

/// Longest head.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Most headers.
const MAX_HEADERS: usize = 64;
/// Longest line that announces a chunk, or trailer.
const MAX_LINE_BYTES: usize = 4 << 10;

/// The bytes are no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not HTTP/1.1: {0}")]
pub(super) struct Garbled(pub(super) String);

/// The head of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) framing: Framing,
    /// Another request may follow on the connection.
    pub(super) keep_alive: bool,
    /// Its own bytes.
    pub(super) length: usize,
}

/// How a body ends, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many more bytes.
    Length(u64),
    /// In chunks.
    Chunked(Chunk),
    /// With the connection.
    UntilClose,
}

/// Where in a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunk {
    /// In the line with the size: what it says so far, and its bytes.
    Size(u64, usize),
    /// Behind the size: an extension, or the end of the line.
    Line(u64, usize),
    /// So many bytes of the chunk are left.
    Data(u64),
    /// So many bytes of the line's end behind the data are left.
    DataEnd(u8),
    /// In a trailer, or the empty line at the end: bytes of this line.
    Trailer(usize),
    /// Over.
    End,
}

/// Reads the head that `bytes` begin with; none if it is not whole yet.
///
/// # Errors
/// [`Garbled`].
pub(super) fn head(bytes: &[u8]) -> Result<Option<Head>, Garbled> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes).map_err(|e| Garbled(e.to_string()))? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial if bytes.len() > MAX_HEAD_BYTES => {
            return Err(Garbled("an endless head".into()));
        }
        httparse::Status::Partial => return Ok(None),
    };
    let status = response.code.unwrap_or_default();
    let (mut framing, mut keep_alive) = (Framing::UntilClose, response.version == Some(1));
    for header in response.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") && framing == Framing::UntilClose {
            let length = value.parse().map_err(|_| Garbled(format!("content-length: {value}")))?;
            framing = Framing::Length(length);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(Garbled(format!("transfer-encoding: {value}")));
            }
            framing = Framing::Chunked(Chunk::Size(0, 0));
        } else if header.name.eq_ignore_ascii_case("connection") {
            keep_alive &= !value.eq_ignore_ascii_case("close");
        }
    }
    if matches!(status, 100..200 | 204 | 304) {
        framing = Framing::Length(0);
    }
    keep_alive &= framing != Framing::UntilClose;
    Ok(Some(Head { status, framing, keep_alive, length }))
}

impl Framing {
    /// True if the whole body came.
    pub(super) const fn is_over(self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunk::End))
    }

    /// True if the end of the connection is the end of the body.
    pub(super) const fn may_close(self) -> bool {
        self.is_over() || matches!(self, Self::UntilClose)
    }

    /// Takes received bytes, gives `each` those of the body, and returns how many bytes are left behind its end.
    ///
    /// # Errors
    /// [`Garbled`], or what `each` says.
    pub(super) fn feed<E: From<Garbled>>(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<usize, E> {
        match self {
            Self::UntilClose => each(bytes).map(|()| 0),
            Self::Length(left) => {
                let (body, rest) = part(bytes, *left);
                *left -= body.len() as u64;
                if !body.is_empty() {
                    each(body)?;
                }
                Ok(rest.len())
            }
            Self::Chunked(chunk) => {
                while !bytes.is_empty() && *chunk != Chunk::End {
                    if *chunk == Chunk::Size(0, 0)
                        && let Some((size, rest)) = whole_size(bytes)
                    {
                        (*chunk, bytes) = (Chunk::Data(size), rest);
                    } else if *chunk == Chunk::DataEnd(2)
                        && let Some(rest) = bytes.strip_prefix(b"\r\n")
                    {
                        (*chunk, bytes) = (Chunk::Size(0, 0), rest);
                    } else if let Chunk::Data(left) = *chunk {
                        let (body, rest) = part(bytes, left);
                        each(body)?;
                        bytes = rest;
                        let left = left - body.len() as u64;
                        *chunk = if left == 0 { Chunk::DataEnd(2) } else { Chunk::Data(left) };
                    } else {
                        bytes = chunk.step(bytes)?;
                    }
                }
                Ok(bytes.len())
            }
        }
    }
}

/// At most `length` bytes, and the others.
fn part(bytes: &[u8], length: u64) -> (&[u8], &[u8]) {
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
    bytes.split_at(length)
}

/// The size of a chunk, above 0, whose line came as most do: whole, short and without extensions; and what follows it.
fn whole_size(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = bytes.iter().take(8).position(|byte| !byte.is_ascii_hexdigit())?;
    let (digits, rest) = bytes.split_at_checked(length)?;
    let size = digits.iter().try_fold(0, |size, digit| Some(size << 4 | hex(*digit)?))?;
    rest.strip_prefix(b"\r\n").filter(|_| size > 0).map(|rest| (size, rest))
}

impl Chunk {
    /// Takes bytes that are not data, at least one, and returns the others.
    fn step<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Garbled> {
        let Some((&first, rest)) = bytes.split_first() else { return Ok(bytes) };
        match *self {
            Self::Size(size, length) => match hex(first) {
                Some(digit) if length < 15 => *self = Self::Size(size << 4 | digit, length + 1),
                None if length > 0 && matches!(first, b'\r' | b';' | b' ') => *self = Self::Line(size, 0),
                _ => return Err(Garbled(format!("byte {first} in the size of a chunk"))),
            },
            Self::Line(size, length) => {
                if length > MAX_LINE_BYTES {
                    return Err(Garbled("an endless line before a chunk".into()));
                }
                *self = match (first, size) {
                    (b'\n', 0) => Self::Trailer(0),
                    (b'\n', _) => Self::Data(size),
                    _ => Self::Line(size, length + 1),
                };
            }
            Self::DataEnd(left) => {
                let wanted = if left == 2 { b'\r' } else { b'\n' };
                if first != wanted {
                    return Err(Garbled(format!("byte {first} instead of the end of a chunk")));
                }
                *self = if left == 2 { Self::DataEnd(1) } else { Self::Size(0, 0) };
            }
            Self::Trailer(length) => {
                let Some(end) = memchr(b'\n', bytes) else {
                    // A lone \r may be the first byte of the empty line.
                    *self = Self::Trailer(length + bytes.len());
                    let endless = length > MAX_LINE_BYTES;
                    return if endless { Err(Garbled("an endless trailer".into())) } else { Ok(&[]) };
                };
                *self = if length + end <= 1 { Self::End } else { Self::Trailer(0) };
                return Ok(bytes.get(end + 1..).unwrap_or_default());
            }
            Self::Data(_) | Self::End => return Ok(bytes),
        }
        Ok(rest)
    }
}

fn hex(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNKED: Framing = Framing::Chunked(Chunk::Size(0, 0));

    fn fed(mut framing: Framing, bytes: &[u8], cut: usize) -> Result<(Vec<u8>, bool, usize), Garbled> {
        let (mut body, mut left) = (Vec::new(), 0);
        for piece in bytes.chunks(cut) {
            left = framing.feed(piece, |piece| -> Result<(), Garbled> {
                body.extend_from_slice(piece);
                Ok(())
            })?;
        }
        Ok((body, framing.is_over(), left))
    }

    #[test]
    fn heads() {
        let text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5";
        assert_eq!(head(&text[..20]), Ok(None));
        let wanted = Head { status: 200, framing: CHUNKED, keep_alive: true, length: text.len() - 1 };
        assert_eq!(head(text), Ok(Some(wanted)));
        let of = |text: &str| {
            let head = head(text.as_bytes()).unwrap().unwrap();
            (head.status, head.framing, head.keep_alive)
        };
        assert_eq!(
            of("HTTP/1.1 503 X\r\nconnection: Close\r\ncontent-length: 7\r\n\r\n"),
            (503, Framing::Length(7), false)
        );
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\n"), (200, Framing::UntilClose, false));
        assert_eq!(of("HTTP/1.1 100 Continue\r\n\r\n"), (100, Framing::Length(0), true));
        for wrong in [
            "nonsense\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        ] {
            assert!(head(wrong.as_bytes()).is_err(), "{wrong}");
        }
        assert!(head(&[b"HTTP/1.1 200 OK\r\na: ".to_vec(), vec![b'x'; 70_000]].concat()).is_err());
    }

    #[test]
    fn chunks_with_extensions_and_trailers() {
        let text = b"5;a=b\r\nhello\r\nA \r\n0123456789\r\n0\r\nx: y\r\n\r\nmore";
        for cut in 1..text.len() {
            let (body, over, _) = fed(CHUNKED, text, cut).unwrap();
            assert_eq!((body.as_slice(), over), (&b"hello0123456789"[..], true), "{cut}");
        }
        assert_eq!(fed(CHUNKED, text, 100).unwrap().2, 4, "bytes behind the end are told");
        for wrong in
            ["x", "\r\n", "5\r\nhelloX", "5\r\nhello\rX", "fffffffffffffffff\r\n", "ZZ not a chunk\r\n"]
        {
            assert!(fed(CHUNKED, wrong.as_bytes(), 100).is_err(), "{wrong}");
        }
        assert!(!fed(CHUNKED, b"5\r\nhello\r\n0\r\n", 3).unwrap().1, "the last line is missing");
    }

    #[test]
    fn lengths() {
        assert_eq!(fed(Framing::Length(3), b"abcd", 9).unwrap(), (b"abc".to_vec(), true, 1));
        assert_eq!(fed(Framing::Length(3), b"ab", 1).unwrap(), (b"ab".to_vec(), false, 0));
        assert_eq!(fed(Framing::UntilClose, b"abcd", 2).unwrap(), (b"abcd".to_vec(), false, 0));
        assert!(Framing::UntilClose.may_close() && !Framing::Length(1).may_close());
    }

    proptest! {
        #[test]
        fn a_body_does_not_depend_on_reads(parts in proptest::collection::vec("[a-z\r\n]{1,40}", 0..6), cut in 1usize..50) {
            let framed: String = parts.iter().map(|part| format!("{:x}\r\n{part}\r\n", part.len())).collect();
            let (body, over, left) = fed(CHUNKED, format!("{framed}0\r\n\r\n").as_bytes(), cut).unwrap();
            prop_assert_eq!((body, over, left), (parts.concat().into_bytes(), true, 0));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, cut in 1usize..9) {
            let _unread = (head(&bytes), fed(CHUNKED, &bytes, cut));
        }
    }
}
