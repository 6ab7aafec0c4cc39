//! Every series this process can emit, declared in one place (what belongs to listeners and to resumes in files of their own beside), each at zero from the start; those of a model from the first
//! scrape that sees its route.
//!
//! Labels are bounded: `api` is [`crate::openai::Api::label`], `code` an HTTP status we send, `blame`, `reason` and
//! `outcome` closed enums. `model` takes only names that the control plane has routes for, at most
//! [`super::models::MAX_MODELS`] of them, and [`super::models::OTHER`] beyond: a client cannot make series.
//! Cost: a counter behind resolved labels is one atomic add. What is counted by model is resolved once a request, to a
//! [`super::models::ModelSeries`]; the other labelled ones are looked up once a request or once an attempt.

mod listeners;
mod resumes;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

pub use self::{listeners::ListenerMetrics, resumes::ResumeMetrics};
pub use super::state::State;
use super::{
    decisions::Why,
    make::{Maker, status_text},
    models::{ModelSeries, Models},
};

use crate::{
    endpoints::Leave,
    error::UpstreamFailure,
    health::{Reason, probe::Probed, progress::Verdict},
    routing::policy::{How, Policy},
    upstream::client::Origin,
};

/// Seconds. From a cached prefix on an idle engine (milliseconds) to a long queue.
const TTFT_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Seconds. From an embedding to an hour's reasoning.
const DURATION_BUCKETS: &[f64] =
    &[0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

/// Seconds. A small model on an idle engine: a few milliseconds; a full batch: 50 to 100; above a second a reader waits.
const ITL_BUCKETS: &[f64] =
    &[0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Why a line of the access log was lost: `reason` of its counter.
pub const LOG_LOSSES: [&str; 2] = ["queue_full", "write_error"];

/// How waiting in the queue ends: a place, the deadline, no room in the queue, the client's leaving, the gateway's stop.
pub const QUEUE_OUTCOMES: [&str; 5] = ["placed", "deadline", "full", "client_gone", "draining"];

/// The label of requests that never came to a deployed model.
pub const NO_MODEL: &str = "";

/// The proxy's metrics and the registry they are in.
#[derive(Debug)]
pub struct Metrics {
    pub(super) registry: Registry,
    /// Finished requests by api, model, code and blame ("none" for success).
    pub requests: IntCounterVec,
    /// Requests under way, from head to the end of the answer.
    pub inflight: IntGauge,
    /// The same, by model.
    pub model_inflight: IntGaugeVec,
    /// Head read to the first byte of the answer, by model.
    pub ttft: HistogramVec,
    /// Mean gap between the events of a stream, by model; one observation a stream.
    pub itl: HistogramVec,
    /// Longest gap between two reads of a stream, by model; one observation a stream.
    pub itl_max: HistogramVec,
    /// Head read to the end of the answer.
    pub duration: Histogram,
    /// SSE events relayed.
    pub events: IntCounter,
    /// Bytes of answers written to clients.
    pub bytes_out: IntCounter,
    /// Bytes of request bodies read.
    pub bytes_in: IntCounter,
    /// Tokens as engines reported them, by model and kind: prompt, completion.
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
    /// Words to the control plane that requests wait for a sleeping model, by `outcome`.
    pub wakes_asked: IntCounterVec,
    /// How long they waited.
    pub queue_wait: Histogram,
    pub(super) queue_depth: IntGaugeVec,
    /// Streams told to go on at another engine while theirs still served them, by [`Leave::label`].
    pub streams_leave: IntCounterVec,
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
    /// Connections put aside for reuse.
    pub upstream_kept: IntCounter,
    /// Lines of the access log written.
    pub access_log_lines: IntCounter,
    /// Lines of the access log lost, by [`LOG_LOSSES`].
    pub access_log_dropped: IntCounterVec,
    /// Routing decisions kept for `/debug/decisions`, by why.
    pub decisions: IntCounterVec,
    /// Clients that left before the end.
    pub client_disconnects: IntCounter,
    /// Error frames engines sent inside a 200.
    pub inband_errors: IntCounter,
    /// Members of bodies taken out because their callers are not trusted.
    pub untrusted_fields: IntCounter,
    /// Clients' connections and certificates.
    pub listeners: ListenerMetrics,
    /// Streams that lost their engine.
    pub resumes: ResumeMetrics,
    /// Binary upgrades by how they ended: done, failed.
    pub upgrades: IntCounterVec,
    pub(super) snapshot_revision: IntGauge,
    pub(super) snapshot_term: IntGauge,
    pub(super) snapshot_age_seconds: IntGauge,
    pub(super) snapshot_from_disk: IntGauge,
    pub(super) endpoints: IntGauge,
    pub(super) endpoints_ejected: IntGauge,
    pub(super) endpoints_by_health: IntGaugeVec,
    pub(super) pools_in_panic: IntGauge,
    pub(super) models: IntGauge,
    pub(super) xds_connected: IntGauge,
    pub(super) xds_age_seconds: IntGauge,
    pub(super) xds_acks: IntGauge,
    pub(super) xds_nacks: IntGauge,
    pub(super) draining: IntGauge,
    pub(super) body_bytes_held: IntGauge,
    pub(super) models_seen: Models,
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
            model_inflight: make.gauges(
                "penstock_proxy_model_requests_inflight",
                "Requests under way that name a deployed model.",
                &["model"],
            )?,
            ttft: make.histograms(
                "penstock_proxy_time_to_first_byte_seconds",
                "Request head read to the first byte of an engine's answer; for streams the first event.",
                TTFT_BUCKETS,
                &["model"],
            )?,
            itl: make.histograms(
                "penstock_proxy_inter_token_latency_seconds",
                "Mean gap between the events of a stream, one observation a stream.",
                ITL_BUCKETS,
                &["model"],
            )?,
            itl_max: make.histograms(
                "penstock_proxy_inter_token_latency_max_seconds",
                "Longest gap inside a stream, one observation a stream.",
                ITL_BUCKETS,
                &["model"],
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
                &["model", "kind"],
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
            wakes_asked: make.counters(
                "penstock_proxy_wakes_asked_total",
                "Words to the control plane that requests wait for a model that sleeps.",
                &["outcome"],
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
            streams_leave: make.counters(
                "penstock_proxy_streams_leave_total",
                "Streams told to go on elsewhere: moved off a drained engine, or their engine is fenced or stopped soon.",
                &["reason"],
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
            upstream_kept: make.counter(
                "penstock_proxy_upstream_connections_kept_total",
                "Connections put aside for reuse; kept less reused is what idled out, was evicted, or waits.",
            )?,
            access_log_lines: make
                .counter("penstock_proxy_access_log_lines_total", "Lines of the access log written.")?,
            access_log_dropped: make.counters(
                "penstock_proxy_access_log_dropped_total",
                "Lines of the access log lost: the queue was full, or they could not be written.",
                &["reason"],
            )?,
            decisions: make.counters(
                "penstock_proxy_decisions_recorded_total",
                "Requests whose routing was recorded for /debug/decisions, by why.",
                &["why"],
            )?,
            client_disconnects: make
                .counter("penstock_proxy_client_disconnects_total", "Clients that left before the end.")?,
            inband_errors: make.counter(
                "penstock_proxy_inband_errors_total",
                "Error frames that engines sent inside a 200.",
            )?,
            untrusted_fields: make.counter(
                "penstock_proxy_untrusted_fields_removed_total",
                "Fields of [trust] taken out of bodies whose callers are not trusted; neighbours count once.",
            )?,
            listeners: ListenerMetrics::new(&make)?,
            resumes: ResumeMetrics::new(&make)?,
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
            snapshot_age_seconds: make.gauge(
                "penstock_proxy_snapshot_age_seconds",
                "Time since the tables in use were put in use; -1 before the first.",
            )?,
            snapshot_from_disk: make.gauge(
                "penstock_proxy_snapshot_from_disk",
                "1 while the tables in use are those kept on disk and no control plane has spoken yet.",
            )?,
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
            models_seen: Models::default(),
            registry: registry.clone(),
        };
        for (policy, how) in Policy::ALL.iter().flat_map(|policy| How::ALL.map(|how| (policy, how))) {
            metrics.picks.with_label_values(&[policy.name(), how.label()]).inc_by(0);
        }
        let failures = UpstreamFailure::ALL.map(|failure| failure.label());
        let known: [(&IntCounterVec, &[&str]); 13] = [
            (&metrics.attempt_failures, &failures),
            (&metrics.retries, &failures),
            (&metrics.load_reports, &["known", "unknown"]),
            (&metrics.wakes_asked, &["taken", "failed"]),
            (&metrics.queue_outcomes, &QUEUE_OUTCOMES),
            (&metrics.ejections, &Reason::ALL.map(|reason| reason.label())),
            (&metrics.probes, &Probed::ALL.map(|probed| probed.label())),
            (&metrics.hang_checks, &Verdict::ALL.map(|verdict| verdict.label())),
            (&metrics.access_log_dropped, &LOG_LOSSES),
            (&metrics.decisions, &Why::ALL.map(|why| why.label())),
            (&metrics.upgrades, &["done", "failed"]),
            (&metrics.upstream_connections, &["new", "reused"]),
            (&metrics.streams_leave, &Leave::ALL.map(Leave::label)),
        ];
        for (counter, label) in known.into_iter().flat_map(|(c, labels)| labels.iter().map(move |l| (c, *l)))
        {
            counter.with_label_values(&[label]).inc_by(0);
        }
        Ok(metrics)
    }

    /// The series of a deployed model; its name must be one of the snapshot's.
    pub fn of_model(&self, model: &str) -> Arc<ModelSeries> {
        self.models_seen.get(model, |label| ModelSeries {
            name: label.into(),
            inflight: self.model_inflight.with_label_values(&[label]),
            ttft: self.ttft.with_label_values(&[label]),
            itl: self.itl.with_label_values(&[label]),
            itl_max: self.itl_max.with_label_values(&[label]),
            prompt_tokens: self.tokens.with_label_values(&[label, "prompt"]),
            completion_tokens: self.tokens.with_label_values(&[label, "completion"]),
        })
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
