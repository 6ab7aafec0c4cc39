//! What the client has seen of a chat or text completion.

use std::ops::Range;

use serde::{Deserialize, de::IgnoredAny};

use super::{
    Loss, Verdict,
    sample::{Sample, push_ids},
};
use crate::openai::span::{self, Step::At, Step::Key};

/// What the client asked for that decides what it may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wishes {
    /// A chat completion, else a text completion.
    pub chat: bool,
    /// It asked for token ids.
    pub ids: bool,
    /// Token ids that it did not ask for are taken out of every chunk.
    pub strip: bool,
}

/// The memory of one stream.
#[derive(Debug)]
pub struct Seen {
    wishes: Wishes,
    /// `id` and `created` of the stream, as they are written.
    pub(super) names: Option<(Vec<u8>, Vec<u8>)>,
    /// Ids of the prompt; empty if the engine did not say them.
    pub(super) prompt: Vec<u32>,
    /// Ids delivered.
    pub(super) ids: Vec<u32>,
    /// Text delivered, as it is written in JSON.
    pub(super) text: Vec<u8>,
    /// How many of `ids` the delivered text stands for, as far as one can tell from empty texts.
    pub(super) whole: usize,
    /// Whether that is so for sure: the last chunk with text had one id.
    pub(super) sure: bool,
    /// Text came without ids.
    pub(super) without_ids: bool,
    /// The form of the stream's chunks.
    pub(super) sample: Option<Sample>,
    /// Ids delivered whose text was not: they come again.
    again: Vec<u32>,
    /// How many of `again` have come.
    repeated: usize,
    /// Chunks that told a role and nothing else.
    openings: usize,
    /// How many of them come again.
    reopening: usize,
    /// The model thinks: what came last was reasoning.
    pub(super) reasoning: bool,
    /// A tool call has begun.
    pub(super) tool_call: bool,
    /// There are other choices than the first.
    pub(super) several: bool,
    /// Something came that is none of the above.
    pub(super) unknown: bool,
    /// Chunks have a place for a finish reason.
    tells_ends: bool,
    /// The choice has its finish reason.
    finished: bool,
    /// Ids of a chunk that is held.
    held: usize,
}

/// What is to be changed in an event that passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Within the event's data.
    pub range: Range<usize>,
    /// In its place.
    pub with: Vec<u8>,
}

#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    error: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    reasoning: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    function_call: Option<IgnoredAny>,
    #[serde(default)]
    audio: Option<IgnoredAny>,
}

impl Seen {
    /// Nothing yet.
    #[must_use]
    pub fn new(wishes: Wishes) -> Self {
        Self {
            wishes,
            names: None,
            prompt: Vec::new(),
            ids: Vec::new(),
            text: Vec::new(),
            whole: 0,
            sure: true,
            without_ids: false,
            sample: None,
            again: Vec::new(),
            repeated: 0,
            openings: 0,
            reopening: 0,
            reasoning: false,
            tool_call: false,
            several: false,
            unknown: false,
            tells_ends: false,
            finished: false,
            held: 0,
        }
    }

    /// What was asked for.
    #[must_use]
    pub const fn wishes(&self) -> Wishes {
        self.wishes
    }

    /// Whether the client has seen anything of the answer itself.
    #[must_use]
    pub fn is_visible(&self) -> bool {
        !self.text.is_empty() || self.reasoning || self.tool_call || self.unknown
    }

    /// Tokens of the prompt and of the answer so far, where the engine tells ids.
    #[must_use]
    pub fn tokens(&self) -> Option<(u64, u64)> {
        let counted = !self.prompt.is_empty() && !self.without_ids && !self.several;
        counted.then_some((self.prompt.len() as u64, (self.ids.len() + self.held) as u64))
    }

    /// The plan has been carried out: ids behind the first `kept` come again, and are not shown twice.
    pub fn resumed(&mut self, kept: usize) {
        self.again = self.ids.split_off(kept.min(self.ids.len()));
        self.repeated = 0;
        self.reopening = self.openings;
        self.finished = false;
        self.held = 0;
    }

    /// A chunk that tells a role and nothing else: each is told once.
    fn on_opening(&mut self) -> Verdict {
        match self.reopening.checked_sub(1) {
            Some(left) => {
                self.reopening = left;
                Verdict::Drop
            }
            None => {
                self.openings += 1;
                Verdict::Pass
            }
        }
    }

