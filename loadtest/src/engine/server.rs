//! The life of the engine's process: bind, load, serve, and every way to end.
//!
//! 1. The port is bound at once, so that a taken port is an error before any loading, but it does not listen: until
//!    loaded, a connection is refused, as with vLLM.
//! 2. The core is started; loading takes its time.
//! 3. It listens, announces itself, and serves until a signal, the death of the core, or an injected crash.
//! 4. SIGTERM with a timeout drains: the port stays open, /health stays 200, new generations fail. Without one, or when
//!    it is over, the port closes and what runs is aborted. Then the core is ended and reaped.

use std::{
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use super::{
    args::Options,
    core_process::{Core, CoreEvent, Lease},
    faults::FaultKind,
    http::{Conn, HeadError, Response},
    log, routes,
    run::{Next, flushed},
    scheduler::Scheduler,
    state::{Counted, Engine, Phase},
};

/// uvicorn's backlog.
const BACKLOG: u32 = 2048;
/// How long a dead core's API server goes on answering with errors; vLLM exits after 1.7 s.
const DEAD_GRACE: Duration = Duration::from_millis(1500);
/// How long aborted streams may take to be told.
const ABORT_GRACE: Duration = Duration::from_secs(2);
/// How far apart a signal to the whole group may reach its two processes.
const GROUP_SIGNAL: Duration = Duration::from_millis(100);
/// How often a drain looks whether it is done.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// Why an engine cannot serve.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    /// The address cannot be bound.
    #[error("cannot listen on {host}:{port} (--host, --port): {source}")]
    Bind {
        /// `--host`.
        host: String,
        /// `--port`.
        port: u16,
        /// Why.
        source: std::io::Error,
    },
    /// The second process cannot be started.
    #[error("cannot start the EngineCore process: {0}")]
    Core(std::io::Error),
    /// `--sim-announce` cannot be written.
    #[error("cannot write {path} (--sim-announce): {source}")]
    Announce {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Signals, metrics: the process is not usable.
    #[error("cannot start: {0}")]
    Start(String),
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self, ServeError> {
        let on = |kind| signal(kind).map_err(|e| ServeError::Start(e.to_string()));
        Ok(Self { terminate: on(SignalKind::terminate())?, interrupt: on(SignalKind::interrupt())? })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Why serving ended.
enum End {
    /// A signal, or the end of a drain.
    Stop,
    /// The core was signalled.
    CoreAsked,
    CoreDied,
    Crashed,
}

/// Serves until the process should end; the code it should end with. `subcommand` is how this program is told to be the
/// engine simulator, if it is more than that.
///
/// # Errors
/// [`ServeError`] if it cannot start.
pub(super) async fn serve(options: Options, subcommand: &[String]) -> Result<ExitCode, ServeError> {
    let socket = bind(&options).await?;
    let mut stop = Stop::new()?;
    let mut core = match options.sim.core {
        true => Some(Core::spawn(subcommand).map_err(ServeError::Core)?),
        false => None,
    };
    let outcome = match load(&options, core.as_mut(), &mut stop).await {
        None => listen_and_serve(options, socket, core.as_mut(), &mut stop).await,
        Some(code) => Ok(code),
    };
    // An injected crash leaves the core behind, as a real one would.
    let crashed = matches!(&outcome, Ok((_, true)));
    if let (Some(core), false) = (core, crashed) {
        core.kill().await;
    }
    outcome.map(|(code, _)| code)
}

async fn bind(options: &Options) -> Result<TcpSocket, ServeError> {
    let fail = |source| ServeError::Bind { host: options.host.clone(), port: options.port, source };
    let address = tokio::net::lookup_host((options.host.as_str(), options.port))
        .await
        .map_err(fail)?
        .next()
        .ok_or_else(|| fail(std::io::ErrorKind::AddrNotAvailable.into()))?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(fail)?;
    socket.set_reuseaddr(true).map_err(fail)?;
    socket.bind(address).map_err(fail)?;
    Ok(socket)
}

/// Loads the model. None when done; else the exit code, and whether it is a crash.
async fn load(options: &Options, core: Option<&mut Core>, stop: &mut Stop) -> Option<(ExitCode, bool)> {
    let fault = |kind| options.sim.faults.iter().find(|f| f.kind == kind);
    log(&format!("vLLM API server version {} (simulated), model {}", super::VLLM_VERSION, options.model));
    let loading = async {
        tokio::time::sleep(Duration::from_millis(options.sim.load_ms)).await;
        if fault(FaultKind::NeverReady).is_some() {
            std::future::pending::<()>().await;
        }
    };
    let core_died = async {
        match core {
            Some(core) => while core.next().await != CoreEvent::Died {},
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = loading => {}
        () = stop.requested() => return Some((ExitCode::SUCCESS, false)),
        () = core_died => {
            log("Engine core initialization failed. See root cause above.");
            return Some((ExitCode::FAILURE, false));
        }
    }
    fault(FaultKind::CrashOnLoad).map(|fault| {
        log("injected crash while loading");
        (ExitCode::from(fault.code), true)
    })
}

async fn listen_and_serve(
    options: Options,
    socket: TcpSocket,
    mut core: Option<&mut Core>,
    stop: &mut Stop,
) -> Result<(ExitCode, bool), ServeError> {
    let lease = core.as_ref().map_or_else(|| Arc::new(Lease::eternal()), |core| core.lease.clone());
    let scheduler = Arc::new(Scheduler::new(options.batch_settings(), options.sim.kv_blocks, lease));
    let core_pid = core.as_ref().map(|core| core.pid());
    let fail = |e: prometheus::Error| ServeError::Start(e.to_string());
    let engine = Arc::new(Engine::new(options, scheduler, core_pid).map_err(fail)?);
    let options = &engine.options;
    let listener = socket.listen(BACKLOG).map_err(|source| ServeError::Bind {
        host: options.host.clone(),
        port: options.port,
        source,
    })?;
    let address = listener.local_addr().map_err(|e| ServeError::Start(e.to_string()))?;
    if let Some(path) = &options.sim.announce {
        announce(path, address, core_pid)
            .map_err(|source| ServeError::Announce { path: path.display().to_string(), source })?;
    }
    log(&format!("Starting vLLM API server 0 on http://{address}"));
    log("Application startup complete.");

    let tasks = TaskTracker::new();
    let stepping = {
        let engine = engine.clone();
        async move { engine.scheduler.run(&engine.metrics, engine.closing.clone()).await }
    };
    tasks.spawn(stepping);
    let mut listener = Some(listener);
    let mut end = serving(&engine, &mut listener, core.as_deref_mut(), stop, &tasks, None).await;
    if matches!(end, End::CoreAsked) {
        // A signal to the whole group may reach the core first: ours is the same one, not a second.
        tokio::time::timeout(GROUP_SIGNAL, stop.requested()).await.unwrap_or_default();
        end = End::Stop;
    }
    if matches!(end, End::Stop) && options.shutdown_timeout_s > 0 {
        engine.enter(Phase::Draining);
        log(&format!("draining in-flight requests count={}", engine.in_flight.load(Ordering::Relaxed)));
        let deadline = Instant::now() + Duration::from_secs(options.shutdown_timeout_s);
        end = serving(&engine, &mut listener, core, stop, &tasks, Some(deadline)).await;
    }
    let code = match end {
        End::Crashed => return Ok((ExitCode::from(engine.exit_code()), true)),
        End::CoreDied => {
            log("EngineCore died unexpectedly. Shutting down client.");
            engine.enter(Phase::Dead);
            let until = Instant::now() + DEAD_GRACE;
            answer_until(&engine, listener.as_ref(), &tasks, until).await;
            ExitCode::FAILURE
        }
        End::Stop | End::CoreAsked => {
            engine.enter(Phase::Aborting);
            ExitCode::SUCCESS
        }
    };
    drop(listener);
    engine.closing.cancel();
    tasks.close();
    // Streams whose readers do not read cannot be told: they are dropped with the process.
    if tokio::time::timeout(ABORT_GRACE, tasks.wait()).await.is_err() {
        log(&format!("{} connections did not end in time", tasks.len()));
    }
    log("Application shutdown complete.");
    Ok((code, false))
}

/// Accepts and serves until something ends it; with a deadline (a drain) also when nothing is in flight any more.
async fn serving(
    engine: &Arc<Engine>,
    listener: &mut Option<TcpListener>,
    mut core: Option<&mut Core>,
    stop: &mut Stop,
    tasks: &TaskTracker,
    deadline: Option<Instant>,
) -> End {
    loop {
        let core_event = async {
            match &mut core {
                Some(core) => core.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = accept(engine, listener.as_ref(), tasks) => {}
            () = stop.requested() => return End::Stop,
            () = engine.crashed.cancelled() => return End::Crashed,
            event = core_event => match event {
                CoreEvent::Ticked => {}
                CoreEvent::CameBack => engine.scheduler.resume(),
                CoreEvent::AskedToStop if deadline.is_none() => return End::CoreAsked,
                CoreEvent::AskedToStop => {}
                CoreEvent::Died => return End::CoreDied,
            },
            () = tokio::time::sleep(DRAIN_POLL), if deadline.is_some() => {
                let drained = engine.in_flight.load(Ordering::Relaxed) == 0;
                if drained || deadline.is_some_and(|d| Instant::now() >= d) {
                    return End::Stop;
                }
            }
        }
    }
}

/// Goes on answering until a time.
async fn answer_until(
    engine: &Arc<Engine>,
    listener: Option<&TcpListener>,
    tasks: &TaskTracker,
    until: Instant,
) {
    let answering = async {
        loop {
            accept(engine, listener, tasks).await;
        }
    };
    // The time being over is the purpose.
    tokio::time::timeout_at(until, answering).await.unwrap_or_default()
}

/// Accepts one connection and serves it in a task of its own.
async fn accept(engine: &Arc<Engine>, listener: Option<&TcpListener>, tasks: &TaskTracker) {
    let Some(listener) = listener else { return std::future::pending().await };
    match listener.accept().await {
        Ok((stream, _)) => {
            if let Err(e) = stream.set_nodelay(true) {
                log(&format!("cannot set TCP_NODELAY: {e}"));
            }
            let engine = engine.clone();
            tasks.spawn(async move { converse(&engine, Conn::new(stream)).await });
        }
        Err(e) => {
            // Out of descriptors: give others time to close, rather than spin.
            log(&format!("accept failed: {e}"));
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }
}

/// Serves one connection to its end.
async fn converse(engine: &Engine, mut conn: Conn) {
    let _open = Counted::new(&engine.connections);
    loop {
        let head = tokio::select! {
            head = conn.read_head() => head,
            () = engine.closing.cancelled() => return,
        };
        let head = match head {
            Ok(head) => head,
            Err(HeadError::Closed) => return,
            Err(HeadError::Invalid) => {
                conn.respond(&Response::text(400, "Invalid HTTP request received."), false);
                flushed(&mut conn, false).await;
                return;
            }
        };
        if routes::handle(engine, &mut conn, head).await == Next::Close {
            return;
        }
    }
}

/// Writes the address file, whole or not at all.
fn announce(path: &Path, address: SocketAddr, core_pid: Option<u32>) -> std::io::Result<()> {
    let json = serde_json::json!({
        "address": address.to_string(), "pid": std::process::id(), "core_pid": core_pid,
    });
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    std::fs::write(&temporary, json.to_string())?;
    std::fs::rename(&temporary, path)
}
