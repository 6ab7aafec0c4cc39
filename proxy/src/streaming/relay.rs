//! The copy loop: from the engine to the client, whole events at a time.
//!
//! Waits on five things: bytes from the engine, the client's leaving, silence for too long, the word that the engine is to be
//! left, the gateway's last call. What has already arrived goes out in one write (engines batch, and slow clients let chunks
//! pile up); nothing that is whole is ever held back for more. An event that is not whole yet is: a stream that breaks never
//! ends inside an event. Backpressure is the write: while a client takes nothing, nothing more is read from its engine.
//!
//! An engine's part in an answer is a [`Leg`]. When one is lost the stream may go on with another: the relay, and what its
//! tracker knows of the client, stay ([`crate::resume`]).
//!
//! Cost of an event: one read, one write, no timer set (one idle timer a stream is looked at when it fires, not when an event
//! passes), no lock; what else is waited for is polled when it has something to say ([`Bell`]); the write goes past the session
//! where it can ([`direct`]); what the tracker notes is a few comparisons.

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use pingora_core::protocols::http::ServerSession;
use pingora_error::ErrorType;
use pingora_http::ResponseHeader;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    downstream::{self, direct, respond},
    error::{GatewayError, UpstreamFailure},
    health::Pulse,
    openai::{
        ErrorShape, error_body,
        event::walk,
        usage::{StreamFacts, Usage},
    },
    resume::{Loss, Refusal, seam::Seam, tracker::Tracker, unary::Assembly},
    streaming::{
        bell::Bell,
        leg::{After, Leg, Read},
    },
    telemetry::metrics::Metrics,
};

/// How long a stream keeps its counts to itself: all streams together write to the same two counters.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Most bytes of events that a whole answer is made of: a million tokens and more.
const MOST_ASSEMBLED: usize = 512 << 20;

/// What the relay needs beside the connections.
#[derive(Debug)]
pub struct RelayContext<'a> {
    /// Longest silence of the engine.
    pub idle: Duration,
    /// The same for a stream that can go on elsewhere.
    pub stall: Duration,
    /// Longest time in which a client takes nothing of what is written.
    pub write_stall: Duration,
    /// Cancelled when the gateway will wait no longer.
    pub cut: &'a CancellationToken,
    /// Shape of an error event.
    pub shape: ErrorShape,
    /// Where events and bytes are counted.
    pub metrics: &'a Metrics,
}

/// How fast the answer came and how much of it was written. Kept with the clock reads that the idle timer needs anyway:
/// gaps are between reads, and a read may hold several events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Bytes of the body written.
    pub bytes: u64,
    /// Events that were there before the first gap.
    pub events_before: u64,
    /// Time from then to the last read.
    pub reading: Duration,
    /// Longest time between two reads.
    pub longest_gap: Duration,
}

/// How a relay ended.
pub struct Relayed {
    /// What the events said; nothing for an answer that is no stream of events.
    pub facts: StreamFacts,
    /// Tokens of prompt and answer, where the engine told their ids.
    pub tokens: Option<(u64, u64)>,
    /// How it went.
    pub pace: Pace,
    /// The answer, where the client wants it whole: nothing of it was written.
    pub whole: Option<Vec<u8>>,
    /// `Ok` once the client has all of the answer.
    pub outcome: Result<(), GatewayError>,
}

impl Relayed {
    /// Tokens as the engines counted them; where they did not, by their ids.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let told = |tokens: u64| (tokens > 0).then_some(tokens);
        let (prompt, completion) = self.tokens.map_or((None, None), |(p, c)| (told(p), Some(c)));
        let usage = self.facts.usage;
        Usage { prompt: usage.prompt.or(prompt), completion: usage.completion.or(completion), ..usage }
    }
}

/// Why a leg does not go on.
#[derive(Debug, Clone, PartialEq)]
pub enum Interrupted {
    /// Its engine is lost, or is to be left.
    Lost(Loss),
    /// What it says does not fit what the client has seen.
    Unfit(Refusal),
    /// The request is over.
    Failed(GatewayError),
}

