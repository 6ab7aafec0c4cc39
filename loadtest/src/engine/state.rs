//! The state all requests of an engine share.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
};

use tokio_util::sync::CancellationToken;

use super::{
    args::Options,
    error::ApiError,
    faults::{Fault, FaultKind, FaultTable},
    metrics::Metrics,
    record::Records,
    scheduler::Scheduler,
};

/// Where the engine is in its life, once it serves. Only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Phase {
    /// Everything works.
    Serving,
    /// SIGTERM with a timeout: what runs may end, new requests fail.
    Draining,
    /// SIGTERM without one, or the timeout is over: what runs is aborted.
    Aborting,
    /// The core is gone: what runs fails, and the process is about to exit.
    Dead,
}

/// One engine.
#[derive(Debug)]
pub(super) struct Engine {
    /// Its command line.
    pub(super) options: Options,
    /// Its batch.
    pub(super) scheduler: Arc<Scheduler>,
    /// Its series.
    pub(super) metrics: Metrics,
    /// Its memory of requests.
    pub(super) records: Records,
    /// `system_fingerprint`.
    pub(super) fingerprint: String,
    /// Process id of the core, if there is one.
    pub(super) core_pid: Option<u32>,
    /// Set by /sleep and /pause.
    pub(super) sleeping: AtomicBool,
    /// Generation requests being worked on.
    pub(super) in_flight: AtomicU64,
    /// What /load reports.
    pub(super) tracked: AtomicU64,
    /// Requests since the start.
    pub(super) requests: AtomicU64,
    /// Open connections.
    pub(super) connections: AtomicU64,
    /// Disconnects seen while a request was worked on.
    pub(super) disconnects: AtomicU64,
    /// Idle connections close when this is cancelled.
    pub(super) closing: CancellationToken,
    /// Cancelled when the process is to end at once, with `exit_code`.
    pub(super) crashed: CancellationToken,
    exit_code: AtomicU8,
    phase: AtomicU8,
    faults: Mutex<FaultTable>,
}

impl Engine {
    /// An engine that serves.
    ///
    /// # Errors
    /// Only if two metrics had one name.
    pub(super) fn new(
        options: Options,
        scheduler: Arc<Scheduler>,
        core_pid: Option<u32>,
    ) -> prometheus::Result<Self> {
        Ok(Self {
            metrics: Metrics::new(&options)?,
            records: Records::new(options.sim.records, options.sim.sha256),
            fingerprint: super::chat::fingerprint(&options.model),
            faults: Mutex::new(FaultTable::new(options.sim.faults.clone())),
            scheduler,
            core_pid,
            options,
            sleeping: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            tracked: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            disconnects: AtomicU64::new(0),
            closing: CancellationToken::new(),
            crashed: CancellationToken::new(),
            exit_code: AtomicU8::new(1),
            phase: AtomicU8::new(Phase::Serving as u8),
        })
    }

    /// Where it is in its life.
    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Serving,
            1 => Phase::Draining,
            2 => Phase::Aborting,
            _ => Phase::Dead,
        }
    }

    /// Moves on, and lets every stream see it.
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::Relaxed);
        self.scheduler.wake_all();
    }

    /// The refusal of a new generation in this phase.
    pub(super) fn refusal(&self) -> Option<ApiError> {
        match self.phase() {
            Phase::Serving => None,
            Phase::Draining | Phase::Aborting => Some(ApiError::shutting_down()),
            Phase::Dead => Some(ApiError::engine_dead()),
        }
    }

    /// The fault that hits a request for `path` which arrives now.
    pub(super) fn take_fault(&self, path: &str) -> Option<Fault> {
        self.with_faults(|faults| faults.take(path))
    }

    /// True if the engine itself has this fault.
    pub(super) fn has_fault(&self, kind: FaultKind) -> bool {
        self.with_faults(|faults| faults.has(kind))
    }

    /// Reads or changes the faults.
    pub(super) fn with_faults<T>(&self, change: impl FnOnce(&mut FaultTable) -> T) -> T {
        change(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the process: by SIGKILL for 137, so that nothing is cleaned up, else with this exit code.
    pub(super) fn crash(&self, code: u8) {
        super::log(&format!("injected crash with code {code}"));
        if code == 137 {
            let killed = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            super::log(&format!("still here after SIGKILL: {killed:?}"));
        }
        self.exit_code.store(code, Ordering::Relaxed);
        self.crashed.cancel();
    }

    /// The code chosen by [`Engine::crash`].
    pub(super) fn exit_code(&self) -> u8 {
        self.exit_code.load(Ordering::Relaxed)
    }
}

/// Counts one thing while it lives.
#[derive(Debug)]
pub(super) struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    /// Adds one now, takes it back when dropped.
    pub(super) fn new(counter: &'a AtomicU64) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
