//! The node's GPUs: what there is, how they are, and which of them may be used.
//!
//! One trait, two sources: [`nvml`] and [`simulated`]. One task, the [`sampler`], reads them on a period, has the pure
//! [`policy`] judge them, and publishes the last reading; nobody else calls the driver, which may block for seconds. A
//! node without a driver is a node with zero GPUs and a reason that can be read, never a crash. A reading that hangs or
//! fails leaves the last one standing, marked as old: engines that run are not ended because the driver does not talk.
//!
//! What a faulty GPU leads to is decided in `crate::plan` (its engines end, and wait) and in the control plane (nothing is
//! placed on it). Absent here: which engine gets which GPU; the control plane assigns that.

mod cards;
mod control;
pub(crate) mod nvml;
pub(crate) mod policy;
mod sampler;
pub(crate) mod simulated;
mod xid;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use penstock_config::agent::GpuConfig;
use penstock_proto::v1;
use serde::Serialize;
use tokio::sync::{Notify, watch};

pub(crate) use cards::shown;
pub(crate) use control::routes;
pub(crate) use sampler::Sampler;

/// What NVML calls a slowdown by hardware because of heat, among a GPU's throttle reasons.
pub(crate) const HOT: &str = "hw_thermal_slowdown";

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

impl GpuKind {
    /// As it is told to others.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nvml => "nvml",
            Self::Simulated => "simulated",
            Self::None => "none",
        }
    }
}

/// What would help a GPU; the later the harder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Remedy {
    /// Nothing, or time.
    None,
    /// Less heat.
    Cooling,
    /// A reset of the GPU.
    Reset,
    /// A reboot of the machine.
    Reboot,
    /// Another GPU.
    Replacement,
}

impl Remedy {
    /// As it is told to others; empty for none.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Cooling => "cooling",
            Self::Reset => "reset",
            Self::Reboot => "reboot",
            Self::Replacement => "replacement",
        }
    }
}

/// Why a card does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It has fallen off the bus.
    Lost,
    /// The driver wants it reset first.
    NeedsReset,
    /// Anything else, in the driver's words.
    Unreadable(String),
}

/// What the driver itself asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// A reset at once.
    Reset,
    /// A reboot.
    Reboot,
    /// A reset once nothing runs there.
    Drain,
}

/// One card as it was read: `health`, `fault` and `xids` are the judge's to fill in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Card {
    /// Its figures; those of a card that does not read are the constant ones of before.
    pub(crate) gpu: v1::Gpu,
    /// Why it does not read, if so.
    pub(crate) trouble: Option<Trouble>,
    /// What the driver asks for, if anything.
    pub(crate) recovery: Option<Recovery>,
}

/// An XID that the driver told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct XidSeen {
    /// The GPU; empty where a lost one could not say its name.
    pub(crate) uuid: String,
    /// Its number.
    pub(crate) xid: u32,
    /// When, in milliseconds of Unix time.
    pub(crate) unix_ms: u64,
}

/// Versions of what reads the GPUs; empty where that is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Driver {
    /// The kernel driver's.
    pub(crate) version: String,
    /// The newest CUDA that it supports.
    pub(crate) cuda: String,
}

/// Everything that a source says at once.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Reading {
    /// Every card.
    pub(crate) cards: Vec<Card>,
    /// XIDs since the last reading.
    pub(crate) xids: Vec<XidSeen>,
    /// Versions.
    pub(crate) driver: Driver,
}

/// A source of GPU readings.
pub(crate) trait Gpus: Send {
    /// Reads all GPUs. May block.
    ///
    /// # Errors
    /// Why nothing could be read; the next call may succeed. A single card that fails is a card in trouble.
    fn sample(&mut self) -> Result<Reading, String>;

    /// Ends what the source runs beside readings, before it is dropped. May block for a second.
    fn close(&mut self) {}
}

/// The last reading, judged.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GpuReport {
    /// Kind of the GPUs.
    pub(crate) kind: GpuKind,
    /// The GPUs, in the order of their source.
    pub(crate) gpus: Vec<v1::Gpu>,
    /// Why there are none, or why they cannot be read; empty: all is well.
    pub(crate) reason: String,
    /// Versions.
    pub(crate) driver: Driver,
    /// When the reading that these figures are of began.
    pub(crate) began: Instant,
    /// When a reading was last tried: it may have failed since.
    pub(crate) tried: Instant,
}

