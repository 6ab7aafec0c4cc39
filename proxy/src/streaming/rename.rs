//! The model's name inside a WebSocket, where clients and engines know it by different ones: an alias, a split, a fallback.
//!
//! A realtime client names its model in `session.update` once more, by the name it knows, and an engine refuses a name that is not
//! its own. So on the way to the engine, and only where the names differ, small text frames are looked into: one that is a
//! `session.update` and names the model as in the URL goes on with the engine's name for it. Everything else passes byte for byte
//! and without waiting: audio (bytes, or base64 in events of other types), long or fragmented messages, compressed ones
//! (their frames are marked), and whatever is not what it seems.
//!
//! Bounded: one frame of at most [`MOST_BYTES`] is held until it is whole.

use serde_json::Value;

use super::websocket::frame_head;

/// Longest payload that is looked into, in bytes; events that configure a session are shorter.
pub const MOST_BYTES: usize = 16 << 10;

/// First byte of a text message in one piece, with no extension at work.
const WHOLE_TEXT: u8 = 0x81;

/// The event that names the model.
const EVENT: &str = "session.update";

/// Two names of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The client's.
    pub from: String,
    /// The engine's.
    pub to: String,
}

/// What the bytes that come next belong to.
#[derive(Debug)]
enum Place {
    /// A frame's head, as far as there is one.
    Head,
    /// A payload that passes: so many bytes of it are to come.
    Passing(u64),
    /// A frame that is held until it has this length.
    Held(usize),
}

/// Follows the frames of a client.
#[derive(Debug)]
pub struct Renamer {
    names: Names,
    place: Place,
    /// The head, or the held frame.
    held: Vec<u8>,
}

impl Renamer {
    /// At the beginning of a frame.
    pub fn new(names: Names) -> Self {
        Self { names, place: Place::Head, held: Vec::new() }
    }

    /// Takes the next bytes; what may go on now is appended to `out`.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while let Some((&first, rest)) = bytes.split_first() {
            match self.place {
                Place::Head => {
                    self.held.push(first);
                    bytes = rest;
                    if let Some((head, payload)) = frame_head(&self.held) {
                        self.enter(head, payload, out);
                    }
                }
                Place::Passing(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    let (passing, after) = bytes.split_at(taken);
                    out.extend_from_slice(passing);
                    bytes = after;
                    self.place = match left - taken as u64 {
                        0 => Place::Head,
                        left => Place::Passing(left),
                    };
                }
                Place::Held(length) => {
                    let taken = length.saturating_sub(self.held.len()).min(bytes.len());
                    let (more, after) = bytes.split_at(taken);
                    self.held.extend_from_slice(more);
                    bytes = after;
                    if self.held.len() >= length {
                        self.release(out);
                    }
                }
            }
        }
    }

    /// A head of that many bytes is whole.
    fn enter(&mut self, head: usize, payload: u64, out: &mut Vec<u8>) {
        let looked_into = self.held.first() == Some(&WHOLE_TEXT)
            && self.held.get(1).is_some_and(|second| second & 0x80 != 0)
            && (EVENT.len() as u64..=MOST_BYTES as u64).contains(&payload);
        self.place = match payload {
            0 => Place::Head,
            payload if looked_into => Place::Held(head + usize::try_from(payload).unwrap_or(MOST_BYTES)),
            payload => Place::Passing(payload),
        };
        if !matches!(self.place, Place::Held(_)) {
            out.append(&mut self.held);
        }
    }

    /// The held frame is whole.
    fn release(&mut self, out: &mut Vec<u8>) {
        match self.renamed() {
            Some(frame) => out.extend(frame),
            None => out.extend_from_slice(&self.held),
        }
        self.held.clear();
        self.place = Place::Head;
    }

    /// The held frame with the engine's name in it; `None` if it stays as it is.
    fn renamed(&self) -> Option<Vec<u8>> {
        let (head, _) = frame_head(&self.held)?;
        let (head, masked) = self.held.split_at_checked(head)?;
        let mask = *head.last_chunk::<4>()?;
        let text = String::from_utf8(xor(masked, mask)).ok()?;
        if !text.contains(EVENT) {
            return None;
        }
        let mut event: Value = serde_json::from_str(&text).ok()?;
        if event.get("type")?.as_str()? != EVENT {
            return None;
        }
        let mut found = false;
        for place in ["/model", "/session/model"] {
            if let Some(model) = event.pointer_mut(place).filter(|model| **model == *self.names.from) {
                *model = Value::String(self.names.to.clone());
                found = true;
            }
        }
        found.then(|| frame(event.to_string().as_bytes(), mask))
    }
}

