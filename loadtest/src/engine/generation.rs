//! One choice of one request: from its prompt to its last token. Pure: what an engine answers, and what a checker expects.
//!
//! A [`Generation`] knows its limits, stop strings and its natural end, and yields one [`Step`] per token. It holds back
//! the text that may still turn out to be the start of a stop string, as vLLM does: always as many characters as the
//! longest one has, less one. No clock, no I/O: who calls [`Generation::step`] decides when.
//!
//! As vLLM also does: a prompt of ids that ends within a character has all of its text given out again, in front of the
//! character, as soon as that is complete ([`Generation::after`]). A gateway must not continue from such a place.
//!
//! The natural end is drawn only where the output may fill the context ([`Limits::may_end`]): a request that names a
//! smaller `max_tokens` gets exactly that many. A continuation that keeps this property ends where the original would.

use super::tokens::{self, Prefix};

/// Tokens in one KV block, and so between two block hashes.
pub const BLOCK_TOKENS: u64 = 16;

/// When a generation ends, beside the will of its client.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Tokens to generate at most; at least 1.
    pub max_tokens: u64,
    /// Tokens before which no stop string, stop id or natural end counts.
    pub min_tokens: u64,
    /// True if the generation may end by itself: it may fill the context and has no `ignore_eos`.
    pub may_end: bool,
    /// Strings that end the output; the one that is complete first wins, of several the first in this list.
    pub stop: Vec<String>,
    /// Ids that end the output.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string, or the text of the stop id, in the output.
    pub include_stop: bool,
}

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// `max_tokens` reached.
    Length,
    /// Natural end.
    End,
    /// A stop string was found.
    StopString(String),
    /// A stop id was generated.
    StopToken(u32),
    /// Ended by the engine, not by the request: a shutdown or a fault.
    Abort,
}

impl Finish {
    /// The word for `finish_reason`, and for the label of the metric.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::End | Self::StopString(_) | Self::StopToken(_) => "stop",
            Self::Abort => "abort",
        }
    }
}

/// What one token brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The token.
    pub id: u32,
    /// Set on the last token.
    pub finish: Option<Finish>,
}

/// One choice being generated.
#[derive(Debug, Clone)]
pub struct Generation {
    prefix: Prefix,
    salt: u64,
    limits: Limits,
    generated: u64,
    /// The end of the text, as long as a stop string may begin in it.
    window: String,
    /// Bytes of `window` that were given out.
    given: usize,
    /// Bytes in which a stop string may begin: one less than the longest.
    reach: usize,
    /// Characters that are held back: one less than the longest stop string.
    held_back: usize,
    /// The prompt's bytes and those generated since, as long as they end within a character.
    open: Option<Vec<u8>>,
    finished: bool,
    piece: Vec<u8>,
}

impl Generation {
    /// A generation after `prefix`. `salt` comes from [`tokens::salt`].
    pub fn new(prefix: Prefix, salt: u64, limits: Limits) -> Self {
        let longest = limits.stop.iter().map(String::len).max().unwrap_or(0);
        let held_back = match limits.include_stop {
            true => 0,
            false => limits.stop.iter().map(|stop| stop.chars().count()).max().unwrap_or(0).saturating_sub(1),
        };
        Self {
            prefix,
            salt,
            limits,
            generated: 0,
            window: String::new(),
            given: 0,
            reach: longest.saturating_sub(1),
            held_back,
            open: None,
            finished: false,
            piece: Vec::with_capacity(8),
        }
    }

    /// The same with the ids of its prompt, which matter if they end within a character.
    #[must_use]
    pub fn after(mut self, prompt: &[u32]) -> Self {
        // No character has more tokens than bytes, and special tokens between them are rare.
        let tail = prompt.get(prompt.len().saturating_sub(16)..).unwrap_or(prompt);
        if tokens::shown(tail).ends_with('\u{fffd}') {
            let mut bytes = Vec::new();
            for &id in prompt {
                tokens::decode_into(id, &mut bytes);
            }
            self.open = Some(bytes);
        }
        self
    }

