//! GPUs for development and drills, on machines that have none: the same each time, named after their node.
//!
//! They do what real ones do as far as anybody looks: they have a topology, engines that were given one hold memory there,
//! and they break on demand, by a script ([`script`]) or by `PUT /gpus/{uuid}/fault` on the agent's private server.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use penstock_config::agent::GpuConfig;
use penstock_proto::v1;
use serde::{Deserialize, Serialize};

use super::{Card, Driver, Gpus, HOT, Reading, Trouble, XidSeen};
use crate::engine::{
    command::{SIMULATED_GPUS_VARIABLE, STATE_DIR_VARIABLE},
    procfs,
    verify::memory_share,
};

/// What vLLM takes of a GPU unless it is told otherwise.
const SHARE: f64 = 0.9;
/// XIDs that wait for the next reading; more are dropped.
const WAITING: usize = 256;

/// What befalls one pretended GPU: a field that is there changes, the others stay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Fault {
    /// An XID is told once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xid: Option<u32>,
    /// Its temperature, in degrees Celsius; it slows down at 90.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) temperature_c: Option<u32>,
    /// Slowed down by hardware because of heat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) throttled: Option<bool>,
    /// Uncorrected ECC errors since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ecc_uncorrected: Option<u64>,
    /// A row remapping waits for a reset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remap_pending: Option<bool>,
    /// The driver says that it is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lost: Option<bool>,
    /// The driver fails to read it, in these words; empty: it reads again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unreadable: Option<String>,
    /// Memory that processes hold, in MiB by pid, whether they exist or not; replaces what was said before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) processes: Option<BTreeMap<u32, u64>>,
}

/// One line of a script.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    /// Seconds after the agent's start.
    at_s: f64,
    /// The GPU: its uuid, or in the file its number.
    gpu: String,
    fault: Fault,
}

/// What has befallen the GPUs so far.
#[derive(Debug, Default)]
pub(crate) struct Simulation {
    uuids: Vec<String>,
    faults: BTreeMap<String, Fault>,
    xids: Vec<XidSeen>,
}

impl Simulation {
    /// Lets `fault` happen to the GPU. False: there is none of this uuid.
    pub(crate) fn befall(&mut self, uuid: &str, fault: Fault) -> bool {
        if !self.uuids.iter().any(|known| known == uuid) {
            return false;
        }
        if let Some(xid) = fault.xid.filter(|_| self.xids.len() < WAITING) {
            self.xids.push(XidSeen { uuid: uuid.to_owned(), xid, unix_ms: unix_ms() });
        }
        let now = self.faults.entry(uuid.to_owned()).or_default();
        *now = Fault {
            xid: None,
            temperature_c: fault.temperature_c.or(now.temperature_c),
            throttled: fault.throttled.or(now.throttled),
            ecc_uncorrected: fault.ecc_uncorrected.or(now.ecc_uncorrected),
            remap_pending: fault.remap_pending.or(now.remap_pending),
            lost: fault.lost.or(now.lost),
            unreadable: fault.unreadable.or(now.unreadable.take()),
            processes: fault.processes.or(now.processes.take()),
        };
        true
    }

    /// The GPU is as new; an XID that was told stays told.
    pub(crate) fn heal(&mut self, uuid: &str) -> bool {
        self.faults.remove(uuid);
        self.uuids.iter().any(|known| known == uuid)
    }
}

/// Of the source, and of those who make things happen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared(Arc<Mutex<Simulation>>);

