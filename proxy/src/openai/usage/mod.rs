//! What an engine's answer says about itself: finish reason, tokens, errors inside a 200, and whether it ended.
//!
//! An engine that fails in mid-stream sends an error as an event of a successful response, and then still `[DONE]`;
//! one that is shut down sends `finish_reason: "abort"` and ends as if all were well. So "the stream ended" and "the
//! answer is whole" are two questions: [`StreamFacts::is_over`] and [`StreamFacts::succeeded`].
//!
//! - [`StreamFacts`]: event streams of all our APIs (chat and text completions, responses, Anthropic's messages).
//! - [`BodyFacts`]: unary JSON bodies, chunk by chunk as they pass.
//!
//! No DOM: an ordinary delta is searched for two needles (`"finish_reason":` and `"usage":`; a typed event only
//! for its name). A key's quotes are escaped inside a string, so no text of a model or a user can look like one. Only the
//! few events that end a stream are parsed, into the few fields wanted. What does not parse is ignored: these are
//! facts for retries, metrics and billing, never a reason to touch the bytes.
//!
//! Cost: no allocation, two vectorised searches an event. `cargo bench -p penstock-proxy --bench scan` prints ns an event.

#[cfg(test)]
mod tests;
mod wire;

use std::sync::LazyLock;

use memchr::memmem::Finder;

use super::event::walk;

static FINISH_REASON: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""finish_reason":"#));
static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""usage":"#));

/// Token counts as the engine reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: Option<u64>,
    /// Tokens generated.
    pub completion: Option<u64>,
    /// Tokens of the prompt that came from the engine's prefix cache.
    pub cached: Option<u64>,
}

impl Usage {
    /// Takes over what `newer` knows.
    fn update(&mut self, newer: Self) {
        self.prompt = newer.prompt.or(self.prompt);
        self.completion = newer.completion.or(self.completion);
        self.cached = newer.cached.or(self.cached);
    }
}

/// Why an engine stopped generating. Anthropic's stop reasons are mapped onto OpenAI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model ended its answer, or a stop sequence was met.
    Stop,
    /// A token limit was reached.
    Length,
    /// The model calls a tool.
    ToolCalls,
    /// A filter or a refusal ended it.
    ContentFilter,
    /// The engine gave the request up: its client left, or it is shutting down.
    Abort,
    /// The engine failed.
    Error,
    /// The engine saw the model repeat itself.
    Repetition,
    /// A reason we do not know.
    Other,
}

impl FinishReason {
    fn named(name: &[u8]) -> Self {
        match name {
            b"stop" | b"end_turn" | b"stop_sequence" => Self::Stop,
            b"length" | b"max_tokens" | b"model_context_window_exceeded" => Self::Length,
            b"tool_calls" | b"tool_use" | b"function_call" => Self::ToolCalls,
            b"content_filter" | b"refusal" => Self::ContentFilter,
            b"abort" => Self::Abort,
            b"error" => Self::Error,
            b"repetition" => Self::Repetition,
            _ => Self::Other,
        }
    }

    /// Name of the reason in metrics and logs; one of a fixed set.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
            Self::Abort => "abort",
            Self::Error => "error",
            Self::Repetition => "repetition",
            Self::Other => "other",
        }
    }

    /// Whether it says that the answer was broken off.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Abort | Self::Error)
    }
}

/// The event that ends a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Terminal {
    /// `data: [DONE]`
    Done,
    /// Anthropic's `message_stop`
    MessageStop,
    /// `response.completed`
    ResponseCompleted,
    /// `response.incomplete`
    ResponseIncomplete,
    /// `response.failed`
    ResponseFailed,
}

impl Terminal {
    /// Name of the event in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::MessageStop => "message_stop",
            Self::ResponseCompleted => "response_completed",
            Self::ResponseIncomplete => "response_incomplete",
            Self::ResponseFailed => "response_failed",
        }
    }
}

