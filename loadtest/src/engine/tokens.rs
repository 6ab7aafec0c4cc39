//! The vocabulary, the tokenizer and the next-token function: pure, exact both ways, O(1) per token.
//!
//! **The next token is a hash of the whole prefix** (prompt ids and generated ids alike, see [`Prefix`]). So a reader who
//! knows the request knows every token of the answer: loss, duplication and reordering are provable, and whoever
//! continues from a prefix, on whichever engine, gets the same remaining tokens.
//!
//! **Text and ids round-trip** because generated pieces delimit themselves:
//!
//! | ids | bytes | made by |
//! |---|---|---|
//! | word, 3 × 2^20 | one separator of ` `, newline, `"`, then four of `a-z2-7` (for example ` k7f3`) | generation and text |
//! | raw, one to three bytes | any bytes that are no piece | text only |
//! | char head, then char tail (4,096) | `F0 9F`, then two bytes: one character of U+1F000 to U+1FFFF | generation and text |
//! | `<\|im_start\|>`, `<\|im_end\|>` | nothing | the chat template; `<\|im_end\|>` ends a generation |
//!
//! A word holds its separator only at its start, so no two words overlap, and nothing before a word can join it: for
//! any text `a` and any generated text `b`, `encode(a + b) = encode(a) ++ encode(b)`. That is what makes the
//! continuation of an assistant's message exact. Newline and `"` are there because JSON must escape them, and the
//! two-token characters because real engines send events with empty text while a character is incomplete.
//!
//! Absent: merges, languages, realism of the text. About three bytes make a token, as in real vocabularies.

/// Separators that open a word, by their index in the word's id.
pub const SEPARATORS: [u8; 3] = [b' ', b'\n', b'"'];
/// Letters of a word, five bits each.
pub const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

const WORD_BITS: u32 = 20;
const WORD_MASK: u32 = (1 << WORD_BITS) - 1;
const RAW1: u32 = 3 << WORD_BITS;
const RAW2: u32 = RAW1 + (1 << 8);
const RAW3: u32 = RAW2 + (1 << 16);
/// First half of a character of U+1F000 to U+1FFFF; its text appears with the tail.
pub const CHAR_HEAD: u32 = RAW3 + (1 << 24);
const CHAR_TAIL: u32 = CHAR_HEAD + 1;
/// Opens a message in the chat template.
pub const IM_START: u32 = CHAR_TAIL + (1 << 12);
/// Closes a message in the chat template, and ends a generation.
pub const IM_END: u32 = IM_START + 1;
/// Ids are below this.
pub const VOCABULARY: u32 = IM_END + 1;
/// The token that ends a generation by itself.
pub const EOS: u32 = IM_END;

/// Tokens after the last special one before a chat answer may end by itself, the four of `assistant\n` included.
const CHAT_END_AFTER: u32 = 4 + 16;
/// Tokens after the last special one at which a chat answer ends at the latest.
const CHAT_END_BY: u32 = 4 + 128;

/// Value of a letter, or 0xff for any other byte.
const LETTER_VALUE: [u8; 256] = {
    let mut table = [0xff; 256];
    let mut value: u8 = 0;
    while value < 32 {
        table[LETTERS[value as usize] as usize] = value;
        value += 1;
    }
    table
};

/// Index of a separator, or 0xff for any other byte.
const SEPARATOR_INDEX: [u8; 256] = {
    let mut table = [0xff; 256];
    table[b' ' as usize] = 0;
    table[b'\n' as usize] = 1;
    table[b'"' as usize] = 2;
    table
};

/// The id of the piece that starts `bytes`, with its length in bytes and in tokens.
fn piece(bytes: &[u8]) -> Option<Piece> {
    match *bytes {
        [s, a, b, c, d, ..] if SEPARATOR_INDEX[usize::from(s)] != 0xff => {
            let letters = [a, b, c, d].map(|l| LETTER_VALUE[usize::from(l)]);
            if letters.contains(&0xff) {
                return None;
            }
            let word = letters.iter().fold(0, |id, &l| id << 5 | u32::from(l));
            Some(Piece::Word(u32::from(SEPARATOR_INDEX[usize::from(s)]) << WORD_BITS | word))
        }
        [0xf0, 0x9f, c @ 0x80..=0xbf, d @ 0x80..=0xbf, ..] => {
            Some(Piece::Char(CHAR_TAIL + (u32::from(c & 0x3f) << 6 | u32::from(d & 0x3f))))
        }
        _ => None,
    }
}

