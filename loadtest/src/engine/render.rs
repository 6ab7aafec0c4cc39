//! From tokens to bytes: what each API must be able to render, and the framing all of them share. Pure.
//!
//! Each API ([`super::chat`], [`super::completions`], [`super::responses`], [`super::messages`]) prepares what never changes
//! within a request once; an event is then a few copies into one buffer. No JSON value is built per token.

use super::{
    error::ApiError,
    generation::{Finish, Generation, Outcome},
    http::{push_chunk, push_chunk_size, push_decimal},
};

/// What is in front of the time in a stamped event; behind it are a quote and the end of the object.
pub(crate) const STAMP: &[u8] = b",\"sim_ns\":\"";
/// Digits of that time, with zeros in front: three centuries of nanoseconds.
pub(crate) const STAMP_DIGITS: usize = 19;

/// Token counts of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Prompt tokens of all prompts.
    pub(super) prompt: u64,
    /// Generated tokens of all choices.
    pub(super) completion: u64,
    /// Prompt tokens found in the prefix cache; 0 if the engine does not report them.
    pub(super) cached: u64,
}

impl Usage {
    /// Appends OpenAI's usage object, in vLLM's order.
    pub(super) fn push_openai(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"prompt_tokens\":");
        push_decimal(out, self.prompt);
        out.extend_from_slice(b",\"total_tokens\":");
        push_decimal(out, self.prompt + self.completion);
        out.extend_from_slice(b",\"completion_tokens\":");
        push_decimal(out, self.completion);
        if self.cached > 0 {
            out.extend_from_slice(b",\"prompt_tokens_details\":{\"cached_tokens\":");
            push_decimal(out, self.cached);
            out.push(b'}');
        }
        out.push(b'}');
    }
}

/// One token, or the abort of a choice, to be rendered.
#[derive(Debug)]
pub(super) struct Token<'a> {
    /// Which choice.
    pub(super) choice: usize,
    /// None if a choice ends without a further token.
    pub(super) id: Option<u32>,
    /// Text it releases; may be empty.
    pub(super) text: &'a str,
    /// Set on the choice's last.
    pub(super) finish: Option<&'a Finish>,
    /// Counts so far, this token included. Completion tokens are those of this choice.
    pub(super) usage: Usage,
}

/// One API's way of saying things.
pub(super) trait Render: Send + Sync {
    /// Events that come with the response's header, long before the first token.
    fn greet(&mut self, _frame: &mut Frame) {}
    /// Events before the first token.
    fn open(&mut self, frame: &mut Frame, usage: Usage);
    /// The events of one token.
    fn token(&mut self, frame: &mut Frame, token: &Token<'_>);
    /// Events after the last token of all choices.
    fn close(&mut self, frame: &mut Frame, usage: Usage);
    /// The events of an error within the stream, its end included. False if this API says nothing and is cut off.
    fn error(&mut self, frame: &mut Frame, error: &ApiError) -> bool;
    /// The whole body of a response that is not streamed.
    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8>;
    /// The body of an error instead of a response.
    fn error_body(&self, error: &ApiError) -> String {
        error.openai_body()
    }
}

/// A request ready to run.
pub(super) struct Job {
    /// One per prompt and choice, in the order of their indices.
    pub(super) generations: Vec<Generation>,
    /// Hashes of the full blocks of each generation's prompt.
    pub(super) blocks: Vec<Vec<u64>>,
    /// Prompt tokens of all prompts, each counted once.
    pub(super) prompt_tokens: u64,
    /// Choices per prompt.
    pub(super) n: u32,
    /// The limit asked for.
    pub(super) max_tokens: Option<u64>,
    /// Stream or one body.
    pub(super) stream: bool,
    /// How it is said.
    pub(super) render: Box<dyn Render>,
}

/// Server-sent events in the chunks of a response body.
#[derive(Debug, Default)]
pub(super) struct Frame {
    scratch: Vec<u8>,
    /// Framed bytes, ready to send.
    pub(super) out: Vec<u8>,
    /// Events so far.
    events: u64,
    /// The event to cut off, counted from 0, and the bytes of it that still go out.
    cut: Option<(u64, usize)>,
    is_cut: bool,
    /// The next event gets a place for the time.
    stamp_next: bool,
    /// Where in `out` times are to be filled in.
    stamps: Vec<usize>,
}

impl Frame {
    /// Adds one event: `write` writes all of it, from `data:` or `event:` to the empty line.
    pub(super) fn event(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        write(&mut scratch);
        let stamped = std::mem::take(&mut self.stamp_next) && scratch.ends_with(b"}\n\n");
        if stamped {
            scratch.truncate(scratch.len() - 3);
            scratch.extend_from_slice(STAMP);
            scratch.resize(scratch.len() + STAMP_DIGITS, b'0');
            scratch.extend_from_slice(b"\"}\n\n");
        }
        let is_whole = self.push(&scratch);
        if stamped && is_whole {
            // Behind the digits: a quote, the end of the object, of the event and of the chunk.
            self.stamps.push(self.out.len() - 6 - STAMP_DIGITS);
        }
        self.scratch = scratch;
    }

    /// Gives the next event, if it is a JSON object, a place for the time at which it is sent.
    pub(super) const fn stamp_next(&mut self) {
        self.stamp_next = true;
    }

    /// Fills the time in where it is to be. To be called right before the bytes are sent; reads the clock only if needed.
    pub(super) fn fill_stamps(&mut self, now_ns: impl Fn() -> u64) {
        if self.stamps.is_empty() {
            return;
        }
        let mut left = now_ns();
        let mut digits = [b'0'; STAMP_DIGITS];
        for digit in digits.iter_mut().rev() {
            *digit = b"0123456789"[(left % 10) as usize];
            left /= 10;
        }
        for at in self.stamps.drain(..) {
            if let Some(place) = self.out.get_mut(at..at + STAMP_DIGITS) {
                place.copy_from_slice(&digits);
            }
        }
    }

