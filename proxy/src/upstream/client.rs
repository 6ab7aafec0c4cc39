//! One attempt at one engine: connect, send, and wait until there is something for the client.
//!
//! [`EngineClient::ask`] returns only once the answer has really begun: for a stream its first whole event, for a unary
//! answer all of it (up to `upstream.unary_buffer_bytes`). Until then nothing has been written to the client, so that
//! every failure in here can be retried elsewhere without anybody noticing. Dropping the future, or an [`Open`] answer,
//! closes the connection, which is how vLLM learns that nobody waits any more.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{StatusCode, header};
use penstock_config::proxy::UpstreamConfig;
use pingora_core::{
    connectors::{ConnectorOptions, http::Connector},
    protocols::http::{client::HttpSession, v1::client::HttpSession as Http1Session},
};
use pingora_error::BError;
use pingora_http::ResponseHeader;
use prometheus::IntCounter;
use tokio::time::{Instant, timeout_at};

use super::{answers, request::EngineRequest};
use crate::{
    downstream::respond,
    endpoints::Endpoint,
    error::UpstreamFailure,
    openai::{
        event::EventSplitter,
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
    pub connection: Http1Session,
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
pub struct EngineClient {
    connector: Connector,
    keepalive: Duration,
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

impl std::fmt::Debug for EngineClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineClient").field("keepalive", &self.keepalive).finish_non_exhaustive()
    }
}

impl EngineClient {
    /// No connections yet. `kept` counts those put aside for reuse.
    pub fn new(config: &UpstreamConfig, kept: IntCounter) -> Self {
        let connector = Connector::new(Some(ConnectorOptions::new(config.keepalive_connections)));
        Self {
            connector,
            keepalive: Duration::from_millis(config.keepalive_ms),
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
            let head = exchange(&mut connection, endpoint, request).await.map_err(|e| lost(&e, origin))?;
            self.beginning(connection, head, endpoint, request).await
        };
        timeout_at(deadline, begun).await.unwrap_or_else(|_| {
            Err(Failed::new(UpstreamFailure::FirstByteTimeout, format!("nothing within {first_byte:?}")))
        })
    }

    /// Puts a connection whose answer has ended back into the pool.
    pub async fn release(&self, connection: Http1Session, endpoint: &Endpoint) {
        self.kept.inc();
        self.connector
            .release_http_session(HttpSession::H1(connection), &endpoint.peer, Some(self.keepalive))
            .await;
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<(Http1Session, Origin), Failed> {
        let connected = self.connector.get_http_session(&endpoint.peer).await;
        match connected.map_err(|e| Failed::new(UpstreamFailure::Connect, e))? {
            (HttpSession::H1(connection), true) => Ok((connection, Origin::Reused)),
            (HttpSession::H1(connection), false) => Ok((connection, Origin::New)),
            _ => Err(Failed::new(UpstreamFailure::Garbage, "the engine's connection is not HTTP/1.1")),
        }
    }

    /// Waits for what can be given to the client: a whole answer, or the first bytes or events of one.
    async fn beginning(
        &self,
        mut connection: Http1Session,
        head: ResponseHeader,
        endpoint: &Endpoint,
        request: &EngineRequest,
    ) -> Result<Answer, Failed> {
        let status = head.status;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return upgraded(connection, head, request);
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
        self.release(connection, endpoint).await;
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

    async fn read_up_to_buffer(&self, connection: &mut Http1Session) -> Result<(Bytes, bool), Failed> {
        let mut body = BytesMut::new();
        loop {
            let chunk = connection.read_body_ref().await.map_err(|e| broken(&e))?;
            let Some(chunk) = chunk else { return Ok((body.freeze(), true)) };
            body.extend_from_slice(chunk);
            if body.len() > self.unary_buffer {
                return Ok((body.freeze(), false));
            }
        }
    }
}

/// Sends the request and reads the head of the final answer, made ready for the client.
async fn exchange(
    connection: &mut Http1Session,
    endpoint: &Endpoint,
    request: &EngineRequest,
) -> Result<ResponseHeader, BError> {
    connection.write_request_header(Box::new(request.head(&endpoint.address)?)).await?;
    // A WebSocket's handshake has no body; what would end one could end what follows the engine's consent (pingora #946).
    if !request.upgrades() {
        connection.write_body(&request.body).await?;
        connection.finish_body().await?;
    }
    loop {
        connection.read_response().await?;
        let Some(head) = connection.resp_header() else { continue };
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            return respond::head_from_engine(head, &request.request_id);
        }
    }
}

/// The connection as bytes, once the engine has consented to a WebSocket that was asked for.
fn upgraded(
    mut connection: Http1Session,
    head: ResponseHeader,
    request: &EngineRequest,
) -> Result<Answer, Failed> {
    let websocket = connection
        .get_header(header::UPGRADE)
        .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if !request.upgrades() || !websocket {
        return Err(Failed::new(UpstreamFailure::Garbage, "a change of protocol that nobody asked for"));
    }
    // Frames may have come in the same read as the head.
    let first = match connection.read_body_bytes().now_or_never() {
        Some(Ok(Some(first))) => first,
        _ => Bytes::new(),
    };
    let engine = End { stream: connection.into_inner(), first };
    Ok(Answer::Upgraded(Box::new(Upgraded { head, engine })))
}

async fn first_events(connection: &mut Http1Session, splitter: &mut EventSplitter) -> Result<Bytes, Failed> {
    let mut facts = StreamFacts::default();
    loop {
        let chunk = connection.read_body_bytes().await.map_err(|e| broken(&e))?;
        let Some(chunk) = chunk else {
            return Err(Failed::new(
                UpstreamFailure::BeforeFirstByte,
                "the stream ended before its first event",
            ));
        };
        let whole = splitter.push(chunk).map_err(|e| Failed::new(UpstreamFailure::Garbage, e))?;
        let Some(whole) = whole else { continue };
        facts.observe(&whole);
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

/// A connection lost before any byte of the answer.
fn lost(error: &BError, origin: Origin) -> Failed {
    use pingora_error::ErrorType as E;
    let failure = match error.etype() {
        E::ConnectionClosed | E::ReadError | E::WriteError if origin == Origin::Reused => {
            UpstreamFailure::StaleConnection
        }
        E::ConnectionClosed | E::ReadError | E::WriteError => UpstreamFailure::BeforeFirstByte,
        _ => UpstreamFailure::Garbage,
    };
    Failed::new(failure, error)
}

/// A connection lost between the answer's head and anything for the client.
fn broken(error: &BError) -> Failed {
    Failed::new(UpstreamFailure::BeforeFirstByte, error)
}
