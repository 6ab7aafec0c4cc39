//! What an answer must be, token by token. Pure.

use crate::engine::{
    generation::{Generation, Limits},
    render::push_escaped,
    template::{Ending, Message, render},
    tokens::Prefix,
};

/// How an answer was wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// The text differs from what the engine must say.
    #[error("after {tokens} tokens: expected {expected:?}, got {got:?}")]
    Text {
        /// Tokens that were right.
        tokens: u64,
        /// What should have come.
        expected: String,
        /// What came.
        got: String,
    },
    /// The ids differ, of the prompt or of the answer.
    #[error("ids {got:?} instead of {expected:?}")]
    Ids {
        /// What should have come.
        expected: Vec<u32>,
        /// What came.
        got: Vec<u32>,
    },
    /// It ended before its last token.
    #[error("ended after {tokens} of {wanted} tokens")]
    Short {
        /// Tokens that came.
        tokens: u64,
        /// Tokens asked for.
        wanted: u64,
    },
    /// The finish reason is not "length".
    #[error("finish reason {0:?} instead of \"length\"")]
    Finish(Option<String>),
    /// The usage is missing or wrong.
    #[error("usage {got:?} instead of {wanted:?} (prompt, completion)")]
    Usage {
        /// What was said.
        got: Option<(u64, u64)>,
        /// What is right.
        wanted: (u64, u64),
    },
}

impl Wrong {
    /// A word for its kind.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Text { .. } | Self::Ids { .. } => "wrong tokens",
            Self::Short { .. } => "lost tokens",
            Self::Finish(_) | Self::Usage { .. } => "wrong end",
        }
    }
}

/// Follows one answer of exactly `wanted` tokens.
#[derive(Debug)]
pub struct Checker {
    generation: Generation,
    wanted: u64,
    prompt_tokens: u64,
    /// Text that must come next.
    expected: String,
    /// The same as it is written in JSON, for a while.
    escaped: Vec<u8>,
    /// What was right so far, if it is to be kept.
    said: Option<String>,
    prompt: Vec<u32>,
    /// The same answer again, followed by its ids.
    by_ids: Generation,
}

impl Checker {
    /// What the engine must answer to `messages` in a chat with `max_tokens: wanted` and `ignore_eos`.
    pub fn chat(messages: &[Message], wanted: u64) -> Self {
        let prompt = render(messages, Ending::Answer);
        let prefix = Prefix::of(&prompt);
        let limits = Limits { max_tokens: wanted, ..Limits::default() };
        let generation = Generation::new(prefix, 0, limits);
        Self {
            prompt_tokens: prefix.len(),
            by_ids: generation.clone(),
            generation,
            wanted,
            expected: String::new(),
            escaped: Vec::new(),
            said: None,
            prompt,
        }
    }

    /// Keeps the text of the answer, for [`Checker::said`]; to be called before any came.
    pub fn keep_text(&mut self) {
        self.said = Some(String::new());
    }

    /// Forgets the prompt's ids, which a stream without ids does not need.
    pub fn forget_ids(&mut self) {
        self.prompt = Vec::new();
    }

    /// The text of the answer so far, if it was kept.
    pub fn said(&mut self) -> Option<String> {
        self.said.take()
    }

    /// Takes the text of an event, as it is written in JSON, if it is that of exactly one more token. If it is not, nothing
    /// was taken, and [`Checker::text`] says what is wrong, if anything is.
    pub fn one_token(&mut self, inside: &[u8]) -> bool {
        if self.expected.is_empty() && self.generation.step(&mut self.expected).is_none() {
            return false;
        }
        self.escaped.clear();
        push_escaped(&mut self.escaped, &self.expected);
        let right = self.escaped == inside;
        if right {
            if let Some(said) = &mut self.said {
                said.push_str(&self.expected);
            }
            self.expected.clear();
        }
        right
    }

    /// Takes the prompt's ids as they came.
    ///
    /// # Errors
    /// [`Wrong::Ids`].
    pub fn prompt_ids(&self, got: &[u32]) -> Result<(), Wrong> {
        match got == self.prompt {
            true => Ok(()),
            false => Err(Wrong::Ids { expected: self.prompt.clone(), got: got.to_vec() }),
        }
    }

    /// Takes ids that came.
    ///
    /// # Errors
    /// [`Wrong::Ids`] if they are not the next ones.
    pub fn ids(&mut self, got: &[u32]) -> Result<(), Wrong> {
        let mut text = String::new();
        let next = got.iter().filter_map(|_| self.by_ids.step(&mut text));
        let expected: Vec<u32> = next.map(|step| step.id).collect();
        if expected == got { Ok(()) } else { Err(Wrong::Ids { expected, got: got.to_vec() }) }
    }

    /// Checks that all ids came.
    ///
    /// # Errors
    /// [`Wrong::Short`].
    pub const fn end_of_ids(&self) -> Result<(), Wrong> {
        match self.by_ids.is_finished() {
            true => Ok(()),
            false => Err(Wrong::Short { tokens: self.by_ids.generated(), wanted: self.wanted }),
        }
    }

