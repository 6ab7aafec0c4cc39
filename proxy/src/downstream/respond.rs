//! Answers that the gateway itself writes: errors, lists of models, and whole answers of engines.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use penstock_config::proxy::LimitsConfig;
use pingora_core::protocols::http::ServerSession;
use pingora_error::{ErrorType::InvalidHTTPHeader, OrErr, Result};
use pingora_http::ResponseHeader;

use super::body;
use crate::{
    error::GatewayError,
    openai::ErrorShape,
    upstream::{connection::head::Head, headers::named_by_connection},
};

/// The header that names a request; the same id is in our logs and goes to the engine. It is ours: two clients may choose
/// the same name, and an engine that gets a name twice mixes up two requests.
pub const REQUEST_ID: &str = "x-request-id";

/// The header that gives a client back the name it chose itself, in this header or in `x-request-id`.
pub const CLIENT_REQUEST_ID: &str = "x-client-request-id";

/// Longest name of a client's own that it gets back.
const MAX_CLIENT_ID_BYTES: usize = 128;

/// The name that a client gave its request, if it is one that can be written to a log.
pub fn client_request_id(headers: &HeaderMap) -> Option<&HeaderValue> {
    let id = headers.get(CLIENT_REQUEST_ID).or_else(|| headers.get(REQUEST_ID))?;
    let fine =
        (1..=MAX_CLIENT_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    fine.then_some(id)
}

/// Gives the client its own name of the request back, where it has one. The request's head must have been read.
///
/// # Errors
/// A header that cannot be written; not to be expected of one that was read.
pub fn echo_client_id(session: &ServerSession, head: &mut ResponseHeader) -> Result<()> {
    match client_request_id(&session.req_header().headers) {
        Some(id) => head.insert_header(CLIENT_REQUEST_ID, id),
        None => Ok(()),
    }
}

/// Writes `status` and a whole `body`.
///
/// # Errors
/// The client could not be written to.
pub async fn whole(
    session: &mut ServerSession,
    status: u16,
    content_type: &'static str,
    request_id: &str,
    body: Bytes,
) -> Result<()> {
    let mut head = ResponseHeader::build_no_case(status, Some(6))?;
    head.insert_header(header::CONTENT_TYPE, content_type)?;
    head.insert_header(REQUEST_ID, request_id)?;
    whole_with_head(session, head, body).await
}

/// Writes what `OPTIONS` asks for.
///
/// # Errors
/// The client could not be written to.
pub async fn options(session: &mut ServerSession, allow: &'static str, request_id: &str) -> Result<()> {
    let mut head = ResponseHeader::build_no_case(StatusCode::NO_CONTENT, Some(4))?;
    head.insert_header(header::ALLOW, allow)?;
    head.insert_header(REQUEST_ID, request_id)?;
    echo_client_id(session, &mut head)?;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(Bytes::new(), true).await
}

/// Writes a prepared head and a whole `body`; sets the length. `HEAD` gets all but the body.
///
/// # Errors
/// The client could not be written to.
pub async fn whole_with_head(
    session: &mut ServerSession,
    mut head: ResponseHeader,
    body: Bytes,
) -> Result<()> {
    echo_client_id(session, &mut head)?;
    head.insert_header(header::CONTENT_LENGTH, body.len())?;
    let head_only = session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(if head_only { Bytes::new() } else { body }, true).await
}

/// Renders an error, unless an answer has begun or nobody is there to read it. An upload still coming in is taken in first
/// so that the client sees the error.
///
/// # Errors
/// The client could not be written to.
pub async fn error(
    session: &mut ServerSession,
    error: &GatewayError,
    shape: ErrorShape,
    request_id: &str,
    limits: &LimitsConfig,
) -> Result<()> {
    let begun = session.response_written().is_some_and(|head| !head.status.is_informational());
    if begun || matches!(error, GatewayError::ClientGone | GatewayError::ClientStalled) {
        return Ok(());
    }
    // The connection cannot be used again where it cannot be told where the request ends: framing that is broken, or a
    // body that the client may or may not send now that it has been refused.
    let end_unknown = matches!(error, GatewayError::BodyFraming | GatewayError::BodyTimeout)
        || body::waits_to_continue(session);
    if end_unknown {
        return last_words(session, error, shape, request_id).await;
    }
    session.set_close_on_response_before_downstream_finish(false);
    let mut head = error_head(error, request_id)?;
    // HTTP/2 knows no such field, nor the change.
    if matches!(error, GatewayError::NotAWebSocket { .. }) && !session.is_http2() {
        head.insert_header(header::UPGRADE, "websocket")?;
    }
    whole_with_head(session, head, error_body(error, shape)).await?;
    body::discard_rest(session, limits).await;
    Ok(())
}

/// Renders an error as the connection's last answer. The only one that can be given where no head could be read.
///
/// # Errors
/// The client could not be written to.
pub async fn last_words(
    session: &mut ServerSession,
    error: &GatewayError,
    shape: ErrorShape,
    request_id: &str,
) -> Result<()> {
    session.set_keepalive(None);
    let body = error_body(error, shape);
    let mut head = error_head(error, request_id)?;
    head.insert_header(header::CONTENT_LENGTH, body.len())?;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(body, true).await
}

fn error_body(error: &GatewayError, shape: ErrorShape) -> Bytes {
    error.body(shape).to_string().into()
}

fn error_head(error: &GatewayError, request_id: &str) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build_no_case(error.status(), Some(8))?;
    head.insert_header(header::CONTENT_TYPE, "application/json")?;
    head.insert_header(REQUEST_ID, request_id)?;
    if let Some(seconds) = error.retry_after_s() {
        head.insert_header(header::RETRY_AFTER, seconds)?;
    }
    if let GatewayError::UnsupportedEncoding { .. } = error {
        head.insert_header(header::ACCEPT_ENCODING, "identity")?;
    }
    if let GatewayError::MethodNotAllowed { allow } = error {
        head.insert_header(header::ALLOW, *allow)?;
    }
    if error.status() == 401 {
        head.insert_header(header::WWW_AUTHENTICATE, "Bearer")?;
    }
    Ok(head)
}

