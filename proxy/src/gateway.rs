//! The life of a request, in one function: `Gateway::handle`.
//!
//! Hosted directly as a pingora `HttpServerApp`, beside `ProxyHttp` rather than inside it: that way even a head that cannot
//! be parsed is answered in the API's own shape, and a request costs no callbacks. Everything in here is a straight line;
//! what a line does is in the module it names.

use std::{pin::pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use penstock_config::proxy::ProxyConfig;
use pingora_core::{
    apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream},
    protocols::http::{
        ServerSession,
        v2::server::{H2Options, default_h2_options},
    },
    server::ShutdownWatch,
};
use pingora_error::ErrorType;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    admission::auth::KeyRing,
    downstream::{
        self,
        body::{self, BodyBudget},
        respond,
    },
    drain::{self, Lifecycle},
    endpoints::{EndpointTable, Pool, Snapshot, Ticket},
    error::{GatewayError, UpstreamFailure},
    openai::{
        self, ErrorShape, Route,
        request::{RequestFacts, ScanLimits},
    },
    record::Record,
    routing::{self, PickRules, policy::Asked, prefix::Chain},
    streaming::relay::{self, RelayContext},
    telemetry::metrics::Metrics,
    upstream::{
        client::{Answer, EngineClient, Failed, Open, Whole},
        request::{EngineRequest, forwarded_headers},
        retry::{self, Next},
    },
};

/// Bytes of HTTP/2 body a client may send before it hears from us: large prompts come in few round trips.
const H2_WINDOW_BYTES: u32 = 1 << 20;

/// Everything requests share.
#[derive(Debug)]
pub struct Gateway {
    config: ProxyConfig,
    options: HttpServerOptions,
    scan_limits: ScanLimits,
    pick_rules: PickRules,
    outlier_rules: crate::endpoints::outlier::Rules,
    keys: KeyRing,
    /// Memory for request bodies.
    pub bodies: BodyBudget,
    engines: EngineClient,
    /// Where requests can go.
    pub table: EndpointTable,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether it is stopping.
    pub lifecycle: Lifecycle,
    started: Instant,
}

impl Gateway {
    /// A gateway without routes.
    ///
    /// # Errors
    /// A sentence about a setting that cannot be used.
    pub fn new(config: ProxyConfig) -> Result<Self, String> {
        config.validate()?;
        let mut options = HttpServerOptions::default();
        options.h2c = config.public.h2c;
        options.h2_idle_timeout = Some(Duration::from_secs(config.public.keepalive_s.max(1)));
        Ok(Self {
            options,
            scan_limits: ScanLimits { max_depth: config.limits.json_depth, ..ScanLimits::default() },
            pick_rules: PickRules::new(
                &config.routing,
                config.outlier.max_ejected_percent,
                &mut fastrand::Rng::new(),
            ),
            outlier_rules: crate::endpoints::outlier::Rules {
                consecutive_failures: config.outlier.consecutive_failures,
                base_ejection_ms: config.outlier.base_ejection_ms,
                max_ejection_ms: config.outlier.max_ejection_ms,
            },
            keys: KeyRing::new(&config.auth.keys)?,
            bodies: BodyBudget::new(config.limits.buffered_bytes),
            engines: EngineClient::new(&config.upstream),
            table: EndpointTable::new(config.upstream.clone()),
            metrics: Metrics::new().map_err(|e| e.to_string())?,
            lifecycle: Lifecycle::default(),
            started: Instant::now(),
            config,
        })
    }

    /// Milliseconds on this process's own clock, which never goes back.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether callers need no key.
    pub fn is_open(&self) -> bool {
        self.keys.is_open()
    }

