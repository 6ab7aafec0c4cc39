//! The form that all plain events of a stream have, so that most of them need no parser. Pure.
//!
//! The events of a stream differ in their text, and in nothing else but the time that `--sim-stamp` puts into some. The
//! first plain one is parsed; those that follow are compared with it, byte for byte, before and behind the text. What does
//! not fit is parsed in its turn, so nothing is taken for right that is not.
//!
//! *Cost* of an event that fits: two comparisons and one search for the end of its text.

use memchr::{memchr2, memmem};

use super::sse::{STAMP, STAMP_DIGITS};

/// The bytes around the text of an event.
#[derive(Debug, Default)]
pub(super) struct Pattern {
    /// To the quote that opens the text; empty as long as nothing was learnt.
    before: Vec<u8>,
    /// From the quote that closes it on, without the stamp.
    after: Vec<u8>,
}

/// What an event that fits says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fit<'a> {
    /// Inside of the JSON string.
    pub(super) text: &'a [u8],
    /// When it was written, by [`super::clock`].
    pub(super) stamp: Option<u64>,
}

impl Pattern {
    /// Takes `event`, whose text is `content`, a part of it, as the form of others.
    pub(super) fn learn(&mut self, event: &[u8], content: &[u8]) {
        self.before.clear();
        let Some(at) = memmem::find(event, b"\"content\":\"").map(|at| at + b"\"content\":\"".len()) else {
            return;
        };
        let (Some(before), Some(after)) = (event.get(..at), event.get(at + content.len()..)) else { return };
        if memmem::find(before, b"\"role\":").is_some() {
            // There is one such event in a stream, and they are counted.
            return;
        }
        self.before.extend_from_slice(before);
        self.after.clear();
        match stamp_at(after) {
            None => self.after.extend_from_slice(after),
            Some(at) => {
                self.after.extend_from_slice(after.get(..at).unwrap_or_default());
                self.after
                    .extend_from_slice(after.get(at + STAMP.len() + STAMP_DIGITS + 1..).unwrap_or_default());
            }
        }
    }

    /// What `event` says, if it has the form.
    pub(super) fn fit<'a>(&self, event: &'a [u8]) -> Option<Fit<'a>> {
        if self.before.is_empty() {
            return None;
        }
        let rest = event.strip_prefix(self.before.as_slice())?;
        let text = rest.get(..end_of_string(rest)?)?;
        let after = rest.get(text.len()..)?;
        if after == self.after {
            return Some(Fit { text, stamp: None });
        }
        let at = stamp_at(after)?;
        let digits = after.get(at + STAMP.len()..at + STAMP.len() + STAMP_DIGITS)?;
        let behind = after.get(at + STAMP.len() + STAMP_DIGITS + 1..)?;
        let same = self.after.get(..at)? == after.get(..at)? && self.after.get(at..)? == behind;
        if same { Some(Fit { text, stamp: Some(decimal(digits)?) }) } else { None }
    }
}

/// Where the closing quote of a string is whose inside begins `bytes`.
fn end_of_string(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + memchr2(b'"', b'\\', bytes.get(from..)?)?;
        if bytes.get(at) == Some(&b'"') {
            return Some(at);
        }
        from = at + 2;
    }
}

/// Where the member with the stamp begins: a comma, its name, its digits and a quote. Looked for from the end, where the
/// simulator puts it.
fn stamp_at(bytes: &[u8]) -> Option<usize> {
    let whole = STAMP.len() + STAMP_DIGITS + 1;
    let last = bytes.len().checked_sub(whole + 1)?;
    let found = bytes.get(last..)?.starts_with(STAMP).then_some(last);
    found.or_else(|| memmem::rfind(bytes, STAMP).filter(|at| at + whole <= bytes.len()))
}

/// Digits as a number; none if one is no digit.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0u64, |number, byte| {
        let digit = u64::from(byte.wrapping_sub(b'0'));
        if digit < 10 { number.checked_mul(10)?.checked_add(digit) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(text: &str, stamp: Option<u64>) -> Vec<u8> {
        let stamp = stamp.map(|ns| format!(",\"sim_ns\":\"{ns:019}\"")).unwrap_or_default();
        format!(
            "data: {{\"id\":\"a\",\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]{stamp}}}"
        )
        .into_bytes()
    }

    #[test]
    fn what_has_the_form_fits_whether_it_is_stamped_or_not() {
        for first in [None, Some(5)] {
            let mut pattern = Pattern::default();
            assert_eq!(pattern.fit(&event("x", None)), None, "nothing was learnt");
            pattern.learn(&event("abc", first), b"abc");
            for (text, stamp) in [("", None), ("k\\\"\\\\", Some(12_345)), (" x", Some(u64::MAX / 2))] {
                let event = event(text, stamp);
                assert_eq!(pattern.fit(&event), Some(Fit { text: text.as_bytes(), stamp }), "{first:?}");
            }
        }
    }

    #[test]
    fn whatever_else_comes_does_not_fit() {
        let mut pattern = Pattern::default();
        pattern.learn(&event("abc", None), b"abc");
        let plain = String::from_utf8(event("abc", Some(5))).unwrap();
        for (from, to) in [
            ("\"a\"", "\"b\""),
            ("null", "\"length\""),
            ("0005", "00x5"),
            ("\"0000", "\"000"),
            ("]", "],\"usage\":{}"),
            ("\"},", "\\\"},"),
        ] {
            let other = plain.replacen(from, to, 1);
            assert_ne!(other, plain, "{from}");
            assert_eq!(pattern.fit(other.as_bytes()), None, "{other}");
        }
        for cut in 0..plain.len() {
            assert_eq!(pattern.fit(&plain.as_bytes()[..cut]), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(first: Vec<u8>, bytes: Vec<u8>) {
            let mut pattern = Pattern::default();
            pattern.learn(&first, b"");
            pattern.fit(&bytes);
            pattern.learn(&[&b"\"content\":\""[..], &first].concat(), &first);
            pattern.fit(&[&b"\"content\":\""[..], &bytes].concat());
            decimal(&bytes);
        }
    }
}
