//! The seam between a stream and its continuation, whatever the API.

use bytes::Bytes;

use super::{Refusal, messages, responses, stitch};
use crate::openai::event::walk;

/// Makes events of the stream out of those of its continuation.
#[derive(Debug)]
pub enum Seam {
    /// Of chat and text completions.
    Chunks(Box<stitch::Stitch>),
    /// Of Anthropic's messages.
    Messages(Box<messages::Stitch>),
    /// Of responses.
    Responses(Box<responses::Stitch>),
}

impl Seam {
    /// Whole events of the continuation as whole events of the stream; `first`: they are the first.
    ///
    /// # Errors
    /// They are not what was asked for.
    pub fn push(&mut self, events: &Bytes, first: bool) -> Result<Bytes, Refusal> {
        let mut out = Vec::with_capacity(events.len());
        match self {
            Self::Chunks(stitch) => return stitch.push(events, first),
            Self::Messages(stitch) => {
                for event in walk(events, first) {
                    stitch.on_event(event.name, &event.data, &mut out)?;
                }
            }
            Self::Responses(stitch) => {
                for event in walk(events, first) {
                    stitch.on_event(event.name, &event.data, &mut out)?;
                }
            }
        }
        Ok(out.into())
    }

    /// Whether the stream has its end, whatever the engine still says.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Chunks(stitch) if stitch.is_over())
    }
}
