//! The life of a request, in one function: `Gateway::handle`.
//!
//! Hosted directly as a pingora `HttpServerApp`, beside `ProxyHttp` rather than inside it: that way even a head that cannot
//! be parsed is answered in the API's own shape, and a request costs no callbacks. Everything in here is a straight line;
//! what a line does is in the module it names.

mod attempts;
mod host;
mod models;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use penstock_config::proxy::{LimitsConfig, ProxyConfig};
use pingora_core::{apps::HttpServerOptions, protocols::http::ServerSession};
use tokio::time::Instant;

use self::attempts::Outcome;
pub use self::host::Host;
use crate::{
    admission::auth::KeyRing,
    downstream::{
        body::{self, BodyBudget},
        peer::Peer,
        respond,
    },
    drain::Lifecycle,
    endpoints::{EndpointTable, Pool, Snapshot, table::Target},
    error::GatewayError,
    health,
    openai::{
        self, Route,
        request::{RequestFacts, ScanLimits},
    },
    record::Record,
    routing::{
        PickRules,
        policy::Asked,
        prefix::Chain,
        resolve::{self, Step},
    },
    telemetry::metrics::Metrics,
    upstream::{
        client::EngineClient,
        request::{EngineRequest, forwarded_headers},
    },
};

/// Everything requests share.
#[derive(Debug)]
pub struct Gateway {
    config: ProxyConfig,
    options: HttpServerOptions,
    scan_limits: ScanLimits,
    pick_rules: PickRules,
    health_rules: health::Rules,
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
        // Listeners find out by themselves who speaks HTTP/2; pingora, asked to, waits for 24 bytes without a deadline.
        options.h2c = false;
        options.h2_idle_timeout = Some(Duration::from_secs(config.public.keepalive_s.max(1)));
        Ok(Self {
            options,
            scan_limits: ScanLimits { max_depth: config.limits.json_depth, ..ScanLimits::default() },
            pick_rules: PickRules::new(
                &config.routing,
                &config.queue,
                config.health.max_ejected_percent,
                &mut fastrand::Rng::new(),
            ),
            health_rules: health::rules(&config.health),
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

    /// How much a client may send, and how slowly.
    pub fn limits(&self) -> &LimitsConfig {
        &self.config.limits
    }

    /// By what endpoints are judged.
    pub fn health_rules(&self) -> &health::Rules {
        &self.health_rules
    }

    /// The settings it was made with.
    pub fn config(&self) -> &ProxyConfig {
        &self.config
    }

    /// Whether callers need no key.
    pub fn is_open(&self) -> bool {
        self.keys.is_open()
    }

    /// From a parsed head to the end of the answer.
    async fn handle(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        peer: &Peer,
    ) -> Result<(), GatewayError> {
        tracing::trace!(client = %peer.address, tls = peer.tls, "request");
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
        let query = &target[path.len()..];
        let mut request = EngineRequest {
            api,
            stream: facts.stream,
            request_id: record.request_id().to_owned(),
            target: [engine_path, query].concat(),
            headers: forwarded_headers(&session.req_header().headers, record.request_id()),
            body: Bytes::new(),
        };
        let user = facts.user_range.clone().and_then(|range| held.bytes.get(range));
        let (header, cookie) = (&*self.config.routing.session_header, &*self.config.routing.session_cookie);
        let headers = &session.req_header().headers;
        let affinity = self.pick_rules.key.session(headers, header, cookie, user);
        let prefix = chain.map(Chain::hashes).unwrap_or_default();
        let asked = Asked { session: affinity, prefix: &prefix, adapter: None };
        let places = self.places(&facts.model, affinity)?;
        record.model(&facts.model);
        // Whoever has room now goes first; only when nobody has is it worth to wait, and then for who should have answered.
        let alone = places.len() == 1;
        let (mut last, mut full) = (None, None);
        for Step { target, fallback } in places {
            self.metrics.routed(&facts.model, &target.pool, fallback);
            request.body = body_for_engine(&held.bytes, &facts, &target.served_model);
            let asked = Asked { adapter: target.adapter.as_deref(), ..asked };
            let place = (&*facts.model, &*target);
            match self.attempts(session, record, place, &asked, &request, alone).await? {
                Outcome::Answered => return Ok(()),
                Outcome::Unanswered(failed) => last = failed.or(last),
                Outcome::Saturated => full = full.or(Some(target)),
            }
        }
        if let Some(target) = full {
            request.body = body_for_engine(&held.bytes, &facts, &target.served_model);
            let asked = Asked { adapter: target.adapter.as_deref(), ..asked };
            let place = (&*facts.model, &*target);
            match self.attempts(session, record, place, &asked, &request, true).await? {
                Outcome::Answered => return Ok(()),
                Outcome::Unanswered(failed) => last = failed.or(last),
                Outcome::Saturated => {}
            }
        }
        self.give_up(session, record, &facts.model, last).await
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

    /// Who may answer a request for `model`, in the order in which they are asked.
    fn places(&self, model: &str, session: Option<u64>) -> Result<Vec<Step>, GatewayError> {
        let snapshot = self.snapshot()?;
        let draw = session.unwrap_or_else(|| fastrand::u64(..));
        resolve::resolve(&snapshot.routes, model, self.pick_rules.key, draw)
            .ok_or_else(|| GatewayError::UnknownModel { model: model.to_owned() })
    }

    /// As it is now; `None` once it is gone.
    fn pool(&self, target: &Target) -> Result<Option<Arc<Pool>>, GatewayError> {
        Ok(self.snapshot()?.pools.get(&*target.pool).map(Arc::clone))
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