    /// Takes a piece of text that came.
    ///
    /// # Errors
    /// [`Wrong::Text`] if it is not the next piece.
    pub fn text(&mut self, got: &str) -> Result<(), Wrong> {
        while self.expected.len() < got.len() && self.generation.step(&mut self.expected).is_some() {}
        if !self.expected.starts_with(got) {
            let tokens = self.generation.generated();
            return Err(Wrong::Text { tokens, expected: self.expected.clone(), got: got.to_string() });
        }
        self.expected.drain(..got.len());
        if let Some(said) = &mut self.said {
            said.push_str(got);
        }
        Ok(())
    }

    /// Checks that the answer is whole, once all text was taken.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn end(&mut self, finish_reason: Option<&str>, usage: Option<(u64, u64)>) -> Result<(), Wrong> {
        let tokens = self.generation.generated();
        // A last token may be half a character: it has no text, and is proved by the usage.
        self.generation.step(&mut self.expected);
        if !self.generation.is_finished() || !self.expected.is_empty() {
            return Err(Wrong::Short { tokens, wanted: self.wanted });
        }
        if finish_reason != Some("length") {
            return Err(Wrong::Finish(finish_reason.map(String::from)));
        }
        let wanted = (self.prompt_tokens, self.wanted);
        if usage != Some(wanted) {
            return Err(Wrong::Usage { got: usage, wanted });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::generation::complete;

    fn messages() -> Vec<Message> {
        vec![Message::new("user", "hello")]
    }

    fn answer(tokens: u64) -> String {
        let prefix = Prefix::of(&render(&messages(), Ending::Answer));
        complete(Generation::new(prefix, 0, Limits { max_tokens: tokens, ..Limits::default() }), u64::MAX)
            .text
    }

    fn check(text: &str, tokens: u64) -> Result<(), Wrong> {
        let mut checker = Checker::chat(&messages(), tokens);
        for part in text.split_inclusive(' ') {
            checker.text(part)?;
        }
        let prompt = checker.prompt_tokens;
        checker.end(Some("length"), Some((prompt, tokens)))
    }

    #[test]
    fn the_right_answer_passes_for_every_length() {
        for tokens in 1..200 {
            assert_eq!(check(&answer(tokens), tokens), Ok(()), "{tokens}");
        }
    }

    #[test]
    fn token_by_token_the_answer_is_the_same_and_is_kept() {
        let mut checker = Checker::chat(&messages(), 60);
        checker.keep_text();
        let mut one = Generation::new(
            Prefix::of(&render(&messages(), Ending::Answer)),
            0,
            Limits { max_tokens: 60, ..Limits::default() },
        );
        for at in 0..60 {
            let (mut text, mut inside) = (String::new(), Vec::new());
            one.step(&mut text).unwrap();
            push_escaped(&mut inside, &text);
            if at % 3 == 1 {
                assert!(!checker.one_token(b"nonsense"));
                // An event without text, before a character is whole, says nothing.
                checker.text(&text).unwrap();
            } else {
                assert!(checker.one_token(&inside), "{at} {text:?}");
            }
        }
        assert!(!checker.one_token(b""), "there are no more");
        let prompt = checker.prompt_tokens;
        assert_eq!(checker.end(Some("length"), Some((prompt, 60))), Ok(()));
        assert_eq!(checker.said(), Some(answer(60)));
    }

    #[test]
    fn every_lost_doubled_or_changed_character_is_found() {
        let right: Vec<char> = answer(40).chars().collect();
        for at in 0..right.len() {
            let lost: String = right[..at].iter().chain(&right[at + 1..]).collect();
            assert!(check(&lost, 40).is_err(), "lost {at}");
            let doubled: String = right[..=at].iter().chain(&right[at..]).collect();
            assert!(check(&doubled, 40).is_err(), "doubled {at}");
        }
        assert!(check(&(answer(40) + "x"), 40).is_err());
    }

    #[test]
    fn ids_are_checked() {
        let right = complete(Checker::chat(&messages(), 9).generation, u64::MAX).ids;
        let mut checker = Checker::chat(&messages(), 9);
        assert_eq!(checker.prompt_ids(&render(&messages(), Ending::Answer)), Ok(()));
        assert!(checker.prompt_ids(&right).is_err());
        assert_eq!((checker.ids(&right[..4]), checker.ids(&[])), (Ok(()), Ok(())));
        assert!(matches!(checker.end_of_ids(), Err(Wrong::Short { tokens: 4, wanted: 9 })));
        assert_eq!(checker.ids(&right[4..]), Ok(()));
        assert_eq!(checker.end_of_ids(), Ok(()));
        assert!(checker.ids(&right[..1]).is_err(), "one too many");
        assert!(Checker::chat(&messages(), 9).ids(&right[1..3]).is_err());
    }

    #[test]
    fn finish_and_usage_are_checked() {
        let end = |finish: Option<&str>, usage| {
            let mut checker = Checker::chat(&messages(), 9);
            checker.text(&answer(9)).unwrap();
            checker.end(finish, usage)
        };
        assert!(matches!(end(Some("abort"), None), Err(Wrong::Finish(_))));
        assert!(matches!(end(Some("length"), None), Err(Wrong::Usage { .. })));
        assert!(matches!(end(Some("length"), Some((1, 9))), Err(Wrong::Usage { .. })));
    }
}
