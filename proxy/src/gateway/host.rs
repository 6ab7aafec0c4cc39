//! The gateway as pingora hosts it: connections in, one request after the other.

use std::{pin::pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{
    apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream},
    protocols::http::{
        ServerSession,
        v2::server::{H2Options, default_h2_options},
    },
    server::ShutdownWatch,
};
use pingora_error::ErrorType;

use super::{Done, Gateway};
use crate::{
    downstream::{peer::Peer, respond},
    drain,
    error::GatewayError,
    listener::HeadClock,
    openai::ErrorShape,
    record::Record,
};

/// Bytes of HTTP/2 body a client may send before it hears from us: large prompts come in few round trips.
const H2_WINDOW_BYTES: u32 = 1 << 20;

/// Header lists up to this many times `limits.header_bytes` get our own 431, with a reason; the h2 crate, which counts 32
/// bytes more for each field, answers larger ones without.
const H2_HEADER_LIST_FACTOR: usize = 2;

/// Streams that we had to reset for a client's errors, as a multiple of those that it may reset itself.
const H2_OWN_RESETS_FACTOR: usize = 10;

/// The gateway as pingora hosts it: one for each connection.
#[derive(Debug)]
pub struct Host {
    /// What all connections share.
    pub gateway: Arc<Gateway>,
    /// Who is at the other end.
    pub peer: Peer,
    /// How long its request heads have been on their way; HTTP/1 only.
    pub clock: Arc<HeadClock>,
}

#[async_trait]
impl HttpServerApp for Host {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.gateway.serve(session, shutdown, self).await
    }

    fn h2_options(&self) -> Option<H2Options> {
        let limits = &self.gateway.config.limits;
        let header_list = limits.header_bytes.saturating_mul(H2_HEADER_LIST_FACTOR);
        let mut options = default_h2_options();
        options
            .initial_window_size(H2_WINDOW_BYTES)
            .initial_connection_window_size(H2_WINDOW_BYTES * 4)
            .max_header_list_size(u32::try_from(header_list).unwrap_or(u32::MAX))
            .max_concurrent_streams(limits.http2_streams)
            .max_pending_accept_reset_streams(limits.http2_resets)
            .max_local_error_reset_streams(Some(limits.http2_resets.saturating_mul(H2_OWN_RESETS_FACTOR)));
        Some(options)
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.gateway.options)
    }
}

impl Gateway {
    /// One request on a connection, from its head on; gives the connection back if it can take another.
    async fn serve(
        &self,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
        host: &Host,
    ) -> Option<ReusedHttpStream> {
        let limits = &self.config.limits;
        let on_http1 = !session.is_http2();
        let read = {
            // One future to its end: a head that has begun to arrive must not be lost to the drain.
            let mut reading = pin!(session.read_request());
            host.clock.next_head();
            tokio::select! {
                biased;
                read = reading.as_mut() => Some(read),
                () = host.clock.expired(Duration::from_millis(limits.head_ms)), if on_http1 => None,
                () = self.lifecycle.close_idle().cancelled() => {
                    Some(tokio::time::timeout(drain::LAST_REQUEST, reading).await.unwrap_or(Ok(false)))
                }
            }
        };
        let refused = match read {
            Some(Ok(true)) => None,
            // Idle, and closed by the client, by its time or by ours. Under TLS an end has to be said, or it looks cut off.
            Some(Ok(false)) => {
                if on_http1 {
                    session.shutdown().await;
                }
                return None;
            }
            Some(Err(e)) => Some(head_error(&e, limits.header_bytes)),
            None => Some(GatewayError::HeadTimeout),
        };
        if let Some(error) = refused {
            let mut record = Record::new(&self.telemetry);
            record.client(host.peer.address.ip());
            record.failed(&error);
            if error != GatewayError::ClientGone {
                let id = record.request_id();
                // Nobody may be there to read it.
                drop(Box::pin(respond::last_words(&mut session, &error, ErrorShape::OpenAi, id)).await);
            }
            return None;
        }
        let mut record = Record::new(&self.telemetry);
        record.client(host.peer.address.ip());
        record.head(session.req_header());
        let _counted = self.lifecycle.request();
        session.set_write_timeout(Some(Duration::from_millis(limits.write_stall_ms)));
        session.set_total_drain_timeout(Some(Duration::from_millis(limits.body_idle_ms)));
        session.set_pipelining_enabled(true);
        if session.get_keepalive().is_some() {
            let keepalive = self.config.public.keepalive_s;
            session.set_keepalive((keepalive > 0 && !*shutdown.borrow()).then_some(keepalive));
        }
        let handled = self.handle(&mut session, &mut record, &host.peer).await;
        if let Ok(Done::Upgraded(tunnel)) = handled {
            Box::pin(self.tunnel(session, &mut record, *tunnel)).await;
            return None;
        }
        if let Err(error) = handled {
            record.failed(&error);
            let shape = record.shape();
            let told = respond::error(&mut session, &error, shape, record.request_id(), limits);
            Box::pin(told).await.ok()?;
            if matches!(error, GatewayError::ClientGone | GatewayError::ClientStalled) {
                return None;
            }
        }
        drop(record);
        if on_http1 && self.lifecycle.close_idle().is_cancelled() {
            session.set_keepalive(None); // so that it is closed now, and with a word under TLS
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let reusable = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(reusable, settings))
    }
}

/// What a head that pingora refused means. Its text is the only place where the reason is told.
fn head_error(error: &pingora_error::Error, limit: usize) -> GatewayError {
    match error.etype() {
        ErrorType::InvalidHTTPHeader => {
            let text = error.to_string();
            if text.contains("header larger") || text.contains("too many headers") {
                GatewayError::HeadTooLarge { limit }
            } else {
                GatewayError::MalformedHead
            }
        }
        _ => GatewayError::ClientGone,
    }
}
