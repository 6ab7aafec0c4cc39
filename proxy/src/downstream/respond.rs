//! Answers that the gateway itself writes: errors, lists of models, and whole answers of engines.

use bytes::Bytes;
use http::{HeaderValue, StatusCode, Version, header};
use penstock_config::proxy::LimitsConfig;
use pingora_core::protocols::http::ServerSession;
use pingora_error::Result;
use pingora_http::ResponseHeader;

use super::body;
use crate::{error::GatewayError, openai::ErrorShape};

/// The header that names a request; the same id is in our logs and goes to the engine.
pub const REQUEST_ID: &str = "x-request-id";

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
    let mut head = ResponseHeader::build(status, Some(6))?;
    head.insert_header(header::CONTENT_TYPE, content_type)?;
    head.insert_header(REQUEST_ID, request_id)?;
    whole_with_head(session, head, body).await
}

/// Writes a prepared head and a whole `body`; sets the length.
///
/// # Errors
/// The client could not be written to.
pub async fn whole_with_head(
    session: &mut ServerSession,
    mut head: ResponseHeader,
    body: Bytes,
) -> Result<()> {
    head.insert_header(header::CONTENT_LENGTH, body.len())?;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(body, true).await
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
    whole_with_head(session, error_head(error, request_id)?, error_body(error, shape)).await?;
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
    whole_with_head(session, error_head(error, request_id)?, error_body(error, shape)).await
}

fn error_body(error: &GatewayError, shape: ErrorShape) -> Bytes {
    error.body(shape).to_string().into()
}

fn error_head(error: &GatewayError, request_id: &str) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build(error.status(), Some(8))?;
    head.insert_header(header::CONTENT_TYPE, "application/json")?;
    head.insert_header(REQUEST_ID, request_id)?;
    if let Some(seconds) = error.retry_after_s() {
        head.insert_header(header::RETRY_AFTER, seconds)?;
    }
    if let GatewayError::MethodNotAllowed { allow } = error {
        head.insert_header(header::ALLOW, *allow)?;
    }
    if error.status() == 401 {
        head.insert_header(header::WWW_AUTHENTICATE, "Bearer")?;
    }
    Ok(head)
}

/// Headers of an engine's answer that are its connection's business, not the client's. `date` and `connection` are written
/// anew; `server` and an engine's own request id would tell about the inside.
const NOT_FORWARDED: [header::HeaderName; 10] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::CONTENT_LENGTH,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    header::PROXY_AUTHENTICATE,
    header::DATE,
    header::SERVER,
    header::HeaderName::from_static(REQUEST_ID),
];

/// The head for the client, made from the engine's. The caller sets the framing.
///
/// # Errors
/// A header that cannot be written; not to be expected of one that was read.
pub fn head_from_engine(engine: &ResponseHeader, request_id: &str) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build(engine.status, Some(engine.headers.len() + 4))?;
    for (name, value) in &engine.headers {
        if !NOT_FORWARDED.contains(name) && name.as_str() != "keep-alive" {
            head.append_header(name.clone(), value.clone())?;
        }
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
