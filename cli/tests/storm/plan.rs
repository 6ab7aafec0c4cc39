//! What each request of a storm does: a pure function of the storm's seed and the request's number.

use std::time::Duration;

use penstock_loadtest::{engine::template::Message, load::verify::Checker};
use serde_json::json;

/// How a request travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// HTTP/1.1, on the connection of the request before, if that is still good.
    KeepAlive,
    /// HTTP/1.1, on a connection of its own that it asks to close.
    Close,
    /// HTTP/2 in clear, on a connection shared with others.
    H2,
}

/// When its client leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// Never: the answer is read to its end and checked.
    Never,
    /// Connected, nothing sent.
    Connected,
    /// In the middle of the head.
    InHead,
    /// In the middle of the body.
    InUpload,
    /// So long after all was sent: queued, in prefill, or with a unary answer being made.
    Waiting(Duration),
    /// After so many events of the stream.
    AfterEvents(usize),
    /// Somewhere inside an event.
    InsideAnEvent,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) transport: Transport,
    pub(crate) leave: Leave,
    pub(crate) stream: bool,
    /// The client's connection ends in a reset rather than in order, whenever it ends.
    pub(crate) reset: bool,
    prompt: String,
    tokens: u64,
}

fn rng(seed: u64, number: u64) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl Plan {
    /// Any kind of request: about half of the clients leave.
    pub(crate) fn any(seed: u64, number: u64) -> Self {
        let mut rng = rng(seed, number);
        let stream = rng.u8(..4) > 0;
        let leave = match rng.u8(..20) {
            0 => Leave::Connected,
            1 => Leave::InHead,
            2 => Leave::InUpload,
            3..6 => Leave::Waiting(Duration::from_micros(rng.u64(..60_000))),
            6..8 if stream => Leave::AfterEvents(rng.usize(1..20)),
            8..10 if stream => Leave::InsideAnEvent,
            _ => Leave::Never,
        };
        Self::new(&mut rng, seed, number, leave, stream)
    }

    /// A client that leaves in the given phase, undisturbed by faults.
    pub(crate) fn leaving(seed: u64, number: u64, leave: Leave, stream: bool) -> Self {
        let mut rng = rng(seed, number);
        Self::new(&mut rng, seed, number, leave, stream)
    }

    /// A client that stays to the end.
    pub(crate) fn staying(seed: u64, number: u64) -> Self {
        let mut rng = rng(seed, number);
        let stream = rng.bool();
        Self::new(&mut rng, seed, number, Leave::Never, stream)
    }

    fn new(rng: &mut fastrand::Rng, seed: u64, number: u64, leave: Leave, stream: bool) -> Self {
        let transport = match rng.u8(..4) {
            0 => Transport::Close,
            1 => Transport::H2,
            _ => Transport::KeepAlive,
        };
        // Some uploads are larger than what the sockets between take at once.
        let padding = if rng.u8(..16) == 0 { rng.usize(..300_000) } else { rng.usize(..200) };
        let prompt = format!("storm {seed}, request {number} {}", "x".repeat(padding));
        // An engine that is left has seconds of work before it: it stops because it was told to.
        let tokens = if leave == Leave::Never { rng.u64(1..30) } else { 4000 };
        Self { transport, leave, stream, reset: rng.u8(..4) == 0, prompt, tokens }
    }

    /// The body; no other request has the same.
    pub(crate) fn body(&self) -> Vec<u8> {
        let mut body = json!({
            "messages": [{"role": "user", "content": self.prompt}], "max_tokens": self.tokens, "ignore_eos": true,
            "stream": self.stream, "model": "sim-model",
        });
        if self.stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        body.to_string().into_bytes()
    }

    /// What the answer must be.
    pub(crate) fn checker(&self) -> Checker {
        Checker::chat(&[Message::new("user", self.prompt.as_str())], self.tokens)
    }

    /// The phase in which the client leaves, for the report.
    pub(crate) fn phase(&self) -> &'static str {
        match (self.leave, self.stream) {
            (Leave::Connected, _) => "connected",
            (Leave::InHead, _) => "head",
            (Leave::InUpload, _) => "upload",
            (Leave::Waiting(_), true) => "queued or prefill",
            (Leave::Waiting(_), false) => "unary",
            (Leave::AfterEvents(_), _) => "decode",
            (Leave::InsideAnEvent, _) => "inside an event",
            (Leave::Never, _) => "out of patience",
        }
    }
}
