//! One attempt at one engine: connect, send, and wait until there is something for the client.
//!
//! [`EngineClient::ask`] returns only once the answer has really begun: for a stream its first whole event, for a unary
//! answer all of it (up to `upstream.unary_buffer_bytes`). Until then nothing has been written to the client, so that
//! every failure in here can be retried elsewhere without anybody noticing. Dropping the future, or an [`Open`] answer,
//! closes the connection, which is how vLLM learns that nobody waits any more.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use penstock_config::proxy::UpstreamConfig;
use pingora_core::protocols::l4;
use pingora_http::ResponseHeader;
use prometheus::IntCounter;
use tokio::{
    runtime,
    time::{Instant, timeout_at},
};

use super::{
    answers,
    connection::{
        BodyError, Connection, HeadError,
        head::{BadHead, Head},
        pool::{Pool, Taken},
    },
    request::EngineRequest,
};
use crate::{
    downstream::respond,
    endpoints::Endpoint,
    error::UpstreamFailure,
    openai::{
        event::{EventSplitter, walk},
        usage::{FinishReason, StreamFacts},
    },
    streaming::tunnel::End,
};

/// An engine's answer, or its beginning.
#[derive(Debug)]
pub enum Answer {
    /// All of it.
    Whole(Box<Whole>),
    /// More follows on the connection.
    Open(Box<Open>),
    /// The engine has changed to a WebSocket.
    Upgraded(Box<Upgraded>),
}

/// An engine's consent to a WebSocket.
#[derive(Debug)]
pub struct Upgraded {
    /// For the client.
    pub head: ResponseHeader,
    /// The connection, and what has come on it already.
    pub engine: End,
}

/// A whole answer.
#[derive(Debug)]
pub struct Whole {
    /// For the client, framing not set.
    pub head: ResponseHeader,
    /// The engine's bytes.
    pub body: Bytes,
}

/// An answer that goes on.
pub struct Open {
    /// For the client, framing not set.
    pub head: ResponseHeader,
    /// What has come so far: whole events of a stream, else any bytes.
    pub first: Bytes,
    /// Where the rest comes from.
    pub connection: Connection,
    /// Present for a stream of events: holds back one that is not whole yet.
    pub events: Option<EventSplitter>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("head", &self.head).field("first", &self.first).finish_non_exhaustive()
    }
}

/// An attempt that came to nothing. The client has seen nothing of it.
#[derive(Debug)]
pub struct Failed {
    /// What it was.
    pub failure: UpstreamFailure,
    /// For the log.
    pub detail: String,
    /// The engine's own error answer, to pass on when no attempt is left.
    pub answer: Option<Box<Whole>>,
}

impl Failed {
    /// A failure after the client had seen something.
    pub fn inside(failure: UpstreamFailure, detail: &str) -> Self {
        Self::new(failure, detail)
    }

    fn new(failure: UpstreamFailure, detail: impl ToString) -> Self {
        Self { failure, detail: detail.to_string(), answer: None }
    }
}

/// The connections to all engines, and the limits on their use.
#[derive(Debug)]
pub struct EngineClient {
    pool: Pool<Connection>,
    connect: Duration,
    unary_buffer: usize,
    kept: IntCounter,
}

/// Whether a connection was reused; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Connected for this request.
    New,
    /// Taken from the pool.
    Reused,
}

impl Origin {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Reused => "reused",
        }
    }
}

impl EngineClient {
    /// No connections yet. `kept` counts those put aside for reuse.
    pub fn new(config: &UpstreamConfig, kept: IntCounter) -> Self {
        Self {
            pool: Pool::new(config.keepalive_connections, Duration::from_millis(config.keepalive_ms)),
            connect: Duration::from_millis(config.connect_ms),
            unary_buffer: config.unary_buffer_bytes,
            kept,
        }
    }

