//! Every series this process can emit, in one struct, each at zero from the start.
//!
//! Labels are bounded: `api` is [`crate::openai::Api::label`], `code` an HTTP status we send, `blame` and `reason` closed
//! enums. `model` takes only names of deployed models, so that a client cannot make series.
//! Cost: a counter behind resolved labels is one atomic add; the labelled ones here are resolved once a request.

use std::{sync::Arc, time::Duration};

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::{
    endpoints::{Pool, Snapshot},
    error::UpstreamFailure,
    health::{Phase, Reason, probe::Probed, progress::Verdict},
    listener::Refusal,
    routing::{
        self,
        policy::{How, Policy},
    },
    upstream::client::Origin,
    xds::status::XdsStatusView,
};

/// Seconds. From a cached prefix on an idle engine (milliseconds) to a long queue.
const TTFT_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Seconds. From an embedding to an hour's reasoning.
const DURATION_BUCKETS: &[f64] =
    &[0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

/// How waiting in the queue ends: a place, the deadline, no room in the queue, the client's leaving, the gateway's stop.
pub const QUEUE_OUTCOMES: [&str; 5] = ["placed", "deadline", "full", "client_gone", "draining"];

/// The label of requests that never came to a deployed model.
pub const NO_MODEL: &str = "";

/// The proxy's metrics and the registry they are in.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Finished requests by api, model, code and blame ("none" for success).
    pub requests: IntCounterVec,
    /// Requests under way, from head to the end of the answer.
    pub inflight: IntGauge,
    /// Head read to the first byte of the answer written.
    pub ttft: Histogram,
    /// Head read to the end of the answer.
    pub duration: Histogram,
    /// SSE events relayed.
    pub events: IntCounter,
    /// Bytes of answers written to clients.
    pub bytes_out: IntCounter,
    /// Bytes of request bodies read.
    pub bytes_in: IntCounter,
    /// Tokens as engines reported them, by kind: prompt, completion.
    pub tokens: IntCounterVec,
    /// Failed attempts by reason.
    pub attempt_failures: IntCounterVec,
    /// Attempts after the first, by the reason of the failure before.
    pub retries: IntCounterVec,
    /// Endpoints chosen, by policy and by how: balanced, affine, spilled.
    pub picks: IntCounterVec,
    /// Targets that requests came to, by the model that was asked for and the deployment that was asked.
    pub targets: IntCounterVec,
    /// Requests that came to a fallback, by the model that was asked for.
    pub fallbacks: IntCounterVec,
    /// Reports of engines' loads, by whether the endpoint was known.
    pub load_reports: IntCounterVec,
    /// Requests that had to wait for a place, by how that ended: see [`QUEUE_OUTCOMES`].
    pub queue_outcomes: IntCounterVec,
    /// How long they waited.
    pub queue_wait: Histogram,
    queue_depth: IntGaugeVec,
    /// Endpoints taken out of picks for their health, by reason.
    pub ejections: IntCounterVec,
    /// Endpoints that passed their trials after an ejection.
    pub endpoint_returns: IntCounter,
    /// Probes by result: passed, failed, timed_out.
    pub probes: IntCounterVec,
    /// Examinations of silent engines by verdict: alive, hung, unknown.
    pub hang_checks: IntCounterVec,
    /// Upstream connections by origin: new, reused.
    pub upstream_connections: IntCounterVec,
    /// Clients that left before the end.
    pub client_disconnects: IntCounter,
    /// Error frames engines sent inside a 200.
    pub inband_errors: IntCounter,
    /// Clients' connections and certificates.
    pub listeners: ListenerMetrics,
    /// Binary upgrades by how they ended: done, failed.
    pub upgrades: IntCounterVec,
    snapshot_revision: IntGauge,
    snapshot_term: IntGauge,
    endpoints: IntGauge,
    endpoints_ejected: IntGauge,
    endpoints_by_health: IntGaugeVec,
    pools_in_panic: IntGauge,
    models: IntGauge,
    xds_connected: IntGauge,
    xds_age_seconds: IntGauge,
    xds_acks: IntGauge,
    xds_nacks: IntGauge,
    draining: IntGauge,
    body_bytes_held: IntGauge,
}

/// What the gauges of state are set from when somebody asks.
#[derive(Debug)]
pub struct State<'a> {
    /// The tables in use.
    pub snapshot: &'a Snapshot,
    /// The control plane's connection.
    pub xds: &'a XdsStatusView,
    /// Whether the process is stopping.
    pub draining: bool,
    /// Request bytes reserved in memory.
    pub body_bytes_held: usize,
    /// The clock that ejections are in.
    pub now_ms: u64,
    /// Largest share of a pool that may be out.
    pub max_ejected_percent: u32,
}

