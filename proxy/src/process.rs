//! The process: flags, settings, sockets, tasks, signals. `run` is its whole life.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use penstock_config::proxy::ProxyConfig;
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    gateway::Gateway,
    listener,
    private::{self, PrivateState},
    telemetry::access_log::{self, AccessLog},
    xds::{
        cache,
        client::{XdsClient, XdsSettings},
        state::XdsState,
        status::XdsStatus,
    },
};

/// The last good state is written at most this often.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(200);

/// After the drain, how long background tasks may take to end.
const TASKS_END: Duration = Duration::from_secs(5);

/// How long the last lines of the access log may take.
const LOG_FLUSH: Duration = Duration::from_secs(2);

#[derive(Debug, Parser)]
#[command(
    name = "penstock-proxy",
    version,
    about = "Penstock's data plane: OpenAI traffic in, engines behind"
)]
struct Args {
    /// Settings file; see config/proxy.toml for every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Write the bound addresses to FILE as JSON once the process listens.
    #[arg(long, value_name = "FILE")]
    announce: Option<PathBuf>,
    /// Overrides log.level.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Overrides public.listen.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Overrides private.listen.
    #[arg(long, value_name = "HOST:PORT")]
    private_listen: Option<String>,
    /// Overrides discovery.controlplanes; may be given more than once.
    #[arg(long, value_name = "URL")]
    controlplane: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Announcement {
    pid: u32,
    public: String,
    private: String,
}

/// The process from its arguments to its exit code: 0 after a drain, 1 when it cannot run, 2 for wrong arguments or settings.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(e) => {
            let code = if e.use_stderr() { 2 } else { 0 };
            // Nothing to be done if even the message cannot be printed.
            drop(e.print());
            return ExitCode::from(code);
        }
    };
    let announce = args.announce.clone();
    let config = match settings(args) {
        Ok(config) => config,
        Err(e) => return fail(2, &e),
    };
    if let Err(e) = penstock_config::logging::init(&config.log) {
        return fail(2, &e);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(1, &format!("cannot start: {e}")),
    };
    match runtime.block_on(run(config, announce)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(1, &e),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("penstock-proxy: {message}");
    ExitCode::from(code)
}

fn settings(args: Args) -> Result<ProxyConfig, String> {
    let mut config: ProxyConfig =
        penstock_config::load("proxy", args.config.as_deref(), penstock_config::environment())
            .map_err(|e| e.to_string())?;
    if let Some(level) = args.log_level {
        config.log.level = level;
    }
    if let Some(listen) = args.listen {
        config.public.listen = listen;
    }
    if let Some(listen) = args.private_listen {
        config.private.listen = listen;
    }
    if !args.controlplane.is_empty() {
        config.discovery.controlplanes = args.controlplane;
    }
    config.validate()?;
    Ok(config)
}

/// Bind, start, announce, wait for a signal, drain.
async fn run(config: ProxyConfig, announce: Option<PathBuf>) -> Result<(), String> {
    let public = listener::bind("public.listen", &config.public.listen)?;
    let private = listener::bind("private.listen", &config.private.listen)?;
    let announcement = Announcement {
        pid: std::process::id(),
        public: local_address(&public)?,
        private: local_address(&private)?,
    };
    let mut gateway = Gateway::new(config.clone())?;
    let access_log = access_log::open(&config.telemetry, &gateway.metrics)?;
    gateway.log_to(access_log.clone());
    let gateway = Arc::new(gateway);
    if gateway.is_open() {
        tracing::warn!(
            "auth.keys is empty: everybody who reaches {} may use every model",
            announcement.public
        );
    }

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let xds = Arc::new(XdsStatus::default());
    discover(&config, &gateway, &xds, &tasks, &stop)?;

    tasks.spawn(reopen_on_hangup(access_log.clone(), stop.clone())?);

    let state = PrivateState { gateway: Arc::clone(&gateway), xds };
    private.set_nonblocking(true).map_err(|e| e.to_string())?;
    let private = tokio::net::TcpListener::from_std(private).map_err(|e| e.to_string())?;
    let ended = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        let served = axum::serve(private, private::router(state)).with_graceful_shutdown(ended).await;
        if let Err(e) = served {
            tracing::error!(error = %e, "the private port is lost");
        }
    });

    let data = listener::runtime(&config.public);
    let address = public.local_addr().map_err(|e| e.to_string())?;
    public.set_nonblocking(true).map_err(|e| e.to_string())?;
    let accepting = data.get_handle().spawn(listener::serve(
        Arc::clone(&gateway),
        public,
        address,
        gateway.lifecycle.watch(),
    ));

    if let Some(path) = announce {
        penstock_config::announce(&path, &announcement)
            .map_err(|e| format!("--announce {}: {e}", path.display()))?;
    }
    tracing::info!(public = announcement.public, private = announcement.private, "penstock-proxy is up");

    let hurry = wait_for_signal().await?;
    let cut = gateway.lifecycle.drain(&config.drain, &hurry).await;
    stop.cancel();
    tasks.close();
    if tokio::time::timeout(TASKS_END, tasks.wait()).await.is_err() {
        tracing::warn!(left = tasks.len(), "background tasks did not end in time");
    }
    drop(tokio::time::timeout(TASKS_END, accepting).await);
    data.shutdown_timeout(Duration::from_millis(100));
    let flushed = tokio::task::spawn_blocking(move || access_log.flush(LOG_FLUSH));
    if !flushed.await.unwrap_or(false) {
        tracing::warn!("the access log could not be written to its end in time");
    }
    tracing::info!(cut, "penstock-proxy has stopped");
    Ok(())
}