    /// Tokens generated so far.
    pub const fn generated(&self) -> u64 {
        self.generated
    }

    /// True after the last token.
    pub const fn is_finished(&self) -> bool {
        self.finished
    }

    /// The sequence so far, prompt included.
    pub const fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// Generates one token and appends the text it releases to `text`. None after the last token.
    pub fn step(&mut self, text: &mut String) -> Option<Step> {
        if self.finished {
            return None;
        }
        let past_minimum = self.generated >= self.limits.min_tokens;
        let ends = self.limits.may_end && past_minimum && self.prefix.ends(self.salt);
        let id = if ends { tokens::EOS } else { self.prefix.next(self.salt) };
        self.prefix.push(id);
        self.generated += 1;
        let finish = self.finish_at(id, ends, past_minimum, text);
        self.finished = finish.is_some();
        Some(Step { id, finish })
    }

    /// Ends it where it is, and appends the text that was held back.
    pub fn abort(&mut self, text: &mut String) {
        self.finished = true;
        self.release(0, text);
    }

    /// Takes the text of token `id` in, gives out what may be given, and says whether this was the last token.
    fn finish_at(&mut self, id: u32, ends: bool, past_minimum: bool, text: &mut String) -> Option<Finish> {
        let stops = !ends && past_minimum && self.limits.stop_token_ids.contains(&id);
        self.take_piece(id);
        if stops && !self.limits.include_stop {
            self.piece.clear();
        }
        // Pieces are whole characters: a head has no bytes of its own.
        let piece = std::str::from_utf8(&self.piece).unwrap_or("\u{fffd}");
        let last = self.generated >= self.limits.max_tokens;
        if self.limits.stop.is_empty() {
            text.push_str(piece);
        } else {
            let before = self.window.len();
            self.window.push_str(piece);
            if past_minimum && let Some(found) = self.found_stop(before) {
                return Some(self.stop_at(found, text));
            }
        }
        if ends || stops {
            self.release(0, text);
            return Some(if ends { Finish::End } else { Finish::StopToken(id) });
        }
        self.release(if last { 0 } else { self.held_back }, text);
        last.then_some(Finish::Length)
    }

    /// Puts the text that a token brings into `piece`.
    fn take_piece(&mut self, id: u32) {
        self.piece.clear();
        tokens::decode_into(id, &mut self.piece);
        let Some(open) = &mut self.open else { return };
        open.append(&mut self.piece);
        let whole = String::from_utf8_lossy(open);
        if !self.prefix.is_mid_char() && !whole.ends_with('\u{fffd}') {
            self.piece = whole.into_owned().into_bytes();
            self.open = None;
        }
    }

    /// Of the stop strings that end in the text added after byte `before`, the one that ends first: its index and where
    /// it starts.
    fn found_stop(&self, before: usize) -> Option<(usize, usize)> {
        let found = self.limits.stop.iter().enumerate().filter_map(|(i, stop)| {
            let mut from = before.saturating_sub(stop.len().saturating_sub(1));
            while !self.window.is_char_boundary(from) {
                from += 1;
            }
            let at = from + self.window.get(from..)?.find(stop.as_str())?;
            Some((at + stop.len(), i, at))
        });
        found.min().map(|(_, i, at)| (i, at))
    }

    fn stop_at(&mut self, (index, start): (usize, usize), text: &mut String) -> Finish {
        let stop = self.limits.stop[index].clone();
        // What follows start was not given out, except with include_stop, where start + len was not.
        let keep = if self.limits.include_stop { start + stop.len() } else { start };
        self.window.truncate(keep);
        self.release(0, text);
        Finish::StopString(stop)
    }

