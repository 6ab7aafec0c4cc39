//! The event splitter: however a stream is cut into chunks, the same whole events come out, nothing is lost, added or held back
//! without need, and no more than the limit is held.
//!
//! An input is a stream and its cuts: the first byte says how many cuts (up to 15), each of the next ones where.

use bytes::Bytes;
use penstock_proxy::openai::{event::EventSplitter, usage::StreamFacts};

/// Small, so that inputs reach it.
const LIMIT: usize = 64;

/// Panics if the splitter breaks a promise on `input`.
pub fn check(input: &[u8]) {
    let Some((&count, rest)) = input.split_first() else { return };
    let count = usize::from(count % 16).min(rest.len());
    let (cuts, stream) = rest.split_at(count);
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| usize::from(*cut) * (stream.len() + 1) / 256).collect();
    cuts.extend([0, stream.len()]);
    cuts.sort_unstable();
    let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
    check_chunks(stream, &chunks);
}

/// The same for chunks that are given.
pub fn check_chunks(stream: &[u8], chunks: &[&[u8]]) {
    let ends = ends_of_events(stream);
    let mut splitter = EventSplitter::default();
    let mut limited = Some(EventSplitter::new(LIMIT));
    let mut facts = StreamFacts::default();
    let (mut fed, mut out) = (0, 0);
    for chunk in chunks {
        fed += chunk.len();
        let before = out;
        if let Some(whole) = splitter.push(Bytes::copy_from_slice(chunk)).expect("far below the limit") {
            assert_eq!(whole, stream[out..out + whole.len()], "the bytes as they came");
            out += whole.len();
            facts.observe(&whole);
        }
        let last_end = ends.iter().rev().find(|end| **end <= fed).copied().unwrap_or(0);
        assert_eq!(out, last_end, "all that is whole, and nothing else");
        assert_eq!(splitter.pending_bytes(), fed - out);
        if let Some(small) = &mut limited {
            match small.push(Bytes::copy_from_slice(chunk)) {
                Ok(whole) => {
                    assert!(small.pending_bytes() <= LIMIT);
                    assert_eq!(
                        whole.map_or(0, |whole| whole.len()),
                        out - before,
                        "a limit changes nothing else"
                    );
                }
                Err(_) => {
                    assert!(fed - out > LIMIT, "only {} bytes had to be held back", fed - out);
                    limited = None;
                }
            }
        }
    }
    assert_eq!(splitter.take_partial(), stream[out..], "the rest");
    let mut at_once = StreamFacts::default();
    at_once.observe(&stream[..out]);
    assert_eq!(facts, at_once, "what is known of a stream does not depend on its chunks");
}

/// Every offset at which an event may end, by a forward reading of the standard, one byte at a time.
fn ends_of_events(stream: &[u8]) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut line_is_empty = true;
    for (at, &byte) in stream.iter().enumerate() {
        match byte {
            b'\n' if at > 0 && stream[at - 1] == b'\r' => {
                if ends.last() == Some(&at) {
                    ends.push(at + 1);
                }
            }
            b'\n' | b'\r' => {
                if line_is_empty {
                    ends.push(at + 1);
                }
                line_is_empty = true;
            }
            _ => line_is_empty = false,
        }
    }
    ends
}
