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
use crate::{downstream::respond, drain, error::GatewayError, openai::ErrorShape, record::Record};

/// Bytes of HTTP/2 body a client may send before it hears from us: large prompts come in few round trips.
const H2_WINDOW_BYTES: u32 = 1 << 20;

/// The gateway as pingora hosts it.
#[derive(Debug)]
pub struct Host(pub Arc<Gateway>);

#[async_trait]
impl HttpServerApp for Host {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.0.serve(session, shutdown).await
    }

    fn h2_options(&self) -> Option<H2Options> {
        let mut options = default_h2_options();
        options.initial_window_size(H2_WINDOW_BYTES).initial_connection_window_size(H2_WINDOW_BYTES * 4);
        Some(options)
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.0.options)
    }
}

impl Gateway {
    /// One request on a connection, from its head on; gives the connection back if it can take another.
    async fn serve(&self, mut session: ServerSession, shutdown: &ShutdownWatch) -> Option<ReusedHttpStream> {
        let limits = &self.config.limits;
        let read = {
            let mut stop = shutdown.clone();
            // One future to its end: a head that has begun to arrive must not be lost to the drain.
            let mut reading = pin!(session.read_request());
            tokio::select! {
                biased;
                read = reading.as_mut() => read,
                () = stopping(&mut stop) => tokio::time::timeout(drain::LAST_REQUEST, reading).await.ok()?,
            }
        };
        match read {
            Ok(true) => {}
            Ok(false) => return None, // an idle connection that the client has closed
            Err(e) => {
                let error = head_error(&e, limits.header_bytes);
                let mut record = Record::new(&self.metrics);
                record.failed(&error);
                if error == GatewayError::ClientGone {
                    return None;
                }
                // Nobody may be there to read it.
                drop(
                    respond::last_words(&mut session, &error, ErrorShape::OpenAi, record.request_id()).await,
                );
                return None;
            }
        }
        let mut record = Record::new(&self.metrics);
        let _counted = self.lifecycle.request();
        session.set_write_timeout(Some(Duration::from_millis(limits.write_stall_ms)));
        session.set_total_drain_timeout(Some(Duration::from_millis(limits.body_idle_ms)));
        session.set_pipelining_enabled(true);
        if session.get_keepalive().is_some() {
            let keepalive = self.config.public.keepalive_s;
            session.set_keepalive((keepalive > 0 && !*shutdown.borrow()).then_some(keepalive));
        }
        let handled = self.handle(&mut session, &mut record).await;
        if let Ok(Done::Upgraded(tunnel)) = handled {
            self.tunnel(session, &mut record, *tunnel).await;
            return None;
        }
        if let Err(error) = handled {
            record.failed(&error);
            let shape = record.shape();
            respond::error(&mut session, &error, shape, record.request_id(), limits).await.ok()?;
            if matches!(error, GatewayError::ClientGone | GatewayError::ClientStalled) {
                return None;
            }
        }
        drop(record);
        let settings = HttpPersistentSettings::for_session(&session);
        let reusable = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(reusable, settings))
    }
}

/// Resolves when no more requests are wanted.
async fn stopping(shutdown: &mut ShutdownWatch) {
    // An error means that the sender is gone: the process is past stopping.
    drop(shutdown.wait_for(|stop| *stop).await);
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