/// What has been seen of one event stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamFacts {
    /// Events with data; comments do not count.
    pub events: u64,
    /// The last finish reason; one that is a failure stays.
    pub finish_reason: Option<FinishReason>,
    /// Choices that gave a finish reason; `n` when all are done.
    pub finished_choices: u32,
    /// The latest counts.
    pub usage: Usage,
    /// The first event that ends a stream.
    pub terminal: Option<Terminal>,
    /// Message of the first in-band error, at most 256 bytes: the engine's words, for our log.
    pub error: Option<String>,
    /// Whether anything has been seen: a byte order mark is one only where it comes first.
    pub begun: bool,
}

impl StreamFacts {
    /// Takes in one or more whole events, as [`super::event::EventSplitter::push`] hands them out. An unfinished
    /// event at the end is ignored.
    pub fn observe(&mut self, whole_events: &[u8]) {
        let first = !self.begun;
        self.begun |= !whole_events.is_empty();
        for event in walk(whole_events, first) {
            self.on_event(event.name, &event.data);
        }
    }

    /// Whether the event that ends the stream has been seen.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.terminal.is_some()
    }

    /// Whether the stream ended, and whole: no error in it, and a finish reason that is no failure. `[DONE]` alone
    /// is no success: engines send it after an error too.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        let finished = match self.terminal {
            None | Some(Terminal::ResponseFailed) => false,
            Some(Terminal::Done) => self.finish_reason.is_some(),
            Some(Terminal::MessageStop | Terminal::ResponseCompleted | Terminal::ResponseIncomplete) => true,
        };
        finished && self.error.is_none() && !self.finish_reason.is_some_and(FinishReason::is_failure)
    }

    /// Takes in one event, as [`walk`] hands it out.
    pub fn on_event(&mut self, name: &[u8], data: &[u8]) {
        self.events += 1;
        if data == b"[DONE]" {
            return self.end(Terminal::Done);
        }
        if is_error(data) {
            return self.fail(data);
        }
        let kind = match name {
            b"" | b"message" => type_of(data),
            name => name,
        };
        match kind {
            b"" => self.on_chunk(data),
            b"error" => self.fail(data),
            b"message_start" | b"message_delta" => {
                let event: wire::MessageEvent = wire::parse(data);
                self.usage.update(event.usage());
                if let Some(reason) = event.stop_reason() {
                    self.finish(FinishReason::named(reason.as_bytes()));
                }
            }
            b"message_stop" => self.end(Terminal::MessageStop),
            b"response.completed" => self.on_response(Terminal::ResponseCompleted, data),
            b"response.incomplete" => self.on_response(Terminal::ResponseIncomplete, data),
            b"response.failed" => {
                self.on_response(Terminal::ResponseFailed, data);
                self.fail(data);
            }
            _ => {}
        }
    }

    /// A chunk of a chat or text completion.
    fn on_chunk(&mut self, data: &[u8]) {
        for at in FINISH_REASON.find_iter(data) {
            if let Some(reason) = finish_reason_at(data, at) {
                self.finish(reason);
            }
        }
        if let Some(usage) = USAGE.find(data).and_then(|at| usage_at(data, at)) {
            self.usage.update(usage);
        }
    }

    fn on_response(&mut self, terminal: Terminal, data: &[u8]) {
        let event: wire::ResponseEvent = wire::parse(data);
        self.usage.update(event.usage());
        self.finish(match (terminal, event.status()) {
            (Terminal::ResponseFailed, _) => FinishReason::Error,
            // vLLM closes a response that hit its limit with `response.completed`, the status telling the truth.
            (Terminal::ResponseIncomplete, _) | (_, Some("incomplete")) => match event.incomplete_reason() {
                Some("content_filter") => FinishReason::ContentFilter,
                _ => FinishReason::Length,
            },
            _ => FinishReason::Stop,
        });
        self.end(terminal);
    }

    fn finish(&mut self, reason: FinishReason) {
        self.finished_choices = self.finished_choices.saturating_add(1);
        if !self.finish_reason.is_some_and(FinishReason::is_failure) {
            self.finish_reason = Some(reason);
        }
    }

    fn end(&mut self, terminal: Terminal) {
        self.terminal.get_or_insert(terminal);
    }

    fn fail(&mut self, data: &[u8]) {
        self.error.get_or_insert_with(|| wire::error_message(data));
    }
}