impl GpuReport {
    /// One without GPUs.
    pub(crate) fn empty(kind: GpuKind, reason: &str) -> Self {
        let now = Instant::now();
        let (gpus, driver) = (vec![], Driver::default());
        Self { kind, gpus, reason: reason.into(), driver, began: now, tried: now }
    }

    /// Why an engine cannot have these GPUs now, if it cannot.
    pub(crate) fn refuses(&self, gpu_uuids: &[String]) -> Option<String> {
        let known = |uuid: &&String| !self.gpus.iter().any(|gpu| gpu.uuid == **uuid);
        let Some(missing) = gpu_uuids.iter().find(known) else {
            return unusable(&self.faults(), gpu_uuids);
        };
        let have = match self.gpus.is_empty() {
            true if self.reason.is_empty() => "none".to_owned(),
            true => format!("none: {}", self.reason),
            false => self.gpus.iter().map(|gpu| gpu.uuid.as_str()).collect::<Vec<_>>().join(", "),
        };
        Some(format!("the assigned GPU {missing} is not on this node (it has {have})"))
    }

    /// GPUs that must not be used, and why.
    pub(crate) fn faults(&self) -> BTreeMap<String, String> {
        let faulty = self.gpus.iter().filter(|gpu| !gpu.fault.is_empty());
        faulty.map(|gpu| (gpu.uuid.clone(), gpu.fault.clone())).collect()
    }

    /// Where the figures are from, as it is told to others.
    pub(crate) fn source(&self, now: Instant) -> v1::GpuSource {
        let age = now.saturating_duration_since(self.began);
        v1::GpuSource {
            kind: self.kind.name().into(),
            driver_version: self.driver.version.clone(),
            cuda_version: self.driver.cuda.clone(),
            reason: self.reason.clone(),
            reading_age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// Why one of these GPUs must not be used, if that is so.
pub(crate) fn unusable(faults: &BTreeMap<String, String>, gpu_uuids: &[String]) -> Option<String> {
    let (uuid, fault) = gpu_uuids.iter().find_map(|uuid| faults.get_key_value(uuid))?;
    Some(format!("GPU {uuid} must not be used: {fault}"))
}

/// What is asked of the sampler, and of pretended GPUs.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    /// A reading is wanted now.
    wake: Arc<Notify>,
    /// GPUs that an operator has seen to.
    cleared: Mutex<BTreeSet<String>>,
    /// What befalls pretended GPUs; None where they are real.
    simulation: Option<simulated::Shared>,
}

/// The last reading, and a way to ask for another.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    report: watch::Receiver<GpuReport>,
    desk: Arc<Desk>,
}

/// What an operator's clearing came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Cleared {
    /// The GPU, after it.
    Seen(Box<serde_json::Value>),
    /// There is no such GPU.
    Unknown,
    /// The driver does not answer at the moment; it is cleared with the next reading.
    Later,
}

impl Handle {
    /// The last reading.
    pub(crate) fn borrow(&self) -> watch::Ref<'_, GpuReport> {
        self.report.borrow()
    }

    /// Wakes at every reading.
    pub(crate) fn changes(&self) -> watch::Receiver<GpuReport> {
        self.report.clone()
    }

    /// A reading that begins now; None when there is none within `longest`.
    pub(crate) async fn fresh(&self, longest: Duration) -> Option<GpuReport> {
        let asked = Instant::now();
        if self.report.has_changed().is_err() {
            // Nobody reads: what is known stays as it is.
            return Some(self.borrow().clone());
        }
        self.desk.wake.notify_one();
        let mut report = self.report.clone();
        let fresh = report.wait_for(|report| report.tried >= asked);
        let fresh = tokio::time::timeout(longest, fresh).await.ok()?;
        Some(fresh.map_or_else(|_| self.borrow().clone(), |report| report.clone()))
    }

    /// An operator has seen to the GPU: what was noted against it is cleared.
    pub(crate) async fn clear(&self, uuid: &str, longest: Duration) -> Cleared {
        if !self.borrow().gpus.iter().any(|gpu| gpu.uuid == uuid) {
            return Cleared::Unknown;
        }
        self.desk.cleared.lock().unwrap_or_else(PoisonError::into_inner).insert(uuid.to_owned());
        let Some(report) = self.fresh(longest).await else { return Cleared::Later };
        match report.gpus.iter().find(|gpu| gpu.uuid == uuid) {
            Some(gpu) => Cleared::Seen(Box::new(shown(gpu))),
            None => Cleared::Unknown,
        }
    }
}

