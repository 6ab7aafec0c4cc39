//! Every event of a stream on its way to the client.

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};

use super::{
    Answers, Ask, Loss, NoPlan, Refusal, Verdict,
    body::Members,
    chunks::{self, Change, Wishes},
    messages, plan, responses,
    seam::Seam,
};
use crate::openai::{
    Api,
    event::walk,
    request::{Edit, rewrite},
    usage::StreamFacts,
};

/// What is remembered of a stream, by its API.
#[derive(Debug)]
enum Memory {
    /// Nothing: it cannot be continued.
    None,
    Chunks(Box<chunks::Seen>),
    Messages(Box<messages::Seen>),
    Responses(Box<responses::Seen>),
}

/// What the client has seen of one stream.
#[derive(Debug)]
pub struct Tracker {
    /// What the events said of themselves.
    pub facts: StreamFacts,
    memory: Memory,
    /// Events of which the next one tells whether they are the client's.
    held: BytesMut,
    /// Events that came, whatever became of them.
    came: u64,
}

/// What may go to the client now.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    /// Whole events; may be empty.
    pub bytes: Bytes,
    /// The stream is lost behind them.
    pub loss: Option<Loss>,
}

impl Tracker {
    /// Of a stream that nobody will continue: its events pass as they are.
    #[must_use]
    pub fn idle() -> Self {
        Self { facts: StreamFacts::default(), memory: Memory::None, held: BytesMut::new(), came: 0 }
    }

    /// Of a stream of `api`.
    #[must_use]
    pub fn new(api: Api, wishes: Wishes) -> Self {
        let chunks = |chat| Memory::Chunks(Box::new(chunks::Seen::new(Wishes { chat, ..wishes })));
        let memory = match api {
            Api::ChatCompletions => chunks(true),
            Api::Completions => chunks(false),
            Api::Messages => Memory::Messages(Box::default()),
            Api::Responses => Memory::Responses(Box::default()),
            _ => Memory::None,
        };
        Self { memory, ..Self::idle() }
    }

