//! The one task that reads the GPUs: on a period, and at once when something happened or somebody asks.
//!
//! A reading that takes too long leaves the last one standing and marks it as old; one that fails does the same. Neither
//! makes a GPU faulty: a driver that was updated under running engines answers nobody, and the engines go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use penstock_config::agent::GpuConfig;
use penstock_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Card, Desk, Driver, GpuReport, Gpus, Opened, Reading, XidSeen,
    policy::{Health, Judge, Remembered, Verdict},
    xid,
};
use crate::{
    engine::{adopt, context::Context, procfs},
    state::{StateDir, stem, write_atomically},
};

/// Readings are at least so far apart, however often one is asked for.
const GAP: Duration = Duration::from_millis(50);
/// How long the source may take to end at a shutdown.
const CLOSE: Duration = Duration::from_secs(2);

/// The file in the state folder with what was noted against GPUs since the machine booted.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    boot_id: String,
    remembered: Remembered,
}

/// A reading, and what each process on the GPUs is: None: gone; Some(None): not of an engine of ours.
type Read = (Reading, BTreeMap<u32, Option<Option<String>>>);

/// The task.
pub(crate) struct Sampler {
    cx: Arc<Context>,
    source: Box<dyn Gpus>,
    config: GpuConfig,
    judge: Judge,
    /// What is in the file.
    stored: Remembered,
    /// File stems of the replicas that processes on the GPUs belong to: kept after they died, while the driver lists them.
    owners: BTreeMap<u32, String>,
    report: Arc<watch::Sender<GpuReport>>,
    desk: Arc<Desk>,
}

impl Sampler {
    /// Publishes the first reading. None: there is nothing to read.
    pub(crate) fn new(
        cx: Arc<Context>,
        opened: Opened,
        config: &GpuConfig,
        report: Arc<watch::Sender<GpuReport>>,
    ) -> Option<Self> {
        let stored = load(&cx.state, &cx.boot_id);
        let judge = Judge::new(config.policy.clone(), stored.clone());
        let owners = BTreeMap::new();
        let (config, desk) = (config.clone(), opened.desk);
        let mut sampler = Self { cx, source: opened.source?, config, judge, stored, owners, report, desk };
        if let Some(first) = opened.first {
            let first = first.map(|reading| owned(reading, &sampler.cx.state));
            let began = sampler.report.borrow().began;
            sampler.take(began, first);
            let report = sampler.report.borrow();
            tracing::info!(source = report.kind.name(), gpus = report.gpus.len(), "GPUs found");
        }
        Some(sampler)
    }