    /// Gives out the window but for its last `keep` characters, and forgets what no stop string can begin in any more.
    fn release(&mut self, keep: usize, text: &mut String) {
        let upto = match keep {
            0 => self.window.len(),
            _ => self.window.char_indices().rev().nth(keep - 1).map_or(0, |(at, _)| at),
        };
        if let Some(new) = self.window.get(self.given..upto) {
            text.push_str(new);
            self.given = upto;
        }
        let mut past = self.window.len().saturating_sub(self.reach).min(self.given);
        while !self.window.is_char_boundary(past) {
            past -= 1;
        }
        self.window.drain(..past);
        self.given -= past;
    }
}

/// Everything a choice says, computed at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The text, stop string cut off.
    pub text: String,
    /// The ids, the last one included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Runs `generation` to its end, or to `at_most` tokens: then it is aborted there.
pub fn complete(mut generation: Generation, at_most: u64) -> Outcome {
    let (mut text, mut ids) = (String::new(), Vec::new());
    let mut left = at_most;
    while left > 0 {
        left -= 1;
        let Some(step) = generation.step(&mut text) else { break };
        ids.push(step.id);
        if let Some(finish) = step.finish {
            return Outcome { text, ids, finish };
        }
    }
    Outcome { text, ids, finish: Finish::Abort }
}