fn xor(bytes: &[u8], mask: [u8; 4]) -> Vec<u8> {
    bytes.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key).collect()
}

/// A text message in one frame, as a client sends it.
fn frame(payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![WHOLE_TEXT];
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(short @ 0..126), _) => frame.push(0x80 | short),
        (_, Ok(medium)) => {
            frame.push(0x80 | 126);
            frame.extend(medium.to_be_bytes());
        }
        _ => {
            frame.push(0x80 | 127);
            frame.extend((payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(xor(payload, mask));
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MASK: [u8; 4] = [1, 2, 3, 250];

    fn names() -> Names {
        Names { from: "alias".into(), to: "org/served \"name\"".into() }
    }

    fn through(bytes: &[u8], cut: usize) -> Vec<u8> {
        let (mut renamer, mut out) = (Renamer::new(names()), Vec::new());
        bytes.chunks(cut).for_each(|chunk| renamer.push(chunk, &mut out));
        assert!(renamer.held.len() <= MOST_BYTES + 14);
        out
    }

    fn payload(frame: &[u8]) -> Value {
        let (head, _) = frame_head(frame).expect("a head");
        serde_json::from_slice(&xor(&frame[head..], MASK)).expect("JSON")
    }

    #[test]
    fn a_session_is_updated_with_the_engines_name() {
        for text in [
            r#"{"type":"session.update","model":"alias"}"#,
            r#"{"session":{"model":"alias","voice":"x"},"type":"session.update"}"#,
        ] {
            let out = through(&frame(text.as_bytes(), MASK), 3);
            let expected = text.replace("alias", r#"org/served \"name\""#);
            assert_eq!(payload(&out), serde_json::from_str::<Value>(&expected).expect("JSON"));
        }
        let long =
            format!(r#"{{"type":"session.update","model":"alias","instructions":"{}"}}"#, "x".repeat(9_000));
        assert_eq!(payload(&through(&frame(long.as_bytes(), MASK), 1_000))["model"], r#"org/served "name""#);
    }

    #[test]
    fn everything_else_passes_as_it_is() {
        let text = |text: &str| frame(text.as_bytes(), MASK);
        let update = text(r#"{"type":"session.update","model":"alias"}"#);
        let marked = |first: u8| [&[first], &update[1..]].concat();
        let too_long =
            format!(r#"{{"type":"session.update","model":"alias","x":"{}"}}"#, "x".repeat(MOST_BYTES));
        for bytes in [
            text(r#"{"type":"session.update","model":"other"}"#),
            text(r#"{"type":"session.update"}"#),
            text(r#"{"type":"input_audio_buffer.append","audio":"c2Vzc2lvbi51cGRhdGU=","model":"alias"}"#),
            text(r#"{"type":"response.create","note":"session.update","model":"alias"}"#),
            text("session.update but no JSON"),
            text(&too_long),
            marked(0x01), // the first of several
            marked(0x80), // the last of several
            marked(0x82), // bytes
            marked(0xc1), // compressed
            marked(0x89), // a ping
        ] {
            assert_eq!(through(&bytes, 7), bytes);
        }
    }

    proptest! {
        #[test]
        fn bytes_that_are_no_update_pass_byte_for_byte_however_they_are_cut(
            frames in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 0..6),
            cut in 1usize..400,
        ) {
            let mut bytes = Vec::new();
            for (text, payload) in frames {
                let mut frame = frame(&payload, MASK);
                frame[0] = if text { WHOLE_TEXT } else { 0x82 };
                bytes.extend(frame);
            }
            prop_assert_eq!(through(&bytes, cut), bytes);
        }

        #[test]
        fn no_bytes_panic_or_get_lost_but_what_is_held(
            bytes in prop::collection::vec(any::<u8>(), 0..600), cut in 1usize..100,
        ) {
            let out = through(&bytes, cut);
            prop_assert!(bytes.starts_with(&out));
        }
    }
}