impl From<GatewayError> for Interrupted {
    fn from(error: GatewayError) -> Self {
        Self::Failed(error)
    }
}

/// What was waited for.
enum Came {
    Read(Read),
    ClientGone,
    LastCall,
    Lost(Loss),
    Silence,
}

/// What has passed since the process's counters were last told.
struct Untold<'a> {
    events: u64,
    bytes: u64,
    since: Instant,
    metrics: &'a Metrics,
}

impl Untold<'_> {
    fn tell(&mut self, now: Instant) {
        self.since = now;
        self.metrics.events.inc_by(std::mem::take(&mut self.events));
        self.metrics.bytes_out.inc_by(std::mem::take(&mut self.bytes));
    }
}

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        self.tell(self.since);
    }
}

/// An answer on its way to the client.
pub struct Relay<'a> {
    session: &'a mut ServerSession,
    context: &'a RelayContext<'a>,
    /// What the client has seen.
    pub tracker: Tracker,
    /// A whole answer in the making, for a client that wants one: it is not written to piece by piece.
    whole: Option<Assembly>,
    pace: Pace,
    untold: Untold<'a>,
    /// Bytes of events that went into it.
    assembled: usize,
    last_read: Instant,
    /// When an event last came; for what is no stream, bytes.
    last_progress: Instant,
}

impl<'a> Relay<'a> {
    /// Nothing written yet.
    pub fn new(
        session: &'a mut ServerSession,
        context: &'a RelayContext<'a>,
        tracker: Tracker,
        whole: Option<Assembly>,
    ) -> Self {
        let now = Instant::now();
        Self {
            session,
            context,
            tracker,
            whole,
            pace: Pace::default(),
            untold: Untold { events: 0, bytes: 0, since: now, metrics: context.metrics },
            assembled: 0,
            last_read: now,
            last_progress: now,
        }
    }

    /// The client's side.
    pub fn session(&mut self) -> &mut ServerSession {
        self.session
    }

