//! The reader of engines' answers: however the bytes are cut, the same head, payload, end and error come of them, no byte is
//! invented or lost, and what follows the body is left alone.
//!
//! An input is an answer and its cuts: the first byte says how many cuts (up to 15), each of the next ones where.

use bytes::{Buf, BytesMut};
use penstock_proxy::upstream::connection::{
    body::{BadBody, Decoder, Framing},
    head::{self, BadHead, Meaning},
};

/// What came of an answer's bytes.
#[derive(Debug, PartialEq)]
enum Outcome {
    NoHead,
    BadHead(BadHead),
    Body { meaning: Meaning, payload: Vec<u8>, bad: Option<BadBody>, ended: bool, rest: Vec<u8> },
}

/// Panics if the reader breaks a promise on `input`.
pub fn check(input: &[u8]) {
    let Some((&count, rest)) = input.split_first() else { return };
    let count = usize::from(count % 16).min(rest.len());
    let (cuts, answer) = rest.split_at(count);
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| usize::from(*cut) * (answer.len() + 1) / 256).collect();
    cuts.extend([0, answer.len()]);
    cuts.sort_unstable();
    let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &answer[pair[0]..pair[1]]).collect();
    let whole = read(&[answer]);
    assert_eq!(read(&pieces), whole, "cuts change nothing");
    if answer.len() < 300 {
        assert_eq!(read(&answer.chunks(1).collect::<Vec<_>>()), whole, "byte by byte");
    }
    let Outcome::Body { meaning, payload, bad, ended, rest } = whole else { return };
    let body = &answer[meaning.length..];
    assert!(body.ends_with(&rest));
    match meaning.framing {
        Framing::Length(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(body.len());
            assert_eq!((&payload[..], bad), (&body[..length], None));
        }
        Framing::UntilClose => assert_eq!((&payload[..], bad, rest.len()), (body, None, 0)),
        Framing::Chunked => {
            assert!(payload.len() + rest.len() <= body.len());
            assert!(!ended || bad.is_none());
            assert!(!ended || body.len() - rest.len() >= payload.len() + 5, "the last chunk is not payload");
        }
    }
}

/// Reads an answer that comes in `pieces`.
fn read(pieces: &[&[u8]]) -> Outcome {
    let mut buffer = BytesMut::new();
    let mut pieces = pieces.iter();
    let meaning = loop {
        match head::parse(&buffer, |head| {
            assert!(head.fields.iter().all(|field| !field.value.iter().any(|byte| b"\r\n\0".contains(byte))));
            Ok(())
        }) {
            Ok(Some((meaning, ()))) => break meaning,
            Ok(None) => {}
            Err(bad) => return Outcome::BadHead(bad),
        }
        let Some(piece) = pieces.next() else { return Outcome::NoHead };
        buffer.extend_from_slice(piece);
    };
    buffer.advance(meaning.length);
    let (mut decoder, mut payload) = (Decoder::new(meaning.framing), Vec::new());
    let mut bad = None;
    loop {
        while bad.is_none() && !buffer.is_empty() {
            match decoder.decode(&mut buffer) {
                Ok(some) if some.is_empty() => break,
                Ok(some) => payload.extend_from_slice(&some),
                Err(e) => bad = Some(e),
            }
        }
        let Some(piece) = pieces.next() else { break };
        buffer.extend_from_slice(piece);
    }
    Outcome::Body { meaning, payload, bad, ended: decoder.is_ended(), rest: buffer.to_vec() }
}