    /// Until told to stop.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let period = Duration::from_millis(self.config.sample_ms);
        let wake = self.desk.wake.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = wake.notified() => tokio::time::sleep(GAP).await,
                () = tokio::time::sleep(period) => {}
            }
            self = match self.read(&stop).await {
                Some(sampler) => sampler,
                None => return,
            };
            self.store().await;
        }
        let mut source = self.source;
        let closing = tokio::task::spawn_blocking(move || source.close());
        if tokio::time::timeout(CLOSE, closing).await.is_err() {
            tracing::warn!("the GPU driver does not let go; the agent ends without it");
        }
    }

    /// One reading. None: it was cut short by `stop`, or broke.
    async fn read(self, stop: &CancellationToken) -> Option<Self> {
        let Self { cx, mut source, config, judge, stored, owners, report, desk } = self;
        let (tried, state) = (Instant::now(), cx.state.clone());
        let mut reading = tokio::task::spawn_blocking(move || {
            let reading = source.sample().map(|reading| owned(reading, &state));
            (source, reading)
        });
        let stale = Duration::from_millis(config.stale_ms);
        let done = tokio::select! {
            () = stop.cancelled() => return None,
            done = &mut reading => done,
            () = tokio::time::sleep(stale) => {
                let reason = format!("the driver has not answered for {} ms: the figures are old", config.stale_ms);
                mark_old(&report, &reason, tried);
                tokio::select! {
                    () = stop.cancelled() => return None,
                    done = &mut reading => done,
                }
            }
        };
        match done {
            Ok((source, reading)) => {
                let mut sampler = Self { cx, source, config, judge, stored, owners, report, desk };
                sampler.take(tried, reading);
                Some(sampler)
            }
            Err(broken) => {
                mark_old(&report, &format!("reading the GPUs broke ({broken}): restart the agent"), tried);
                None
            }
        }
    }

    /// Judges a reading and publishes it.
    fn take(&mut self, tried: Instant, reading: Result<Read, String>) {
        let (reading, processes) = match reading {
            Ok(read) => read,
            Err(reason) => return mark_old(&self.report, &reason, tried),
        };
        let Reading { cards, xids, driver } = reading;
        for seen in xids {
            self.note(seen, &cards);
        }
        let cleared = std::mem::take(&mut *self.desk.cleared.lock().unwrap_or_else(PoisonError::into_inner));
        for uuid in cleared {
            let had = self.judge.clear(&uuid);
            tracing::info!(gpu = uuid, had, "an operator has cleared what was noted against a GPU");
        }
        self.note_owners(&processes);
        let unix_ms = unix_ms();
        let gpus = cards.iter().map(|card| {
            let verdict = self.judge.judge(card, tried, unix_ms);
            self.judged(card, verdict)
        });
        let gpus: Vec<v1::Gpu> = gpus.collect();
        self.cx.registry.weigh(self.weights(&gpus));
        self.publish(gpus, driver, tried);
    }

    /// Engines on degraded GPUs, where the policy gives them less than a full share of requests.
    fn weights(&self, gpus: &[v1::Gpu]) -> BTreeMap<String, u32> {
        let percent = self.config.policy.degraded_weight_percent;
        if percent >= 100 {
            return BTreeMap::new();
        }
        let degraded = gpus.iter().filter(|gpu| gpu.health == i32::from(v1::GpuHealth::Degraded));
        let degraded: BTreeSet<&str> = degraded.map(|gpu| gpu.uuid.as_str()).collect();
        let assignments = self.cx.board.all().into_iter().map(|view| view.assignment);
        let slow = assignments.filter(|a| a.gpu_uuids.iter().any(|uuid| degraded.contains(uuid.as_str())));
        slow.map(|assignment| (assignment.replica_id, percent)).collect()
    }

    fn publish(&self, gpus: Vec<v1::Gpu>, driver: Driver, tried: Instant) {
        let before = self.report.borrow().clone();
        if !before.reason.is_empty() {
            tracing::info!(gpus = gpus.len(), "the GPUs can be read again");
        }
        for gpu in &gpus {
            let former = before.gpus.iter().find(|former| former.uuid == gpu.uuid);
            tell(former, gpu);
        }
        let report = GpuReport { gpus, reason: String::new(), driver, began: tried, tried, ..before };
        self.report.send_replace(report);
    }

    /// The card with what is made of it.
    fn judged(&self, card: &Card, verdict: Verdict) -> v1::Gpu {
        let mut gpu = card.gpu.clone();
        let remedy = verdict.remedy.name();
        let health = match verdict.health {
            Health::Healthy => v1::GpuHealth::Healthy,
            Health::Degraded => v1::GpuHealth::Degraded,
            Health::Faulty => v1::GpuHealth::Faulty,
        };
        if verdict.health == Health::Faulty && self.config.policy.on_fault == "pull" {
            let help = if remedy.is_empty() { String::new() } else { format!(" (needs: {remedy})") };
            gpu.fault = format!("{}{help}", verdict.reason);
        } else if gpu.mig_enabled == Some(true) {
            gpu.fault = "it is divided (MIG), and engines are not placed on parts of GPUs".into();
        }
        (gpu.health, gpu.health_reason, gpu.remedy) = (health.into(), verdict.reason, remedy.into());
        gpu.xids = self.judge.xids(&gpu.uuid);
        let replicas = self.cx.board.all();
        for process in &mut gpu.processes {
            let Some(owner) = self.owners.get(&process.pid) else { continue };
            let own = replicas.iter().map(|view| &view.assignment.replica_id).find(|id| stem(id) == *owner);
            process.replica_id = own.unwrap_or(owner).clone();
        }
        gpu
    }

    /// An XID. A lost GPU may not be able to say its name: if just one is in trouble, it is that.
    fn note(&mut self, seen: XidSeen, cards: &[Card]) {
        let XidSeen { mut uuid, xid: number, unix_ms } = seen;
        let mut troubled = cards.iter().filter(|card| card.trouble.is_some());
        if let (true, Some(card), None) = (uuid.is_empty(), troubled.next(), troubled.next()) {
            uuid.clone_from(&card.gpu.uuid);
        }
        let hardware = self.judge.is_of_hardware(number);
        self.cx.metrics.gpu_xid(hardware);
        let named = xid::named(number);
        match (hardware, uuid.is_empty()) {
            (_, true) => tracing::error!("{named} of a GPU that cannot be told"),
            (true, false) => tracing::error!(gpu = uuid, "{named}"),
            (false, false) => tracing::warn!(gpu = uuid, "{named}"),
        }
        if !uuid.is_empty() {
            self.judge.note_xid(&uuid, number, unix_ms);
        }
    }

    fn note_owners(&mut self, processes: &BTreeMap<u32, Option<Option<String>>>) {
        self.owners.retain(|pid, _| processes.contains_key(pid));
        for (pid, owner) in processes {
            match owner {
                // It died: what it was is still so.
                None => {}
                Some(Some(owner)) => drop(self.owners.insert(*pid, owner.clone())),
                Some(None) => drop(self.owners.remove(pid)),
            }
        }
    }

    /// Keeps for the next agent what was noted against GPUs.
    async fn store(&mut self) {
        if *self.judge.remembered() == self.stored {
            return;
        }
        self.stored = self.judge.remembered().clone();
        let stored = Stored { boot_id: self.cx.boot_id.clone(), remembered: self.stored.clone() };
        let path = file(&self.cx.state);
        let written = tokio::task::spawn_blocking(move || {
            write_atomically(&path, &serde_json::to_vec_pretty(&stored)?)
        });
        match written.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "cannot store what was noted against GPUs"),
            Err(error) => tracing::error!(%error, "storing what was noted against GPUs broke"),
        }
    }
}

