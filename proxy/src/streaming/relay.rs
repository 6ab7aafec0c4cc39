//! The copy loop: from the engine to the client, whole events at a time.
//!
//! Waits on four things: bytes from the engine, the client's leaving, silence for too long, the gateway's last call. What
//! has already arrived goes out in one write (engines batch, and slow clients let chunks pile up); nothing that is whole
//! is ever held back for more. An event that is not whole yet is: a stream that breaks never ends inside an event.
//! Backpressure is the write: while a client takes nothing, nothing more is read from its engine.
//!
//! Cost of an event: one read, one write, one allocation for its bytes, one atomic load, no timer set (one idle timer a stream is looked
//! at when it fires, not when an event passes), no lock.

use std::{pin::pin, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use pingora_core::protocols::http::{ServerSession, v1::client::HttpSession as Http1Session};
use pingora_error::ErrorType;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    downstream::{self, respond},
    error::{GatewayError, UpstreamFailure},
    health::Pulse,
    openai::{ErrorShape, usage::StreamFacts},
    telemetry::metrics::Metrics,
    upstream::client::{Events, Open},
};

/// A write is filled with what is already there up to about this size, in bytes: some seventy usual events.
const COALESCE_BYTES: usize = 16 << 10;

/// What the relay needs beside the two connections.
#[derive(Debug)]
pub struct RelayContext<'a> {
    /// Longest silence of the engine.
    pub idle: Duration,
    /// Cancelled when the gateway will wait no longer.
    pub cut: &'a CancellationToken,
    /// Shape of an error event.
    pub shape: ErrorShape,
    /// Where events and bytes are counted.
    pub metrics: &'a Metrics,
    /// Where the engine's progress is noted.
    pub pulse: &'a Pulse<'a>,
}

/// How a relay ended.
pub struct Relayed {
    /// What the events said; nothing for an answer that is no stream of events.
    pub facts: StreamFacts,
    /// The engine's connection, if it can be used again.
    pub connection: Option<Http1Session>,
    /// `Ok` once the client has all of the answer.
    pub outcome: Result<(), GatewayError>,
}

/// Writes the head and relays the rest. When the engine fails, a stream of events ends with an error event; any other
/// answer is cut, so that it cannot be taken for whole.
pub async fn relay(session: &mut ServerSession, open: Open, context: &RelayContext<'_>) -> Relayed {
    let Open { head, first, mut connection, mut events } = open;
    let outcome = match begin(session, head, first, events.as_ref(), context).await {
        Ok(()) => copy(session, &mut connection, events.as_mut(), context).await,
        Err(e) => Err(e),
    };
    let outcome = match outcome {
        Ok(()) => end(session, events.as_ref()).await,
        Err(e) => Err(e),
    };
    if let Err(error @ (GatewayError::Upstream(_) | GatewayError::Draining)) = &outcome {
        match events {
            // The body ends in good order, so the connection stays: closing it would cost the client its next request.
            // The client may be gone as well: the stream's own outcome stands.
            Some(_) => drop(session.write_response_body(error.event(context.shape).into(), true).await),
            None => {
                session.set_keepalive(None);
                session.shutdown().await;
            }
        }
    }
    let reusable = outcome.is_ok();
    Relayed {
        facts: events.map(|e| e.facts).unwrap_or_default(),
        connection: reusable.then_some(connection),
        outcome,
    }
}

async fn begin(
    session: &mut ServerSession,
    mut head: pingora_http::ResponseHeader,
    first: Bytes,
    events: Option<&Events>,
    context: &RelayContext<'_>,
) -> Result<(), GatewayError> {
    let framed = respond::frame_as_stream(session, &mut head).and_then(|()| match events {
        // Proxies in front of us must not hold events back either.
        Some(_) => head
            .insert_header("cache-control", "no-cache")
            .and_then(|()| head.insert_header("x-accel-buffering", "no")),
        None => Ok(()),
    });
    framed.map_err(|_| GatewayError::Upstream(UpstreamFailure::Garbage))?;
    session.write_response_header(Box::new(head)).await.map_err(|e| write_error(&e))?;
    context.metrics.events.inc_by(events.map_or(0, |e| e.facts.events));
    write(session, first, context).await
}

