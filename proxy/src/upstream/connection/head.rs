//! The head of an answer: read, and judged by what it says of its body. Pure.
//!
//! What two readers could take for two different bodies is refused: lengths that contradict each other, a length beside chunks,
//! an encoding other than `chunked`. So are fields that go on in the next line, and spaces before a colon.

use std::mem::MaybeUninit;

use http::StatusCode;

use super::body::Framing;

/// Most bytes of a head.
pub const MOST_BYTES: usize = 64 << 10;

/// Most fields of a head.
const MOST_FIELDS: usize = 256;

/// Why bytes are no head that can be used; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// It is not HTTP/1.0 or 1.1, or breaks its grammar.
    #[error("not an HTTP head: {0}")]
    Syntax(#[from] httparse::Error),
    /// Three digits that are no status.
    #[error("no status is {0}")]
    Status(u16),
    /// No end in sight.
    #[error("the head is larger than {MOST_BYTES} bytes")]
    TooLarge,
    /// Not a number, or not one number.
    #[error("the content-length cannot be read")]
    Length,
    /// Not `chunked`, or not only.
    #[error("the transfer-encoding is not \"chunked\"")]
    Encoding,
    /// Or chunks where HTTP/1.0 knows none.
    #[error("both a content-length and a transfer-encoding")]
    TwoFramings,
    /// It cannot be handed on.
    #[error("a field that cannot be written again")]
    Field,
}

/// A head as it lies in the buffer.
#[derive(Debug, Clone, Copy)]
pub struct Head<'b> {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, in order, names as they were written.
    pub fields: &'b [httparse::Header<'b>],
    is_http_11: bool,
}

/// What follows from a head, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// Bytes of the head, its empty line included.
    pub length: usize,
    /// Where its body ends.
    pub framing: Framing,
    /// Whether the engine will take another request after it.
    pub keeps_alive: bool,
}

impl<'b> Head<'b> {
    /// The values of a field; `name` in lower case.
    pub fn values(self, name: &str) -> impl Iterator<Item = &'b [u8]> {
        self.fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// Whether it is not the answer yet, but a word before it.
    pub fn is_interim(self) -> bool {
        self.status.is_informational() && self.status != StatusCode::SWITCHING_PROTOCOLS
    }

