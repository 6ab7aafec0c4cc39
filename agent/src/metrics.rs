//! Every metric of the agent, declared here and nowhere else, present at zero from the start.
//!
//! Labels are of fixed cardinality: engine states and outcomes, and the GPUs of this node by uuid; never a replica or a
//! reason text; those are in `GET /engines`. Figures that are read off something (engines by state, GPUs) are set when `/metrics` is asked.

use std::time::{Duration, Instant};

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use penstock_proto::v1;

use crate::{
    board::EngineView,
    engine::{State, causes::Cause, load},
    gpu::{GpuKind, GpuReport},
    warm::Way,
};

/// The agent's metrics.
pub(crate) struct Metrics {
    registry: Registry,
    engines: IntGaugeVec,
    /// Processes on the node that look like vLLM and are none of ours.
    pub(crate) foreign: IntGauge,
    /// Requests for engines' logs that are being answered.
    pub(crate) log_streams: IntGauge,
    /// Times that an engine's log was put aside.
    pub(crate) log_rotations: IntCounter,
    gpus: IntGauge,
    gpus_faulty: IntGauge,
    gpu_memory: IntGaugeVec,
    gpu_memory_used: IntGaugeVec,
    gpu_utilization: IntGaugeVec,
    gpu_temperature: IntGaugeVec,
    gpus_degraded: IntGauge,
    gpu_reading_age: IntGauge,
    gpu_faulty: IntGaugeVec,
    gpu_degraded: IntGaugeVec,
    gpu_throttled: IntGaugeVec,
    gpu_power: IntGaugeVec,
    gpu_sm_clock: IntGaugeVec,
    gpu_ecc_corrected: IntGaugeVec,
    gpu_ecc_uncorrected: IntGaugeVec,
    gpu_memory_others: IntGaugeVec,
    gpu_xids: IntCounterVec,
    /// Engines whose memory was not given back in time.
    pub(crate) gpu_leftovers: IntCounter,
    /// Whether a session with a control plane stands.
    pub(crate) session_connected: IntGauge,
    /// Sessions that a control plane welcomed.
    pub(crate) sessions: IntCounter,
    /// Tries to get a session that failed.
    pub(crate) session_failures: IntCounter,
    /// Assignments taken over.
    pub(crate) assignments_accepted: IntCounter,
    /// Assignments refused because newer ones are known.
    pub(crate) assignments_stale: IntCounter,
    /// Registrations accepted by the control plane.
    pub(crate) registrations_accepted: IntCounter,
    /// Registrations refused by the control plane.
    pub(crate) registrations_refused: IntCounter,
    /// Engine processes started.
    pub(crate) starts: IntCounter,
    /// Engines taken over from an earlier agent.
    pub(crate) adoptions: IntCounter,
    exits: IntCounterVec,
    canaries: IntCounterVec,
    metric_missing: IntGaugeVec,
    gave_up: IntGauge,
    /// Engines ended because they answered and got nowhere.
    pub(crate) wedges: IntCounter,
    /// Engines ended because they stopped answering.
    pub(crate) liveness_failures: IntCounter,
    /// Readings of an engine's /metrics that worked.
    pub(crate) scrapes_ok: IntCounter,
    /// Readings that failed or lacked a figure.
    pub(crate) scrapes_failed: IntCounter,
    /// SIGKILLs that were needed.
    pub(crate) kills: IntCounter,
    ready_seconds: HistogramVec,
    warm_failures: IntCounterVec,
    stop_seconds: Histogram,
}

/// Whose error an XID is.
const XID_CLASSES: [&str; 2] = ["application", "hardware"];

/// What became of a canary.
const CANARY_OUTCOMES: [&str; 4] = ["answered", "failed", "taken_back", "unanswered"];