enum Piece {
    Word(u32),
    Char(u32),
}

/// Appends the ids of `text`. Special tokens never come out of text, whatever it says.
pub fn encode(text: &str, ids: &mut Vec<u32>) {
    let bytes = text.as_bytes();
    ids.reserve(bytes.len() / 3 + 2);
    let (mut at, mut raw_from) = (0, 0);
    while at < bytes.len() {
        let candidate = bytes[at] == 0xf0 || SEPARATOR_INDEX[usize::from(bytes[at])] != 0xff;
        let Some(piece) = (if candidate { piece(&bytes[at..]) } else { None }) else {
            at += 1;
            continue;
        };
        encode_raw(&bytes[raw_from..at], ids);
        match piece {
            Piece::Word(id) => {
                ids.push(id);
                at += 5;
            }
            Piece::Char(tail) => {
                ids.extend([CHAR_HEAD, tail]);
                at += 4;
            }
        }
        raw_from = at;
    }
    encode_raw(&bytes[raw_from..], ids);
}

fn encode_raw(run: &[u8], ids: &mut Vec<u32>) {
    let mut chunks = run.chunks_exact(3);
    for chunk in &mut chunks {
        ids.push(RAW3 + u32::from_be_bytes([0, chunk[0], chunk[1], chunk[2]]));
    }
    match *chunks.remainder() {
        [a] => ids.push(RAW1 + u32::from(a)),
        [a, b] => ids.push(RAW2 + u32::from_be_bytes([0, 0, a, b])),
        _ => {}
    }
}

/// The ids of `text`.
pub fn encoded(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    encode(text, &mut ids);
    ids
}

/// Appends the bytes of one id. A char head has none: its tail brings the whole character. Special and unknown ids
/// have none either.
pub fn decode_into(id: u32, out: &mut Vec<u8>) {
    if id < RAW1 {
        let word = id & WORD_MASK;
        out.push(SEPARATORS[(id >> WORD_BITS) as usize]);
        out.extend([15, 10, 5, 0].map(|shift| LETTERS[(word >> shift & 31) as usize]));
    } else if id < RAW2 {
        out.push((id - RAW1).to_be_bytes()[3]);
    } else if id < RAW3 {
        out.extend_from_slice(&(id - RAW2).to_be_bytes()[2..]);
    } else if id < CHAR_HEAD {
        out.extend_from_slice(&(id - RAW3).to_be_bytes()[1..]);
    } else if (CHAR_TAIL..IM_START).contains(&id) {
        let tail = id - CHAR_TAIL;
        let [.., high] = (0x80 | tail >> 6).to_be_bytes();
        let [.., low] = (0x80 | tail & 0x3f).to_be_bytes();
        out.extend([0xf0, 0x9f, high, low]);
    }
}

/// The text of `ids`; bytes that are not UTF-8 become U+FFFD.
pub fn decoded(ids: &[u32]) -> String {
    let mut bytes = Vec::with_capacity(ids.len() * 5);
    for &id in ids {
        decode_into(id, &mut bytes);
    }
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

/// The text of `ids` as real tokenizers give it: a character that they leave open is a U+FFFD at the end.
pub fn shown(ids: &[u32]) -> String {
    let mut text = decoded(ids);
    if ids.last() == Some(&CHAR_HEAD) {
        text.push('\u{fffd}');
    }
    text
}

/// What is mixed into the choice of tokens beside the prefix: nothing (0) unless the request has a `seed` or asks for
/// more than one choice.
pub fn salt(seed: Option<i64>, choice: u32) -> u64 {
    let seed = seed.map_or(0, |s| finish(s.cast_unsigned() ^ 0x5eed_5eed_5eed_5eed) | 1);
    seed ^ u64::from(choice).wrapping_mul(0xa076_1d64_78bd_642f)
}

/// The state of a token sequence: enough to know its next token, and nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    hash: u64,
    length: u64,
    /// Tokens since the last special one; none if there was none.
    since_special: Option<u32>,
    mid_char: bool,
}