fn file(state: &StateDir) -> PathBuf {
    state.root().join("gpus.json")
}

/// What an earlier agent noted, if the machine has not booted since.
fn load(state: &StateDir, boot_id: &str) -> Remembered {
    let path = file(state);
    let Ok(text) = std::fs::read(&path) else { return Remembered::default() };
    match serde_json::from_slice::<Stored>(&text) {
        Ok(stored) if stored.boot_id == boot_id => stored.remembered,
        Ok(_) => Remembered::default(),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "what was noted against GPUs is damaged");
            Remembered::default()
        }
    }
}

/// Looks up what the processes on the GPUs are.
fn owned(reading: Reading, state: &StateDir) -> Read {
    let pids = reading.cards.iter().flat_map(|card| card.gpu.processes.iter().map(|process| process.pid));
    let pids: BTreeSet<u32> = pids.collect();
    let owner = |pid: u32| {
        let raw = procfs::raw_pid(pid);
        procfs::read(raw).filter(|process| !process.is_dead()).map(|_| adopt::tie(raw, state))
    };
    (reading, pids.into_iter().map(|pid| (pid, owner(pid))).collect())
}

/// The last reading stands; why there is no newer one.
fn mark_old(report: &watch::Sender<GpuReport>, reason: &str, tried: Instant) {
    report.send_modify(|report| {
        if report.reason != reason {
            tracing::error!(reason, "the GPUs cannot be read");
        }
        for gpu in report.gpus.iter_mut().filter(|gpu| gpu.health != i32::from(v1::GpuHealth::Faulty)) {
            gpu.health = v1::GpuHealth::Degraded.into();
            gpu.health_reason = reason.into();
        }
        (report.reason, report.tried) = (reason.into(), tried);
    });
}

/// Logs what became of a GPU.
fn tell(before: Option<&v1::Gpu>, now: &v1::Gpu) {
    let same = |before: &v1::Gpu| before.health == now.health && before.health_reason == now.health_reason;
    if before.is_some_and(same) {
        return;
    }
    let (gpu, reason, remedy) = (&now.uuid, &now.health_reason, &now.remedy);
    match v1::GpuHealth::try_from(now.health) {
        Ok(v1::GpuHealth::Faulty) => {
            let pulled = !now.fault.is_empty();
            tracing::error!(gpu, reason, remedy, pulled, "a GPU is faulty");
        }
        Ok(v1::GpuHealth::Degraded) => tracing::warn!(gpu, reason, remedy, "a GPU is degraded"),
        _ if before.is_some() => tracing::info!(gpu, "a GPU is healthy again"),
        _ => {}
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
