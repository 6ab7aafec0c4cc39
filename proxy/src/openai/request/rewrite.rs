//! Single places of a body changed, all other bytes as they were.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// Bytes that take the place of a range; none to cut it out, an empty range to insert.
pub type Edit<'a> = (Range<usize>, &'a [u8]);

/// `body` with every edit made, in one pass. Ranges are those of `body`; one that reaches into an earlier one, or beyond the
/// body, is cut to what is left. Without edits it is `body` itself.
#[must_use]
pub fn rewrite(body: &Bytes, mut edits: Vec<Edit<'_>>) -> Bytes {
    if edits.is_empty() {
        return body.clone();
    }
    edits.sort_by_key(|(range, _)| range.start);
    let more: usize = edits.iter().map(|(_, new)| new.len()).sum();
    let mut written = BytesMut::with_capacity(body.len() + more);
    let mut at = 0;
    for (range, new) in edits {
        let start = range.start.clamp(at, body.len());
        written.extend_from_slice(body.get(at..start).unwrap_or_default());
        written.extend_from_slice(new);
        at = range.end.clamp(start, body.len());
    }
    written.extend_from_slice(body.get(at..).unwrap_or_default());
    written.freeze()
}

/// [`rewrite`] with one edit.
#[must_use]
pub fn splice(body: &Bytes, range: Range<usize>, json_value: &[u8]) -> Bytes {
    rewrite(body, vec![(range, json_value)])
}

/// `text` as a JSON string, quotes included, for [`splice`].
#[must_use]
pub fn json_string(text: &str) -> Vec<u8> {
    serde_json::Value::from(text).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_made_in_the_order_of_the_body_and_cut_to_it() {
        let body = Bytes::from_static(b"0123456789");
        let edit = |edits: Vec<Edit<'_>>| rewrite(&body, edits);
        assert_eq!(edit(vec![(8..9, b"X"), (1..3, b""), (5..5, b"in")]), "034in567X9");
        assert_eq!(edit(vec![(2..6, b"a"), (4..8, b"b")]), "01ab89");
        assert_eq!(edit(vec![(9..99, b"z"), (50..60, b"!")]), "012345678z!");
        assert!(std::ptr::eq(edit(vec![]).as_ptr(), body.as_ptr()), "no copy where nothing changes");
    }
}