    /// Adds OpenAI's last event.
    pub(super) fn done(&mut self) {
        self.stamp_next = false;
        self.push(b"data: [DONE]\n\n");
    }

    /// Adds a comment, which is no event, as `--sse-keep-alive-interval` does.
    pub(super) fn keep_alive(&mut self) {
        push_chunk(&mut self.out, b": keep-alive\n\n");
    }

    /// True if all of it is in `out`.
    fn push(&mut self, event: &[u8]) -> bool {
        if self.is_cut {
            return false;
        }
        match self.cut {
            Some((at, bytes)) if at == self.events => {
                push_chunk_size(&mut self.out, event.len());
                self.out.extend_from_slice(event.get(..bytes).unwrap_or(event));
                self.is_cut = true;
            }
            _ => push_chunk(&mut self.out, event),
        }
        self.events += 1;
        !self.is_cut
    }

    /// From event `at` on (none: the next one) only `bytes` bytes go out, of an event whose chunk announces all of it:
    /// what a peer sees of a cut.
    pub(super) fn cut_at(&mut self, at: Option<u64>, bytes: usize) {
        self.cut = Some((at.unwrap_or(self.events), bytes));
    }

    /// True once an event was cut.
    pub(super) const fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Adds bytes as one chunk that claims to be longer than it is, or not at all a chunk.
    pub(super) fn garbage(&mut self) {
        self.out.extend_from_slice(b"ZZ not a chunk\r\n");
        push_chunk_size(&mut self.out, 5);
    }
}

/// Appends the inside of a JSON string.
pub(crate) fn push_escaped(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let mut from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            8 => b"\\b",
            12 => b"\\f",
            0..0x20 => b"\\u00",
            _ => continue,
        };
        out.extend_from_slice(&bytes[from..at]);
        out.extend_from_slice(escape);
        if escape == b"\\u00" {
            out.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        }
        from = at + 1;
    }
    out.extend_from_slice(&bytes[from..]);
}

/// `text` as a JSON string, quotes included.
pub(super) fn quoted(text: &str) -> String {
    let mut out = vec![b'"'];
    push_escaped(&mut out, text);
    out.push(b'"');
    String::from_utf8(out).unwrap_or_default()
}

/// Appends a JSON list of ids.
pub(super) fn push_ids(out: &mut Vec<u8>, ids: &[u32]) {
    out.push(b'[');
    for (i, &id) in ids.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        push_decimal(out, u64::from(id));
    }
    out.push(b']');
}

/// Appends `"finish_reason"` and `"stop_reason"` of a finished choice, `reason` being the former.
pub(super) fn push_finish(out: &mut Vec<u8>, finish: &Finish, reason: &str) {
    out.extend_from_slice(b"\"finish_reason\":\"");
    out.extend_from_slice(reason.as_bytes());
    out.extend_from_slice(b"\",\"stop_reason\":");
    match finish {
        Finish::StopString(stop) => out.extend_from_slice(quoted(stop).as_bytes()),
        Finish::StopToken(id) => push_decimal(out, u64::from(*id)),
        Finish::Length | Finish::End | Finish::Abort => out.extend_from_slice(b"null"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn strings_are_json(text: String) {
            prop_assert_eq!(serde_json::from_str::<String>(&quoted(&text)).unwrap(), text);
        }
    }

    #[test]
    fn a_cut_event_keeps_its_chunk_size_and_is_the_last() {
        let framed = |at, bytes| {
            let mut frame = Frame::default();
            frame.cut_at(at, bytes);
            frame.event(|out| out.extend_from_slice(b"data: 12\n\n"));
            frame.done();
            (String::from_utf8(frame.out.clone()).unwrap(), frame.is_cut())
        };
        assert_eq!(framed(None, 4), ("a\r\ndata".into(), true));
        assert_eq!(framed(Some(0), 99), ("a\r\ndata: 12\n\n".into(), true));
        assert_eq!(framed(Some(1), 0), ("a\r\ndata: 12\n\n\r\ne\r\n".into(), true));
        assert!(!framed(Some(2), 0).1, "there is no such event");
    }

    #[test]
    fn a_stamped_event_says_when_it_was_sent() {
        let mut frame = Frame::default();
        frame.event(|out| out.extend_from_slice(b"data: {\"a\":1}\n\n"));
        frame.stamp_next();
        frame.event(|out| out.extend_from_slice(b"data: {\"b\":1}\n\n"));
        frame.event(|out| out.extend_from_slice(b"data: {\"c\":1}\n\n"));
        frame.stamp_next();
        frame.event(|out| out.extend_from_slice(b"data: [DONE]\n\n"));
        frame.fill_stamps(|| 1_234_567_890_123);
        frame.fill_stamps(|| 0);
        let text = String::from_utf8(frame.out).unwrap();
        let stamped = "data: {\"b\":1,\"sim_ns\":\"0000001234567890123\"}\n\n";
        assert!(text.contains(stamped) && text.matches("sim_ns").count() == 1, "{text}");
    }

    #[test]
    fn usage_is_in_the_order_of_vllm() {
        let mut out = Vec::new();
        Usage { prompt: 3, completion: 4, cached: 0 }.push_openai(&mut out);
        assert_eq!(out, b"{\"prompt_tokens\":3,\"total_tokens\":7,\"completion_tokens\":4}");
    }
}
