//! The life of a request, in one function: `Gateway::handle`.
//!
//! Hosted directly as a pingora `HttpServerApp`, beside `ProxyHttp` rather than inside it: that way even a head that cannot
//! be parsed is answered in the API's own shape, and a request costs no callbacks. Everything in here is a straight line;
//! what a line does is in the module it names.

mod attempts;
mod go_on;
mod host;
mod models;
mod realtime;
mod stream;
mod take;
mod targets;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::Method;
use penstock_config::proxy::{LimitsConfig, ProxyConfig};
use pingora_core::{apps::HttpServerOptions, protocols::http::ServerSession};
use tokio::{sync::Notify, time::Instant};

pub use self::{host::Host, take::RESUME};
use crate::{
    admission::auth::KeyRing,
    downstream::{body::BodyBudget, peer::Peer, respond},
    drain::Lifecycle,
    endpoints::{EndpointTable, Pool, Snapshot, table::Target},
    error::GatewayError,
    health,
    openai::{self, Route, request::ScanLimits},
    record::Record,
    routing::PickRules,
    telemetry::{Telemetry, access_log::AccessLog, metrics::Metrics},
    upstream::client::EngineClient,
};

/// What has become of a request when [`Gateway::handle`] is done with it.
enum Done {
    /// It has been answered.
    Answered,
    /// Client and engine have agreed to a WebSocket; the connection is the tunnel's now.
    Upgraded(Box<realtime::Tunnel>),
}

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
    pub metrics: Arc<Metrics>,
    /// Where requests leave what is known of them.
    pub telemetry: Telemetry,
    /// Told when a request has found its model asleep.
    pub wanted: Notify,
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
        if let Some(name) = config.trust.remove_fields.iter().find(|name| openai::request::is_acted_on(name))
        {
            return Err(format!(
                "trust.remove_fields has {name:?}, which the gateway reads itself; remove it there"
            ));
        }
        let mut options = HttpServerOptions::default();
        // Listeners find out by themselves who speaks HTTP/2; pingora, asked to, waits for 24 bytes without a deadline.
        options.h2c = false;
        options.h2_idle_timeout = Some(Duration::from_secs(config.public.keepalive_s.max(1)));
        let telemetry = Telemetry::new(&config.telemetry)?;
        let metrics = Arc::clone(&telemetry.metrics);
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
            engines: EngineClient::new(&config.upstream, metrics.upstream_kept.clone()),
            table: EndpointTable::new(config.upstream.clone(), &config.resume),
            metrics,
            telemetry,
            wanted: Notify::new(),
            lifecycle: Lifecycle::default(),
            started: Instant::now(),
            config,
        })
    }

    /// Has requests logged there. Without it they are not.
    pub fn log_to(&mut self, log: AccessLog) {
        self.telemetry.access_log = log;
    }

    /// Milliseconds on this process's own clock, which never goes back.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Closes connections to engines that have not been used for a while.
    pub fn sweep_connections(&self) {
        self.engines.sweep();
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

    /// From a parsed head to the end of the answer, or to the beginning of a tunnel.
    ///
    /// What most requests do not come to is boxed, here and below: a request's future is as large as its largest branch, is
    /// moved when its task is made, and stays in memory as long as its stream.
    async fn handle(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        peer: &Peer,
    ) -> Result<Done, GatewayError> {
        self.check_head(session)?;
        let head = session.req_header();
        let target =
            head.uri.path_and_query().map_or_else(|| head.uri.path().to_owned(), ToString::to_string);
        let path = target.split_once('?').map_or(&*target, |(path, _)| path);
        if path == "/healthz" && matches!(head.method, Method::GET | Method::HEAD) {
            record.unlogged();
            return self.say(session, record, "text/plain", "ok\n".into()).await;
        }
        let route = openai::route(&head.method, path);
        record.route(route.label(), route.shape());
        if let Route::Options { allow } = route {
            record.status(204);
            let said = respond::options(session, allow, record.request_id()).await;
            return said.map(|()| Done::Answered).map_err(|_| GatewayError::ClientGone);
        }
        let from = take::Source { peer, caller: self.keys.caller(&head.headers)? };
        record.caller(from.caller.name);
        let asked_for = take::Url { path, query: &target[path.len()..] };
        match route {
            Route::Inference { api, path } => {
                let asked_for = take::Url { path, ..asked_for };
                self.inference(session, record, api, asked_for, from).await
            }
            Route::Realtime => Box::pin(self.realtime(session, record, asked_for, from)).await,
            Route::Models => self.say(session, record, "application/json", self.models()).await,
            Route::Model { id } => {
                let model = self.model(&id)?;
                self.say(session, record, "application/json", model).await
            }
            Route::StoredResponse => Err(GatewayError::StoredResponse),
            Route::MethodNotAllowed { allow, .. } => Err(GatewayError::MethodNotAllowed { allow }),
            // Options were answered above.
            Route::NotFound { .. } | Route::Options { .. } => {
                Err(GatewayError::UnknownPath { path: path.to_owned() })
            }
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
    ) -> Result<Done, GatewayError> {
        record.status(200);
        respond::whole(session, 200, content_type, record.request_id(), body)
            .await
            .map_err(|_| GatewayError::ClientGone)?;
        Ok(Done::Answered)
    }
}