    /// The plain chunk `data`, if it is one of the stream's form; what is to be changed in it.
    #[inline]
    pub fn on_plain(&mut self, data: &[u8]) -> Option<Option<Change>> {
        let sample = self.sample.as_ref().filter(|_| self.again.is_empty())?;
        let fit = sample.fit(data)?;
        if fit.ids_at.is_empty() {
            self.without_ids |= !fit.text.is_empty();
            self.text.extend_from_slice(fit.text);
            return Some(None);
        }
        let before = self.ids.len();
        if !push_ids(data.get(fit.ids_at.clone())?, &mut self.ids) {
            self.ids.truncate(before);
            return None;
        }
        self.note_text(fit.text, before);
        Some(self.strips().then(|| null(fit.ids_at)))
    }

    fn note_text(&mut self, text: &[u8], before: usize) {
        if !text.is_empty() {
            self.text.extend_from_slice(text);
            self.whole = self.ids.len();
            self.sure = self.ids.len() <= before + 1;
            self.reasoning = false;
        }
    }

    const fn strips(&self) -> bool {
        self.wishes.strip && !self.wishes.ids
    }

    /// Any other event.
    pub fn on_event(&mut self, data: &[u8], changes: &mut Vec<Change>) -> Verdict {
        if data == b"[DONE]" {
            // An engine that never speaks of an end says it all with this.
            let is_end = self.finished || self.several || !self.tells_ends;
            return if is_end { Verdict::Pass } else { Verdict::Lost(Loss::Unfinished) };
        }
        let prompt = self.prompt_at(data);
        let Ok(chunk) = parse(data, &prompt) else {
            // JSON that is no chunk is somebody's extension; what is no JSON was cut.
            self.unknown = true;
            return if span::is_json(data) { Verdict::Pass } else { Verdict::Lost(Loss::Garbage) };
        };
        let Some(choices) = chunk.choices else {
            self.unknown |= chunk.error.is_none();
            return if is_failure(data) { Verdict::Lost(Loss::ErrorEvent) } else { Verdict::Pass };
        };
        self.note_names(data);
        if let Some(prompt) = prompt {
            self.take_prompt(prompt, changes);
        }
        match <[Choice; 1]>::try_from(choices) {
            Ok([choice]) if choice.index == 0 && !self.several => self.on_choice(data, &choice, changes),
            // The usage of all, behind the last choice.
            Err(none) if none.is_empty() => match self.finished && !self.several {
                true => Verdict::Hold,
                false => Verdict::Pass,
            },
            Ok([other]) => self.on_other(std::slice::from_ref(&other)),
            Err(others) => self.on_other(&others),
        }
    }

    /// Chunks of streams with several choices: nobody can continue them once something was said.
    fn on_other(&mut self, choices: &[Choice]) -> Verdict {
        self.several = true;
        if let Some(loss) = choices.iter().find_map(|choice| broken_off(choice.finish_reason.as_deref()?)) {
            return Verdict::Lost(loss);
        }
        let says = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let only_opens = |choice: &Choice| {
            let delta = choice.delta.as_ref();
            choice.finish_reason.is_none() && delta.is_some_and(|d| d.role.is_some() && !says(&d.content))
        };
        match choices {
            [choice] if only_opens(choice) => self.on_opening(),
            _ => {
                self.unknown = true;
                Verdict::Pass
            }
        }
    }

    fn on_choice(&mut self, data: &[u8], choice: &Choice, changes: &mut Vec<Change>) -> Verdict {
        if let Some(loss) = choice.finish_reason.as_deref().and_then(broken_off) {
            return Verdict::Lost(loss);
        }
        let path: &[span::Step<'_>] = match self.wishes.chat {
            true => &[Key("choices"), At(0), Key("delta"), Key("content")],
            false => &[Key("choices"), At(0), Key("text")],
        };
        let text = span::get(data, path).and_then(span::string).unwrap_or_default();
        let ids_at = span::find(data, &[Key("choices"), At(0), Key("token_ids")])
            .filter(|range| data.get(range.clone()) != Some(b"null"));
        let mut ids = Vec::new();
        let told =
            ids_at.clone().is_some_and(|range| push_ids(data.get(range).unwrap_or_default(), &mut ids));
        let finish = choice.finish_reason.is_some();
        self.tells_ends |= span::find(data, &[Key("choices"), At(0), Key("finish_reason")]).is_some();
        if let Some(delta) = &choice.delta {
            let is_opening = delta.role.is_some() && text.is_empty() && ids.is_empty() && !finish;
            self.note_delta(delta);
            if is_opening {
                return self.on_opening();
            }
        }
        if let Some(verdict) = self.on_repeated(&mut ids, text, finish, ids_at.clone(), changes) {
            return verdict;
        }
        if let (true, Some(range)) = (self.strips(), ids_at.clone()) {
            changes.push(null(range));
        }
        if finish {
            self.finished = true;
            self.held = ids.len();
            return Verdict::Hold;
        }
        self.without_ids |= !told && !text.is_empty();
        let before = self.ids.len();
        self.ids.append(&mut ids);
        self.note_text(text, before);
        if self.sample.is_none() {
            self.sample = Sample::learn(data, self.wishes.chat);
        }
        Verdict::Pass
    }

