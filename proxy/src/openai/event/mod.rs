//! Server-sent events out of a byte stream: whole events, as the bytes that were read.
//!
//! Engines usually send one HTTP chunk per event, but nothing promises it: a chunk may hold several events, or end
//! inside one, or between the two bytes of a line end. A relay that forwards chunks as they come cannot add an event
//! of its own (an error, a resumed continuation) without cutting into one. So only whole events are let through, and
//! an unfinished tail is held back until its end arrives.
//!
//! What ends an event is the standard's: a blank line, lines ending in LF, CRLF or CR. Comments (`: keep-alive`),
//! blank lines and a leading BOM are bytes like any other: nothing is rewritten or left out. When a chunk ends in a
//! CR that ends an event, the event is let through at once, not held for the LF that may follow.
//!
//! Invariants: the concatenated output is the concatenated input, less [`EventSplitter::pending_bytes`] at its end;
//! every output ends where an event ends; no more than the limit is ever held back.
//!
//! Cost: a chunk that ends in a blank line, with nothing pending, is handed on after two comparisons. Otherwise one
//! backward search for the last blank line; held-back bytes are copied once, into the buffer they leave in.

#[cfg(test)]
mod tests;
mod walk;

use bytes::{Bytes, BytesMut};

pub use self::walk::{Event, Walk, walk};

/// Default limit of a single event: a first frame with 100,000 prompt token ids is 0.6 MB.
pub const DEFAULT_MAX_EVENT_BYTES: usize = 16 << 20;

/// An event grew beyond the limit without an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine sent more than {limit} bytes without the blank line that ends an event")]
pub struct EventTooLarge {
    /// Bytes allowed.
    pub limit: usize,
}

/// What the bytes before a chunk were, as far as the chunk's first bytes depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// A line has begun.
    InLine,
    /// A line has ended, or the stream has just begun.
    LineEnd,
    /// A line has ended in CR: an LF would belong to it. Whether that line was blank.
    Cr { blank: bool },
}

/// Cuts one response body into whole events.
#[derive(Debug)]
pub struct EventSplitter {
    pending: BytesMut,
    before: Before,
    max_event_bytes: usize,
}

impl Default for EventSplitter {
    fn default() -> Self {
        Self::new(DEFAULT_MAX_EVENT_BYTES)
    }
}

impl EventSplitter {
    /// A splitter at the start of a stream, which holds back at most `max_event_bytes`.
    #[must_use]
    pub fn new(max_event_bytes: usize) -> Self {
        Self { pending: BytesMut::new(), before: Before::LineEnd, max_event_bytes }
    }

    /// Takes the next chunk and hands out everything that is whole by now: `chunk` itself or a slice of it when
    /// nothing was held back, `None` when no event ended.
    ///
    /// # Errors
    /// The unfinished event is larger than the limit; the stream cannot go on.
    pub fn push(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, EventTooLarge> {
        let whole = if chunk.ends_with(b"\n\n") {
            self.before = Before::LineEnd;
            chunk.len()
        } else {
            let whole = last_boundary(&chunk, self.before);
            self.before = after(&chunk, self.before);
            whole
        };
        let tail = chunk.len() - whole;
        if tail > 0 && tail + if whole == 0 { self.pending.len() } else { 0 } > self.max_event_bytes {
            return Err(EventTooLarge { limit: self.max_event_bytes });
        }
        if whole == 0 {
            self.pending.extend_from_slice(&chunk);
            return Ok(None);
        }
        let rest = chunk.split_off(whole);
        let events = if self.pending.is_empty() {
            chunk
        } else {
            self.pending.extend_from_slice(&chunk);
            self.pending.split().freeze()
        };
        self.pending.extend_from_slice(&rest);
        Ok(Some(events))
    }

    /// Bytes of the unfinished event that are held back.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// The unfinished event, once the stream has ended. Clients would ignore it: an event without its blank line is
    /// not dispatched.
    #[must_use]
    pub fn take_partial(&mut self) -> Bytes {
        self.pending.split().freeze()
    }
}

/// Where the last event boundary in `chunk` is: the offset behind its blank line, or 0.
fn last_boundary(chunk: &[u8], before: Before) -> usize {
    let mut end = chunk.len();
    while let Some(terminator) = memchr::memrchr2(b'\n', b'\r', chunk.get(..end).unwrap_or_default()) {
        if ends_blank_line(chunk, terminator, before) {
            return terminator + 1;
        }
        end = terminator;
    }
    0
}

/// Whether the CR or LF at `at` completes the end of a blank line.
fn ends_blank_line(chunk: &[u8], at: usize, before: Before) -> bool {
    let byte_at = |index: usize| chunk.get(index).copied();
    let previous = at.checked_sub(1);
    if byte_at(at) == Some(b'\n') {
        match previous {
            Some(cr) if byte_at(cr) == Some(b'\r') => return is_line_start(chunk, cr, before),
            None => {
                if let Before::Cr { blank } = before {
                    return blank;
                }
            }
            Some(_) => {}
        }
    }
    is_line_start(chunk, at, before)
}

/// Whether a line starts at `at`.
fn is_line_start(chunk: &[u8], at: usize, before: Before) -> bool {
    match at.checked_sub(1).and_then(|previous| chunk.get(previous)) {
        Some(byte) => matches!(byte, b'\n' | b'\r'),
        None => before != Before::InLine,
    }
}

/// What stands before the chunk that follows `chunk`.
fn after(chunk: &[u8], before: Before) -> Before {
    match chunk.last() {
        None => before,
        Some(b'\n') => Before::LineEnd,
        Some(b'\r') => Before::Cr { blank: ends_blank_line(chunk, chunk.len() - 1, before) },
        Some(_) => Before::InLine,
    }
}
