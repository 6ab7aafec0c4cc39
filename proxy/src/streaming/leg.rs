//! One engine's part in an answer, as it is read: whole events, and all that is there at once.

use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use pingora_http::ResponseHeader;

use super::relay::Interrupted;
use crate::{
    openai::event::EventSplitter,
    resume::{Loss, seam::Seam},
    upstream::{
        client::Open,
        connection::{BodyError, Connection},
    },
};

/// A write is filled with what is already there up to about this size, in bytes: some seventy usual events.
const COALESCE_BYTES: usize = 16 << 10;

/// What a read brought.
pub(super) type Read = Result<Option<Bytes>, BodyError>;

/// What follows the bytes that were there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    More,
    End,
    /// The connection broke. Not to be read again: a reader that has failed says "end" next.
    Broken,
}

/// One engine's part in an answer.
pub struct Leg {
    pub(super) connection: Connection,
    /// Present for a stream of events.
    pub(super) splitter: Option<EventSplitter>,
    /// Present for a part that is not the first.
    pub(super) seam: Option<Seam>,
    /// Whether anything has come of it.
    pub(super) begun: bool,
    /// Whether the engine has ended it in order.
    pub(super) ended: bool,
}

impl Leg {
    /// The first part, or the only one. What it begins with is handed to [`Relay::begin`](super::relay::Relay::begin).
    pub fn first(open: Open) -> (Self, ResponseHeader, Bytes) {
        let Open { head, first, connection, events } = open;
        (Self { connection, splitter: events, seam: None, begun: false, ended: false }, head, first)
    }

    /// One that goes on where another was lost; what it begins with is handed to [`Relay::go_on`](super::relay::Relay::go_on).
    pub fn next(open: Open, seam: Seam) -> (Self, Bytes) {
        let (leg, _, first) = Self::first(open);
        (Self { seam: Some(seam), ..leg }, first)
    }

    /// The engine's connection, if it can be used again.
    pub fn into_connection(self) -> Option<Connection> {
        self.ended.then_some(self.connection)
    }

    /// `chunk` and whatever else can be read without waiting, less an event that is not whole.
    pub(super) fn take_what_is_there(&mut self, chunk: Bytes) -> Result<(Bytes, After), Interrupted> {
        let Self { connection, splitter, .. } = self;
        let mut whole = |chunk: Bytes| match splitter.as_mut() {
            None => Ok(Some(chunk)),
            Some(splitter) => splitter.push(chunk).map_err(|_| Interrupted::Lost(Loss::Garbage)),
        };
        let first = whole(chunk)?.unwrap_or_default();
        let mut joined = BytesMut::new();
        let mut after = After::More;
        let mut cx = Context::from_waker(Waker::noop());
        while connection.has_more() && first.len().max(joined.len()) < COALESCE_BYTES {
            match connection.poll_body(&mut cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(None)) => {
                    after = After::End;
                    break;
                }
                Poll::Ready(Err(_)) => {
                    after = After::Broken;
                    break;
                }
                Poll::Ready(Ok(Some(chunk))) => {
                    let Some(next) = whole(chunk)? else { continue };
                    if joined.is_empty() {
                        joined.extend_from_slice(&first);
                    }
                    joined.extend_from_slice(&next);
                }
            }
        }
        Ok((if joined.is_empty() { first } else { joined.freeze() }, after))
    }
}
