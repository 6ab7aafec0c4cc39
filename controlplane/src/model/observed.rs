//! What agents say, kept in memory only: it is repeated every report interval.

use std::{collections::BTreeMap, time::Instant};

use penstock_proto::v1;

/// An engine's state as its agent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineState {
    /// Its process is being started.
    Starting,
    /// It loads its model.
    Loading,
    /// It serves.
    Ready,
    /// It finishes what it has.
    Draining,
    /// It has ended.
    Stopped,
    /// It cannot run; its agent may try again.
    Failed,
    /// It runs, serves nobody, and can be woken.
    Asleep,
}

impl EngineState {
    /// As shown by the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Asleep => "asleep",
        }
    }

    /// From the wire; a value that this build does not know counts as starting.
    pub fn from_wire(state: i32) -> Self {
        match v1::EngineState::try_from(state) {
            Ok(v1::EngineState::Loading) => Self::Loading,
            Ok(v1::EngineState::Ready) => Self::Ready,
            Ok(v1::EngineState::Draining) => Self::Draining,
            Ok(v1::EngineState::Stopped) => Self::Stopped,
            Ok(v1::EngineState::Failed) => Self::Failed,
            Ok(v1::EngineState::Asleep) => Self::Asleep,
            Ok(v1::EngineState::Starting | v1::EngineState::Unspecified) | Err(_) => Self::Starting,
        }
    }
}

/// One engine in a node's report.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineObserved {
    /// The generation it runs for.
    pub generation: u64,
    /// Its state.
    pub state: EngineState,
    /// host:port; may be empty.
    pub address: String,
    /// Its process; 0 if none.
    pub pid: u32,
    /// Starts after the first, for this generation.
    pub restarts: u32,
    /// Failures in a row; None: its agent does not tell.
    pub failures: Option<u32>,
    /// Its agent gave it up there: why.
    pub gave_up: Option<String>,
    /// Why it is in this state; may be empty.
    pub reason: String,
    /// How it ended the last time, unasked.
    pub last_exit: Option<v1::EngineExit>,
    /// It has said how it is loaded: the three figures mean something.
    pub says_load: bool,
    /// Requests it works on.
    pub running: u32,
    /// Requests that wait in it.
    pub waiting: u32,
    /// Share of its KV cache in use, 0.0 to 1.0.
    pub kv_used_ratio: f32,
    /// Mean time to the first token over the last half minute, in milliseconds, and of how many requests; 0 requests: not
    /// known.
    pub ttft: (u32, u32),
    /// What its program called its version; may be empty.
    pub engine_version: String,
    /// host:port at which it publishes KV events; empty: it does not.
    pub kv_events_address: String,
    /// What is to be known of how it was started.
    pub notes: Vec<String>,
    /// How it became ready last.
    pub started: Started,
}

/// How an engine became ready last, in its agent's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Started {
    /// "cold", "prefetched", "restored", "woken" or "adopted"; empty: it has not been ready.
    pub way: String,
    /// How long that took.
    pub ready_ms: u64,
    /// Why not in a warmer way that was asked for.
    pub note: String,
}

/// The mean of engines' means, each with the number of requests it is of; None: no request had a first token.
pub fn mean_ttft_ms(engines: &[(u32, u32)]) -> Option<u32> {
    let sum = engines.iter().map(|(ms, requests)| u128::from(*ms) * u128::from(*requests)).sum::<u128>();
    let requests = engines.iter().map(|(_, requests)| u128::from(*requests)).sum();
    sum.checked_div(requests).and_then(|ms| u32::try_from(ms).ok())
}