/// Headers of an engine's answer that are its connection's business, or the inside's, and not the client's. `date` and
/// `connection` are written anew; what `Connection` names goes as well.
const NOT_FORWARDED: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authentication-info",
    "te",
    "trailer",
    "transfer-encoding",
    "content-length",
    "upgrade",
    "date",
    "server",
    "via",
    "x-powered-by",
    // The engine's own name of the request, its load, and what it would like from whom it takes for its client.
    REQUEST_ID,
    CLIENT_REQUEST_ID,
    "endpoint-load-metrics",
    "www-authenticate",
    "set-cookie",
];

/// The head for the client, made from the engine's. The caller sets the framing; that of a WebSocket is set here.
///
/// # Errors
/// A header that cannot be written; not to be expected of one that was read.
pub fn head_from_engine(engine: Head<'_>, request_id: &str) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build_no_case(engine.status, Some(engine.fields.len() + 4))?;
    let named = named_by_connection(engine.values("connection"));
    for field in engine.fields {
        let stays =
            |name: &str| NOT_FORWARDED.contains(&name) || named.iter().any(|n| n.eq_ignore_ascii_case(name));
        let name = HeaderName::from_bytes(field.name.as_bytes()).or_err(InvalidHTTPHeader, "a name")?;
        if !stays(name.as_str()) {
            let value = HeaderValue::from_bytes(field.value).or_err(InvalidHTTPHeader, "a value")?;
            head.append_header(name, value)?;
        }
    }
    if engine.status == StatusCode::SWITCHING_PROTOCOLS {
        head.insert_header(header::CONNECTION, "Upgrade")?;
        head.insert_header(header::UPGRADE, "websocket")?;
    }
    head.insert_header(REQUEST_ID, request_id)?;
    Ok(head)
}

/// Prepares `head` for a body of unknown length.
///
/// # Errors
/// A header that cannot be written.
pub fn frame_as_stream(session: &mut ServerSession, head: &mut ResponseHeader) -> Result<()> {
    match session.req_header().version {
        Version::HTTP_2 => Ok(()),
        Version::HTTP_11 => {
            head.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))
        }
        _ => {
            session.set_keepalive(None); // HTTP/1.0 knows no chunks: the end of the connection ends the body
            Ok(())
        }
    }
}

/// Whether an engine's answer is a stream of events.
pub fn is_event_stream(head: &ResponseHeader) -> bool {
    head.status == StatusCode::OK
        && head
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|v| v.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::connection::head;

    #[test]
    fn what_belongs_to_the_engines_connection_stays_there() {
        let engine = "HTTP/1.1 200 OK\r\n\
            connection: close, X-Inside\r\n\
            x-inside: 1\r\n\
            keep-alive: timeout=5\r\n\
            transfer-encoding: chunked\r\n\
            server: uvicorn\r\n\
            x-request-id: theirs\r\n\
            endpoint-load-metrics: TEXT x=1\r\n\
            set-cookie: a=1\r\n\
            upgrade: h2c\r\n\
            Content-Type: application/json\r\n\
            x-kept: 1\r\n\
            x-kept: 2\r\n\
            \r\n";
        let parsed = head::parse(engine.as_bytes(), |head| {
            head_from_engine(head, "ours").map_err(|_| head::BadHead::Field)
        });
        let (_, head) = parsed.expect("good").expect("whole");
        let mut lines: Vec<_> =
            head.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap_or("?"))).collect();
        lines.sort_unstable();
        assert_eq!(lines, ["content-type: application/json", "x-kept: 1", "x-kept: 2", "x-request-id: ours"]);
    }

    #[test]
    fn a_clients_own_id_is_given_back_if_it_can_be_written() {
        let id = |pairs: &[(&'static str, &str)]| {
            let pairs =
                pairs.iter().map(|(n, v)| (header::HeaderName::from_static(n), v.parse().expect("a value")));
            let headers: HeaderMap = pairs.collect();
            client_request_id(&headers).map(|v| v.to_str().unwrap_or("?").to_owned())
        };
        assert_eq!(id(&[("x-request-id", "a-1")]).as_deref(), Some("a-1"));
        assert_eq!(id(&[("x-request-id", "a"), ("x-client-request-id", "b")]).as_deref(), Some("b"));
        for bad in ["", "two words", "caf\u{e9}", &"x".repeat(129)] {
            assert_eq!(id(&[("x-request-id", bad)]), None, "{bad}");
        }
    }
}