/// The source that the settings name, with its first reading still to come.
pub(crate) struct Opened {
    /// None: there are no GPUs, and there will be none.
    pub(crate) source: Option<Box<dyn Gpus>>,
    /// The reason for that, or the kind.
    pub(crate) report: GpuReport,
    /// Its first reading, which tells what the node has before anything else begins.
    pub(crate) first: Option<Result<Reading, String>>,
    /// What may be asked of it.
    pub(crate) desk: Arc<Desk>,
}

/// The source that the settings name, and its first reading. `state_dir`: whose engines hold memory of pretended GPUs.
///
/// # Errors
/// A script for pretended GPUs that cannot be read or understood.
pub(crate) fn open(config: &GpuConfig, node_id: &str, state_dir: &Path) -> Result<Opened, String> {
    let desk = Desk::default();
    let none = |reason: &str, desk: Desk| {
        let report = GpuReport::empty(GpuKind::None, reason);
        Ok(Opened { source: None, report, first: None, desk: Arc::new(desk) })
    };
    if config.source == "none" {
        return none("the setting gpus.source is \"none\"", desk);
    }
    if config.source == "simulated" {
        let source = simulated::Simulated::new(config, node_id, state_dir)?;
        let desk = Desk { simulation: Some(source.shared()), ..desk };
        return Ok(first_reading(Box::new(source), GpuKind::Simulated, desk));
    }
    let source = nvml::NvmlGpus::new(&config.nvml_library, desk.wake.clone());
    let opened = first_reading(Box::new(source), GpuKind::Nvml, desk);
    match &opened.first {
        Some(Err(reason)) if config.source == "auto" => {
            tracing::info!(reason, "no GPU driver: this node has zero GPUs (gpus.source = \"auto\")");
            none(reason, Desk::default())
        }
        Some(Err(reason)) => {
            tracing::error!(reason, "the GPUs cannot be read: this node has zero GPUs until they can");
            Ok(opened)
        }
        _ => Ok(opened),
    }
}

fn first_reading(mut source: Box<dyn Gpus>, kind: GpuKind, desk: Desk) -> Opened {
    let report = GpuReport::empty(kind, "");
    let first = Some(source.sample());
    Opened { source: Some(source), report, first, desk: Arc::new(desk) }
}

/// Both ends of a report, without a sampler behind it.
pub(crate) fn handle(opened: &Opened) -> (Arc<watch::Sender<GpuReport>>, Handle) {
    let sender = Arc::new(watch::Sender::new(opened.report.clone()));
    let handle = Handle { report: sender.subscribe(), desk: opened.desk.clone() };
    (sender, handle)
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
        let auto = open(&config("auto"), "n", Path::new("/")).unwrap();
        assert!(auto.source.is_none() && auto.report.gpus.is_empty());
        assert_eq!(auto.report.kind, GpuKind::None);
        assert!(auto.report.reason.contains("/no/such/libnvidia-ml.so"), "{}", auto.report.reason);
        let wanted = open(&config("nvml"), "n", Path::new("/")).unwrap();
        assert!(wanted.source.is_some() && wanted.report.kind == GpuKind::Nvml);
        assert!(wanted.first.unwrap().is_err());
        let refusal = auto.report.refuses(&["GPU-1".into()]).expect("refused");
        assert!(refusal.contains("GPU-1") && refusal.contains("it has none: "), "{refusal}");
    }

    #[test]
    fn only_usable_gpus_of_this_node_can_be_had() {
        let gpu = |uuid: &str, fault: &str| v1::Gpu {
            uuid: uuid.into(),
            fault: fault.into(),
            ..v1::Gpu::default()
        };
        let report = GpuReport {
            gpus: vec![gpu("a", ""), gpu("b", "XID 79")],
            ..GpuReport::empty(GpuKind::Simulated, "")
        };
        assert_eq!(report.refuses(&["a".into()]), None);
        assert_eq!(report.refuses(&[]), None);
        assert!(report.refuses(&["x".into()]).expect("refused").contains("it has a, b"));
        let refusal = report.refuses(&["a".into(), "b".into()]).expect("refused");
        assert_eq!(refusal, "GPU b must not be used: XID 79");
    }

    #[tokio::test]
    async fn where_nobody_reads_what_is_known_is_fresh_enough() {
        let opened = open(&config("none"), "n", Path::new("/")).unwrap();
        let (sender, handle) = handle(&opened);
        drop(sender);
        let report = handle.fresh(Duration::from_secs(3_600)).await.expect("at once");
        assert!(report.reason.contains("gpus.source"));
        assert_eq!(handle.clear("x", Duration::ZERO).await, Cleared::Unknown);
    }
}