impl Shared {
    /// Held for a moment only.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Simulation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pretended GPUs of one kind.
#[derive(Debug)]
pub(crate) struct Simulated {
    gpus: Vec<v1::Gpu>,
    shared: Shared,
    /// What is still to come, the last first.
    script: Vec<Line>,
    since: Instant,
    /// Processes of engines name it: another agent on this machine may have a node of the same name.
    state_dir: String,
}

impl Simulated {
    /// As many as the settings say. Their uuids are unique in the fleet as far as node ids are.
    ///
    /// # Errors
    /// A script that cannot be read or understood; the text names the setting and the line.
    pub(crate) fn new(config: &GpuConfig, node_id: &str, state_dir: &Path) -> Result<Self, String> {
        let per_numa = config.simulated_count.div_ceil(config.simulated_numa_nodes.max(1)).max(1);
        let gpu = |index| v1::Gpu {
            uuid: format!("SIM-{node_id}-{index}"),
            name: "Simulated GPU".into(),
            memory_total_mib: config.simulated_memory_mib,
            utilization_percent: Some(0),
            temperature_c: Some(30),
            slowdown_c: Some(90),
            shutdown_c: Some(95),
            power_w: Some(70),
            power_limit_w: Some(700),
            errors: Some(v1::GpuErrors {
                corrected: Some(0),
                uncorrected: Some(0),
                remap_pending: Some(false),
                ..Default::default()
            }),
            numa_node: if config.simulated_numa_nodes == 0 { None } else { Some(index / per_numa) },
            link_group: u32::checked_div(index, config.simulated_link_group)
                .map_or_else(String::new, |group| format!("sim-link-{group}")),
            ..v1::Gpu::default()
        };
        let gpus: Vec<v1::Gpu> = (0..config.simulated_count).map(gpu).collect();
        let uuids: Vec<String> = gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
        let script = match config.simulated_script.as_str() {
            "" => Vec::new(),
            path => script(Path::new(path), &uuids)?,
        };
        let shared = Shared::default();
        shared.lock().uuids = uuids;
        let state_dir = state_dir.to_string_lossy().into_owned();
        Ok(Self { gpus, shared, script, since: Instant::now(), state_dir })
    }