impl Metrics {
    /// All series, at zero.
    ///
    /// # Errors
    /// A name declared twice: a defect, found by the first test that runs.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let make = Maker { registry: &registry };
        let metrics = Self {
            requests: make.counters(
                "penstock_proxy_requests_total",
                "Finished requests; code 499 is a client that left.",
                &["api", "model", "code", "blame"],
            )?,
            inflight: make.gauge("penstock_proxy_requests_inflight", "Requests under way.")?,
            ttft: make.histogram(
                "penstock_proxy_time_to_first_byte_seconds",
                "Request head read to the first byte of the answer written.",
                TTFT_BUCKETS,
            )?,
            duration: make.histogram(
                "penstock_proxy_request_duration_seconds",
                "Request head read to the end of the answer.",
                DURATION_BUCKETS,
            )?,
            events: make.counter("penstock_proxy_stream_events_total", "SSE events relayed.")?,
            bytes_out: make.counter("penstock_proxy_response_bytes_total", "Bytes of answers written.")?,
            bytes_in: make
                .counter("penstock_proxy_request_body_bytes_total", "Bytes of request bodies read.")?,
            tokens: make.counters(
                "penstock_proxy_tokens_total",
                "Tokens as reported by engines.",
                &["kind"],
            )?,
            attempt_failures: make.counters(
                "penstock_proxy_attempt_failures_total",
                "Attempts at an engine that failed.",
                &["reason"],
            )?,
            retries: make.counters(
                "penstock_proxy_retries_total",
                "Attempts after the first, by why the one before failed.",
                &["reason"],
            )?,
            picks: make.counters(
                "penstock_proxy_picks_total",
                "Endpoints chosen; affine: for its session or prefix, spilled: that one was too busy.",
                &["policy", "how"],
            )?,
            targets: make.counters(
                "penstock_proxy_targets_total",
                "Deployments asked, by the model that clients named; more than requests where one could not answer.",
                &["model", "target"],
            )?,
            fallbacks: make.counters(
                "penstock_proxy_fallbacks_total",
                "Fallbacks asked because no target of the model could answer.",
                &["model"],
            )?,
            load_reports: make.counters(
                "penstock_proxy_load_reports_total",
                "Engines' reports of their load that arrived; unknown: of an endpoint that is not in the tables.",
                &["endpoint"],
            )?,
            queue_outcomes: make.counters(
                "penstock_proxy_queue_outcomes_total",
                "Requests for which every engine was at its limit, by how their wait ended.",
                &["outcome"],
            )?,
            queue_wait: make.histogram(
                "penstock_proxy_queue_wait_seconds",
                "Time in the queue, however it ended.",
                TTFT_BUCKETS,
            )?,
            queue_depth: make.gauges(
                "penstock_proxy_queue_depth",
                "Requests that wait for a place, by pool.",
                &["pool"],
            )?,
            ejections: make.counters(
                "penstock_proxy_ejections_total",
                "Endpoints taken out of picks for their health.",
                &["reason"],
            )?,
            endpoint_returns: make.counter(
                "penstock_proxy_endpoint_returns_total",
                "Endpoints that passed their trials after an ejection.",
            )?,
            probes: make.counters(
                "penstock_proxy_probes_total",
                "Health probes of endpoints that no traffic proves alive.",
                &["result"],
            )?,
            hang_checks: make.counters(
                "penstock_proxy_hang_checks_total",
                "Examinations of engines that were silent for too long.",
                &["verdict"],
            )?,
            upstream_connections: make.counters(
                "penstock_proxy_upstream_connections_total",
                "Connections to engines that requests used.",
                &["origin"],
            )?,
            client_disconnects: make
                .counter("penstock_proxy_client_disconnects_total", "Clients that left before the end.")?,
            inband_errors: make.counter(
                "penstock_proxy_inband_errors_total",
                "Error frames that engines sent inside a 200.",
            )?,
            listeners: ListenerMetrics::new(&make)?,
            upgrades: make.counters(
                "penstock_proxy_upgrades_total",
                "Successors started, by whether they took over.",
                &["result"],
            )?,
            body_bytes_held: make
                .gauge("penstock_proxy_request_bytes_held", "Request bytes held in memory.")?,
            snapshot_revision: make
                .gauge("penstock_proxy_snapshot_revision", "Revision of the tables in use.")?,
            snapshot_term: make.gauge("penstock_proxy_snapshot_term", "Term of the tables in use.")?,
            endpoints: make.gauge("penstock_proxy_endpoints", "Endpoints in the tables in use.")?,
            endpoints_ejected: make
                .gauge("penstock_proxy_endpoints_ejected", "Endpoints out of picks for their health.")?,
            endpoints_by_health: make.gauges(
                "penstock_proxy_endpoints_by_health",
                "Endpoints by the state of their health.",
                &["state"],
            )?,
            pools_in_panic: make.gauge(
                "penstock_proxy_pools_in_panic",
                "Pools in which too many endpoints are out for health to be looked at.",
            )?,
            models: make.gauge("penstock_proxy_models", "Models that can be asked for.")?,
            xds_connected: make
                .gauge("penstock_proxy_xds_connected", "1 while a control plane is connected.")?,
            xds_age_seconds: make.gauge(
                "penstock_proxy_xds_last_response_age_seconds",
                "Age of the control plane's last word; -1 before the first.",
            )?,
            xds_acks: make.gauge("penstock_proxy_xds_acks", "Responses accepted since the start.")?,
            xds_nacks: make.gauge("penstock_proxy_xds_nacks", "Responses refused since the start.")?,
            draining: make.gauge("penstock_proxy_draining", "1 once the process is stopping.")?,
            registry: registry.clone(),
        };
        for failure in UpstreamFailure::ALL {
            metrics.attempt_failures.with_label_values(&[failure.label()]).inc_by(0);
            metrics.retries.with_label_values(&[failure.label()]).inc_by(0);
        }
        for policy in Policy::ALL {
            for how in How::ALL {
                metrics.picks.with_label_values(&[policy.name(), how.label()]).inc_by(0);
            }
        }
        for endpoint in ["known", "unknown"] {
            metrics.load_reports.with_label_values(&[endpoint]).inc_by(0);
        }
        for outcome in QUEUE_OUTCOMES {
            metrics.queue_outcomes.with_label_values(&[outcome]).inc_by(0);
        }
        for reason in Reason::ALL {
            metrics.ejections.with_label_values(&[reason.label()]).inc_by(0);
        }
        for probed in Probed::ALL {
            metrics.probes.with_label_values(&[probed.label()]).inc_by(0);
        }
        for verdict in Verdict::ALL {
            metrics.hang_checks.with_label_values(&[verdict.label()]).inc_by(0);
        }
        for kind in ["prompt", "completion"] {
            metrics.tokens.with_label_values(&[kind]).inc_by(0);
        }
        for result in ["done", "failed"] {
            metrics.upgrades.with_label_values(&[result]).inc_by(0);
        }
        for origin in ["new", "reused"] {
            metrics.upstream_connections.with_label_values(&[origin]).inc_by(0);
        }
        Ok(metrics)
    }

    /// The Prometheus text of everything, with the gauges of state brought up to date first.
    pub fn render(&self, state: &State<'_>) -> String {
        let State { snapshot, xds, draining, body_bytes_held, now_ms, max_ejected_percent } = *state;
        let all = || snapshot.pools.values().flat_map(|pool| &pool.endpoints);
        self.snapshot_revision.set(clamp(snapshot.version.revision));
        self.snapshot_term.set(clamp(snapshot.version.term));
        self.endpoints.set(clamp(all().count() as u64));
        self.endpoints_ejected.set(clamp(all().filter(|e| e.is_ejected(now_ms)).count() as u64));
        self.queue_depth.reset(); // pools come and go
        for (name, pool) in &snapshot.pools {
            self.queue_depth.with_label_values(&[name.as_str()]).set(clamp(pool.queue.len() as u64));
        }
        let mut by_phase = [0u64; Phase::ALL.len()];
        for phase in all().map(|endpoint| endpoint.vitals().phase(now_ms)) {
            by_phase[phase as usize] += 1;
        }
        for (phase, count) in Phase::ALL.into_iter().zip(by_phase) {
            self.endpoints_by_health.with_label_values(&[phase.label()]).set(clamp(count));
        }
        let panics = |pool: &&Arc<Pool>| routing::in_panic(pool, now_ms, max_ejected_percent);
        self.pools_in_panic.set(clamp(snapshot.pools.values().filter(panics).count() as u64));
        self.models.set(clamp(snapshot.routes.len() as u64));
        self.xds_connected.set(i64::from(xds.connected));
        self.xds_age_seconds.set(xds.last_response_age.map_or(-1, |age| clamp(age.as_secs())));
        self.xds_acks.set(clamp(xds.acks));
        self.xds_nacks.set(clamp(xds.nacks));
        self.draining.set(i64::from(draining));
        self.body_bytes_held.set(clamp(body_bytes_held as u64));
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(e) => format!("# metrics could not be rendered: {e}\n"),
        }
    }

    /// Counts a connection that a request used.
    pub fn connected(&self, origin: Origin) {
        self.upstream_connections.with_label_values(&[origin.label()]).inc();
    }

    /// Counts a target that a request for `model` came to. Both are names of the tables in use.
    pub fn routed(&self, model: &str, target: &str, fallback: bool) {
        self.targets.with_label_values(&[model, target]).inc();
        if fallback {
            self.fallbacks.with_label_values(&[model]).inc();
        }
    }

    /// Counts a report of an engine's load.
    pub fn load_reported(&self, known: bool) {
        self.load_reports.with_label_values(&[if known { "known" } else { "unknown" }]).inc();
    }

    /// Counts a finished request.
    pub fn finished(&self, api: &str, model: &str, status: u16, blame: &str, took: Duration) {
        let mut digits = [0u8; 5];
        self.requests.with_label_values(&[api, model, status_text(status, &mut digits), blame]).inc();
        self.duration.observe(took.as_secs_f64());
    }
}

