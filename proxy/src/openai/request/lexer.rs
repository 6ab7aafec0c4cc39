//! JSON's tokens, as RFC 8259 has them, over bytes that are known to be UTF-8.
//!
//! Two loops carry the load and are written for it: [`Lexer::find_special`] skips the inside of strings 64 bytes at a
//! time (one OR-fold over three comparisons, which the compiler turns into vector instructions), and
//! [`Lexer::number_run`] walks arrays of token ids with eight digits to the step.
//!
//! A `\u` escape is checked for its four hex digits; that surrogates come in pairs is left to the engine, as
//! `serde_json` leaves it when it ignores a value. Text that we decode shows a lone one as U+FFFD.

use super::ScanError;

/// The inside of a string token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text {
    /// Where the text starts, behind the opening quote.
    pub(super) start: usize,
    /// Where the closing quote is.
    pub(super) end: usize,
    /// Bytes by which the text is shorter once its escapes are decoded.
    pub(super) saved: usize,
    /// Whether there is any escape.
    pub(super) escaped: bool,
}

/// A cursor over a body.
pub(super) struct Lexer<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) pos: usize,
}

/// Bytes that end a plain stretch inside a string.
const fn special(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\')
}

/// A high bit for bytes of `word` that are [`special`]. The lowest one set is exact; those above it may be wrong, as
/// the subtractions borrow, but only behind a byte that is special.
const fn special_in_word(word: u64) -> u64 {
    const fn all(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    let quote = word ^ all(b'"');
    let backslash = word ^ all(b'\\');
    let below = word.wrapping_sub(all(0x20)) & !word;
    let equal = quote.wrapping_sub(all(1)) & !quote | backslash.wrapping_sub(all(1)) & !backslash;
    (below | equal) & all(0x80)
}

/// The value of a hex digit.
pub(in crate::openai) const fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

/// Four hex digits at the start of `bytes`.
#[inline]
fn hex4(bytes: &[u8]) -> Option<u16> {
    let [a, b, c, d] = bytes.first_chunk::<4>()?.map(|byte| HEX[usize::from(byte)]);
    let unit = u16::from(a) << 12 | u16::from(b) << 8 | u16::from(c) << 4 | u16::from(d);
    ((a | b | c | d) < 16).then_some(unit)
}

/// The value of each hex digit; 255 for other bytes. Prompts in other scripts are often nothing but `\u` escapes.
const HEX: [u8; 256] = {
    let mut table = [255; 256];
    let mut byte = 0u8;
    loop {
        if let Some(value) = hex_digit(byte) {
            table[byte as usize] = value;
        }
        if byte == 255 {
            break table;
        }
        byte += 1;
    }
};

impl<'a> Lexer<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, pos: 0 }
    }

    #[inline]
    pub(super) fn peek(&self) -> Option<u8> {
        self.bytes.get(self.pos).copied()
    }

    /// The error for what stands at the cursor.
    #[cold]
    pub(super) fn expected(&self, expected: &'static str) -> ScanError {
        self.expected_at(self.pos, expected)
    }

    #[cold]
    fn expected_at(&self, offset: usize, expected: &'static str) -> ScanError {
        ScanError::NotJson { offset, expected, found: self.bytes.get(offset).copied() }
    }

    #[inline]
    pub(super) fn skip_whitespace(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.pos += 1;
        }
    }

    /// Takes `word` (`true`, `false` or `null`), whose first letter stands at the cursor.
    pub(super) fn literal(&mut self, word: &'static str) -> Result<(), ScanError> {
        let rest = self.bytes.get(self.pos..).unwrap_or_default();
        let same = rest.iter().zip(word.as_bytes()).take_while(|(a, b)| a == b).count();
        if same < word.len() {
            return Err(self.expected_at(self.pos + same, word));
        }
        self.pos += word.len();
        Ok(())
    }

    /// Takes a string whose opening quote stands at the cursor.
    #[inline]
    pub(super) fn string(&mut self) -> Result<Text, ScanError> {
        let start = self.pos + 1;
        let (mut pos, mut saved, mut escaped) = (start, 0, false);
        loop {
            pos = self.find_special(pos);
            match self.bytes.get(pos) {
                Some(b'"') => {
                    self.pos = pos + 1;
                    return Ok(Text { start, end: pos, saved, escaped });
                }
                Some(b'\\') => {
                    let (next, decoded) = self.escape(pos)?;
                    saved += next - pos - decoded;
                    escaped = true;
                    pos = next;
                }
                Some(_) => {
                    return Err(self.expected_at(pos, "an escape in place of a raw control character"));
                }
                None => return Err(self.expected_at(pos, "'\"' at the end of a string")),
            }
        }
    }

    /// The first byte at or behind `pos` that is special inside a string, or the end of the body.
    #[inline]
    fn find_special(&self, mut pos: usize) -> usize {
        const BLOCK: usize = 64;
        // Keys, short values and the stretches between two `\n` of a prompt end soon; only what does not is worth
        // the vector loop.
        let mut words = BLOCK / 8;
        loop {
            while let Some(word) = self.bytes.get(pos..).and_then(|rest| rest.first_chunk::<8>()) {
                let hits = special_in_word(u64::from_le_bytes(*word));
                if hits != 0 {
                    return pos + hits.trailing_zeros() as usize / 8;
                }
                pos += 8;
                words -= 1;
                if words == 0 {
                    break;
                }
            }
            let rest = self.bytes.get(pos..).unwrap_or_default();
            let (blocks, _) = rest.as_chunks::<BLOCK>();
            if words > 0 || blocks.is_empty() {
                return pos + rest.iter().position(|&byte| special(byte)).unwrap_or(rest.len());
            }
            let plain =
                blocks.iter().take_while(|block| !block.iter().fold(false, |hit, &b| hit | special(b)));
            pos += plain.count() * BLOCK;
            words = BLOCK / 8;
        }
    }

    /// Checks the escape whose backslash is at `pos`: where it ends, and how many UTF-8 bytes it stands for.
    #[inline]
    fn escape(&self, pos: usize) -> Result<(usize, usize), ScanError> {
        match self.bytes.get(pos + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok((pos + 2, 1)),
            Some(b'u') => {
                let digits = self.bytes.get(pos + 2..).unwrap_or_default();
                let Some(unit) = hex4(digits) else {
                    let good = digits.iter().take_while(|&&byte| hex_digit(byte).is_some()).count();
                    return Err(self.expected_at(pos + 2 + good, "four hex digits after \\u"));
                };
                // Half of a surrogate pair stands for half of the pair's four bytes.
                let decoded = match unit {
                    0..=0x7f => 1,
                    0x80..=0x7ff | 0xd800..=0xdfff => 2,
                    _ => 3,
                };
                Ok((pos + 6, decoded))
            }
            _ => Err(self.expected_at(pos + 1, "one of \" \\ / b f n r t u after a backslash")),
        }
    }

    /// Takes a number whose first byte stands at the cursor; whether it is an integer without a sign.
    pub(super) fn number(&mut self) -> Result<bool, ScanError> {
        let mut natural = true;
        let mut pos = self.pos;
        if self.bytes.get(pos) == Some(&b'-') {
            natural = false;
            pos += 1;
        }
        pos = match self.bytes.get(pos) {
            Some(b'0') => pos + 1,
            Some(b'1'..=b'9') => self.digits(pos),
            _ => return Err(self.expected_at(pos, "a digit")),
        };
        if self.bytes.get(pos) == Some(&b'.') {
            natural = false;
            pos = self.some_digits(pos + 1)?;
        }
        if matches!(self.bytes.get(pos), Some(b'e' | b'E')) {
            natural = false;
            pos += 1;
            if matches!(self.bytes.get(pos), Some(b'+' | b'-')) {
                pos += 1;
            }
            pos = self.some_digits(pos)?;
        }
        self.pos = pos;
        Ok(natural)
    }

    /// From behind a number: takes every `,123` and `, 123` that follows, and says how many. What it does not take
    /// (signs, fractions, zeros, other white space) is left for [`Self::number`].
    pub(super) fn number_run(&mut self) -> u64 {
        let mut count = 0;
        loop {
            if self.peek() != Some(b',') {
                return count;
            }
            let start = self.pos + 1 + usize::from(self.bytes.get(self.pos + 1) == Some(&b' '));
            if !matches!(self.bytes.get(start), Some(b'1'..=b'9')) {
                return count;
            }
            let end = self.digits(start);
            if matches!(self.bytes.get(end), Some(b'.' | b'e' | b'E')) {
                return count;
            }
            self.pos = end;
            count += 1;
        }
    }

    fn some_digits(&self, start: usize) -> Result<usize, ScanError> {
        match self.digits(start) {
            end if end == start => Err(self.expected_at(start, "a digit")),
            end => Ok(end),
        }
    }

    /// Where the digits that start at `pos` end.
    #[inline]
    fn digits(&self, mut pos: usize) -> usize {
        const ZEROS: u64 = u64::from_ne_bytes([b'0'; 8]);
        const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
        // Added to a byte of 10 or more it sets the high bit. A carry can only spoil bytes behind the first hit.
        const ABOVE_NINE: u64 = u64::from_ne_bytes([0x80 - 10; 8]);
        while let Some(word) = self.bytes.get(pos..).and_then(|rest| rest.first_chunk::<8>()) {
            let digits = u64::from_le_bytes(*word) ^ ZEROS;
            let others = (digits.wrapping_add(ABOVE_NINE) | digits) & HIGH;
            if others != 0 {
                return pos + others.trailing_zeros() as usize / 8;
            }
            pos += 8;
        }
        let rest = self.bytes.get(pos..).unwrap_or_default();
        pos + rest.iter().take_while(|byte| byte.is_ascii_digit()).count()
    }

    /// The text of a string token, its escapes decoded; a lone surrogate becomes U+FFFD.
    pub(super) fn decode(&self, text: Text) -> String {
        let raw = self.bytes.get(text.start..text.end).unwrap_or_default();
        if !text.escaped {
            return String::from_utf8_lossy(raw).into_owned();
        }
        let mut decoded = Vec::with_capacity(raw.len());
        let mut rest = raw;
        while let Some((&byte, tail)) = rest.split_first() {
            if byte != b'\\' {
                decoded.push(byte);
                rest = tail;
                continue;
            }
            let (character, used) = unescape(tail);
            decoded.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            rest = tail.get(used..).unwrap_or_default();
        }
        String::from_utf8_lossy(&decoded).into_owned()
    }
}

/// The character of the (checked) escape whose backslash stood before `tail`, and how much of `tail` it took.
fn unescape(tail: &[u8]) -> (char, usize) {
    let unit = match tail.first() {
        Some(b'b') => return ('\u{8}', 1),
        Some(b'f') => return ('\u{c}', 1),
        Some(b'n') => return ('\n', 1),
        Some(b'r') => return ('\r', 1),
        Some(b't') => return ('\t', 1),
        Some(b'u') => tail.get(1..).and_then(hex4).unwrap_or_default(),
        Some(&other) => return (char::from(other), 1),
        None => return (char::REPLACEMENT_CHARACTER, 0),
    };
    if let Some(character) = char::from_u32(u32::from(unit)) {
        return (character, 5);
    }
    let low = tail.get(5..).and_then(|next| next.strip_prefix(b"\\u")).and_then(hex4);
    match low.and_then(|low| char::decode_utf16([unit, low]).next()?.ok()) {
        Some(character) => (character, 11),
        None => (char::REPLACEMENT_CHARACTER, 5),
    }
}