    fn framing(self) -> Result<Framing, BadHead> {
        let length = length(self.values("content-length"))?;
        let mut encodings = self.values("transfer-encoding");
        let encoding = encodings.next();
        if self.status.is_informational()
            || matches!(self.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        {
            // Whatever else it says: it has no body.
            return Ok(Framing::Length(0));
        }
        match (encoding, length) {
            (None, None) => Ok(Framing::UntilClose),
            (None, Some(length)) => Ok(Framing::Length(length)),
            (Some(value), None) if self.is_http_11 => {
                let is_chunked = value.eq_ignore_ascii_case(b"chunked") && encodings.next().is_none();
                if is_chunked { Ok(Framing::Chunked) } else { Err(BadHead::Encoding) }
            }
            (Some(_), _) => Err(BadHead::TwoFramings),
        }
    }

    fn keeps_alive(self) -> bool {
        let says = |word: &str| {
            let mut tokens = self.values("connection").flat_map(|value| value.split(|byte| *byte == b','));
            tokens.any(|token| token.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
        };
        !says("close") && (self.is_http_11 || says("keep-alive"))
    }
}

/// The one number that all values of `content-length` name.
fn length<'a>(values: impl Iterator<Item = &'a [u8]>) -> Result<Option<u64>, BadHead> {
    let mut numbers = values.flat_map(|value| value.split(|byte| *byte == b',')).map(number);
    let Some(first) = numbers.next() else { return Ok(None) };
    let same = numbers.all(|number| number == first);
    first.filter(|_| same).map(Some).ok_or(BadHead::Length)
}

fn number(text: &[u8]) -> Option<u64> {
    let digits = text.trim_ascii();
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, byte| {
        let digit = char::from(*byte).to_digit(10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Reads the head at the beginning of `buffer` and shows it to `take`; `None` while it is not all there.
///
/// # Errors
/// It will never be one.
pub fn parse<T>(
    buffer: &[u8],
    take: impl FnOnce(Head<'_>) -> Result<T, BadHead>,
) -> Result<Option<(Meaning, T)>, BadHead> {
    let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let status = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut parsed,
        buffer,
        &mut fields,
    )?;
    let httparse::Status::Complete(length) = status else {
        return if buffer.len() >= MOST_BYTES { Err(BadHead::TooLarge) } else { Ok(None) };
    };
    if length > MOST_BYTES {
        return Err(BadHead::TooLarge);
    }
    let code = parsed.code.unwrap_or_default();
    let head = Head {
        status: StatusCode::from_u16(code).map_err(|_| BadHead::Status(code))?,
        fields: parsed.headers,
        is_http_11: parsed.version == Some(1),
    };
    let (framing, keeps_alive) = (head.framing()?, head.keeps_alive());
    Ok(Some((Meaning { length, framing, keeps_alive }, take(head)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(text: &str) -> Result<Option<(Framing, bool)>, BadHead> {
        let parsed = parse(text.as_bytes(), |_| Ok(()))?;
        Ok(parsed.map(|(meaning, ())| (meaning.framing, meaning.keeps_alive)))
    }

    fn with(fields: &str) -> Result<Option<(Framing, bool)>, BadHead> {
        meaning(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"))
    }

    #[test]
    fn a_head_says_where_its_body_ends() {
        for (fields, framing) in [
            ("", Framing::UntilClose),
            ("Content-Length: 12\r\n", Framing::Length(12)),
            ("content-length: 12\r\nContent-Length: 12, 12\r\n", Framing::Length(12)),
            ("content-length: 18446744073709551615\r\n", Framing::Length(u64::MAX)),
            ("Transfer-Encoding: Chunked\r\n", Framing::Chunked),
        ] {
            assert_eq!(with(fields), Ok(Some((framing, true))), "{fields}");
        }
        for status in ["100 Continue", "101 Switching", "204 None", "304 Same"] {
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: 5\r\n\r\n");
            assert_eq!(meaning(&head), Ok(Some((Framing::Length(0), true))), "{status}");
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_not_read() {
        for (fields, bad) in [
            ("content-length: 1\r\ncontent-length: 2\r\n", BadHead::Length),
            ("content-length: 1, 2\r\n", BadHead::Length),
            ("content-length: 1,\r\n", BadHead::Length),
            ("content-length: \r\n", BadHead::Length),
            ("content-length: +1\r\n", BadHead::Length),
            ("content-length: -1\r\n", BadHead::Length),
            ("content-length: 0x1\r\n", BadHead::Length),
            ("content-length: 18446744073709551616\r\n", BadHead::Length),
            ("content-length: 1\r\ntransfer-encoding: chunked\r\n", BadHead::TwoFramings),
            ("transfer-encoding: gzip, chunked\r\n", BadHead::Encoding),
            ("transfer-encoding: identity\r\n", BadHead::Encoding),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", BadHead::Encoding),
            ("x: 1\r\n folded\r\n", BadHead::Syntax(httparse::Error::HeaderName)),
            ("content-length : 1\r\n", BadHead::Syntax(httparse::Error::HeaderName)),
            (": 1\r\n", BadHead::Syntax(httparse::Error::HeaderName)),
            ("x: a\rb\r\n", BadHead::Syntax(httparse::Error::HeaderValue)),
            (&"x: 1\r\n".repeat(257), BadHead::Syntax(httparse::Error::TooManyHeaders)),
        ] {
            assert_eq!(with(fields), Err(bad), "{fields}");
        }
        let http_10 = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(meaning(http_10), Err(BadHead::TwoFramings));
        for garbage in ["HTTP/2.0 200 OK\r\n\r\n", "SSH-2.0-x\r\n", "{\"a\":1}", "HTTP/1.1 20 OK\r\n\r\n"] {
            assert!(matches!(meaning(garbage), Err(BadHead::Syntax(_))), "{garbage}");
        }
        assert_eq!(meaning("HTTP/1.1 099 OK\r\n\r\n"), Err(BadHead::Status(99)));
    }

    #[test]
    fn a_head_has_an_end() {
        assert_eq!(with(&format!("x: {}\r\n", "a".repeat(60 << 10))), Ok(Some((Framing::UntilClose, true))));
        let long = format!("HTTP/1.1 200 OK\r\nx: {}", "a".repeat(MOST_BYTES));
        assert_eq!(meaning(&long), Err(BadHead::TooLarge));
        assert_eq!(meaning(&format!("{long}\r\n\r\n")), Err(BadHead::TooLarge));
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(meaning(&head[..end]), Ok(None), "{end}");
        }
        let (meaning, ()) = parse(format!("{head}x").as_bytes(), |_| Ok(())).expect("good").expect("whole");
        assert_eq!(meaning.length, head.len());
    }

    #[test]
    fn a_connection_stays_if_both_want_it() {
        for (head, stays) in [
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nconnection: x, Close\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\n\r\n", false),
            ("HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\nconnection: keep-alive, close\r\n\r\n", false),
        ] {
            assert_eq!(meaning(head).map(|m| m.map(|(_, stays)| stays)), Ok(Some(stays)), "{head}");
        }
    }
}