    /// Sends `request` to `endpoint` and waits for the answer's beginning, for up to `first_byte`. `on_connected` hears where the connection came
    /// from.
    ///
    /// # Errors
    /// [`Failed`], with the connection closed.
    pub async fn ask(
        &self,
        endpoint: &Endpoint,
        request: &EngineRequest,
        first_byte: Duration,
        on_connected: impl FnOnce(Origin),
    ) -> Result<Answer, Failed> {
        let (mut connection, origin) = self.connect(endpoint).await?;
        on_connected(origin);
        let deadline = Instant::now() + first_byte;
        let begun = async {
            let head = exchange(&mut connection, endpoint, request).await.map_err(|e| lost(e, origin))?;
            self.beginning(connection, head, request).await
        };
        timeout_at(deadline, begun).await.unwrap_or_else(|_| {
            Err(Failed::new(UpstreamFailure::FirstByteTimeout, format!("nothing within {first_byte:?}")))
        })
    }

    /// Puts a connection whose answer has ended aside, if another request can be sent on it.
    pub fn release(&self, mut connection: Connection) {
        if connection.is_reusable() {
            self.kept.inc();
            connection.rest();
            self.pool.put(connection.address(), connection, runtime::Handle::current().id(), Instant::now());
        }
    }

    /// Closes connections that nobody has used for `upstream.keepalive_ms`.
    pub fn sweep(&self) {
        self.pool.sweep(Instant::now());
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<(Connection, Origin), Failed> {
        let home = runtime::Handle::current().id();
        while let Some(taken) = self.pool.take(endpoint.resolved, home, Instant::now()) {
            let quiet = match taken {
                Taken::Here(connection) => connection.is_quiet().then_some(connection),
                Taken::Elsewhere(connection) if connection.is_quiet() => connection.move_here().ok(),
                Taken::Elsewhere(_) => None,
            };
            if let Some(connection) = quiet {
                return Ok((connection, Origin::Reused));
            }
        }
        let connected = Connection::connect(endpoint.resolved, self.connect).await;
        connected
            .map(|connection| (connection, Origin::New))
            .map_err(|e| Failed::new(UpstreamFailure::Connect, e))
    }

    /// Waits for what can be given to the client: a whole answer, or the first bytes or events of one.
    async fn beginning(
        &self,
        mut connection: Connection,
        Begun { head, is_websocket }: Begun,
        request: &EngineRequest,
    ) -> Result<Answer, Failed> {
        let status = head.status;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return upgraded(connection, head, is_websocket && request.upgrades());
        }
        if respond::is_event_stream(&head) {
            let mut events = EventSplitter::default();
            let first = first_events(&mut connection, &mut events).await?;
            return Ok(Answer::Open(Box::new(Open { head, first, connection, events: Some(events) })));
        }
        let (body, ended) = self.read_up_to_buffer(&mut connection).await?;
        if !ended {
            return Ok(Answer::Open(Box::new(Open { head, first: body, connection, events: None })));
        }
        self.release(connection);
        let mut whole = Box::new(Whole { head, body });
        match answers::judge(&mut whole, request) {
            Ok(()) => {}
            Err(detail) => {
                let failure = UpstreamFailure::BeforeFirstByte;
                return Err(Failed { failure, detail, answer: Some(whole) });
            }
        }
        match whole.head.status {
            StatusCode::SERVICE_UNAVAILABLE => {
                Err(Failed { failure: UpstreamFailure::Busy, detail: "503".into(), answer: None })
            }
            // 501 is an answer: what was asked for does not exist, here or elsewhere.
            status if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => Err(Failed {
                failure: UpstreamFailure::BeforeFirstByte,
                detail: format!("answered {status}"),
                answer: Some(whole),
            }),
            StatusCode::OK if request.stream && whole.body.is_empty() => {
                Err(Failed::new(UpstreamFailure::Garbage, "an empty 200 where a stream was asked for"))
            }
            _ => Ok(Answer::Whole(whole)),
        }
    }