impl Default for Prefix {
    fn default() -> Self {
        Self::new()
    }
}

impl Prefix {
    /// The empty sequence.
    pub const fn new() -> Self {
        Self { hash: 0x9ae1_6a3b_2f90_404f, length: 0, since_special: None, mid_char: false }
    }

    /// The sequence `ids`.
    pub fn of(ids: &[u32]) -> Self {
        let mut prefix = Self::new();
        for &id in ids {
            prefix.push(id);
        }
        prefix
    }

    /// Appends one token. Every id changes the state, and so does its place.
    pub fn push(&mut self, id: u32) {
        let mixed = (self.hash.rotate_left(5) ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.hash = mixed ^ mixed >> 29;
        self.length += 1;
        self.mid_char = id == CHAR_HEAD;
        self.since_special = match id {
            IM_START | IM_END => Some(0),
            _ => self.since_special.map(|n| n.saturating_add(1)),
        };
    }

    /// Tokens pushed so far.
    pub const fn len(&self) -> u64 {
        self.length
    }

    /// True before the first push.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Names this very sequence; used as the identity of the KV block that ends here.
    pub const fn hash(&self) -> u64 {
        self.hash
    }

    /// True if the last token was the head of a character.
    pub const fn is_mid_char(&self) -> bool {
        self.mid_char
    }

    /// The token that follows, [`EOS`] aside.
    pub fn next(&self, salt: u64) -> u32 {
        let x = finish(self.hash ^ salt);
        let [low, high] = [x & 0xffff_ffff, x >> 32].map(|half| u32::try_from(half).unwrap_or(0));
        if self.mid_char {
            return CHAR_TAIL + (low & 0xfff);
        }
        if high & 31 == 31 {
            return CHAR_HEAD;
        }
        let separator = match high >> 8 & 15 {
            0 => 1,
            1 => 2,
            _ => 0,
        };
        separator << WORD_BITS | low & WORD_MASK
    }

    /// True if a generation that may fill the context ends here. In a chat: after 16 to 128 tokens of the answer.
    /// In plain text without special tokens: with a chance of 1 in 64 at each token.
    pub fn ends(&self, salt: u64) -> bool {
        let draw = finish(self.hash ^ salt) >> 48;
        match self.since_special {
            _ if self.mid_char => false,
            Some(n) if n < CHAT_END_AFTER => false,
            Some(n) => n >= CHAT_END_BY || draw.is_multiple_of(48),
            None => draw & 63 == 0,
        }
    }
}

/// The finaliser of murmur3: every bit of the input reaches every bit of the output.
pub(crate) const fn finish(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn generate(prompt: &[u32], n: usize, salt: u64) -> Vec<u32> {
        let mut prefix = Prefix::of(prompt);
        (0..n)
            .map(|_| {
                let id = prefix.next(salt);
                prefix.push(id);
                id
            })
            .collect()
    }

    /// Text as users write it, rich in what could be mistaken for a piece.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            "\\PC{0,40}",
            "[ \n\"a-z2-7é🎈🀀]{0,60}",
            proptest::collection::vec(0..VOCABULARY, 0..20).prop_map(|ids| decoded(&ids)),
        ]
    }

    proptest! {
        #[test]
        fn text_survives_encoding(text in text()) {
            prop_assert_eq!(decoded(&encoded(&text)), text);
        }

        #[test]
        fn ids_are_within_the_vocabulary(text in text()) {
            prop_assert!(encoded(&text).iter().all(|&id| id < VOCABULARY && id != IM_START && id != IM_END));
        }

        #[test]
        fn generated_text_joins_any_text_exactly(before in text(), n in 0usize..60, salt: u64) {
            let prompt = encoded(&before);
            let mut ids = generate(&prompt, n, salt);
            if ids.last() == Some(&CHAR_HEAD) {
                ids.pop();
            }
            let joined = format!("{before}{}", decoded(&ids));
            prop_assert_eq!(encoded(&joined), [prompt, ids].concat());
        }

        #[test]
        fn continuation_from_every_prefix_is_the_same(prompt in proptest::collection::vec(0..VOCABULARY, 0..30), salt: u64) {
            let whole = generate(&prompt, 40, salt);
            for cut in 0..whole.len() {
                let seen = [&prompt[..], &whole[..cut]].concat();
                prop_assert_eq!(&generate(&seen, whole.len() - cut, salt), &whole[cut..]);
            }
        }

        #[test]
        fn a_lost_doubled_or_swapped_token_changes_what_follows(
            prompt in proptest::collection::vec(0..VOCABULARY, 2..30), at: prop::sample::Index
        ) {
            let at = at.index(prompt.len() - 1);
            let (mut lost, mut doubled, mut swapped) = (prompt.clone(), prompt.clone(), prompt.clone());
            lost.remove(at);
            doubled.insert(at, prompt[at]);
            swapped.swap(at, at + 1);
            let hash = Prefix::of(&prompt).hash();
            prop_assert_ne!(hash, Prefix::of(&lost).hash());
            prop_assert_ne!(hash, Prefix::of(&doubled).hash());
            prop_assert!(swapped == prompt || hash != Prefix::of(&swapped).hash());
        }

        #[test]
        fn decoding_takes_any_id(id: u32) {
            let mut out = Vec::new();
            decode_into(id, &mut out);
            prop_assert!(out.len() <= 5);
        }
    }

    #[test]
    fn words_have_the_documented_form() {
        assert_eq!(decoded(&[0]), " aaaa");
        assert_eq!(decoded(&[1 << 20 | 0xf_ffff]), "\n7777");
        assert_eq!(decoded(&[2 << 20 | 1]), "\"aaab");
        assert_eq!(encoded(" k7f3"), vec![decoded_id(" k7f3")]);
        assert_eq!(encoded("🎈").len(), 2);
        assert_eq!(encoded("assistant\n").len(), 4, "CHAT_END_AFTER counts on it");
        assert_eq!((shown(&[CHAR_HEAD]), shown(&encoded("🎈"))), ("\u{fffd}".into(), "🎈".into()));
    }

    fn decoded_id(word: &str) -> u32 {
        (0..RAW1).find(|&id| decoded(&[id]) == word).unwrap()
    }

    #[test]
    fn a_chat_answer_ends_between_16_and_128_tokens() {
        let mut lengths = Vec::new();
        for question in 0..200u32 {
            let mut prompt = vec![IM_START];
            encode("assistant\n", &mut prompt);
            prompt.insert(0, question);
            let mut prefix = Prefix::of(&prompt);
            let mut n = 0;
            while !prefix.ends(0) {
                prefix.push(prefix.next(0));
                n += 1;
            }
            assert!((16..=129).contains(&n), "{n}");
            lengths.push(n);
        }
        lengths.sort_unstable();
        lengths.dedup();
        assert!(lengths.len() > 40, "lengths vary");
    }

    #[test]
    fn pieces_of_every_kind_are_generated() {
        let text = decoded(&generate(&[1, 2, 3], 500, 0));
        for wanted in [' ', '\n', '"'] {
            assert!(text.contains(wanted), "{wanted:?}");
        }
        assert!(text.chars().any(|c| u32::from(c) >= 0x1f000));
    }

    #[test]
    fn salt_is_zero_unless_asked_for() {
        assert_eq!(salt(None, 0), 0);
        assert_ne!(salt(Some(0), 0), 0);
        assert_ne!(salt(None, 1), salt(None, 2));
        assert_ne!(generate(&[7], 8, salt(Some(1), 0)), generate(&[7], 8, salt(Some(2), 0)));
    }
}