/// Starts from the last good state on disk, then follows the control plane.
fn discover(
    config: &ProxyConfig,
    gateway: &Arc<Gateway>,
    status: &Arc<XdsStatus>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<(), String> {
    let discovery = &config.discovery;
    let snapshot_file =
        (!discovery.snapshot_file.is_empty()).then(|| PathBuf::from(&discovery.snapshot_file));
    let kept = snapshot_file.as_deref().map_or_else(XdsState::default, |path| cache::load(path).state);
    if kept.is_complete() {
        gateway.table.apply(&kept);
        tracing::info!(version = %kept.version(), "serving from the last good snapshot on disk");
    }
    let (states, mut changes) = watch::channel(Arc::new(kept));

    if let Some(path) = snapshot_file {
        let written = cache::write_behind(
            path,
            states.subscribe(),
            SNAPSHOT_INTERVAL,
            Arc::clone(status),
            stop.clone(),
        );
        tasks.spawn(written);
    }
    let applied = Arc::clone(gateway);
    tasks.spawn(async move {
        // Ends with the sender, which is the client's task.
        while changes.changed().await.is_ok() {
            let state = Arc::clone(&changes.borrow_and_update());
            let table = Arc::clone(&applied);
            // A host name in an address may block on its lookup.
            if tokio::task::spawn_blocking(move || table.table.apply(&state)).await.is_err() {
                tracing::error!("the tables could not be applied; the former ones stay in use");
            }
        }
    });
    if discovery.controlplanes.is_empty() {
        tracing::warn!("discovery.controlplanes is empty: serving from discovery.snapshot_file alone");
        return Ok(());
    }
    let settings = XdsSettings {
        endpoints: discovery.controlplanes.clone(),
        node_id: node_id(&discovery.node_id),
        ..XdsSettings::default()
    };
    let client = XdsClient::new(settings).map_err(|e| e.to_string())?;
    tasks.spawn(client.run(states, Arc::clone(status), stop.clone()));
    Ok(())
}

/// SIGHUP has the access log's file opened again, until `stop`.
fn reopen_on_hangup(
    log: AccessLog,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send, String> {
    let mut hangups = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    Ok(async move {
        while let Some(Some(())) = stop.run_until_cancelled(hangups.recv()).await {
            log.reopen();
            tracing::info!("SIGHUP: the access log is opened again");
        }
    })
}

fn node_id(configured: &str) -> String {
    if !configured.is_empty() {
        return configured.to_owned();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    if host.is_empty() { "proxy".into() } else { format!("proxy-{host}") }
}

fn local_address(socket: &std::net::TcpListener) -> Result<String, String> {
    socket.local_addr().map(|a| a.to_string()).map_err(|e| e.to_string())
}

/// Returns at the first SIGTERM or SIGINT, with a token that a second one cancels.
async fn wait_for_signal() -> Result<CancellationToken, String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    next().await;
    let hurry = CancellationToken::new();
    let second = hurry.clone();
    // Lives as long as the drain: the process ends after it.
    tokio::spawn(async move {
        next().await;
        second.cancel();
    });
    Ok(hurry)
}
