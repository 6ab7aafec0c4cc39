//! `/v1/realtime`: a WebSocket between a client and an engine of the model that the URL names.
//!
//! Up to the engine's 101 it is a request like any other: the same picks, affinity, retries and errors. The 101 goes to the
//! client, and from then on the connection is a tunnel's, which holds the ticket to its end. What is said inside is not read,
//! but for the model that `session.update` names where the engine knows it by another name ([`crate::streaming::rename`]).

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, header};
use pingora_core::protocols::http::ServerSession;

use super::{
    Done, Gateway,
    attempts::Place,
    take::{Source, Url, sender},
};
use crate::{
    downstream::respond,
    error::{GatewayError, UpstreamFailure},
    openai::{Api, query, route::REALTIME_PATH},
    record::Record,
    routing::policy::Asked,
    streaming::{
        rename::Names,
        tunnel::{self, End, TunnelContext},
    },
    upstream::{
        client::{Failed, Upgraded},
        request::EngineRequest,
    },
};

/// A tunnel whose client has got the 101.
pub(super) struct Tunnel {
    engine: End,
    place: Place,
    /// What client and engine call the model, where that differs.
    names: Option<Names>,
}

impl Gateway {
    /// A WebSocket's handshake.
    pub(super) async fn realtime(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        url: Url<'_>,
        from: Source<'_>,
    ) -> Result<Done, GatewayError> {
        check_handshake(session)?;
        let query = url.query.strip_prefix('?').unwrap_or_default();
        let facts = query::scan(query, self.scan_limits.max_model_bytes).map_err(GatewayError::Body)?;
        let sender = sender(session, from);
        let request = EngineRequest {
            api: Api::Realtime,
            stream: false,
            request_id: record.request_id().to_owned(),
            target: String::new(),
            headers: self.headers_for_engine(session, &sender, record.request_id()),
            body: Bytes::new(),
            resume: None,
            whole: None,
        };
        let session_key = self.session_key(&session.req_header().headers, None);
        let asked = Asked { session: session_key, ..Asked::default() };
        // By which name the engine that was asked last knows the model.
        let served = Mutex::new(String::new());
        let aim = |request: &mut EngineRequest, served_model: &str| {
            served_model.clone_into(&mut served.lock().unwrap_or_else(PoisonError::into_inner));
            let mut query = query.to_owned();
            if served_model != facts.model {
                query.replace_range(facts.model_range.clone(), &query::encode(served_model));
            }
            request.target = [REALTIME_PATH, "?", &query].concat();
        };
        let mut done = self.ask_targets(session, record, &facts.model, &asked, request, aim).await;
        if let Ok(Done::Upgraded(tunnel)) = &mut done {
            let to = served.into_inner().unwrap_or_else(PoisonError::into_inner);
            tunnel.names = (facts.model != to).then_some(Names { from: facts.model, to });
        }
        done
    }

    /// Hands the engine's consent on to the client.
    pub(super) async fn upgrade(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        upgraded: Upgraded,
        place: Place,
    ) -> Result<Done, GatewayError> {
        let Upgraded { mut head, engine } = upgraded;
        record.status(head.status.as_u16());
        let written = match respond::echo_client_id(session, &mut head) {
            Ok(()) => session.write_response_header(Box::new(head)).await,
            Err(e) => Err(e),
        };
        written.map_err(|_| GatewayError::ClientGone)?;
        Ok(Done::Upgraded(Box::new(Tunnel { engine, place, names: None })))
    }

    /// Runs a tunnel to its end. The client's connection ends with it.
    pub(super) async fn tunnel(&self, session: ServerSession, record: &mut Record<'_>, tunnel: Tunnel) {
        let Tunnel { engine, place, names } = tunnel;
        // Only HTTP/1.1 comes here: its handshake was checked.
        let ServerSession::H1(mut session) = session else { return };
        // A client that could not wait for the 101 has sent frames already.
        let first = match session.read_body_bytes().now_or_never() {
            Some(Ok(Some(first))) => first,
            _ => Bytes::new(),
        };
        let client = End { stream: session.into_inner(), first };
        let context = TunnelContext {
            idle: Duration::from_millis(self.config.limits.websocket_idle_ms),
            write_stall: Duration::from_millis(self.config.limits.write_stall_ms),
            cut: self.lifecycle.cut(),
            names,
            metrics: &self.metrics,
        };
        match tunnel::run(client, engine, &context).await {
            Ok(()) => self.note_end(place.ticket()),
            Err(error) => {
                // Silence may be the client's; an engine that hangs up without a word has failed.
                if let GatewayError::Upstream(failure @ UpstreamFailure::MidStream) = &error {
                    self.note_failure(place.ticket(), &Failed::inside(*failure, "in a WebSocket"));
                }
                record.failed(&error);
            }
        }
    }
}

/// Checks what RFC 6455 asks of a client's handshake, as far as an engine would have to refuse it.
fn check_handshake(session: &ServerSession) -> Result<(), GatewayError> {
    let problem = if session.is_http2() {
        Some("connect with HTTP/1.1, not HTTP/2")
    } else {
        handshake_problem(&session.req_header().headers)
    };
    problem.map_or(Ok(()), |problem| Err(GatewayError::NotAWebSocket { problem }))
}

fn handshake_problem(headers: &HeaderMap) -> Option<&'static str> {
    let has = |name: header::HeaderName, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    if !has(header::UPGRADE, "websocket") || !has(header::CONNECTION, "upgrade") {
        return Some("the request has no `Connection: Upgrade` and `Upgrade: websocket`");
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        return Some("the request must have `Sec-WebSocket-Version: 13`");
    }
    // 16 bytes in base64.
    if headers.get(header::SEC_WEBSOCKET_KEY).is_none_or(|key| key.len() != 24) {
        return Some("the request must have a `Sec-WebSocket-Key`");
    }
    let length = headers.get(header::CONTENT_LENGTH).map(http::HeaderValue::as_bytes);
    if headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != b"0") {
        return Some("the request must have no body");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: [(&str, &str); 4] = [
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (header::HeaderName::from_static(name), value.parse().expect("a value"))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_handshake_is_checked_in_words() {
        assert_eq!(handshake_problem(&headers(&GOOD)), None);
        for (name, _) in GOOD {
            let rest: Vec<_> = GOOD.into_iter().filter(|(other, _)| *other != name).collect();
            assert!(handshake_problem(&headers(&rest)).is_some(), "without {name}");
        }
        for more in [("content-length", "5"), ("transfer-encoding", "chunked")] {
            let all = [&GOOD[..], &[more]].concat();
            assert_eq!(handshake_problem(&headers(&all)), Some("the request must have no body"));
        }
        assert_eq!(handshake_problem(&headers(&[&GOOD[..], &[("content-length", "0")]].concat())), None);
    }
}