/// What is counted for each listener, by its name in the settings.
#[derive(Debug)]
pub struct ListenerMetrics {
    accepted: IntCounterVec,
    open: IntGaugeVec,
    refused: IntCounterVec,
    certificate_expiry: IntGaugeVec,
    certificate_reloads: IntCounterVec,
}

impl ListenerMetrics {
    fn new(make: &Maker<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            accepted: make.counters(
                "penstock_proxy_connections_total",
                "Clients' connections accepted, those refused for the limit not counted.",
                &["listener"],
            )?,
            open: make.gauges("penstock_proxy_connections_open", "Clients' connections.", &["listener"])?,
            refused: make.counters(
                "penstock_proxy_connections_refused_total",
                "Clients' connections closed before they brought a request.",
                &["listener", "reason"],
            )?,
            certificate_expiry: make.gauges(
                "penstock_proxy_certificate_expiry_timestamp_seconds",
                "When the first certificate of the listener's chain expires.",
                &["listener"],
            )?,
            certificate_reloads: make.counters(
                "penstock_proxy_certificate_reloads_total",
                "Changed certificate files, by whether they are in use now or were refused.",
                &["listener", "result"],
            )?,
        })
    }

    /// Makes the series of a listener, at zero.
    pub fn exists(&self, listener: &str) {
        self.accepted.with_label_values(&[listener]).inc_by(0);
        self.open.with_label_values(&[listener]).add(0);
        for refusal in Refusal::ALL {
            self.refused.with_label_values(&[listener, refusal.label()]).inc_by(0);
        }
    }

    /// Counts a connection in, until what it gives back is dropped.
    pub fn opened(&self, listener: &str) -> impl Drop + use<> {
        self.accepted.with_label_values(&[listener]).inc();
        let gauge = self.open.with_label_values(&[listener]);
        gauge.inc();
        Open(gauge)
    }

    /// Counts a connection that was closed before it brought a request.
    pub fn refused(&self, listener: &str, why: Refusal) {
        self.refused.with_label_values(&[listener, why.label()]).inc();
    }

    /// Tells of the certificates in use.
    pub fn certificate(&self, listener: &str, expires_unix_s: i64) {
        self.certificate_expiry.with_label_values(&[listener]).set(expires_unix_s);
        for result in ["loaded", "refused"] {
            self.certificate_reloads.with_label_values(&[listener, result]).inc_by(0);
        }
    }

    /// Counts changed files of certificates.
    pub fn reloaded(&self, listener: &str, good: bool) {
        let result = if good { "loaded" } else { "refused" };
        self.certificate_reloads.with_label_values(&[listener, result]).inc();
    }
}