    /// From a parsed head to the end of the answer.
    async fn handle(&self, session: &mut ServerSession, record: &mut Record<'_>) -> Result<(), GatewayError> {
        self.check_head(session)?;
        let head = session.req_header();
        let target =
            head.uri.path_and_query().map_or_else(|| head.uri.path().to_owned(), ToString::to_string);
        let path = target.split_once('?').map_or(&*target, |(path, _)| path);
        if path == "/healthz" && head.method == http::Method::GET {
            return self.say(session, record, "text/plain", "ok\n".into()).await;
        }
        let route = openai::route(&head.method, path);
        record.route(route.label(), route.shape());
        self.keys.caller(&head.headers)?;
        let (api, engine_path) = match route {
            Route::Inference { api, path } => (api, path),
            Route::Models => return self.say(session, record, "application/json", self.models()).await,
            Route::Model { id } => {
                let model = self.model(&id)?;
                return self.say(session, record, "application/json", model).await;
            }
            Route::MethodNotAllowed { allowed, .. } => {
                return Err(GatewayError::MethodNotAllowed { allow: allowed });
            }
            Route::NotFound { .. } => return Err(GatewayError::UnknownPath { path: path.to_owned() }),
        };
        check_content_type(session)?;
        let held = body::read(session, &self.config.limits, &self.bodies).await?;
        record.body(held.bytes.len());
        let mut chain = self.pick_rules.chain();
        let facts = openai::request::scan_with(&held.bytes, &self.scan_limits, chain.as_mut())
            .map_err(GatewayError::Body)?;
        let served_model = self.served_model(&facts.model)?;
        record.model(&facts.model);
        let query = &target[path.len()..];
        let request = EngineRequest {
            api,
            stream: facts.stream,
            request_id: record.request_id().to_owned(),
            target: [engine_path, query].concat(),
            headers: forwarded_headers(&session.req_header().headers, record.request_id()),
            body: body_for_engine(&held.bytes, &facts, &served_model),
        };
        let user = facts.user_range.clone().and_then(|range| held.bytes.get(range));
        let (header, cookie) = (&*self.config.routing.session_header, &*self.config.routing.session_cookie);
        let headers = &session.req_header().headers;
        let affinity = self.pick_rules.key.session(headers, header, cookie, user);
        let prefix = chain.map(Chain::hashes).unwrap_or_default();
        let asked = Asked { session: affinity, prefix: &prefix };
        self.attempts(session, record, &facts.model, &asked, &request).await
    }

    /// Asks engines in turn until one has answered, then hands the answer on.
    async fn attempts(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        asked: &Asked<'_>,
        request: &EngineRequest,
    ) -> Result<(), GatewayError> {
        self.pool(model)?.budget.earn();
        let rules = self.pick_rules.of(model);
        let mut tried: Vec<Arc<str>> = Vec::new();
        let mut last: Option<Failed> = None;
        let mut resent = false;
        loop {
            let pool = self.pool(model)?;
            let chance = |n| fastrand::usize(0..n);
            let with = (&self.pick_rules, &rules);
            let picked = routing::pick(&pool, &tried, asked, self.now_ms(), with, chance);
            let Some((ticket, how)) = picked else {
                return self.give_up(session, record, model, last).await;
            };
            self.metrics.picks.with_label_values(&[rules.policy.name(), how.label()]).inc();
            let answered = tokio::select! {
                biased;
                answered = self.engines.ask(ticket.endpoint(), request, |origin| self.metrics.connected(origin)) => answered,
                () = downstream::gone(session) => return Err(GatewayError::ClientGone),
                () = self.lifecycle.cut().cancelled() => return Err(GatewayError::Draining),
            };
            let failed = match answered {
                Ok(answer) => return self.hand_on(session, record, answer, ticket).await,
                Err(failed) => failed,
            };
            self.note_failure(&ticket, &failed);
            let tries = tried.len() + 1;
            let attempts = self.config.upstream.attempts;
            match retry::after_failure(failed.failure, tries, attempts, resent, || {
                pool.budget.take(self.now_ms())
            }) {
                Next::Retry => tried.push(Arc::clone(&ticket.endpoint().id)),
                Next::Resend => resent = true,
                Next::GiveUp => return self.give_up(session, record, model, Some(failed)).await,
            }
            self.metrics.retries.with_label_values(&[failed.failure.label()]).inc();
            last = Some(failed);
        }
    }

    /// Writes an answer to the client. The ticket is held to its end.
    async fn hand_on(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        answer: Answer,
        ticket: Ticket,
    ) -> Result<(), GatewayError> {
        record.begun();
        match answer {
            Answer::Whole(whole) => {
                ticket.endpoint().succeeded();
                self.write_whole(session, record, *whole).await
            }
            Answer::Open(open) => self.stream(session, record, *open, ticket).await,
        }
    }

    async fn stream(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        open: Open,
        ticket: Ticket,
    ) -> Result<(), GatewayError> {
        record.status(open.head.status.as_u16());
        let context = RelayContext {
            idle: Duration::from_millis(self.config.upstream.idle_ms),
            cut: self.lifecycle.cut(),
            shape: record.shape(),
            metrics: &self.metrics,
        };
        let relayed = relay::relay(session, open, &context).await;
        record.usage(&relayed.facts.usage);
        if relayed.facts.error.is_some() {
            self.metrics.inband_errors.inc();
        }
        match (&relayed.outcome, &relayed.facts.error) {
            (Ok(()), None) => ticket.endpoint().succeeded(),
            (Ok(()), Some(message)) => {
                let failed = Failed::inside(UpstreamFailure::MidStream, message);
                self.note_failure(&ticket, &failed);
            }
            (Err(GatewayError::Upstream(failure)), _) => {
                self.note_failure(&ticket, &Failed::inside(*failure, "while streaming"));
            }
            (Err(_), _) => {}
        }
        if let Some(connection) = relayed.connection {
            self.engines.release(connection, ticket.endpoint()).await;
        }
        relayed.outcome
    }

