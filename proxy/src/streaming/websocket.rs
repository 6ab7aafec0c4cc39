//! Just enough of WebSocket frames (RFC 6455) to end a tunnel in words: where a frame ends, whether the other side has said
//! goodbye, and a goodbye of our own.
//!
//! The tunnel hands bytes on as they are (but for a name, see [`super::rename`]). Only lengths are read here, and only of what
//! engines send: a close frame of ours may go to the client between two frames, never inside one.

/// The longest head of a frame: two bytes, eight of length, four of mask.
const MAX_HEAD: usize = 14;

const CLOSE: u8 = 0x8;

/// Follows the frames of one direction.
#[derive(Debug, Default)]
pub struct FrameTracker {
    head: [u8; MAX_HEAD],
    /// Bytes of the present frame's head.
    have: usize,
    /// Bytes of the present frame's payload still to come.
    left: u64,
    closed: bool,
}

impl FrameTracker {
    /// Takes the next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let available = bytes.len() as u64;
                let taken = self.left.min(available);
                self.left -= taken;
                // No more than there are bytes.
                bytes = bytes.get(usize::try_from(taken).unwrap_or(bytes.len())..).unwrap_or_default();
                continue;
            }
            let Some((&byte, rest)) = bytes.split_first() else { return };
            bytes = rest;
            if let Some(slot) = self.head.get_mut(self.have) {
                *slot = byte;
            }
            self.have += 1;
            if let Some((_, payload)) = self.head.get(..self.have).and_then(frame_head) {
                self.closed |= self.head[0] & 0x0f == CLOSE;
                self.left = payload;
                self.have = 0;
            }
        }
    }

    /// Whether the last frame is whole, so that another may follow.
    pub const fn is_between_frames(&self) -> bool {
        self.have == 0 && self.left == 0
    }

    /// Whether a close frame has passed.
    pub const fn has_closed(&self) -> bool {
        self.closed
    }
}

/// The lengths of a frame's head and payload, once `bytes` holds the whole head.
pub fn frame_head(bytes: &[u8]) -> Option<(usize, u64)> {
    let [_, second, rest @ ..] = bytes else { return None };
    let (length, extended) = match second & 0x7f {
        126 => (u64::from(u16::from_be_bytes(*rest.first_chunk()?)), 2),
        127 => (u64::from_be_bytes(*rest.first_chunk()?), 8),
        short => (u64::from(short), 0),
    };
    let head = 2 + extended + if second & 0x80 == 0 { 0 } else { 4 };
    (bytes.len() >= head).then_some((head, length))
}

/// Why we close a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goodbye {
    /// The gateway is stopping.
    Stopping,
    /// Nothing was said for too long.
    Idle,
    /// The engine is gone.
    EngineLost,
}

impl Goodbye {
    /// The close frame, as a server sends it.
    pub fn frame(self) -> Vec<u8> {
        let (code, reason): (u16, &str) = match self {
            Self::Stopping => (1001, "the gateway is stopping"),
            Self::Idle => (1001, "nothing was said for too long"),
            Self::EngineLost => (1011, "the engine was lost"),
        };
        let length = u8::try_from(2 + reason.len()).unwrap_or(2); // reasons are shorter than a control frame's 125 bytes
        let mut frame = vec![0x80 | CLOSE, length];
        frame.extend_from_slice(&code.to_be_bytes());
        frame.extend_from_slice(reason.as_bytes());
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(opcode: u8, payload: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut bytes = vec![0x80 | opcode];
        match payload {
            0..126 => bytes.push(mask | u8::try_from(payload).unwrap()),
            126..65_536 => {
                bytes.push(mask | 126);
                bytes.extend(u16::try_from(payload).unwrap().to_be_bytes());
            }
            _ => {
                bytes.push(mask | 127);
                bytes.extend((payload as u64).to_be_bytes());
            }
        }
        bytes.extend(vec![0x88; if masked { 4 } else { 0 } + payload]);
        bytes
    }

    #[test]
    fn a_goodbye_is_one_whole_close_frame() {
        for goodbye in [Goodbye::Stopping, Goodbye::Idle, Goodbye::EngineLost] {
            let mut tracker = FrameTracker::default();
            let frame = goodbye.frame();
            assert!(frame.len() <= 127 && frame.len() == usize::from(frame[1]) + 2);
            tracker.push(&frame[..5]);
            assert!(!tracker.is_between_frames());
            tracker.push(&frame[5..]);
            assert!(tracker.is_between_frames() && tracker.has_closed());
        }
    }

    proptest! {
        #[test]
        fn frames_end_where_they_end_however_they_are_cut(
            frames in prop::collection::vec((prop::sample::select(vec![1u8, 2, 9, 10]), prop::sample::select(vec![0usize, 1, 125, 126, 127, 300, 65_535, 65_536, 70_000]), any::<bool>()), 0..5),
            cuts in prop::collection::vec(1..3000usize, 1..9),
        ) {
            let mut bytes = Vec::new();
            let mut ends = vec![0];
            for (opcode, payload, masked) in frames {
                bytes.extend(frame(opcode, payload, masked));
                ends.push(bytes.len());
            }
            let mut tracker = FrameTracker::default();
            let mut at = 0;
            for cut in cuts.iter().cycle() {
                prop_assert_eq!(tracker.is_between_frames(), ends.contains(&at));
                if at == bytes.len() { break; }
                let end = bytes.len().min(at + cut);
                tracker.push(&bytes[at..end]);
                at = end;
            }
            prop_assert!(!tracker.has_closed());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            FrameTracker::default().push(&bytes);
        }
    }
}
