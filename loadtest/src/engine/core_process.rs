//! The second process of an engine, which stands for vLLM's EngineCore, and the lease by which tokens depend on it.
//!
//! The API server starts its own program again as `engine-core`, in the same process group, joined by a socket pair
//! (the child's standard input). While sequences run, the core sends a tick every [`TICK`]; a tick lets the API server
//! give out tokens for [`LEASE`]. So a stopped core stops the tokens and nothing else, at no cost per token; an idle
//! engine's core sleeps without ticks. One byte each way: [`BUSY`], [`IDLE`] down, [`TICKED`], [`ASKED_TO_STOP`] up.
//!
//! As vLLM's, the core outlives an API server that was killed: it waits for a signal. A SIGTERM while the API server
//! lives is passed up to it, so that a signal to the whole group drains instead of cutting.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    process::{ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

/// Time between ticks while sequences run.
const TICK: Duration = Duration::from_millis(10);
/// How long one tick lasts. Long beside TICK: on a busy machine a process may wait tens of ms for its turn.
const LEASE: Duration = Duration::from_millis(100);

const BUSY: u8 = b'b';
const IDLE: u8 = b'i';
const TICKED: u8 = b't';
const ASKED_TO_STOP: u8 = b's';

/// The right to give out tokens, renewed by the core.
#[derive(Debug)]
pub(super) struct Lease {
    started: Instant,
    /// Until when it is valid, µs after `started`; `u64::MAX` without a core.
    until_us: AtomicU64,
    busy: AtomicBool,
    socket: Option<StdUnixStream>,
}

impl Lease {
    /// A lease that never ends: there is no core.
    pub(super) fn eternal() -> Self {
        Self {
            started: Instant::now(),
            until_us: AtomicU64::new(u64::MAX),
            busy: AtomicBool::new(false),
            socket: None,
        }
    }

    fn new(socket: StdUnixStream) -> Self {
        Self {
            started: Instant::now(),
            until_us: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            socket: Some(socket),
        }
    }

    /// True if tokens may be given out now.
    pub(super) fn is_valid(&self) -> bool {
        let until_us = self.until_us.load(Ordering::Relaxed);
        until_us == u64::MAX || self.now_us() < until_us
    }

    /// True if the core is to work and has not shown for too long that it does.
    pub(super) fn is_lapsed(&self) -> bool {
        self.busy.load(Ordering::Relaxed) && !self.is_valid()
    }

    /// Tells the core whether sequences run.
    pub(super) fn set_busy(&self, busy: bool) {
        let Some(socket) = &self.socket else { return };
        if self.busy.load(Ordering::Relaxed) == busy {
            return;
        }
        // A core that was stopped for very long fills the socket: say it again at the next change or token.
        if (&*socket).write(&[if busy { BUSY } else { IDLE }]).is_ok() {
            self.busy.store(busy, Ordering::Relaxed);
        }
    }

    /// Renews it; true if it had lapsed.
    fn renew(&self) -> bool {
        let now_us = self.now_us();
        let lease_us = u64::try_from(LEASE.as_micros()).unwrap_or(u64::MAX);
        self.until_us.swap(now_us + lease_us, Ordering::Relaxed) <= now_us
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }
}

/// What the core did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CoreEvent {
    /// It lives, and the lease was valid all the time.
    Ticked,
    /// It lives, and the lease had lapsed before.
    CameBack,
    /// It was asked to stop.
    AskedToStop,
    /// It is gone.
    Died,
}

/// The running core.
#[derive(Debug)]
pub(super) struct Core {
    child: Child,
    socket: UnixStream,
    /// What it grants.
    pub(super) lease: Arc<Lease>,
    pid: u32,
}

impl Core {
    /// Starts it: this very program, with `subcommand` before `engine-core`.
    ///
    /// # Errors
    /// Whatever keeps a process from being started.
    pub(super) fn spawn(subcommand: &[String]) -> io::Result<Self> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let child = Command::new(std::env::current_exe()?)
            .args(subcommand)
            .arg("engine-core")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        let pid = child.id().unwrap_or(0);
        let lease = Arc::new(Lease::new(ours.try_clone()?));
        Ok(Self { child, socket: UnixStream::from_std(ours)?, lease, pid })
    }

    /// Its process id.
    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the next thing it does.
    pub(super) async fn next(&mut self) -> CoreEvent {
        let mut bytes = [0; 64];
        let read = tokio::select! {
            read = self.socket.read(&mut bytes) => read.unwrap_or(0),
            _ = self.child.wait() => 0,
        };
        match bytes.get(..read) {
            None | Some([]) => CoreEvent::Died,
            Some(said) if said.contains(&ASKED_TO_STOP) => CoreEvent::AskedToStop,
            Some(_) if self.lease.renew() => CoreEvent::CameBack,
            Some(_) => CoreEvent::Ticked,
        }
    }

    /// Ends it and reaps it.
    pub(super) async fn kill(mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        if let Err(e) = self.child.kill().await {
            super::log(&format!("cannot end EngineCore {}: {e}", self.pid));
        }
    }
}

/// The core's side: `engine-core`.
pub(super) fn main() -> ExitCode {
    // For `ps`: fifteen characters are what Linux keeps.
    if let Err(e) = std::fs::write("/proc/self/comm", "sim::EngineCore") {
        super::log(&format!("cannot name the EngineCore process: {e}"));
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map(StdUnixStream::from);
    let served = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        let socket = socket?;
        socket.set_nonblocking(true)?;
        runtime.block_on(async { serve(UnixStream::from_std(socket)?).await })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            super::log(&format!("engine-core is started by `serve`, over a socket as standard input: {e}"));
            ExitCode::from(2)
        }
    }
}

async fn serve(mut socket: UnixStream) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut busy = false;
    let mut said = [0; 64];
    loop {
        let word = tokio::select! {
            read = socket.read(&mut said) => match said.get(..read.unwrap_or(0)) {
                None | Some([]) => break,
                Some(said) => {
                    busy = said.last() == Some(&BUSY);
                    ticks.reset();
                    if !busy { continue }
                    TICKED
                }
            },
            _ = ticks.tick(), if busy => TICKED,
            _ = terminate.recv() => ASKED_TO_STOP,
            // Ctrl-C reaches the whole group; the API server decides.
            _ = interrupt.recv() => continue,
        };
        match socket.try_write(&[word]) {
            // A stopped API server lets the socket fill up: it has ticks enough.
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => break,
            _ => {}
        }
    }
    // The API server is gone without ending us: vLLM's EngineCore stays too.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