/// The hashes of the full KV blocks of `ids`: each names the whole sequence up to its block's end.
pub fn block_hashes(ids: &[u32]) -> (Prefix, Vec<u64>) {
    let mut prefix = Prefix::new();
    let mut blocks = Vec::with_capacity(ids.len() / 16);
    for &id in ids {
        prefix.push(id);
        if prefix.len().is_multiple_of(BLOCK_TOKENS) {
            blocks.push(prefix.hash());
        }
    }
    (prefix, blocks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(max_tokens: u64) -> Limits {
        Limits { max_tokens, ..Limits::default() }
    }

    fn run(limits: Limits) -> Outcome {
        complete(Generation::new(Prefix::of(&[1, 2, 3]), 0, limits), u64::MAX)
    }

    #[test]
    fn ends_by_length_with_exactly_max_tokens() {
        let all = run(limits(40));
        assert_eq!((all.ids.len(), all.finish), (40, Finish::Length));
    }

    #[test]
    fn ends_by_itself_only_if_it_may() {
        let chat = Prefix::of(&[tokens::IM_START]);
        let open = Limits { max_tokens: 100_000, may_end: true, ..Limits::default() };
        let all = complete(Generation::new(chat, 0, open), u64::MAX);
        assert_eq!(all.finish, Finish::End);
        assert_eq!(all.ids.last(), Some(&tokens::EOS));
        assert!(all.ids.len() <= 140);
        let shut = complete(Generation::new(chat, 0, limits(500)), u64::MAX);
        assert_eq!(shut.ids.len(), 500);
    }

    #[test]
    fn min_tokens_delays_every_kind_of_end() {
        let chat = Prefix::of(&[tokens::IM_START]);
        let open = Limits { max_tokens: 100_000, min_tokens: 300, may_end: true, ..Limits::default() };
        let all = complete(Generation::new(chat, 0, open), u64::MAX);
        assert!(all.ids.len() > 300);
        let early = run(limits(40)).text.chars().take(4).collect::<String>();
        let stopped = run(Limits { stop: vec![early.clone()], min_tokens: 20, ..limits(40) });
        assert!(stopped.text.starts_with(&early));
    }

    #[test]
    fn stop_ids_end_the_output() {
        let all = run(limits(40));
        let stop = Limits { stop_token_ids: vec![all.ids[7]], ..limits(40) };
        let stopped = run(stop.clone());
        assert_eq!((&stopped.ids[..], stopped.finish), (&all.ids[..8], Finish::StopToken(all.ids[7])));
        assert_eq!(stopped.text, tokens::decoded(&all.ids[..7]));
        assert_eq!(run(Limits { include_stop: true, ..stop }).text, tokens::decoded(&all.ids[..8]));
    }

    #[test]
    fn of_several_stop_strings_the_first_to_be_complete_wins() {
        let all = run(limits(40)).text;
        let (early, late) = (all[2..4].to_string(), all[1..5].to_string());
        let stopped = run(Limits { stop: vec![late, early.clone()], ..limits(40) });
        assert_eq!((stopped.text, stopped.finish), (all[..2].to_string(), Finish::StopString(early)));
    }

    /// Where text is held back, it is by characters, as Python counts them.
    #[test]
    fn as_many_characters_are_held_back_as_a_stop_string_may_need() {
        let mut generation =
            Generation::new(Prefix::of(&[9]), 0, Limits { stop: vec!["1".repeat(8)], ..limits(300) });
        let (mut text, mut ids) = (String::new(), Vec::new());
        while let Some(step) = generation.step(&mut text) {
            ids.push(step.id);
            let whole = tokens::decoded(&ids).chars().count();
            let kept = if step.finish.is_some() { 0 } else { 7 };
            assert_eq!(text.chars().count(), whole.saturating_sub(kept));
        }
        assert!(text.chars().any(|c| c.len_utf8() == 4), "characters of several bytes are there");
        let mut aborted =
            Generation::new(Prefix::of(&[9]), 0, Limits { stop: vec!["1".repeat(8)], ..limits(9) });
        let (mut text, ids) =
            (String::new(), [(); 4].map(|()| aborted.step(&mut String::new()).map(|s| s.id)));
        aborted.abort(&mut text);
        let whole = tokens::decoded(&ids.map(Option::unwrap));
        assert!(whole.ends_with(&text) && text.chars().count() == 7 && aborted.is_finished());
    }

    #[test]
    fn a_prompt_that_ends_within_a_character_comes_back_with_it() {
        let prompt = [&tokens::encoded("Say it. "), &[tokens::CHAR_HEAD][..]].concat();
        let continued = |ids: &[u32]| {
            let generation = Generation::new(Prefix::of(ids), 0, limits(5)).after(ids);
            complete(generation, u64::MAX)
        };
        let all = continued(&prompt);
        assert_eq!(all.text, format!("Say it. {}", tokens::decoded(&all.ids)));
        // From a clean place nothing comes back.
        let clean = [&prompt[..], &all.ids[..1]].concat();
        assert_eq!(continued(&clean).text, tokens::decoded(&continued(&clean).ids));
    }

    #[test]
    fn aborts_at_the_given_count() {
        let generation = Generation::new(Prefix::new(), 0, limits(40));
        assert_eq!(complete(generation, 5).finish, Finish::Abort);
    }

    proptest! {
        /// The output with a stop string equals the output without, cut before (or after) the first match.
        #[test]
        fn stop_strings_cut_exactly(start in 0usize..100, length in 1usize..14, include: bool) {
            let all = run(limits(60));
            let chars: Vec<(usize, char)> = all.text.char_indices().collect();
            let start = start % (chars.len() - 20);
            let stop: String = chars[start..start + length].iter().map(|&(_, c)| c).collect();
            let stopped = run(Limits { stop: vec!["never there".into(), stop.clone()], include_stop: include, ..limits(60) });
            let first = all.text.find(&stop).unwrap();
            let end = if include { first + stop.len() } else { first };
            prop_assert_eq!(stopped.text, &all.text[..end]);
            prop_assert_eq!(stopped.finish, Finish::StopString(stop));
        }

        /// What is given out step by step is the whole text, and never part of a stop string.
        #[test]
        fn deltas_add_up(stop in "[a-z]{2,6}") {
            let limits = Limits { stop: vec![stop], ..limits(80) };
            let mut generation = Generation::new(Prefix::of(&[9]), 0, limits.clone());
            let mut text = String::new();
            while generation.step(&mut text).is_some() {}
            prop_assert_eq!(text, complete(Generation::new(Prefix::of(&[9]), 0, limits), u64::MAX).text);
        }
    }

    #[test]
    fn blocks_name_their_whole_prefix() {
        let ids: Vec<u32> = (0..50).collect();
        let (prefix, blocks) = block_hashes(&ids);
        assert_eq!((prefix.len(), blocks.len()), (50, 3));
        assert_eq!(blocks[1], Prefix::of(&ids[..32]).hash());
    }
}
