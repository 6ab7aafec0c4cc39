//! Every series that this process can emit, declared once, at zero from the start.
//!
//! Labels are closed sets; no label carries a name from outside, so their number is bounded.

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector, proto::MetricType,
};

use crate::{view::View, xds::kind::Kind};

/// See the module's text. All names begin with `penstock_controlplane_`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// The term as of the view.
    pub term: IntGauge,
    /// 1 while this process leads.
    pub leading: IntGauge,
    /// Times this process was elected.
    pub elections_won: IntCounter,
    /// Writes of a passed term that the store refused.
    pub fenced_writes: IntCounter,
    /// Requests and sessions handed to the leader, by `outcome`.
    pub forwarded: IntCounterVec,
    /// The store's revision that the view has reached.
    pub view_revision: IntGauge,
    /// Times the whole store was read again because the watch broke off or fell behind.
    pub view_resyncs: IntCounter,
    /// Stored values that could not be read and were passed over.
    pub view_unreadable: IntCounter,
    /// Models that are deployed.
    pub deployments: IntGauge,
    /// Replicas wanted, over all deployments.
    pub replicas_wanted: IntGauge,
    /// Registered endpoints by `state`.
    pub endpoints: IntGaugeVec,
    /// Nodes present.
    pub nodes: IntGauge,
    /// Open sessions of agents.
    pub fleet_sessions: IntGauge,
    /// Reports of agents taken in.
    pub fleet_reports: IntCounter,
    /// Measurements of engines' loads by `outcome`.
    pub loads: IntCounterVec,
    /// Registrations by `outcome`.
    pub registrations: IntCounterVec,
    /// Deregistrations answered.
    pub deregistrations: IntCounter,
    /// Decisions of the plan by `action`.
    pub plan_actions: IntCounterVec,
    /// Models whose rollout got nothing done for as long as they allow.
    pub plan_stalled: IntGauge,
    /// Models whose spec fails wherever it is placed.
    pub plan_failing: IntGauge,
    /// 1 while nothing is changed because the store is not followed.
    pub plan_held: IntGauge,
    /// Plans that had more to start or stop than one may.
    pub plan_capped: IntCounter,
    /// Passes of reconcile by `outcome`.
    pub reconciles: IntCounterVec,
    /// How long a pass took, store writes included.
    pub reconcile_seconds: Histogram,
    /// Subscribed proxies.
    pub xds_subscribers: IntGauge,
    /// Control planes that follow this one.
    pub followers: IntGauge,
    /// Snapshots published.
    pub xds_snapshots: IntCounter,
    /// Snapshots held back because they were not consistent.
    pub xds_inconsistent: IntCounter,
    /// Endpoints that stay in tables though nobody hears of them.
    pub xds_held_endpoints: IntGauge,
    /// 1 while no snapshot is published.
    pub xds_held_snapshot: IntGauge,
    /// gRPC clients whose handshake failed.
    pub grpc_refused: IntCounter,
    /// Looks at certificates that found new ones, by outcome.
    pub grpc_certificate_reloads: IntCounterVec,
    /// When our gRPC certificate expires.
    pub grpc_certificate_expires: IntGauge,
    /// Responses sent by `type`.
    pub xds_responses: IntCounterVec,
    /// Responses that proxies refused by `type`.
    pub xds_nacks: IntCounterVec,
    /// REST requests by `class` of status.
    pub http_requests: IntCounterVec,
    /// REST requests that were not let in, by `reason`.
    pub http_refused: IntCounterVec,
    /// Records that were added to the audit.
    pub audit_records: IntCounter,
    /// Requests with an Idempotency-Key by `outcome`.
    pub idempotency: IntCounterVec,
    /// Scheduled backups by `outcome`.
    pub backups: IntCounterVec,
    /// When the last scheduled backup was made, in Unix seconds; 0: none is known.
    pub backup_last_success: IntGauge,
    /// Its size.
    pub backup_bytes: IntGauge,
    /// How often one shall be made; 0: backups are not scheduled.
    pub backup_interval_seconds: IntGauge,
    /// Seconds since the process started.
    pub uptime_seconds: Gauge,
}

/// Values of `outcome` of registrations.
pub const REGISTRATION_OUTCOMES: [&str; 9] = [
    "accepted",
    "repeated",
    "unknown_assignment",
    "withdrawn",
    "stale_generation",
    "future_generation",
    "wrong_node",
    "bad_address",
    "store_error",
];

