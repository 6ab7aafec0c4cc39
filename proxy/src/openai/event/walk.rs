//! One whole event after another.

use std::{borrow::Cow, ops::Range};

/// One event that has data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event<'a> {
    /// The value of its `event` field; empty without one.
    pub name: &'a [u8],
    /// Its data, several lines joined by line feeds.
    pub data: Cow<'a, [u8]>,
    /// Where it stands, its blank line and whatever came before it without being an event (comments) included.
    pub range: Range<usize>,
}

/// The events in `bytes`, which are whole events as [`super::EventSplitter::push`] hands them out; what is unfinished at
/// the end is left out. `first`: nothing of the stream came before, so that a byte order mark is none of the first line.
#[must_use]
pub fn walk(bytes: &[u8], first: bool) -> Walk<'_> {
    let mark: &[u8] = b"\xEF\xBB\xBF";
    let at = if first && bytes.starts_with(mark) { mark.len() } else { 0 };
    Walk { bytes, at, began: 0 }
}

/// See [`walk`].
#[derive(Debug, Clone)]
pub struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the event under way began.
    began: usize,
}

impl<'a> Iterator for Walk<'a> {
    type Item = Event<'a>;

    #[inline]
    fn next(&mut self) -> Option<Event<'a>> {
        let mut name: &[u8] = b"";
        let mut data: Option<Cow<'a, [u8]>> = None;
        while let Some((line, next)) = take_line(self.bytes, self.at) {
            self.at = next;
            if line.is_empty() {
                if let Some(data) = data.take() {
                    let range = self.began..self.at;
                    self.began = self.at;
                    return Some(Event { name, data, range });
                }
                name = b"";
            } else if let Some(value) = field(line, b"data") {
                data = Some(match data {
                    None => Cow::Borrowed(value),
                    Some(first) => Cow::Owned([&first, value].join(&b'\n')),
                });
            } else if let Some(value) = field(line, b"event") {
                name = value;
            }
        }
        None
    }
}

/// The line that starts at `at`, and where the next one does; `None` when no line ends.
#[inline]
fn take_line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let rest = bytes.get(at..)?;
    let length = memchr::memchr2(b'\n', b'\r', rest)?;
    let (line, end) = rest.split_at(length);
    Some((line, at + length + if end.starts_with(b"\r\n") { 2 } else { 1 }))
}

/// The value of the line's field if it is called `name`.
#[inline]
fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let rest = line.strip_prefix(name)?;
    match rest.split_first() {
        None => Some(rest),
        Some((b':', value)) => Some(value.strip_prefix(b" ").unwrap_or(value)),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str, first: bool) -> Vec<(String, String, Range<usize>)> {
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        walk(text.as_bytes(), first).map(|e| (lossy(e.name), lossy(&e.data), e.range)).collect()
    }

    #[test]
    fn events_come_with_their_place() {
        let text = "data: a\n\n: ping\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\nid: 1\n\ndata: d";
        let found = all(text, true);
        assert_eq!(found[0], (String::new(), "a".into(), 0..9));
        assert_eq!((&*found[1].0, &*found[1].1), ("x", "b\nc"));
        assert_eq!(&text[found[1].2.clone()], ": ping\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\n");
        assert_eq!(found.len(), 2, "what has no data is no event, nor what is unfinished");
    }

    #[test]
    fn a_mark_counts_only_where_the_stream_begins() {
        assert_eq!(all("\u{feff}data: a\n\n", true)[0].1, "a");
        assert!(all("\u{feff}data: a\n\n", false).is_empty());
    }

    #[test]
    fn a_name_is_that_of_its_own_event() {
        assert_eq!(all("event: x\n\ndata: a\n\n", true)[0].0, "");
    }
}
