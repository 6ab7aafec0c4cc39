//! A stream that goes on at another engine: from the request as it was sent and what the client has seen to the request that
//! brings the rest, or to the reason why there is none. Pure: bytes in, bytes and decisions out.
//!
//! ```text
//! engine ─ events ─▶ [Stitch] ─▶ [Tracker] ─▶ client          engine dies ─▶ Tracker::plan ─▶ Plan { ask, stitch }
//!            only of a continuation   what the client has seen                 another engine is asked, its events
//!                                                                              are stitched on
//! ```
//!
//! - [`tracker`]: every event passes it on its way to the client. It keeps what a continuation needs (token ids, text) and sees
//!   the ways in which a stream dies inside a 200: an error event, an abort that is not ours, an end that is none, garbage.
//! - [`chunks`]: that memory for chat and text completions, token by token; [`sample`] is what makes it cheap.
//! - [`messages`], [`responses`]: the same for Anthropic's messages and for responses, by text.
//! - `plan`: what is asked of the next engine. [`body`] reads the request's members for it, [`refusal`] says why not.
//! - [`seam`]: the continuation's events become events of the stream. [`stitch`] does it for chunks: the stream's id, its shape,
//!   its counts. [`stop`] finds stop strings that span the cut.
//! - [`unary`]: a whole answer out of a stream's events, for requests that want one.
//!
//! # What is exact
//!
//! *By ids* (chat and text completions of engines that return token ids): the next engine gets the very ids that the first one
//! had, so with greedy sampling the answer is the uninterrupted one, token for token. Ids behind the last whole character
//! are generated again: an engine whose prompt ends within one begins with the whole prompt's text.
//! *By text* (tools, log probabilities, images, engines without ids; messages; responses): the text seen is the beginning of
//! the assistant's message; nothing is lost or doubled, but its tokens may be cut differently.
//! *Again* (nothing of text seen): the request as it was; what opens the stream comes once.

pub mod body;
pub mod chunks;
pub mod messages;
#[cfg(test)]
mod model;
mod plan;
pub mod refusal;
pub mod responses;
pub mod sample;
pub mod seam;
pub mod stitch;
pub mod stop;
pub mod tracker;
pub mod unary;
mod wire;

pub use self::refusal::Refusal;
use crate::{endpoints::Leave, error::UpstreamFailure};

/// How a stream was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The connection broke.
    Broken,
    /// The body ended, or said `[DONE]`, and the answer was not finished.
    Unfinished,
    /// The engine said inside the stream that it failed.
    ErrorEvent,
    /// The engine gave the request up, and nobody had asked it to.
    Aborted,
    /// What came was no event, or none of this API.
    Garbage,
    /// Nothing came for too long.
    Stalled,
    /// The engine is to be emptied; nothing is wrong with the stream.
    Moved,
    /// The engine was fenced, or its time to drain is over.
    Fenced,
}

impl Loss {
    /// Every loss, for metrics that exist at zero.
    pub const ALL: [Self; 8] = [
        Self::Broken,
        Self::Unfinished,
        Self::ErrorEvent,
        Self::Aborted,
        Self::Garbage,
        Self::Stalled,
        Self::Moved,
        Self::Fenced,
    ];

    /// Its name in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Broken => "broken",
            Self::Unfinished => "unfinished",
            Self::ErrorEvent => "error_event",
            Self::Aborted => "aborted",
            Self::Garbage => "garbage",
            Self::Stalled => "stalled",
            Self::Moved => "moved",
            Self::Fenced => "fenced",
        }
    }

    /// Why a stream leaves an engine that still serves it.
    #[must_use]
    pub const fn of_leave(leave: Leave) -> Self {
        match leave {
            Leave::Moved => Self::Moved,
            Leave::Fenced => Self::Fenced,
        }
    }

    /// What it says of the engine's health; nothing where the engine did as it was told.
    #[must_use]
    pub const fn failure(self) -> Option<UpstreamFailure> {
        match self {
            Self::Broken | Self::Unfinished | Self::ErrorEvent | Self::Aborted => {
                Some(UpstreamFailure::MidStream)
            }
            Self::Garbage => Some(UpstreamFailure::Garbage),
            Self::Stalled => Some(UpstreamFailure::IdleTimeout),
            Self::Moved | Self::Fenced => None,
        }
    }

    /// Whether the stream can go on where it is if no other engine takes it.
    #[must_use]
    pub const fn is_optional(self) -> bool {
        matches!(self, Self::Stalled | Self::Moved | Self::Fenced)
    }
}

/// What becomes of an event on its way to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the client's.
    Pass,
    /// Whether it is the client's, the next event tells.
    Hold,
    /// The client has it already.
    Drop,
    /// It, and what is held, says that the stream is lost; the client must not see it.
    Lost(Loss),
}

/// A question to the next engine without whose answer the continuation cannot be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// The text of these ids: `/detokenize`.
    Text(Vec<u32>),
    /// How many tokens this text has: `/tokenize`.
    Tokens(String),
    /// How long a context may be: `/v1/models`.
    Context,
}

/// What has been answered so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers {
    /// Texts, by how many of the ids were asked for.
    pub texts: Vec<(usize, String)>,
    /// To [`Question::Tokens`].
    pub tokens: Option<u64>,
    /// To [`Question::Context`], in tokens.
    pub context: Option<u64>,
}

/// The request that brings the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Its path.
    pub path: &'static str,
    /// Its body, JSON.
    pub body: Vec<u8>,
    /// Tokens that were generated before and are prompt now.
    pub recomputed: u64,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlan {
    /// Not before this is answered.
    Asks(Question),
    /// It would be wrong.
    Refused(Refusal),
}

impl From<Refusal> for NoPlan {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}