    /// Through which things are made to happen.
    pub(crate) fn shared(&self) -> Shared {
        self.shared.clone()
    }
}

impl Gpus for Simulated {
    fn sample(&mut self) -> Result<Reading, String> {
        let elapsed = self.since.elapsed().as_secs_f64();
        let mut simulation = self.shared.lock();
        while let Some(line) = self.script.pop_if(|line| line.at_s <= elapsed) {
            simulation.befall(&line.gpu, line.fault);
        }
        let xids = std::mem::take(&mut simulation.xids);
        let faults = simulation.faults.clone();
        drop(simulation);
        let held = engines(&self.gpus, &self.state_dir);
        let none = Fault::default();
        let cards = self.gpus.iter().map(|gpu| {
            let fault = faults.get(&gpu.uuid).unwrap_or(&none);
            card(gpu, fault, held.get(&gpu.uuid).map(Vec::as_slice).unwrap_or_default())
        });
        let driver = Driver { version: "simulated".into(), cuda: String::new() };
        Ok(Reading { cards: cards.collect(), xids, driver })
    }
}

fn card(gpu: &v1::Gpu, fault: &Fault, engines: &[(u32, f64)]) -> Card {
    let mut gpu = gpu.clone();
    let trouble = match &fault.unreadable {
        _ if fault.lost == Some(true) => Some(Trouble::Lost),
        Some(why) if !why.is_empty() => Some(Trouble::Unreadable(why.clone())),
        _ => None,
    };
    if trouble.is_some() {
        (gpu.utilization_percent, gpu.temperature_c, gpu.power_w, gpu.errors) = (None, None, None, None);
        return Card { gpu, trouble, recovery: None };
    }
    gpu.temperature_c = fault.temperature_c.or(gpu.temperature_c);
    if fault.throttled == Some(true) {
        gpu.throttle_reasons.push(HOT.into());
    }
    if let Some(errors) = &mut gpu.errors {
        errors.uncorrected = fault.ecc_uncorrected.or(errors.uncorrected);
        errors.remap_pending = fault.remap_pending.or(errors.remap_pending);
    }
    let process = |pid, mib| v1::GpuProcess { pid, used_mib: Some(mib), replica_id: String::new() };
    let total = gpu.memory_total_mib;
    gpu.processes = engines.iter().map(|(pid, share)| process(*pid, part(total, *share))).collect();
    let told = fault.processes.iter().flatten();
    gpu.processes.extend(told.map(|(pid, mib)| process(*pid, *mib)));
    let used = gpu.processes.iter().filter_map(|process| process.used_mib).sum::<u64>();
    gpu.memory_used_mib = used.min(total);
    Card { gpu, trouble, recovery: None }
}

/// A share of a memory, in whole MiB.
fn part(total_mib: u64, share: f64) -> u64 {
    let permille = (share.clamp(0.0, 1.0) * 1_000.0).round();
    // Between 0 and 1000.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let permille = permille as u64;
    total_mib.saturating_mul(permille) / 1_000
}

/// Processes of `state_dir`'s engines that were given one of `gpus`: one per engine, and the share that it takes. As with a real one, it is not the
/// first process alone that holds it: while any process of its group lives, the memory is in use.
fn engines(gpus: &[v1::Gpu], state_dir: &str) -> BTreeMap<String, Vec<(u32, f64)>> {
    let mut holders: BTreeMap<(String, i32), (u32, f64)> = BTreeMap::new();
    for process in procfs::all().into_iter().filter(|process| !process.is_dead()) {
        let [given, of] = procfs::environment(process.pid, [SIMULATED_GPUS_VARIABLE, STATE_DIR_VARIABLE]);
        let (Some(given), Ok(pid)) = (given, u32::try_from(process.pid)) else { continue };
        if of.as_deref() != Some(state_dir) {
            continue;
        }
        for uuid in given.split(',').filter(|uuid| gpus.iter().any(|gpu| gpu.uuid == *uuid)) {
            let holder = holders.entry((uuid.to_owned(), process.pgrp));
            holder.or_insert_with(|| (pid, memory_share(&command_line(process.pid)).unwrap_or(SHARE)));
        }
    }
    let mut by_gpu: BTreeMap<String, Vec<(u32, f64)>> = BTreeMap::new();
    for ((uuid, _), holder) in holders {
        by_gpu.entry(uuid).or_default().push(holder);
    }
    by_gpu
}

fn command_line(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

/// Reads a script: a JSON array of what happens, each with `at_s` and `gpu`.
fn script(path: &Path, uuids: &[String]) -> Result<Vec<Line>, String> {
    let named = |why: String| format!("gpus.simulated_script {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| named(e.to_string()))?;
    let mut lines = lines(&text).map_err(|why| {
        named(format!(
            "{why}; accepted: [{{\"at_s\": 1.5, \"gpu\": \"0\", \"xid\": 79}}, ...] with xid, temperature_c, throttled, \
             ecc_uncorrected, remap_pending, lost, unreadable, processes"
        ))
    })?;
    for line in &mut lines {
        if let Some(uuid) = line.gpu.parse::<usize>().ok().and_then(|number| uuids.get(number)) {
            line.gpu.clone_from(uuid);
        }
        if !uuids.contains(&line.gpu) {
            return Err(named(format!("there is no GPU {:?}; there are {}", line.gpu, uuids.join(", "))));
        }
    }
    lines.sort_by(|a, b| b.at_s.total_cmp(&a.at_s));
    Ok(lines)
}

fn lines(text: &str) -> Result<Vec<Line>, String> {
    let entries: Vec<serde_json::Map<String, serde_json::Value>> =
        serde_json::from_str(text).map_err(|e| e.to_string())?;
    let line = |(number, mut entry): (usize, serde_json::Map<String, serde_json::Value>)| {
        let wrong = |why: &str| format!("entry {}: {why}", number + 1);
        let at_s =
            entry.remove("at_s").and_then(|at| at.as_f64()).ok_or_else(|| wrong("at_s is no number"))?;
        let gpu = entry.remove("gpu").and_then(|gpu| gpu.as_str().map(str::to_owned));
        let gpu = gpu.ok_or_else(|| wrong("gpu is no text"))?;
        let fault = serde_json::from_value(entry.into()).map_err(|e| wrong(&e.to_string()))?;
        Ok(Line { at_s, gpu, fault })
    };
    entries.into_iter().enumerate().map(line).collect()
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GpuConfig {
        GpuConfig { simulated_count: 4, simulated_link_group: 2, ..GpuConfig::default() }
    }

    fn cards(source: &mut Simulated) -> Vec<Card> {
        source.sample().unwrap().cards
    }

    #[test]
    fn two_nodes_have_no_uuid_in_common_and_a_topology() {
        let mut source = Simulated::new(&config(), "a", Path::new("/")).unwrap();
        let gpus: Vec<_> = cards(&mut source).into_iter().map(|card| card.gpu).collect();
        let told = gpus.iter().map(|g| (g.uuid.as_str(), g.numa_node, g.link_group.as_str()));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [
                ("SIM-a-0", Some(0), "sim-link-0"),
                ("SIM-a-1", Some(0), "sim-link-0"),
                ("SIM-a-2", Some(1), "sim-link-1"),
                ("SIM-a-3", Some(1), "sim-link-1"),
            ]
        );
        let plain = GpuConfig { simulated_link_group: 0, simulated_numa_nodes: 0, ..config() };
        let plain = cards(&mut Simulated::new(&plain, "b", Path::new("/")).unwrap());
        assert!(plain.iter().all(|c| c.gpu.link_group.is_empty() && c.gpu.numa_node.is_none()));
    }

    #[test]
    fn what_befalls_a_gpu_is_read_and_ends_when_it_is_healed() {
        let mut source = Simulated::new(&config(), "a", Path::new("/")).unwrap();
        let shared = source.shared();
        let fault = |text: &str| serde_json::from_str::<Fault>(text).unwrap();
        assert!(!shared.lock().befall("SIM-b-0", fault(r#"{"xid": 79}"#)));
        let happens =
            r#"{"xid": 79, "ecc_uncorrected": 2, "processes": {"4000000": 100}, "throttled": true}"#;
        assert!(shared.lock().befall("SIM-a-1", fault(happens)));
        let reading = source.sample().unwrap();
        assert_eq!((reading.xids[0].uuid.as_str(), reading.xids[0].xid), ("SIM-a-1", 79));
        let gpu = &reading.cards[1].gpu;
        assert_eq!(gpu.errors.as_ref().unwrap().uncorrected, Some(2));
        assert_eq!((gpu.memory_used_mib, gpu.processes[0].pid), (100, 4_000_000));
        assert_eq!(gpu.throttle_reasons, [HOT]);
        assert!(source.sample().unwrap().xids.is_empty(), "told once");
        shared.lock().befall("SIM-a-1", fault(r#"{"lost": true}"#));
        assert_eq!(cards(&mut source)[1].trouble, Some(Trouble::Lost));
        assert!(shared.lock().heal("SIM-a-1"));
        assert_eq!(
            cards(&mut source)[1],
            cards(&mut Simulated::new(&config(), "a", Path::new("/")).unwrap())[1]
        );
    }

    #[test]
    fn a_script_is_followed_and_a_wrong_one_is_refused_in_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let with = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            let simulated_script = file.path().to_str().unwrap().to_owned();
            Simulated::new(&GpuConfig { simulated_script, ..config() }, "a", Path::new("/"))
        };
        let script =
            r#"[{"at_s": 3600, "gpu": "0", "lost": true}, {"at_s": 0, "gpu": "SIM-a-2", "xid": 48}]"#;
        let reading = with(script).unwrap().sample().unwrap();
        assert_eq!(reading.xids[0].xid, 48);
        assert!(reading.cards.iter().all(|card| card.trouble.is_none()));
        for (wrong, says) in [
            (r#"[{"at_s": 0, "gpu": "9", "xid": 48}]"#, "there is no GPU \"9\"; there are SIM-a-0"),
            ("[{", "accepted: ["),
            (r#"[{"gpu": "0"}]"#, "entry 1: at_s is no number"),
            (r#"[{"at_s": 1, "gpu": "0", "boom": 1}]"#, "entry 1: unknown field `boom`"),
        ] {
            let error = with(wrong).unwrap_err();
            assert!(error.contains(says) && error.contains("gpus.simulated_script"), "{error}");
        }
    }

    #[test]
    fn a_share_is_of_whole_mebibytes() {
        assert_eq!((part(1_000, 0.9), part(81_920, 0.25), part(10, 7.0)), (900, 20_480, 10));
    }
}