struct Open(IntGauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The status in decimal without an allocation.
fn status_text(status: u16, digits: &mut [u8; 5]) -> &str {
    let mut rest = status;
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            return std::str::from_utf8(&digits[start..]).unwrap_or_default();
        }
    }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

struct Maker<'a> {
    registry: &'a Registry,
}

impl Maker<'_> {
    fn registered<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        c: C,
    ) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(c.clone()))?;
        Ok(c)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.registered(IntCounter::new(name, help)?)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.registered(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.registered(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.registered(IntGauge::new(name, help)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.registered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_at_zero() {
        let metrics = Metrics::new().expect("names are unique");
        let state = State {
            snapshot: &Snapshot::default(),
            xds: &crate::xds::status::XdsStatus::default().view(),
            draining: false,
            body_bytes_held: 0,
            now_ms: 0,
            max_ejected_percent: 67,
        };
        let text = metrics.render(&state);
        for line in [
            "penstock_proxy_retries_total{reason=\"connect\"} 0",
            "penstock_proxy_requests_inflight 0",
            "penstock_proxy_ejections_total{reason=\"hang\"} 0",
            "penstock_proxy_endpoints_by_health{state=\"half_open\"} 0",
            "penstock_proxy_upstream_connections_total{origin=\"reused\"} 0",
            "penstock_proxy_xds_last_response_age_seconds -1",
        ] {
            assert!(text.contains(line), "{line} missing in\n{text}");
        }
    }

    #[test]
    fn a_status_is_written_in_decimal() {
        for status in [0, 7, 200, 499, 65_535] {
            assert_eq!(status_text(status, &mut [0; 5]), status.to_string());
        }
    }
}