impl From<v1::EngineStatus> for EngineObserved {
    fn from(status: v1::EngineStatus) -> Self {
        let says_load = status.load.is_some();
        let load = status.load.unwrap_or_default();
        let ratio = load.kv_used_ratio;
        Self {
            generation: status.generation,
            state: EngineState::from_wire(status.state),
            address: status.address,
            pid: status.pid,
            restarts: status.restarts,
            failures: status.failures,
            gave_up: status.gave_up.then_some(status.gave_up_reason),
            reason: status.reason,
            last_exit: status.last_exit,
            says_load,
            running: load.running,
            waiting: load.waiting,
            ttft: (load.ttft_ms, load.ttft_requests),
            started: Started { way: status.started, ready_ms: status.ready_ms, note: status.start_note },
            engine_version: status.engine_version,
            kv_events_address: status.kv_events_address,
            notes: status.notes,
            kv_used_ratio: if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.0 },
        }
    }
}

/// A node, as of its last report.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeObserved {
    /// A session is open.
    pub connected: bool,
    /// When it last reported, if it has since this process started.
    pub reported_at: Option<Instant>,
    /// Its engines by replica id.
    pub engines: BTreeMap<String, EngineObserved>,
    /// Its GPUs with live figures.
    pub gpus: Vec<v1::Gpu>,
    /// vLLM processes on it that belong to no engine of its agent.
    pub foreign: Vec<v1::ForeignProcess>,
    /// The disk that it keeps models on, if it says so.
    pub disk: Option<v1::Disk>,
    /// How far the models are that it should have.
    pub prefetches: Vec<v1::PrefetchStatus>,
    /// Where they are read from; None: its agent does not say.
    pub gpu_source: Option<v1::GpuSource>,
    /// Its engines' programs, as far as it has told.
    pub programs: Vec<v1::EngineProgram>,
    /// Replicas that its present session was told to end, and when.
    pub withdrawn: BTreeMap<String, Instant>,
}

impl NodeObserved {
    /// Whether a replica that was withdrawn has ended for certain: a report that was made well after the withdrawal
    /// (`settle` covers one already under way) does not have it any more.
    pub fn is_gone(&self, replica_id: &str, settle: std::time::Duration) -> bool {
        let Some((withdrawn, reported)) = self.withdrawn.get(replica_id).zip(self.reported_at) else {
            return false;
        };
        let ended = self.engines.get(replica_id).is_none_or(|e| e.state == EngineState::Stopped);
        self.connected && ended && reported >= *withdrawn + settle
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_replica_is_gone_only_by_a_report_made_after_it_was_withdrawn() {
        let (start, settle) = (Instant::now(), Duration::from_millis(500));
        let at = |ms| start + Duration::from_millis(ms);
        let mut node = NodeObserved { connected: true, ..NodeObserved::default() };
        assert!(!node.is_gone("m-0", settle), "never withdrawn");
        node.withdrawn.insert("m-0".into(), at(1_000));
        node.reported_at = Some(at(1_200));
        assert!(!node.is_gone("m-0", settle), "that report may have been under way");
        node.reported_at = Some(at(1_500));
        assert!(node.is_gone("m-0", settle));
        let running = v1::EngineStatus { state: 4, ..v1::EngineStatus::default() };
        node.engines.insert("m-0".into(), running.into());
        assert!(!node.is_gone("m-0", settle), "it still drains");
    }

    #[test]
    fn nonsense_from_the_wire_is_tamed() {
        let load = v1::EngineLoad { kv_used_ratio: f32::NAN, ..v1::EngineLoad::default() };
        let status = v1::EngineStatus { state: 99, load: Some(load), ..v1::EngineStatus::default() };
        let engine = EngineObserved::from(status);
        assert_eq!((engine.state, engine.kv_used_ratio), (EngineState::Starting, 0.0));
    }

    #[test]
    fn an_engine_counts_by_its_requests_and_one_without_any_not_at_all() {
        assert_eq!(mean_ttft_ms(&[(100, 30), (500, 10), (9_999, 0)]), Some(200));
        assert_eq!(mean_ttft_ms(&[(0, 0), (0, 0)]), None);
        assert_eq!(mean_ttft_ms(&[]), None);
        assert_eq!(mean_ttft_ms(&[(u32::MAX, u32::MAX), (u32::MAX, u32::MAX)]), Some(u32::MAX));
    }
}
