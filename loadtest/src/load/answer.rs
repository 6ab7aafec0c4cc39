//! What a stream has said so far, and whether it was right.

use super::{
    pattern::{Pattern, decimal},
    shape::{Misshapen, Shape},
    sse::{self, Event, STAMP, STAMP_DIGITS, Splitter, TooLong},
    stats::Stats,
    verify::{Checker, Wrong},
};

/// Longest example of an error body kept.
const MAX_EXAMPLE: usize = 300;

/// The kind of failure of a stream that ended with an error event which says what it is: what came before was right, and
/// nobody was deceived.
pub const ERROR_EVENT: &str = "error in the stream";

/// A failed request: its kind, for counting, and what happened.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: String,
    pub(super) detail: String,
}

impl Failure {
    pub(super) fn new(kind: &str, detail: impl ToString) -> Self {
        Self { kind: kind.into(), detail: detail.to_string() }
    }
}

impl From<Wrong> for Failure {
    fn from(wrong: Wrong) -> Self {
        Self::new(wrong.kind(), &wrong)
    }
}

impl From<Misshapen> for Failure {
    fn from(misshapen: Misshapen) -> Self {
        Self::new("misshapen stream", &misshapen)
    }
}

impl From<TooLong> for Failure {
    fn from(_: TooLong) -> Self {
        Self::new("garbage", "an endless event")
    }
}

/// When a request should have been sent, and when it was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Began {
    pub(super) intended_ns: u64,
    pub(super) began_ns: u64,
}

/// One stream.
pub(super) struct Answer {
    began: Began,
    checker: Checker,
    /// Ids must come, and are checked.
    ids: bool,
    splitter: Splitter,
    pattern: Pattern,
    shape: Shape,
    /// When text came last.
    last_ns: Option<u64>,
    finish: Option<String>,
    usage: Option<(u64, u64)>,
    done: bool,
}

impl Answer {
    pub(super) fn new(began: Began, checker: Checker, ids: bool) -> Self {
        Self {
            began,
            checker,
            ids,
            splitter: Splitter::default(),
            pattern: Pattern::default(),
            shape: Shape::default(),
            last_ns: None,
            finish: None,
            usage: None,
            done: false,
        }
    }

    /// Takes bytes that were there at `now_ns`.
    pub(super) fn take(&mut self, bytes: &[u8], now_ns: u64, stats: &mut Stats) -> Result<(), Failure> {
        let mut splitter = std::mem::take(&mut self.splitter);
        let mut events = 0;
        let taken = splitter.split(bytes, |event| {
            events += 1;
            self.event(event, now_ns, stats)
        });
        self.splitter = splitter;
        stats.read(now_ns, bytes.len(), events);
        taken
    }

    fn event(&mut self, event: &[u8], now_ns: u64, stats: &mut Stats) -> Result<(), Failure> {
        if self.done {
            return Err(Failure::new("garbage", "an event after [DONE]"));
        }
        if let Some(fit) = self.pattern.fit(event)
            && self.checker.one_token(fit.text)
        {
            if let Some(stamp) = fit.stamp {
                note_stamp(stamp, now_ns, stats);
            }
            if !fit.text.is_empty() {
                self.note_text(now_ns, stats);
            }
            return Ok(());
        }
        self.parsed(event, now_ns, stats)
    }