impl Metrics {
    /// All series, at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let types: Vec<&str> = Kind::ALL.into_iter().map(Kind::label).chain(["engine_load"]).collect();
        let metrics = Self {
            term: gauge(&r, "term", "The last term that anybody took.")?,
            leading: gauge(&r, "leading", "1 while this process leads.")?,
            elections_won: counter(&r, "elections_won_total", "Times this process was elected.")?,
            fenced_writes: counter(&r, "fenced_writes_total", "Writes of a passed term, refused.")?,
            forwarded: counters(
                &r,
                "forwarded_total",
                "Requests and sessions handed to the leader.",
                "outcome",
                &["ok", "no_leader", "failed"],
            )?,
            view_revision: gauge(&r, "view_revision", "Store revision that the view has reached.")?,
            view_resyncs: counter(&r, "view_resyncs_total", "Times the whole store was read again.")?,
            view_unreadable: counter(
                &r,
                "view_unreadable_total",
                "Stored values passed over as unreadable.",
            )?,
            deployments: gauge(&r, "deployments", "Models that are deployed.")?,
            replicas_wanted: gauge(&r, "replicas_wanted", "Replicas wanted over all deployments.")?,
            endpoints: gauges(&r, "endpoints", "Registered endpoints.", "state", &["ready", "draining"])?,
            nodes: gauge(&r, "nodes", "Nodes present.")?,
            fleet_sessions: gauge(&r, "fleet_sessions", "Open sessions of agents.")?,
            fleet_reports: counter(&r, "fleet_reports_total", "Reports of agents taken in.")?,
            loads: counters(
                &r,
                "engine_loads_total",
                "Measurements of engines' loads: new ones, those that said nothing new, of no present assignment.",
                "outcome",
                &["new", "known", "unassigned"],
            )?,
            registrations: counters(
                &r,
                "registrations_total",
                "Registrations.",
                "outcome",
                &REGISTRATION_OUTCOMES,
            )?,
            deregistrations: counter(&r, "deregistrations_total", "Deregistrations answered.")?,
            plan_actions: counters(
                &r,
                "plan_actions_total",
                "Decisions of the plan.",
                "action",
                &["place", "withdraw", "forget", "scale", "move", "sleep", "wake"],
            )?,
            plan_stalled: gauge(&r, "plan_stalled", "Models whose rollout is stalled.")?,
            plan_failing: gauge(
                &r,
                "plan_failing",
                "Models whose spec failed on so many nodes that it is not tried on more.",
            )?,
            plan_held: gauge(
                &r,
                "plan_held",
                "1 while nothing is changed because the store is not followed.",
            )?,
            plan_capped: counter(
                &r,
                "plan_capped_total",
                "Plans that had more to start or stop than one may.",
            )?,
            reconciles: counters(
                &r,
                "reconciles_total",
                "Passes of reconcile.",
                "outcome",
                &["settled", "changed", "conflict", "error"],
            )?,
            reconcile_seconds: histogram(&r)?,
            xds_subscribers: gauge(&r, "xds_subscribers", "Subscribed proxies.")?,
            followers: gauge(&r, "followers", "Control planes that are linked to this one, which leads.")?,
            xds_snapshots: counter(&r, "xds_snapshots_total", "Snapshots published.")?,
            xds_held_endpoints: gauge(
                &r,
                "xds_held_endpoints",
                "Endpoints that nobody hears of any more and that stay in the tables, since nobody asked for that.",
            )?,
            xds_held_snapshot: gauge(
                &r,
                "xds_held_snapshot",
                "1 while no snapshot is published because models vanished from the store.",
            )?,
            grpc_refused: counter(
                &r,
                "grpc_refused_total",
                "gRPC connections refused: no TLS, no certificate, or one that is not accepted.",
            )?,
            grpc_certificate_reloads: counters(
                &r,
                "grpc_certificate_reloads_total",
                "Changes of the gRPC certificates' files.",
                "outcome",
                &["taken", "refused"],
            )?,
            grpc_certificate_expires: gauge(
                &r,
                "grpc_certificate_expires_seconds",
                "When the gRPC certificate expires, in seconds since 1970; 0 without TLS.",
            )?,
            xds_inconsistent: counter(&r, "xds_inconsistent_total", "Snapshots held back as inconsistent.")?,
            xds_responses: counters(&r, "xds_responses_total", "Responses sent.", "type", &types)?,
            xds_nacks: counters(&r, "xds_nacks_total", "Responses that proxies refused.", "type", &types)?,
            http_requests: counters(
                &r,
                "http_requests_total",
                "REST requests.",
                "class",
                &["2xx", "3xx", "4xx", "5xx"],
            )?,
            backups: counters(&r, "backups_total", "Scheduled backups.", "outcome", &["ok", "failed"])?,
            backup_last_success: gauge(
                &r,
                "backup_last_success_timestamp_seconds",
                "When the last scheduled backup was made; 0: none is known.",
            )?,
            backup_bytes: gauge(&r, "backup_bytes", "Size of the last scheduled backup.")?,
            backup_interval_seconds: gauge(
                &r,
                "backup_interval_seconds",
                "How often a backup is made; 0: backups are not scheduled.",
            )?,
            http_refused: counters(
                &r,
                "http_refused_total",
                "REST requests that were not let in.",
                "reason",
                &["unauthenticated", "forbidden", "rate_limited"],
            )?,
            audit_records: counter(&r, "audit_records_total", "Records added to the audit.")?,
            idempotency: counters(
                &r,
                "idempotency_total",
                "Requests with an Idempotency-Key.",
                "outcome",
                &["kept", "replayed", "mismatch", "unknown"],
            )?,
            uptime_seconds: register(
                &r,
                Gauge::new(name("uptime_seconds"), "Seconds since the process started.")?,
            )?,
            registry: r,
        };
        Ok(metrics)
    }

    /// Sets the gauges that follow the store.
    pub fn observe_view(&self, view: &View) {
        let (mut deployed, mut wanted, mut ready, mut draining) = (0_i64, 0_i64, 0_i64, 0_i64);
        for model in view.models.values() {
            if let Some(deployment) = &model.deployment {
                deployed += 1;
                wanted += i64::from(deployment.value.replicas);
            }
            for endpoint in model.endpoints.values() {
                if model.takes_requests(endpoint) { ready += 1 } else { draining += 1 }
            }
        }
        self.deployments.set(deployed);
        self.replicas_wanted.set(wanted);
        self.endpoints.with_label_values(&["ready"]).set(ready);
        self.endpoints.with_label_values(&["draining"]).set(draining);
        self.nodes.set(i64::try_from(view.nodes.len()).unwrap_or(i64::MAX));
        self.term.set(i64::try_from(view.published_term()).unwrap_or(i64::MAX));
        self.view_revision.set(i64::try_from(view.revision).unwrap_or(i64::MAX));
    }

    /// Every series as JSON: by name, with help, kind, and samples with their labels. Histograms as count and sum.
    pub fn summary(&self) -> Vec<serde_json::Value> {
        let families = self.registry.gather();
        let family = |family: &prometheus::proto::MetricFamily| {
            let kind = family.get_field_type();
            let samples = family.get_metric().iter().map(|metric| {
                let labels =
                    metric.get_label().iter().map(|label| (label.name().to_owned(), label.value().into()));
                let labels = serde_json::Map::from_iter(labels);
                match kind {
                    MetricType::HISTOGRAM => {
                        let histogram = metric.get_histogram();
                        let (count, sum) = (histogram.get_sample_count(), histogram.get_sample_sum());
                        serde_json::json!({ "labels": labels, "count": count, "sum": sum })
                    }
                    MetricType::GAUGE => {
                        serde_json::json!({ "labels": labels, "value": metric.get_gauge().get_value() })
                    }
                    _ => serde_json::json!({ "labels": labels, "value": metric.get_counter().get_value() }),
                }
            });
            let kind = match kind {
                MetricType::HISTOGRAM => "histogram",
                MetricType::GAUGE => "gauge",
                _ => "counter",
            };
            let samples: Vec<_> = samples.collect();
            serde_json::json!({ "name": family.name(), "help": family.help(), "kind": kind, "samples": samples })
        };
        families.iter().map(family).collect()
    }

    /// In Prometheus' text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn name(short: &str) -> String {
    format!("penstock_controlplane_{short}")
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, series: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(series.clone()))?;
    Ok(series)
}

fn gauge(registry: &Registry, short: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    register(registry, IntGauge::new(name(short), help)?)
}

fn counter(registry: &Registry, short: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    register(registry, IntCounter::new(name(short), help)?)
}

fn gauges(
    registry: &Registry,
    short: &str,
    help: &str,
    label: &str,
    values: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    let series = register(registry, IntGaugeVec::new(Opts::new(name(short), help), &[label])?)?;
    values.iter().for_each(|value| drop(series.with_label_values(&[value])));
    Ok(series)
}

fn counters(
    registry: &Registry,
    short: &str,
    help: &str,
    label: &str,
    values: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let series = register(registry, IntCounterVec::new(Opts::new(name(short), help), &[label])?)?;
    values.iter().for_each(|value| drop(series.with_label_values(&[value])));
    Ok(series)
}

/// From a pass that only looks (below a millisecond) to one that waits for a slow disk.
fn histogram(registry: &Registry) -> Result<Histogram, prometheus::Error> {
    let help = "How long a pass of reconcile took, store writes included.";
    let buckets = vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
    register(
        registry,
        Histogram::with_opts(HistogramOpts::new(name("reconcile_seconds"), help).buckets(buckets))?,
    )
}