impl Metrics {
    /// All metrics at zero.
    ///
    /// # Errors
    /// A name declared twice or malformed: a defect, found by any test that makes one.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let counter = IntCounter::new(format!("penstock_agent_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(format!("penstock_agent_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<Histogram, prometheus::Error> {
            let opts = HistogramOpts::new(format!("penstock_agent_{name}"), help).buckets(buckets.to_vec());
            let histogram = Histogram::with_opts(opts)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let engines = IntGaugeVec::new(Opts::new("penstock_agent_engines", "Engines by state."), &["state"])?;
        registry.register(Box::new(engines.clone()))?;
        let exits = IntCounterVec::new(
            Opts::new(
                "penstock_agent_engine_exits_total",
                "Engines that ended unasked or could not be started, by cause.",
            ),
            &["cause"],
        )?;
        registry.register(Box::new(exits.clone()))?;
        // A woken simulator is ready in milliseconds, a large model from cold storage in twenty minutes.
        let opts = HistogramOpts::new(
            "penstock_agent_engine_ready_seconds",
            "Time from an engine's start, or its waking, to its first completion, by the way it was started.",
        );
        let buckets = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0];
        let ready_seconds = HistogramVec::new(opts.buckets(buckets.to_vec()), &["way"])?;
        registry.register(Box::new(ready_seconds.clone()))?;
        let warm_failures = IntCounterVec::new(
            Opts::new(
                "penstock_agent_warm_failures_total",
                "Warm ways that failed, so that an engine was ended or started cold, by way.",
            ),
            &["way"],
        )?;
        registry.register(Box::new(warm_failures.clone()))?;
        for way in Way::ALL {
            ready_seconds.with_label_values(&[way.name()]);
        }
        for way in [Way::Prefetched, Way::Restored, Way::Woken] {
            warm_failures.with_label_values(&[way.name()]);
        }
        let per_gpu = |name: &str, help: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let gauges = IntGaugeVec::new(Opts::new(format!("penstock_agent_{name}"), help), &["gpu"])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let canaries = IntCounterVec::new(
            Opts::new(
                "penstock_agent_engine_canaries_total",
                "Completions of one token that the agent asked of engines without progress, by outcome.",
            ),
            &["outcome"],
        )?;
        registry.register(Box::new(canaries.clone()))?;
        let metric_missing = IntGaugeVec::new(
            Opts::new(
                "penstock_agent_engine_metric_missing",
                "Ready engines whose /metrics lacks a figure that routing, scaling or liveness needs.",
            ),
            &["metric"],
        )?;
        registry.register(Box::new(metric_missing.clone()))?;
        for outcome in CANARY_OUTCOMES {
            canaries.with_label_values(&[outcome]);
        }
        for metric in load::wanted() {
            metric_missing.with_label_values(&[metric]);
        }
        let gpu_xids = IntCounterVec::new(
            Opts::new("penstock_agent_gpu_xids_total", "XIDs: of the hardware, or of applications."),
            &["class"],
        )?;
        registry.register(Box::new(gpu_xids.clone()))?;
        for class in XID_CLASSES {
            gpu_xids.with_label_values(&[class]);
        }
        for label in Cause::LABELS {
            exits.with_label_values(&[label]);
        }
        for state in State::ALL {
            engines.with_label_values(&[state.name()]);
        }
        Ok(Self {
            engines,
            exits,
            foreign: gauge(
                "foreign_processes",
                "Processes on this node that look like vLLM and belong to no engine of this agent.",
            )?,
            log_streams: gauge("log_streams", "Requests for engines' logs that are being answered.")?,
            log_rotations: counter(
                "engine_log_rotations_total",
                "Times that an engine's log was put aside.",
            )?,
            canaries,
            metric_missing,
            gave_up: gauge("engines_gave_up", "Engines that failed so often that they are given up here.")?,
            wedges: counter(
                "engine_wedges_total",
                "Engines ended because they answered and made no progress.",
            )?,
            gpus: gauge("gpus", "GPUs on this node.")?,
            gpus_faulty: gauge("gpus_faulty", "GPUs on this node with a fault.")?,
            gpu_memory: per_gpu("gpu_memory_bytes", "Memory of a GPU.")?,
            gpu_memory_used: per_gpu("gpu_memory_used_bytes", "Memory in use on a GPU.")?,
            gpu_utilization: per_gpu("gpu_utilization_percent", "Share of time in which a GPU was busy.")?,
            gpu_temperature: per_gpu("gpu_temperature_celsius", "Temperature of a GPU.")?,
            gpus_degraded: gauge("gpus_degraded", "GPUs on this node that are degraded.")?,
            gpu_reading_age: gauge("gpu_reading_age_seconds", "Age of the last reading of the GPUs.")?,
            gpu_faulty: per_gpu("gpu_faulty", "1 while a GPU is faulty.")?,
            gpu_degraded: per_gpu("gpu_degraded", "1 while a GPU is degraded.")?,
            gpu_throttled: per_gpu("gpu_throttled", "1 while heat or power lower a GPU's clocks.")?,
            gpu_power: per_gpu("gpu_power_watts", "Power that a GPU draws.")?,
            gpu_sm_clock: per_gpu("gpu_sm_clock_megahertz", "Clock of a GPU's multiprocessors.")?,
            gpu_ecc_corrected: per_gpu(
                "gpu_ecc_corrected",
                "Corrected ECC errors since the driver was loaded.",
            )?,
            gpu_ecc_uncorrected: per_gpu(
                "gpu_ecc_uncorrected",
                "Uncorrected ECC errors since the driver was loaded.",
            )?,
            gpu_memory_others: per_gpu(
                "gpu_memory_others_bytes",
                "Memory of a GPU that processes hold which are no engines of this agent.",
            )?,
            gpu_xids,
            gpu_leftovers: counter(
                "gpu_leftovers_total",
                "Ended engines whose GPU memory was not given back in time.",
            )?,
            session_connected: gauge("session_connected", "1 while a session with a control plane stands.")?,
            sessions: counter("sessions_total", "Sessions that a control plane welcomed.")?,
            session_failures: counter("session_failures_total", "Tries to get a session that failed.")?,
            assignments_accepted: counter("assignments_accepted_total", "Assignments taken over.")?,
            assignments_stale: counter(
                "assignments_stale_total",
                "Assignments refused because newer ones are known.",
            )?,
            registrations_accepted: counter("registrations_accepted_total", "Registrations accepted.")?,
            registrations_refused: counter("registrations_refused_total", "Registrations refused.")?,
            starts: counter("engine_starts_total", "Engine processes started.")?,
            adoptions: counter("engine_adoptions_total", "Engines taken over from an earlier agent.")?,
            liveness_failures: counter(
                "engine_liveness_failures_total",
                "Engines ended because they stopped answering.",
            )?,
            scrapes_ok: counter("engine_scrapes_total", "Readings of an engine's /metrics that worked.")?,
            scrapes_failed: counter(
                "engine_scrape_failures_total",
                "Readings of an engine's /metrics that failed or lacked a figure.",
            )?,
            kills: counter("engine_kills_total", "Engines whose processes needed SIGKILL.")?,
            ready_seconds,
            warm_failures,
            // From "nothing to drain" to the longest drain and both signals' time.
            stop_seconds: histogram(
                "engine_stop_seconds",
                "Time from the order to stop an engine until no process of it was left.",
                &[0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0],
            )?,
            registry,
        })
    }

    /// Counts an end by `Cause::label`.
    pub(crate) fn exited(&self, cause: &str) {
        self.exits.with_label_values(&[cause]).inc();
    }

    /// Counts a canary by what became of it.
    pub(crate) fn canary(&self, outcome: &str) {
        self.canaries.with_label_values(&[outcome]).inc();
    }

    /// Counts an XID.
    pub(crate) fn gpu_xid(&self, of_hardware: bool) {
        let [application, hardware] = XID_CLASSES;
        self.gpu_xids.with_label_values(&[if of_hardware { hardware } else { application }]).inc();
    }

    /// An engine became ready in this way, this long after its start.
    pub(crate) fn became_ready(&self, way: Way, took: Duration) {
        self.ready_seconds.with_label_values(&[way.name()]).observe(took.as_secs_f64());
    }

    /// A warm way failed.
    pub(crate) fn warm_failed(&self, way: Way) {
        self.warm_failures.with_label_values(&[way.name()]).inc();
    }

    /// An engine that was told to stop took this long.
    pub(crate) fn stopped(&self, took: Duration) {
        self.stop_seconds.observe(took.as_secs_f64());
    }

    /// Everything in Prometheus text.
    ///
    /// # Errors
    /// The encoder's.
    pub(crate) fn render(
        &self,
        engines: &[EngineView],
        gpus: &GpuReport,
    ) -> Result<String, prometheus::Error> {
        for state in State::ALL {
            let count = engines.iter().filter(|view| view.state == state).count();
            self.engines.with_label_values(&[state.name()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for metric in load::wanted() {
            let lacks = |view: &&EngineView| view.state == State::Ready && view.missing.contains(&metric);
            self.metric_missing.with_label_values(&[metric]).set(whole(engines.iter().filter(lacks).count()));
        }
        self.gave_up.set(whole(engines.iter().filter(|view| view.gave_up.is_some()).count()));
        self.set_gpus(gpus);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|e| prometheus::Error::Msg(e.to_string()))
    }

    /// A GPU that went takes its series along, and so does a figure that is not known.
    fn set_gpus(&self, report: &GpuReport) {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let bytes = |mib: u64| whole(mib.saturating_mul(1 << 20));
        let count = |health: v1::GpuHealth| {
            let count = report.gpus.iter().filter(|gpu| gpu.health == i32::from(health)).count();
            i64::try_from(count).unwrap_or(i64::MAX)
        };
        self.gpus.set(i64::try_from(report.gpus.len()).unwrap_or(i64::MAX));
        self.gpus_faulty.set(count(v1::GpuHealth::Faulty));
        self.gpus_degraded.set(count(v1::GpuHealth::Degraded));
        // Where nothing is read, nothing gets old.
        let age_ms = match report.kind {
            GpuKind::None => 0,
            _ => report.source(Instant::now()).reading_age_ms,
        };
        self.gpu_reading_age.set(whole(age_ms / 1_000));
        self.per_gpu().iter().for_each(|gauges| gauges.reset());
        for gpu in &report.gpus {
            let label = [gpu.uuid.as_str()];
            let set = |gauges: &IntGaugeVec, value: Option<i64>| {
                if let Some(value) = value {
                    gauges.with_label_values(&label).set(value);
                }
            };
            let errors = gpu.errors.unwrap_or_default();
            let others = gpu.processes.iter().filter(|process| process.replica_id.is_empty());
            let others = others.filter_map(|process| process.used_mib).sum::<u64>();
            let slowed = |reason: &String| {
                reason.contains("thermal") || reason.contains("power") || reason == "hw_slowdown"
            };
            set(&self.gpu_memory, Some(bytes(gpu.memory_total_mib)));
            set(&self.gpu_memory_used, Some(bytes(gpu.memory_used_mib)));
            set(&self.gpu_memory_others, Some(bytes(others)));
            set(&self.gpu_utilization, gpu.utilization_percent.map(i64::from));
            set(&self.gpu_temperature, gpu.temperature_c.map(i64::from));
            set(&self.gpu_faulty, Some((gpu.health == i32::from(v1::GpuHealth::Faulty)).into()));
            set(&self.gpu_degraded, Some((gpu.health == i32::from(v1::GpuHealth::Degraded)).into()));
            set(&self.gpu_throttled, Some(gpu.throttle_reasons.iter().any(slowed).into()));
            set(&self.gpu_power, gpu.power_w.map(i64::from));
            set(&self.gpu_sm_clock, gpu.sm_clock_mhz.map(i64::from));
            set(&self.gpu_ecc_corrected, errors.corrected.map(whole));
            set(&self.gpu_ecc_uncorrected, errors.uncorrected.map(whole));
        }
    }

    fn per_gpu(&self) -> [&IntGaugeVec; 12] {
        [
            &self.gpu_memory,
            &self.gpu_memory_used,
            &self.gpu_memory_others,
            &self.gpu_utilization,
            &self.gpu_temperature,
            &self.gpu_faulty,
            &self.gpu_degraded,
            &self.gpu_throttled,
            &self.gpu_power,
            &self.gpu_sm_clock,
            &self.gpu_ecc_corrected,
            &self.gpu_ecc_uncorrected,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::records::tests::record;

    #[test]
    fn each_gpu_has_its_series_while_it_is_there() {
        let metrics = Metrics::new().unwrap();
        let gpu =
            v1::Gpu { uuid: "g0".into(), memory_total_mib: 2, memory_used_mib: 1, ..Default::default() };
        let with = GpuReport { gpus: vec![gpu], ..GpuReport::empty(GpuKind::Simulated, "") };
        let text = metrics.render(&[], &with).unwrap();
        assert!(text.contains("penstock_agent_gpu_memory_used_bytes{gpu=\"g0\"} 1048576"), "{text}");
        assert!(!text.contains("penstock_agent_gpu_power_watts{"), "it does not say");
        let without = GpuReport { gpus: vec![], ..with };
        assert!(!metrics.render(&[], &without).unwrap().contains("g0"));
    }

    #[test]
    fn every_label_is_there_from_the_start() {
        let metrics = Metrics::new().unwrap();
        let gpus = GpuReport::empty(GpuKind::None, "");
        let text = metrics.render(&[EngineView::new(record("a", 0).assignment, "")], &gpus).unwrap();
        for line in [
            "penstock_agent_engines{state=\"starting\"} 1",
            "penstock_agent_engines{state=\"failed\"} 0",
            "penstock_agent_engine_exits_total{cause=\"signal\"} 0",
            "penstock_agent_assignments_stale_total 0",
            "penstock_agent_engine_canaries_total{outcome=\"answered\"} 0",
            "penstock_agent_engine_metric_missing{metric=\"vllm:num_requests_running\"} 0",
            "penstock_agent_engine_ready_seconds_count{way=\"woken\"} 0",
            "penstock_agent_warm_failures_total{way=\"restored\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in\n{text}");
        }
    }
}