    /// An event that is looked at with care.
    fn parsed(&mut self, event: &[u8], now_ns: u64, stats: &mut Stats) -> Result<(), Failure> {
        match sse::parse(event) {
            Event::Delta { content, finish_reason } => {
                self.shape.take(event)?;
                if self.ids {
                    check_ids(event, &mut self.checker)?;
                }
                if let Some(stamp) = sse::string_after(event, STAMP)
                    && stamp.len() == STAMP_DIGITS
                    && let Some(stamp) = decimal(stamp)
                {
                    note_stamp(stamp, now_ns, stats);
                }
                if !content.is_empty() {
                    let mut text = String::new();
                    sse::unescape(content, &mut text).ok_or_else(|| Failure::new("garbage", lossy(event)))?;
                    self.checker.text(&text)?;
                    self.note_text(now_ns, stats);
                    if finish_reason.is_none() && !self.ids {
                        self.pattern.learn(event, content);
                    }
                }
                if let Some(reason) = finish_reason {
                    self.finish = Some(String::from_utf8_lossy(reason).into_owned());
                }
            }
            Event::Usage { prompt_tokens, completion_tokens } => {
                self.shape.take(event)?;
                self.usage = Some((prompt_tokens, completion_tokens));
            }
            Event::Done => self.done = true,
            Event::Error(data) if sse::is_typed(data) => {
                return Err(Failure::new(ERROR_EVENT, lossy(data)));
            }
            Event::Error(data) => return Err(Failure::new("error without a type", lossy(data))),
            Event::Comment => {}
            Event::Unknown => return Err(Failure::new("garbage", lossy(event))),
        }
        Ok(())
    }

    /// Text came.
    fn note_text(&mut self, now_ns: u64, stats: &mut Stats) {
        match self.last_ns.replace(now_ns) {
            None if stats.span.holds(self.began.intended_ns) => {
                stats.ttft.note(self.began.intended_ns, now_ns);
                stats.ttft_service.note(self.began.began_ns, now_ns);
            }
            Some(last_ns) if stats.span.holds(now_ns) => stats.gap.note(last_ns, now_ns),
            None | Some(_) => {}
        }
    }

    /// Looks back at the whole of it; the text of the answer, if it was kept.
    pub(super) fn end(mut self) -> Result<Option<String>, Failure> {
        if self.splitter.pending() > 0 || !self.done {
            return Err(Failure::new("cut", "ended without [DONE]"));
        }
        if self.ids {
            self.checker.end_of_ids()?;
        }
        self.checker.end(self.finish.as_deref(), self.usage)?;
        self.shape.end()?;
        Ok(self.checker.said())
    }
}

fn note_stamp(stamp_ns: u64, now_ns: u64, stats: &mut Stats) {
    if stats.span.holds(now_ns) {
        stats.one_way.note(stamp_ns, now_ns);
    }
}

/// Checks a whole answer; its text, if it was kept.
pub(super) fn check_whole(body: &[u8], mut checker: Checker, ids: bool) -> Result<Option<String>, Failure> {
    let body: serde_json::Value = serde_json::from_slice(body).map_err(|e| Failure::new("garbage", e))?;
    let choice = &body["choices"][0];
    checker.text(choice["message"]["content"].as_str().unwrap_or(""))?;
    if ids {
        checker.prompt_ids(&ids_of(&body["prompt_token_ids"]))?;
        checker.ids(&ids_of(&choice["token_ids"]))?;
        checker.end_of_ids()?;
    }
    let usage = &body["usage"];
    let usage = usage["prompt_tokens"].as_u64().zip(usage["completion_tokens"].as_u64());
    checker.end(choice["finish_reason"].as_str(), usage)?;
    Ok(checker.said())
}

/// Checks the ids that an event tells.
fn check_ids(event: &[u8], checker: &mut Checker) -> Result<(), Failure> {
    if let Some(prompt) = sse::numbers_after(event, b"\"prompt_token_ids\":") {
        checker.prompt_ids(&prompt)?;
    }
    match sse::numbers_after(event, b"\"token_ids\":") {
        Some(ids) => Ok(checker.ids(&ids)?),
        None => Ok(()),
    }
}

/// A list of ids in a body.
fn ids_of(value: &serde_json::Value) -> Vec<u32> {
    let id = |id: &serde_json::Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    value.as_array().map(|ids| ids.iter().filter_map(id).collect()).unwrap_or_default()
}

/// The beginning of bytes, as text.
pub(super) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.get(..MAX_EXAMPLE).unwrap_or(bytes)).into_owned()
}
