//! The client's side of a request: who it is ([`peer`]), taking its body ([`body`]), answering it ([`respond`]), noticing
//! that it left.

pub mod body;
pub mod direct;
pub mod peer;
pub mod respond;

use pingora_core::protocols::http::ServerSession;

/// Resolves once the client has closed the connection, or reset the stream. The request's body must have been read.
/// Cancel-safe; to be selected against everything that is waited for on the client's behalf.
pub async fn gone(session: &mut ServerSession) {
    // Whatever comes: with the body read, nothing but the end can (further pipelined requests are set aside by pingora).
    drop(session.read_body_or_idle(true).await);
}