    /// The body, or more of it than is held; whether that is all. What came in one read stays where it lies.
    async fn read_up_to_buffer(&self, connection: &mut Connection) -> Result<(Bytes, bool), Failed> {
        let Some(first) = connection.read_body().await.map_err(broken)? else {
            return Ok((Bytes::new(), true));
        };
        if first.len() > self.unary_buffer || connection.has_ended() {
            let ended = first.len() <= self.unary_buffer;
            return Ok((first, ended));
        }
        let left = connection.body_left().and_then(|left| usize::try_from(left).ok()).unwrap_or_default();
        let mut body = BytesMut::with_capacity(first.len().saturating_add(left).min(self.unary_buffer));
        body.extend_from_slice(&first);
        drop(first);
        while let Some(next) = connection.read_body().await.map_err(broken)? {
            body.extend_from_slice(&next);
            if body.len() > self.unary_buffer {
                return Ok((body.freeze(), false));
            }
        }
        Ok((body.freeze(), true))
    }
}

/// The head of an answer.
struct Begun {
    /// For the client.
    head: ResponseHeader,
    /// Whether the engine means to change to a WebSocket.
    is_websocket: bool,
}

/// Sends the request and reads the head of the final answer, made ready for the client.
async fn exchange(
    connection: &mut Connection,
    endpoint: &Endpoint,
    request: &EngineRequest,
) -> Result<Begun, HeadError> {
    // A WebSocket's handshake has no body.
    let body: &[u8] = if request.upgrades() { &[] } else { &request.body };
    let sent = connection.send(&request.head(&endpoint.address), body).await;
    sent.map_err(|error| HeadError::Lost { error, begun: false })?;
    let begun = |head: Head<'_>| {
        let is_websocket = head.values("upgrade").any(|value| value.eq_ignore_ascii_case(b"websocket"));
        let head = respond::head_from_engine(head, &request.request_id).map_err(|_| BadHead::Field)?;
        Ok(Begun { head, is_websocket })
    };
    connection.read_head(begun).await
}

/// The connection as bytes, if the engine has consented to a WebSocket that was asked for.
fn upgraded(connection: Connection, head: ResponseHeader, was_asked_for: bool) -> Result<Answer, Failed> {
    if !was_asked_for {
        return Err(Failed::new(UpstreamFailure::Garbage, "a change of protocol that nobody asked for"));
    }
    // Frames may have come in the same read as the head.
    let (stream, first) = connection.into_parts();
    let engine = End { stream: Box::new(l4::stream::Stream::from(stream)), first };
    Ok(Answer::Upgraded(Box::new(Upgraded { head, engine })))
}

async fn first_events(connection: &mut Connection, splitter: &mut EventSplitter) -> Result<Bytes, Failed> {
    let mut facts = StreamFacts::default();
    loop {
        let chunk = connection.read_body().await.map_err(broken)?;
        let Some(chunk) = chunk else {
            return Err(Failed::new(
                UpstreamFailure::BeforeFirstByte,
                "the stream ended before its first event",
            ));
        };
        let whole = splitter.push(chunk).map_err(|e| Failed::new(UpstreamFailure::Garbage, e))?;
        let Some(whole) = whole else { continue };
        // The first event alone: what came with it is the relay's, so that it makes no difference how reads fell.
        if let Some(event) = walk(&whole, true).next() {
            facts.on_event(event.name, &event.data);
        }
        let failed = facts.finish_reason.filter(|reason| reason.is_failure()).map(FinishReason::label);
        return match facts.error.as_deref().or(failed) {
            None => Ok(whole),
            Some(message) => {
                let detail = format!("the stream began with an error: {message}");
                Err(Failed::new(UpstreamFailure::BeforeFirstByte, detail))
            }
        };
    }
}

/// No head: the connection was lost, or what came is none.
fn lost(error: HeadError, origin: Origin) -> Failed {
    let failure = match &error {
        HeadError::Lost { begun: false, .. } if origin == Origin::Reused => UpstreamFailure::StaleConnection,
        HeadError::Lost { .. } => UpstreamFailure::BeforeFirstByte,
        HeadError::Bad(_) => UpstreamFailure::Garbage,
    };
    Failed::new(failure, error)
}

/// A connection lost between the answer's head and anything for the client.
fn broken(error: BodyError) -> Failed {
    Failed::new(UpstreamFailure::BeforeFirstByte, error)
}