    fn note_delta(&mut self, delta: &Delta) {
        let says = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if says(&delta.reasoning) || says(&delta.reasoning_content) {
            self.reasoning = true;
        } else if says(&delta.content) {
            self.reasoning = false;
        }
        self.tool_call |= delta.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
        self.tool_call |= delta.function_call.is_some();
        self.unknown |= delta.audio.is_some();
    }

    /// Ids that the client has already: not shown again if they are the same. If they are not, a sampled answer took another
    /// turn where no text was seen, which only a client that was told the ids could notice.
    fn on_repeated(
        &mut self,
        ids: &mut Vec<u32>,
        text: &[u8],
        finish: bool,
        ids_at: Option<Range<usize>>,
        changes: &mut Vec<Change>,
    ) -> Option<Verdict> {
        let expected = self.again.get(self.repeated..).filter(|expected| !expected.is_empty())?;
        let same = ids.iter().zip(expected).take_while(|(a, b)| a == b).count();
        let is_over = same == expected.len();
        if same < ids.len() && !is_over || (same < expected.len() && (finish || !text.is_empty())) {
            if self.wishes.ids {
                return Some(Verdict::Lost(Loss::Garbage));
            }
            self.again.clear();
            return None;
        }
        self.repeated += same;
        self.ids.extend(ids.drain(..same));
        if is_over {
            self.again.clear();
        }
        if ids.is_empty() && text.is_empty() && !finish {
            return Some(Verdict::Drop);
        }
        if let Some(range) = ids_at.filter(|_| same > 0 && !self.strips()) {
            changes.push(Change { range, with: super::sample::ids_json(ids) });
        }
        None
    }

    fn note_names(&mut self, data: &[u8]) {
        if self.names.is_none() {
            let get = |key| span::get(data, &[Key(key)]).map(<[u8]>::to_vec);
            self.names = get("id").zip(get("created"));
        }
    }

    fn prompt_at(&self, data: &[u8]) -> Option<Prompt> {
        let path: &[span::Step<'_>] = match self.wishes.chat {
            true => &[Key("prompt_token_ids")],
            false => &[Key("choices"), At(0), Key("prompt_token_ids")],
        };
        let range = span::find(data, path)?;
        let array = data.get(range.clone()).filter(|array| *array != b"null")?;
        let mut ids = Vec::new();
        let plain = push_ids(array, &mut ids);
        Some(Prompt { range, ids: plain.then_some(ids) })
    }

    /// The prompt's ids come once, and are the client's only if it asked for them: a long prompt's are long.
    fn take_prompt(&mut self, prompt: Prompt, changes: &mut Vec<Change>) {
        let known = !self.prompt.is_empty();
        if known || !self.wishes.ids {
            changes.push(null(prompt.range));
        }
        if !known {
            self.prompt = prompt.ids.unwrap_or_default();
        }
    }
}

/// The ids of the prompt in a chunk.
struct Prompt {
    /// Where they stand.
    range: Range<usize>,
    /// Themselves, unless there is something else.
    ids: Option<Vec<u32>>,
}

/// The chunk, read past the ids of its prompt: those are looked at already, and may be most of it.
fn parse(data: &[u8], prompt: &Option<Prompt>) -> serde_json::Result<Chunk> {
    let around = |range: &Range<usize>| Some((data.get(..range.start)?, data.get(range.end..)?));
    let read = prompt.as_ref().filter(|prompt| prompt.ids.is_some());
    match read.and_then(|prompt| around(&prompt.range)) {
        Some((before, behind)) => serde_json::from_slice(&[before, b"null", behind].concat()),
        None => serde_json::from_slice(data),
    }
}

fn null(range: Range<usize>) -> Change {
    Change { range, with: b"null".to_vec() }
}

/// Finish reasons that say that the engine broke the answer off.
fn broken_off(reason: &str) -> Option<Loss> {
    match reason {
        "abort" => Some(Loss::Aborted),
        "error" => Some(Loss::ErrorEvent),
        _ => None,
    }
}

/// Whether an error object is the engine's failure and not the client's fault.
#[must_use]
pub fn is_failure(data: &[u8]) -> bool {
    let is_error = span::get(data, &[Key("error")]).is_some_and(|error| error != b"null")
        || span::get(data, &[Key("object")]) == Some(b"\"error\"");
    let code = span::get(data, &[Key("error"), Key("code")]).or_else(|| span::get(data, &[Key("code")]));
    let status = code.and_then(|code| std::str::from_utf8(code).ok()?.trim_matches('"').parse::<u16>().ok());
    is_error && !status.is_some_and(|status| (400..500).contains(&status))
}