/// What a unary JSON body says of itself, taken in as it passes.
///
/// `usage` is looked for wherever it stands: with `return_token_ids` the prompt's ids come behind it, and may be
/// hundreds of kilobytes. Memory is bounded: no more than the last 16 KiB and one chunk are kept.
#[derive(Debug, Clone, Default)]
pub struct BodyFacts {
    /// The end of what has passed, not looked at yet, behind an overlap that has been.
    recent: Vec<u8>,
    usage: Usage,
    finish_reason: Option<FinishReason>,
}

impl BodyFacts {
    /// Kept of the past, so that a `usage` object cut by a chunk boundary is still seen whole: many times its size.
    const OVERLAP: usize = 16 << 10;

    /// Takes in the next bytes of the body.
    pub fn push(&mut self, chunk: &[u8]) {
        self.recent.extend_from_slice(chunk);
        if self.recent.len() >= 2 * Self::OVERLAP {
            (self.usage, self.finish_reason) = (self.usage(), self.finish_reason());
            self.recent.drain(..self.recent.len() - Self::OVERLAP);
        }
    }

    /// The token counts of all that has passed.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut usage = self.usage;
        for newer in USAGE.find_iter(&self.recent).filter_map(|at| usage_at(&self.recent, at)) {
            usage.update(newer);
        }
        usage
    }

    /// The last choice's finish reason, a failure of any choice going first.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        let recent =
            FINISH_REASON.find_iter(&self.recent).filter_map(|at| finish_reason_at(&self.recent, at));
        self.finish_reason
            .into_iter()
            .chain(recent)
            .reduce(|kept, next| if kept.is_failure() { kept } else { next })
    }
}

/// What follows `prefix` in `json`, white space between tokens left out.
#[inline]
fn after<'a>(json: &'a [u8], prefix: &[&[u8]]) -> Option<&'a [u8]> {
    prefix.iter().try_fold(json, |rest, token| rest.trim_ascii_start().strip_prefix(*token))
}

/// Whether the payload is an error object: `{"error":...` (not null), or vLLM's older `{"object":"error",...`.
#[inline]
fn is_error(data: &[u8]) -> bool {
    if let Some(value) = after(data, &[b"{", br#""error""#, b":"]) {
        return !value.trim_ascii_start().starts_with(b"null");
    }
    after(data, &[b"{", br#""object""#, b":", br#""error""#]).is_some()
}

/// The payload's `type`, if that is its first key; empty if not.
#[inline]
fn type_of(data: &[u8]) -> &[u8] {
    after(data, &[b"{", br#""type""#, b":", b"\""]).and_then(until_quote).unwrap_or_default()
}

/// The text before the next quote: enough for the plain words that we compare with.
fn until_quote(text: &[u8]) -> Option<&[u8]> {
    text.get(..memchr::memchr(b'"', text)?)
}

/// The reason behind a `"finish_reason":` that was found at `at`; `None` for null.
#[inline]
fn finish_reason_at(json: &[u8], at: usize) -> Option<FinishReason> {
    let value = after(json.get(at + FINISH_REASON.needle().len()..)?, &[b"\""])?;
    until_quote(value).map(FinishReason::named)
}

/// The counts behind a `"usage":` that was found at `at`; `None` if there are none.
fn usage_at(json: &[u8], at: usize) -> Option<Usage> {
    let value = json.get(at + USAGE.needle().len()..)?.trim_ascii_start();
    if !value.starts_with(b"{") {
        return None;
    }
    let usage = wire::parse::<wire::Usage>(value).counts();
    (usage != Usage::default()).then_some(usage)
}