async fn copy(
    session: &mut ServerSession,
    connection: &mut Http1Session,
    mut events: Option<&mut Events>,
    context: &RelayContext<'_>,
) -> Result<(), GatewayError> {
    let mut last_read = Instant::now();
    let mut idle = pin!(sleep_until(last_read + context.idle));
    let mut cut = pin!(context.cut.cancelled());
    loop {
        let read = tokio::select! {
            biased;
            read = connection.read_body_bytes() => read,
            () = downstream::gone(session) => return Err(GatewayError::ClientGone),
            () = cut.as_mut() => return Err(GatewayError::Draining),
            () = idle.as_mut() => {
                if last_read.elapsed() >= context.idle {
                    return Err(GatewayError::Upstream(UpstreamFailure::IdleTimeout));
                }
                idle.as_mut().reset(last_read + context.idle);
                continue;
            }
        };
        last_read = Instant::now();
        let Some(chunk) = read.map_err(|_| GatewayError::Upstream(UpstreamFailure::MidStream))? else {
            return Ok(());
        };
        context.pulse.beat(last_read);
        let (ready, after) = take_what_is_there(connection, chunk, events.as_deref_mut())?;
        if let Some(events) = events.as_deref_mut() {
            let before = events.facts.events;
            events.facts.observe(&ready);
            context.metrics.events.inc_by(events.facts.events - before);
        }
        if !ready.is_empty() {
            write(session, ready, context).await?;
        }
        match after {
            After::More => {}
            After::End => return Ok(()),
            After::Broken => return Err(GatewayError::Upstream(UpstreamFailure::MidStream)),
        }
    }
}

/// What follows the bytes that were there.
enum After {
    More,
    End,
    /// The connection broke. Not to be read again: a reader that has failed says "end" next.
    Broken,
}

/// `chunk` and whatever else can be read without waiting, less an event that is not whole.
fn take_what_is_there(
    connection: &mut Http1Session,
    chunk: Bytes,
    mut events: Option<&mut Events>,
) -> Result<(Bytes, After), GatewayError> {
    let mut whole = |chunk: Bytes| match events.as_deref_mut() {
        None => Ok(Some(chunk)),
        Some(events) => {
            events.splitter.push(chunk).map_err(|_| GatewayError::Upstream(UpstreamFailure::Garbage))
        }
    };
    let first = whole(chunk)?.unwrap_or_default();
    let mut joined = BytesMut::new();
    let mut after = After::More;
    while first.len().max(joined.len()) < COALESCE_BYTES {
        match connection.read_body_bytes().now_or_never() {
            None => break,
            Some(Ok(None)) => {
                after = After::End;
                break;
            }
            Some(Err(_)) => {
                after = After::Broken;
                break;
            }
            Some(Ok(Some(chunk))) => {
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

/// The engine has ended its answer in order. Whether it was a whole one, its events tell.
async fn end(session: &mut ServerSession, events: Option<&Events>) -> Result<(), GatewayError> {
    if events.is_some_and(|events| !events.facts.is_over() || events.splitter.pending_bytes() > 0) {
        return Err(GatewayError::Upstream(UpstreamFailure::MidStream));
    }
    session.write_response_body(Bytes::new(), true).await.map_err(|e| write_error(&e))
}

async fn write(
    session: &mut ServerSession,
    bytes: Bytes,
    context: &RelayContext<'_>,
) -> Result<(), GatewayError> {
    context.metrics.bytes_out.inc_by(bytes.len() as u64);
    context.pulse.while_written(session.write_response_body(bytes, false)).await.map_err(|e| write_error(&e))
}

fn write_error(error: &pingora_error::Error) -> GatewayError {
    match error.etype() {
        ErrorType::WriteTimedout => GatewayError::ClientStalled,
        _ => GatewayError::ClientGone,
    }
}
