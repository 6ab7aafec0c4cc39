//! What is known of every engine, for reports, `GET /engines` and metrics.
//!
//! Supervisors write, everybody reads. The lock is held for a copy and never across an await. State changes wake the
//! fleet session; load readings, several a second for each engine, do not: the session asks for those that changed.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use penstock_proto::v1;
use tokio::sync::watch;

use crate::{
    assignment::Assignment,
    engine::{State, causes::Cause, load::Load, records::Origin, ttft::Window},
    warm::Started,
};

/// How an engine's main process last ended unasked, or could not be started.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LastExit {
    /// Why.
    pub(crate) cause: Cause,
    /// The same for the operator, with what it wrote.
    pub(crate) detail: String,
    /// When.
    pub(crate) at: Instant,
}

impl LastExit {
    fn on_wire(&self, now: Instant) -> v1::EngineExit {
        v1::EngineExit {
            cause: self.cause.label().into(),
            detail: self.detail.clone(),
            advice: self.cause.advice().into(),
            retry_helps: self.cause.retry_helps(),
            age_ms: u64::try_from(now.saturating_duration_since(self.at).as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// One engine, as others see it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EngineView {
    /// What it runs for.
    pub(crate) assignment: Assignment,
    /// Where it is in its life.
    pub(crate) state: State,
    /// Why, for the operator; may be empty.
    pub(crate) reason: String,
    /// Main process; 0 while there is none.
    pub(crate) pid: i32,
    /// Port; 0 while it has none.
    pub(crate) port: u16,
    /// host:port for proxies; empty while it has none.
    pub(crate) address: String,
    /// Starts after the first, for this generation.
    pub(crate) restarts: u32,
    /// What the control plane says of its registration.
    pub(crate) registration: String,
    /// What it last said of its load, and when.
    pub(crate) load: Option<(Load, Instant)>,
    /// What it said of first tokens lately.
    pub(crate) first_tokens: Window,
    /// What was executed, without secrets.
    pub(crate) command: Vec<String>,
    /// How it ended the last time, for this generation.
    pub(crate) last_exit: Option<LastExit>,
    /// How it became ready last.
    pub(crate) started: Started,
    /// What its program is, and what is to be known of how it was started.
    pub(crate) origin: Origin,
    /// Failures in a row.
    pub(crate) failures: u32,
    /// Why it is given up on this node, if it is.
    pub(crate) gave_up: Option<String>,
    /// Figures that its /metrics lacks.
    pub(crate) missing: Vec<&'static str>,
}

impl EngineView {
    /// An engine that has done nothing yet.
    pub(crate) fn new(assignment: Assignment, reason: &str) -> Self {
        Self {
            assignment,
            state: State::Starting,
            reason: reason.into(),
            pid: 0,
            port: 0,
            address: String::new(),
            restarts: 0,
            registration: String::new(),
            load: None,
            first_tokens: Window::default(),
            command: vec![],
            last_exit: None,
            started: Started::default(),
            origin: Origin::default(),
            failures: 0,
            gave_up: None,
            missing: vec![],
        }
    }

    /// Why it is as it is: its reason, or what its /metrics lacks.
    pub(crate) fn told(&self) -> String {
        match (self.reason.is_empty(), self.missing.is_empty()) {
            (true, false) => format!("its /metrics lacks {}", self.missing.join(", ")),
            _ => self.reason.clone(),
        }
    }

    fn load(&self, now: Instant) -> Option<v1::EngineLoad> {
        let mean = self.first_tokens.mean();
        self.load.map(|(load, at)| v1::EngineLoad {
            running: load.running,
            waiting: load.waiting,
            kv_used_ratio: load.kv_used_ratio,
            age_ms: u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX),
            generation: self.assignment.generation,
            ttft_ms: mean.ttft_ms,
            ttft_requests: mean.requests,
        })
    }

    fn status(&self, now: Instant) -> v1::EngineStatus {
        let load = self.load(now);
        v1::EngineStatus {
            model: self.assignment.model.clone(),
            replica_id: self.assignment.replica_id.clone(),
            generation: self.assignment.generation,
            state: v1::EngineState::from(self.state).into(),
            address: self.address.clone(),
            pid: u32::try_from(self.pid).unwrap_or_default(),
            restarts: self.restarts,
            reason: self.told(),
            load,
            last_exit: self.last_exit.as_ref().map(|exit| exit.on_wire(now)),
            started: self.started.way.map(|way| way.name().to_owned()).unwrap_or_default(),
            ready_ms: u64::try_from(self.started.took.as_millis()).unwrap_or(u64::MAX),
            start_note: self.started.note.clone(),
            engine_version: self.origin.version.clone(),
            kv_events_address: self.origin.kv_events_address.clone(),
            notes: self.origin.notes.clone(),
            failures: Some(self.failures),
            gave_up: self.gave_up.is_some(),
            gave_up_reason: self.gave_up.clone().unwrap_or_default(),
        }
    }
}

/// What a session has been told of loads: generation and figures, by replica id.
pub(crate) type Told = BTreeMap<String, (u64, Load)>;

/// Every engine by replica id.
#[derive(Debug)]
pub(crate) struct Board {
    engines: Mutex<BTreeMap<String, EngineView>>,
    changes: watch::Sender<u64>,
}

impl Board {
    /// Without engines.
    pub(crate) fn new() -> Self {
        Self { engines: Mutex::new(BTreeMap::new()), changes: watch::Sender::new(0) }
    }

    /// Puts the engine up, in place of one with its replica id.
    pub(crate) fn put(&self, view: EngineView) {
        let id = view.assignment.replica_id.clone();
        let before = self.lock().insert(id, view.clone());
        if before.as_ref() != Some(&view) {
            self.changed();
        }
    }

    /// Changes the replica's entry, if it is there, and tells the readers.
    pub(crate) fn update(&self, replica_id: &str, change: impl FnOnce(&mut EngineView)) {
        let changed = match self.lock().get_mut(replica_id) {
            Some(view) => {
                let before = view.clone();
                change(view);
                *view != before
            }
            None => false,
        };
        if changed {
            self.changed();
        }
    }

    /// Notes a load reading; nobody is woken.
    pub(crate) fn note_load(&self, replica_id: &str, load: Load, now: Instant) {
        if let Some(view) = self.lock().get_mut(replica_id) {
            view.load = Some((load, now));
            if let Some(reading) = load.first_tokens {
                view.first_tokens.note(reading, now);
            }
        }
    }

    /// Takes the replica's entry down.
    pub(crate) fn remove(&self, replica_id: &str) {
        let removed = self.lock().remove(replica_id);
        if removed.is_some() {
            self.changed();
        }
    }

    /// Keeps only entries that `keep` accepts.
    pub(crate) fn retain(&self, mut keep: impl FnMut(&EngineView) -> bool) {
        let mut engines = self.lock();
        let before = engines.len();
        engines.retain(|_, view| keep(view));
        let changed = engines.len() != before;
        drop(engines);
        if changed {
            self.changed();
        }
    }

    /// All engines, by replica id.
    pub(crate) fn all(&self) -> Vec<EngineView> {
        self.lock().values().cloned().collect()
    }

    /// All engines, as they are reported.
    pub(crate) fn statuses(&self, now: Instant) -> Vec<v1::EngineStatus> {
        self.lock().values().map(|view| view.status(now)).collect()
    }

    /// The loads that differ from `told`, which then has them.
    pub(crate) fn load_changes(&self, told: &mut Told, now: Instant) -> Vec<v1::ReplicaLoad> {
        let engines = self.lock();
        told.retain(|id, _| engines.contains_key(id));
        let mut changes = Vec::new();
        for (id, view) in engines.iter() {
            let Some((load, _)) = view.load else { continue };
            let (generation, before) = (view.assignment.generation, told.get(id));
            if before.is_none_or(|before| before.0 != generation || load.differs(&before.1)) {
                told.insert(id.clone(), (generation, load));
                changes.push(v1::ReplicaLoad { replica_id: id.clone(), load: view.load(now) });
            }
        }
        changes
    }

    /// Wakes at every change but load readings.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, EngineView>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::{records::tests::record, ttft::FirstTokens};

    #[test]
    fn changes_wake_and_load_readings_do_not() {
        let board = Board::new();
        let mut changes = board.changes();
        board.put(EngineView::new(record("a", 0).assignment, ""));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let load = Load { running: 1, waiting: 2, kv_used_ratio: 0.5, first_tokens: None };
        let (at, before) = (Instant::now(), load);
        board.note_load("a", load, at);
        board.update("a", |view| view.reason.clear());
        board.update("b", |view| view.reason = "x".into());
        assert!(!changes.has_changed().unwrap());
        let mut told = Told::new();
        assert_eq!(board.load_changes(&mut told, at)[0].replica_id, "a");
        assert!(board.load_changes(&mut told, at).is_empty());
        board.note_load("a", Load { kv_used_ratio: 0.501, ..load }, at);
        assert!(board.load_changes(&mut told, at).is_empty(), "hardly another");
        board.note_load("a", Load { running: 2, ..load }, at);
        let load = board.load_changes(&mut told, at).remove(0).load.unwrap();
        assert_eq!((load.running, load.waiting), (2, 2));
        board.note_load("a", before, at);
        board.update("a", |view| view.state = State::Loading);
        assert!(changes.has_changed().unwrap());
        let status = board.statuses(at + Duration::from_millis(70)).remove(0);
        assert_eq!(status.load.unwrap().age_ms, 70);
        assert_eq!(status.state, i32::from(v1::EngineState::Loading));
    }

    #[test]
    fn first_tokens_are_told_as_the_mean_of_late() {
        let board = Board::new();
        board.put(EngineView::new(record("a", 0).assignment, ""));
        let start = Instant::now();
        for (after_s, requests, seconds) in [(0, 10.0, 5.0), (2, 14.0, 7.0)] {
            let first_tokens = Some(FirstTokens { requests, seconds });
            let load = Load { running: 1, waiting: 0, kv_used_ratio: 0.0, first_tokens };
            board.note_load("a", load, start + Duration::from_secs(after_s));
        }
        let load = board.statuses(start + Duration::from_secs(2)).remove(0).load.unwrap();
        assert_eq!((load.ttft_ms, load.ttft_requests), (500, 4));
    }
}