    async fn write_whole(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        whole: Whole,
    ) -> Result<(), GatewayError> {
        record.status(whole.head.status.as_u16());
        record.tail(&whole.body);
        self.metrics.bytes_out.inc_by(whole.body.len() as u64);
        respond::whole_with_head(session, whole.head, whole.body).await.map_err(|_| GatewayError::ClientGone)
    }

    /// No attempt is left: the engine's own error answer if there is one, else ours.
    async fn give_up(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        last: Option<Failed>,
    ) -> Result<(), GatewayError> {
        match last {
            Some(Failed { answer: Some(whole), .. }) => self.write_whole(session, record, *whole).await,
            Some(failed) => Err(GatewayError::Upstream(failed.failure)),
            None => Err(GatewayError::NoEndpoint { model: model.to_owned() }),
        }
    }

    fn note_failure(&self, ticket: &Ticket, failed: &Failed) {
        let endpoint = ticket.endpoint();
        self.metrics.attempt_failures.with_label_values(&[failed.failure.label()]).inc();
        tracing::debug!(
            endpoint = &*endpoint.id,
            failure = failed.failure.label(),
            detail = failed.detail,
            "attempt failed"
        );
        if failed.failure.counts_against_endpoint() && endpoint.failed(self.now_ms(), &self.outlier_rules) {
            self.metrics.ejections.inc();
            tracing::warn!(
                endpoint = &*endpoint.id,
                address = endpoint.address,
                detail = failed.detail,
                "endpoint ejected"
            );
        }
    }

    fn check_head(&self, session: &ServerSession) -> Result<(), GatewayError> {
        let limit = self.config.limits.header_bytes;
        let headers = &session.req_header().headers;
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        let target = session.req_header().raw_path().len();
        if bytes + target > limit { Err(GatewayError::HeadTooLarge { limit }) } else { Ok(()) }
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>, GatewayError> {
        let snapshot = Arc::clone(&self.table.load());
        if snapshot.loaded { Ok(snapshot) } else { Err(GatewayError::NotReady) }
    }

    fn pool(&self, model: &str) -> Result<Arc<Pool>, GatewayError> {
        let snapshot = self.snapshot()?;
        let route = snapshot
            .routes
            .get(model)
            .ok_or_else(|| GatewayError::UnknownModel { model: model.to_owned() })?;
        Ok(Arc::clone(&route.pool))
    }

    fn served_model(&self, model: &str) -> Result<String, GatewayError> {
        let snapshot = self.snapshot()?;
        let route = snapshot
            .routes
            .get(model)
            .ok_or_else(|| GatewayError::UnknownModel { model: model.to_owned() })?;
        Ok(route.served_model.clone())
    }

    fn models(&self) -> Bytes {
        let snapshot = self.table.load();
        let data: Vec<_> =
            snapshot.routes.values().map(|route| model_card(&route.model, route.created_unix_s)).collect();
        json!({"object": "list", "data": data}).to_string().into()
    }

    fn model(&self, id: &str) -> Result<Bytes, GatewayError> {
        let snapshot = self.snapshot()?;
        let route =
            snapshot.routes.get(id).ok_or_else(|| GatewayError::UnknownModel { model: id.to_owned() })?;
        Ok(model_card(&route.model, route.created_unix_s).to_string().into())
    }

    async fn say(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        content_type: &'static str,
        body: Bytes,
    ) -> Result<(), GatewayError> {
        record.status(200);
        respond::whole(session, 200, content_type, record.request_id(), body)
            .await
            .map_err(|_| GatewayError::ClientGone)
    }
}

fn model_card(id: &str, created: i64) -> serde_json::Value {
    json!({"id": id, "object": "model", "created": created, "owned_by": "penstock"})
}

fn check_content_type(session: &ServerSession) -> Result<(), GatewayError> {
    let value = session.get_header_bytes(http::header::CONTENT_TYPE);
    let essence = value.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    let is_json = essence.eq_ignore_ascii_case(b"application/json")
        || (essence.len() > 5 && essence[essence.len() - 5..].eq_ignore_ascii_case(b"+json"));
    if is_json {
        return Ok(());
    }
    Err(GatewayError::UnsupportedMediaType { got: String::from_utf8_lossy(essence).into_owned() })
}

/// The client's bytes; only the value of `model` is replaced, where the engines know another name.
fn body_for_engine(body: &Bytes, facts: &RequestFacts, served_model: &str) -> Bytes {
    if facts.model == served_model {
        return body.clone();
    }
    openai::request::splice(body, facts.model_range.clone(), &openai::request::json_string(served_model))
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
        if let Err(error) = self.handle(&mut session, &mut record).await {
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
