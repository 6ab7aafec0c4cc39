//! The node's GPUs: what there is, and how they are.
//!
//! One trait, two sources: [`nvml`] and [`simulated`]. A sampler task reads them on a period and publishes the last
//! reading; nobody else calls the driver, which may block for seconds. A node without a driver is a node with zero GPUs and
//! a reason that can be read, never a crash. Absent here: which engine gets which GPU; the control plane assigns that.

pub(crate) mod nvml;
pub(crate) mod simulated;

use std::{sync::Arc, time::Duration};

use penstock_config::agent::GpuConfig;
use penstock_proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Which kind of GPU uuids this node has, and so which variable tells an engine of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GpuKind {
    /// Real ones.
    Nvml,
    /// Pretended ones.
    Simulated,
    /// No GPUs.
    None,
}

/// A source of GPU readings.
pub(crate) trait Gpus: Send {
    /// Reads all GPUs. May block.
    ///
    /// # Errors
    /// Why nothing could be read; the next call may succeed. A single GPU that fails is a reading with its fault set.
    fn sample(&mut self) -> Result<Vec<v1::Gpu>, String>;
}

/// The last reading.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GpuReport {
    /// Kind of the GPUs.
    pub(crate) kind: GpuKind,
    /// The GPUs, in the order of their source.
    pub(crate) gpus: Vec<v1::Gpu>,
    /// Why there are none, or why they cannot be read; empty: all is well.
    pub(crate) reason: String,
}

impl GpuReport {
    /// Why an engine cannot have these GPUs now, if it cannot.
    pub(crate) fn refuses(&self, gpu_uuids: &[String]) -> Option<String> {
        let known = |uuid: &&String| !self.gpus.iter().any(|gpu| gpu.uuid == **uuid);
        let missing = gpu_uuids.iter().find(known)?;
        let have = match self.gpus.is_empty() {
            true if self.reason.is_empty() => "none".to_owned(),
            true => format!("none: {}", self.reason),
            false => self.gpus.iter().map(|gpu| gpu.uuid.as_str()).collect::<Vec<_>>().join(", "),
        };
        Some(format!("the assigned GPU {missing} is not on this node (it has {have})"))
    }
}

/// The source that the settings name, and its first reading.
pub(crate) fn open(config: &GpuConfig, node_id: &str) -> (Option<Box<dyn Gpus>>, GpuReport) {
    let none = |reason: &str| GpuReport { kind: GpuKind::None, gpus: vec![], reason: reason.into() };
    let (source, kind): (Box<dyn Gpus>, GpuKind) = match config.source.as_str() {
        "simulated" => (Box::new(simulated::Simulated::new(config, node_id)), GpuKind::Simulated),
        "none" => return (None, none("the setting gpus.source is \"none\"")),
        _ => (Box::new(nvml::NvmlGpus::new(&config.nvml_library)), GpuKind::Nvml),
    };
    let mut source = source;
    match source.sample() {
        Ok(gpus) => {
            tracing::info!(source = config.source, gpus = gpus.len(), "GPUs found");
            (Some(source), GpuReport { kind, gpus, reason: String::new() })
        }
        Err(reason) if config.source == "auto" => {
            tracing::info!(reason, "no GPU driver: this node has zero GPUs (gpus.source = \"auto\")");
            (None, none(&reason))
        }
        Err(reason) => {
            tracing::error!(reason, "the GPUs cannot be read: this node has zero GPUs until they can");
            (Some(source), GpuReport { kind, gpus: vec![], reason })
        }
    }
}

/// Reads `source` every `period` and publishes the readings, until told to stop. A failed reading keeps the GPUs known and
/// marks each as faulty, so that a driver's hiccup does not look like a machine without GPUs.
pub(crate) async fn sampler(
    source: Box<dyn Gpus>,
    period: Duration,
    report: Arc<watch::Sender<GpuReport>>,
    stop: CancellationToken,
) {
    let mut source = source;
    while stop.run_until_cancelled(tokio::time::sleep(period)).await.is_some() {
        let reading = tokio::task::spawn_blocking(move || {
            let reading = source.sample();
            (source, reading)
        });
        let Some(Ok((back, reading))) = stop.run_until_cancelled(reading).await else { return };
        source = back;
        report.send_modify(|report| match reading {
            Ok(gpus) => (report.gpus, report.reason) = (gpus, String::new()),
            Err(reason) => {
                if report.reason != reason {
                    tracing::error!(reason, "the GPUs cannot be read");
                }
                report.gpus.iter_mut().for_each(|gpu| gpu.fault.clone_from(&reason));
                report.reason = reason;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(source: &str) -> GpuConfig {
        GpuConfig {
            source: source.into(),
            nvml_library: "/no/such/libnvidia-ml.so".into(),
            ..GpuConfig::default()
        }
    }

    #[test]
    fn a_node_without_a_driver_has_zero_gpus_and_a_reason() {
        let (source, report) = open(&config("auto"), "n");
        assert!(source.is_none() && report.gpus.is_empty());
        assert_eq!(report.kind, GpuKind::None);
        assert!(report.reason.contains("/no/such/libnvidia-ml.so"), "{}", report.reason);
        let (source, report) = open(&config("nvml"), "n");
        assert!(source.is_some() && report.kind == GpuKind::Nvml && !report.reason.is_empty());
        let refusal = report.refuses(&["GPU-1".into()]).expect("refused");
        assert!(refusal.contains("GPU-1") && refusal.contains("it has none: "), "{refusal}");
    }

    #[test]
    fn only_gpus_of_this_node_can_be_had() {
        let (_, report) = open(&config("simulated"), "n");
        let uuid = report.gpus[3].uuid.clone();
        assert_eq!(report.refuses(&[uuid]), None);
        assert_eq!(report.refuses(&[]), None);
        assert!(report.refuses(&["GPU-x".into()]).expect("refused").contains("SIM-n-0, SIM-n-1"));
    }

    struct Scripted(Vec<Result<Vec<v1::Gpu>, String>>);

    impl Gpus for Scripted {
        fn sample(&mut self) -> Result<Vec<v1::Gpu>, String> {
            self.0.pop().unwrap_or_else(|| Err("driver lost".into()))
        }
    }

    #[tokio::test]
    async fn a_driver_that_is_lost_makes_faults_not_an_empty_node() {
        let gpu = v1::Gpu { uuid: "g".into(), ..v1::Gpu::default() };
        let first = GpuReport { kind: GpuKind::Nvml, gpus: vec![], reason: String::new() };
        let report = Arc::new(watch::Sender::new(first));
        let mut changes = report.subscribe();
        let stop = CancellationToken::new();
        let source = Box::new(Scripted(vec![Ok(vec![gpu])]));
        let task = tokio::spawn(sampler(source, Duration::from_millis(1), report.clone(), stop.clone()));
        let lost = changes.wait_for(|r| r.reason == "driver lost").await.unwrap().clone();
        assert_eq!(lost.gpus.iter().map(|g| g.fault.as_str()).collect::<Vec<_>>(), ["driver lost"]);
        stop.cancel();
        task.await.unwrap();
    }
}
