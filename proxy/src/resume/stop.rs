//! Stop strings that span the cut: the gateway looks for them in the place of the engine that goes on, which has not seen the
//! text before.
//!
//! As vLLM does it (`v1/engine/detokenizer.py`): after each token the strings are looked for that end in its text; the one that is
//! whole first ends the answer. Text in which one may have begun is held back, the longest string's length less one, in
//! characters; none ends an answer before `min_tokens`.

/// Looks for stop strings in text that comes piece by piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stops {
    strings: Vec<String>,
    /// The string itself belongs to the answer.
    include: bool,
    /// The end of the text, as far as a string may begin in it.
    window: String,
    /// Bytes of it that were given out.
    given: usize,
}

/// What a piece of text let out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Let {
    /// Text for the client.
    pub text: String,
    /// The string that was found: the answer ends here.
    pub stop: Option<String>,
}

impl Stops {
    /// After `given` was delivered and `held` was not.
    #[must_use]
    pub fn new(strings: Vec<String>, include: bool, given: &str, held: &str) -> Self {
        let mut stops = Self { strings, include, window: [given, held].concat(), given: given.len() };
        stops.forget();
        stops
    }

    /// Characters in which a string may have begun.
    fn reach(&self) -> usize {
        self.strings.iter().map(|string| string.chars().count()).max().unwrap_or(0).saturating_sub(1)
    }

    /// Takes the next token's text. `counts`: `min_tokens` is over.
    pub fn push(&mut self, piece: &str, counts: bool) -> Let {
        let before = self.window.len();
        self.window.push_str(piece);
        if let Some((string, at)) = self.found(before).filter(|_| counts) {
            let keep = if self.include { at + string.len() } else { at };
            self.window.truncate(keep);
            return Let { text: self.rest(), stop: Some(string) };
        }
        let held = if self.include { 0 } else { self.reach() };
        let upto = back(&self.window, held);
        let text = self.window.get(self.given..upto).unwrap_or_default().to_owned();
        self.given = self.given.max(upto);
        self.forget();
        Let { text, stop: None }
    }

    /// Whatever was held back: the answer has ended otherwise.
    pub fn rest(&mut self) -> String {
        let text = self.window.get(self.given..).unwrap_or_default().to_owned();
        self.given = self.window.len();
        text
    }

    /// The string that is complete first, and where it begins; of two the one that was given first. It may have begun in text that
    /// was not looked at, but not ended there.
    fn found(&self, before: usize) -> Option<(String, usize)> {
        let first_of = |string: &String| {
            let mut from = before.saturating_sub(string.len() - 1);
            while !self.window.is_char_boundary(from) {
                from += 1;
            }
            self.window.get(from..)?.find(string.as_str()).map(|at| from + at)
        };
        let strings = self.strings.iter().filter(|string| !string.is_empty());
        let found = strings.filter_map(|string| Some((string, first_of(string)?)));
        found.min_by_key(|(string, at)| at + string.len()).map(|(string, at)| (string.clone(), at))
    }

    /// What was given out and no string can begin in is not needed any more.
    fn forget(&mut self) {
        let past = back(&self.window, self.reach()).min(self.given);
        self.window.drain(..past);
        self.given -= past;
    }
}

/// Where the last `characters` of `text` begin.
fn back(text: &str, characters: usize) -> usize {
    match characters.checked_sub(1) {
        None => text.len(),
        Some(nth) => text.char_indices().nth_back(nth).map_or(0, |(at, _)| at),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All of an answer that comes in these pieces, the cut behind the first `cut` of them.
    fn answer(
        pieces: &[&str],
        cut: usize,
        strings: &[&str],
        include: bool,
        min: usize,
    ) -> (String, Option<String>) {
        let strings: Vec<String> = strings.iter().map(ToString::to_string).collect();
        let mut stops = Stops::new(strings.clone(), include, "", "");
        let mut text = String::new();
        for (i, piece) in pieces.iter().enumerate() {
            if i == cut {
                let whole = pieces[..cut].concat();
                let (given, held) = whole.split_at(text.len());
                stops = Stops::new(strings.clone(), include, given, held);
            }
            let out = stops.push(piece, i >= min);
            text.push_str(&out.text);
            if out.stop.is_some() {
                return (text, out.stop);
            }
        }
        text.push_str(&stops.rest());
        (text, None)
    }

    #[test]
    fn a_string_across_the_cut_is_found() {
        let pieces = ["one ", "tw", "o EN", "D three"];
        for cut in 0..=4 {
            assert_eq!(answer(&pieces, cut, &["END"], false, 0), ("one two ".into(), Some("END".into())));
            assert_eq!(answer(&pieces, cut, &["END"], true, 0), ("one two END".into(), Some("END".into())));
            assert_eq!(answer(&pieces, cut, &["none"], false, 0), (pieces.concat(), None));
        }
    }

    #[test]
    fn before_the_minimum_none_ends_and_the_one_that_is_whole_first_wins() {
        assert_eq!(answer(&["aXb", "cXd"], 9, &["X"], false, 1), ("aXbc".into(), Some("X".into())));
        assert_eq!(answer(&["aX", "Yb"], 9, &["XY"], false, 1), ("a".into(), Some("XY".into())));
        assert_eq!(answer(&["xyz"], 9, &["z", "y"], false, 0).1, Some("y".into()));
        assert_eq!(answer(&["xyz"], 9, &["yz", "z"], false, 0).1, Some("yz".into()));
    }

    proptest! {
        /// Wherever the cut is, the answer is that without one.
        #[test]
        fn a_cut_changes_nothing(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            strings in prop::collection::vec("[abé]{1,4}", 1..3),
            cut in 0usize..12,
            include: bool,
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
            prop_assert_eq!(
                answer(&pieces, cut, &strings, include, 0),
                answer(&pieces, usize::MAX, &strings, include, 0)
            );
        }

        /// Nothing of a stop string that comes later was given out.
        #[test]
        fn the_text_is_what_stands_before_the_first_string_that_ends(pieces in prop::collection::vec("[ab]{1}", 0..12)) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            let (text, stop) = answer(&pieces, usize::MAX, &["aab"], false, 0);
            match whole.find("aab") {
                Some(at) => prop_assert_eq!((text.as_str(), stop.as_deref()), (&whole[..at], Some("aab"))),
                None => prop_assert_eq!((text, stop), (whole, None)),
            }
        }
    }
}