    /// Writes the head and what came with it.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub async fn begin(
        &mut self,
        mut head: ResponseHeader,
        leg: &mut Leg,
        first: Bytes,
        pulse: &Pulse<'_>,
    ) -> Result<(), Interrupted> {
        if self.whole.is_some() {
            return self.deliver(leg, first, pulse).await.map(drop);
        }
        let session = &mut *self.session;
        let framed = respond::frame_as_stream(session, &mut head).and_then(|()| match leg.splitter {
            // Proxies in front of us must not hold events back either.
            Some(_) => head
                .insert_header("cache-control", "no-cache")
                .and_then(|()| head.insert_header("x-accel-buffering", "no")),
            None => Ok(()),
        });
        let framed = framed.and_then(|()| respond::echo_client_id(session, &mut head));
        framed.map_err(|_| GatewayError::Upstream(UpstreamFailure::Garbage))?;
        session.write_response_header(Box::new(head)).await.map_err(|e| write_error(&e))?;
        let delivered = self.deliver(leg, first, pulse).await;
        self.pace.events_before = self.tracker.facts.events;
        delivered.map(drop)
    }

    /// Writes what a leg that goes on begins with.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub async fn go_on(&mut self, leg: &mut Leg, first: Bytes, pulse: &Pulse<'_>) -> Result<(), Interrupted> {
        self.last_read = Instant::now();
        self.last_progress = self.last_read;
        self.deliver(leg, first, pulse).await.map(drop)
    }

    /// Copies until the answer is over. With `leave`, the engine is also lost when that resolves, or when it stalls; without,
    /// the stream stays as long as it can.
    ///
    /// # Errors
    /// Why it is not over.
    pub async fn copy(
        &mut self,
        leg: &mut Leg,
        pulse: &Pulse<'_>,
        leave: Option<impl Future<Output = Loss>>,
    ) -> Result<(), Interrupted> {
        let may_leave = leave.is_some();
        let patience = if may_leave { self.context.stall.min(self.context.idle) } else { self.context.idle };
        let mut leave = pin!(async {
            match leave {
                Some(leave) => leave.await,
                None => std::future::pending().await,
            }
        });
        let mut idle = pin!(sleep_until(self.last_progress + patience));
        let mut cut = pin!(self.context.cut.cancelled());
        let bell = Bell::default();
        loop {
            if self.tracker.facts.is_over() && leg.seam.as_ref().is_some_and(Seam::is_over) {
                return self.end(leg).await;
            }
            let session = &mut *self.session;
            let came = poll_fn(|cx| {
                if let Poll::Ready(read) = leg.connection.poll_body(cx) {
                    return Poll::Ready(Came::Read(read));
                }
                if !bell.has_rung(cx) {
                    return Poll::Pending;
                }
                let cx = &mut bell.context();
                if pin!(downstream::gone(session)).poll(cx).is_ready() {
                    return Poll::Ready(Came::ClientGone);
                }
                if cut.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Came::LastCall);
                }
                if let Poll::Ready(loss) = leave.as_mut().poll(cx) {
                    return Poll::Ready(Came::Lost(loss));
                }
                idle.as_mut().poll(cx).map(|()| Came::Silence)
            });
            let read = match came.await {
                Came::Read(read) => read,
                Came::ClientGone => return Err(GatewayError::ClientGone.into()),
                Came::LastCall => return Err(GatewayError::Draining.into()),
                Came::Lost(loss) => return Err(Interrupted::Lost(loss)),
                Came::Silence if self.last_progress.elapsed() >= patience => {
                    return Err(Interrupted::Lost(Loss::Stalled));
                }
                Came::Silence => {
                    idle.as_mut().reset(self.last_progress + patience);
                    bell.ring();
                    continue;
                }
            };
            let before = std::mem::replace(&mut self.last_read, Instant::now());
            let chunk = match read {
                Ok(Some(chunk)) => chunk,
                Ok(None) => {
                    leg.ended = true;
                    return self.end(leg).await;
                }
                Err(_) => return Err(Interrupted::Lost(Loss::Broken)),
            };
            pulse.beat(self.last_read);
            let gap = self.last_read.saturating_duration_since(before);
            self.pace.reading += gap;
            self.pace.longest_gap = self.pace.longest_gap.max(gap);
            let (ready, after) = leg.take_what_is_there(chunk)?;
            if self.deliver(leg, ready, pulse).await? || leg.splitter.is_none() {
                self.last_progress = self.last_read;
            }
            match after {
                After::More => {}
                After::End => {
                    leg.ended = true;
                    return self.end(leg).await;
                }
                After::Broken => return Err(Interrupted::Lost(Loss::Broken)),
            }
        }
    }

    /// Writes whole events, or the bytes of an answer that is no stream; whether events came.
    async fn deliver(&mut self, leg: &mut Leg, bytes: Bytes, pulse: &Pulse<'_>) -> Result<bool, Interrupted> {
        if bytes.is_empty() {
            return Ok(false);
        }
        if leg.splitter.is_none() {
            self.write(bytes, pulse).await?;
            return Ok(true);
        }
        let first = !std::mem::replace(&mut leg.begun, true);
        let bytes = match &mut leg.seam {
            None => bytes,
            Some(seam) => seam.push(&bytes, first).map_err(Interrupted::Unfit)?,
        };
        let (before, came) = (self.tracker.facts.events, self.tracker.came());
        let sound = self.tracker.facts.error.is_none();
        let mut passed = self.tracker.pass(bytes);
        self.untold.events += self.tracker.facts.events - before;
        if sound && self.tracker.facts.error.is_some() {
            let shape = self.context.shape;
            passed.bytes = error_body::normalise_events(&passed.bytes, shape).unwrap_or(passed.bytes);
        }
        if !passed.bytes.is_empty() {
            self.hand_out(passed.bytes, before == 0, pulse).await?;
        }
        match passed.loss {
            Some(loss) => Err(Interrupted::Lost(loss)),
            None => Ok(self.tracker.came() > came),
        }
    }

    /// The leg has ended in order. Whether it was a whole answer, its events tell.
    async fn end(&mut self, leg: &Leg) -> Result<(), Interrupted> {
        let over = self.tracker.facts.is_over();
        if leg.splitter.as_ref().is_some_and(|splitter| !over || splitter.pending_bytes() > 0 && leg.ended) {
            return Err(Interrupted::Lost(Loss::Unfinished));
        }
        Ok(self.close().await?)
    }

    async fn hand_out(&mut self, events: Bytes, first: bool, pulse: &Pulse<'_>) -> Result<(), Interrupted> {
        let Some(whole) = &mut self.whole else { return Ok(self.write(events, pulse).await?) };
        self.assembled += events.len();
        if self.assembled > MOST_ASSEMBLED {
            return Err(Interrupted::Unfit(Refusal::Api));
        }
        let mut events = walk(&events, first);
        events.try_for_each(|event| whole.on_event(event.name, &event.data)).map_err(Interrupted::Unfit)
    }

    async fn write(&mut self, bytes: Bytes, pulse: &Pulse<'_>) -> Result<(), GatewayError> {
        self.pace.bytes += bytes.len() as u64;
        self.untold.bytes += bytes.len() as u64;
        if self.last_read.saturating_duration_since(self.untold.since) >= TELL_EVERY {
            self.untold.tell(self.last_read);
        }
        if let Some(socket) = direct::socket(self.session) {
            let left = direct::begin(socket, &bytes).map_err(|e| direct_error(&e))?;
            if left == 0 {
                return Ok(());
            }
            let rest = direct::rest(socket, &bytes, left, self.context.write_stall);
            return pulse.while_written(Box::pin(rest)).await.map_err(|e| direct_error(&e));
        }
        // Boxed: thousands of streams would keep room for a future that most never have.
        let write = Box::pin(self.session.write_response_body(bytes, false));
        pulse.while_written(write).await.map_err(|e| write_error(&e))
    }

    /// Ends an answer of which the client has all: its engine's end did not come.
    ///
    /// # Errors
    /// The client left.
    pub async fn close(&mut self) -> Result<(), GatewayError> {
        if self.whole.is_some() {
            return Ok(());
        }
        self.session.write_response_body(Bytes::new(), true).await.map_err(|e| write_error(&e))?;
        Ok(())
    }

    /// Tells the client of what went wrong, if it can still be told: a stream of events ends with an error event; any other
    /// answer is cut, so that it cannot be taken for whole.
    pub async fn finish(mut self, is_stream: bool, outcome: Result<(), GatewayError>) -> Relayed {
        if let Err(error) = &outcome
            && self.whole.is_none()
            && !matches!(error, GatewayError::ClientGone | GatewayError::ClientStalled)
        {
            if is_stream {
                let held = self.tracker.take_held();
                let last = [&held, error.event(self.context.shape).as_bytes()].concat();
                self.pace.bytes += held.len() as u64;
                // The body ends in good order, so the connection stays: closing it would cost the client its next request.
                // The client may be gone as well: the stream's own outcome stands.
                drop(self.session.write_response_body(last.into(), true).await);
            } else {
                self.session.set_keepalive(None);
                self.session.shutdown().await;
            }
        }
        let whole = self.whole.and_then(Assembly::body);
        Relayed { tokens: self.tracker.tokens(), facts: self.tracker.facts, pace: self.pace, whole, outcome }
    }
}

/// Why bytes could not be written past the session.
fn direct_error(error: &io::Error) -> GatewayError {
    match error.kind() {
        io::ErrorKind::TimedOut => GatewayError::ClientStalled,
        _ => GatewayError::ClientGone,
    }
}

fn write_error(error: &pingora_error::Error) -> GatewayError {
    match error.etype() {
        ErrorType::WriteTimedout => GatewayError::ClientStalled,
        _ => GatewayError::ClientGone,
    }
}