    /// Whether it remembers anything.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.memory, Memory::None)
    }

    /// Events that have come, whatever became of them.
    #[must_use]
    pub const fn came(&self) -> u64 {
        self.came
    }

    /// Takes whole events in, and says which of them are the client's.
    pub fn pass(&mut self, events: Bytes) -> Passed {
        if self.is_idle() {
            let before = self.facts.events;
            self.facts.observe(&events);
            self.came += self.facts.events - before;
            return Passed { bytes: events, loss: None };
        }
        let first = !self.facts.begun;
        self.facts.begun |= !events.is_empty();
        let mut changes: Vec<Change> = Vec::new();
        let mut edits: Vec<(std::ops::Range<usize>, Vec<u8>)> = Vec::new();
        // Where what is held begins: before these events, within them, or nowhere.
        let (mut was_held, mut hold_from) = (!self.held.is_empty(), None);
        let mut loss = None;
        for event in walk(&events, first) {
            self.came += 1;
            let verdict = self.judge(event.name, &event.data, &mut changes);
            let shown = matches!(verdict, Verdict::Pass | Verdict::Hold) && !changes.is_empty();
            if let (Cow::Borrowed(data), true) = (&event.data, shown) {
                let at = (data.as_ptr() as usize).saturating_sub(events.as_ptr() as usize);
                edits.extend(changes.drain(..).map(|c| (at + c.range.start..at + c.range.end, c.with)));
            }
            changes.clear();
            match verdict {
                Verdict::Pass => (was_held, hold_from) = (false, None),
                Verdict::Hold => hold_from = hold_from.or(Some(event.range.start)),
                Verdict::Drop => edits.push((event.range, Vec::new())),
                Verdict::Lost(how) => {
                    hold_from = hold_from.or(Some(event.range.start));
                    // What is lost is not kept with what is held.
                    edits.push((event.range.start..events.len(), Vec::new()));
                    loss = Some(how);
                    break;
                }
            }
        }
        if hold_from.is_none() && edits.is_empty() && self.held.is_empty() {
            return Passed { bytes: events, loss };
        }
        let cut = hold_from.unwrap_or(events.len());
        let part = |from: usize, upto: usize| {
            let inside = edits.iter().filter(|(range, _)| range.start >= from && range.start < upto);
            let edits: Vec<Edit<'_>> = inside
                .map(|(range, with)| (range.start - from..range.end.min(upto) - from, &**with))
                .collect();
            rewrite(&events.slice(from..upto), edits)
        };
        let passing = part(0, cut);
        let released = if was_held { BytesMut::new() } else { self.held.split() };
        if cut < events.len() {
            self.held.extend_from_slice(&part(cut, events.len()));
        }
        let bytes = match released.is_empty() {
            true => passing,
            false => [&released[..], &passing].concat().into(),
        };
        Passed { bytes, loss }
    }

    fn judge(&mut self, name: &[u8], data: &[u8], changes: &mut Vec<Change>) -> Verdict {
        let verdict = match &mut self.memory {
            Memory::None => Verdict::Pass,
            Memory::Chunks(seen) => {
                if let Some(change) = seen.on_plain(data) {
                    self.facts.events += 1;
                    changes.extend(change);
                    return Verdict::Pass;
                }
                seen.on_event(data, changes)
            }
            Memory::Messages(seen) => seen.on_event(name, data),
            Memory::Responses(seen) => seen.on_event(name, data),
        };
        if matches!(verdict, Verdict::Pass | Verdict::Hold) {
            self.facts.on_event(name, data);
        }
        verdict
    }

    /// What is held: the client's after all, when the stream cannot go on.
    pub fn take_held(&mut self) -> Bytes {
        self.held.split().freeze()
    }

    /// How the stream may go on; `original` is the request as its engine got it.
    ///
    /// # Errors
    /// What must be known before, or why it may not.
    pub fn plan(&self, original: &[u8], answers: &Answers) -> Result<Plan, NoPlan> {
        let original = Members::of(original)?;
        match &self.memory {
            Memory::None => Err(Refusal::Api.into()),
            Memory::Chunks(seen) => plan::plan(seen, &original, answers),
            Memory::Messages(seen) => seen.plan(&original, answers).map(|(ask, stitch)| Plan {
                ask,
                seam: Seam::Messages(Box::new(stitch)),
                kept: 0,
            }),
            Memory::Responses(seen) => seen.plan(&original, answers).map(|(ask, stitch)| Plan {
                ask,
                seam: Seam::Responses(Box::new(stitch)),
                kept: 0,
            }),
        }
    }

    /// A plan was carried out: what it brings is the rest of this stream.
    pub fn resumed(&mut self, kept: usize) {
        self.held.clear();
        match &mut self.memory {
            Memory::None => {}
            Memory::Chunks(seen) => seen.resumed(kept),
            Memory::Messages(seen) => seen.resumed(),
            Memory::Responses(seen) => seen.resumed(),
        }
    }

    /// Tokens of the prompt, 0 where that is not known, and of the answer, as far as they were told: they count even where no
    /// usage was.
    #[must_use]
    pub fn tokens(&self) -> Option<(u64, u64)> {
        match &self.memory {
            Memory::None => None,
            Memory::Chunks(seen) => seen.tokens(),
            Memory::Messages(seen) => seen.tokens().map(|output| (0, output)),
            Memory::Responses(seen) => seen.tokens().map(|output| (0, output)),
        }
    }
}

/// How a stream goes on.
#[derive(Debug)]
pub struct Plan {
    /// What the next engine is asked.
    pub ask: Ask,
    /// What becomes of its events.
    pub seam: Seam,
    /// Of the ids delivered, those that do not come again.
    pub kept: usize,
}
