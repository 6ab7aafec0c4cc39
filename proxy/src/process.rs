//! The process: flags, settings, sockets, tasks, signals. `run` is its whole life.

use std::{
    collections::BTreeMap, ffi::OsString, net::TcpListener, path::PathBuf, process::ExitCode, sync::Arc,
    time::Duration,
};

use clap::{Parser, Subcommand};
use penstock_config::proxy::{DrainConfig, PUBLIC, ProxyConfig};
use penstock_proto::tls::ClientTls;
use sd_notify::NotifyState;
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    endpoints::{departure, reported},
    gateway::Gateway,
    health,
    listener::{self, Listener, reload},
    private::{self, PrivateState},
    signals::{Asked, Signals},
    telemetry::access_log,
    upgrade::{
        Ready, Socket,
        command::{self, UpgradeArgs},
        predecessor::{self, Predecessor},
        successor,
    },
    xds::{
        cache,
        client::{XdsClient, XdsSettings},
        state::XdsState,
        status::XdsStatus,
        wants::Wants,
    },
};

/// The last good state is written at most this often.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(200);

/// After the drain, how long background tasks may take to end.
const TASKS_END: Duration = Duration::from_secs(5);

/// How long the last lines of the access log may take.
const LOG_FLUSH: Duration = Duration::from_secs(2);
/// Between two looks for tables, by a process that is to take over.
const TABLES: Duration = Duration::from_millis(20);

/// The private port's name among the sockets that go to a successor.
const PRIVATE: &str = "private";

#[derive(Debug, Parser)]
#[command(
    name = "penstock-proxy",
    version,
    about = "Penstock's data plane: OpenAI traffic in, engines behind",
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
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

#[derive(Debug, Subcommand)]
enum Command {
    /// Let a running proxy give way to the binary that is installed now, without losing a request
    Upgrade(UpgradeArgs),
}

#[derive(Debug, Serialize)]
struct Announcement {
    pid: u32,
    /// Empty where `public.listen` is.
    public: String,
    private: String,
    /// The further listeners, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    listeners: BTreeMap<String, String>,
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
    if let Some(Command::Upgrade(options)) = &args.command {
        return match command::run(options) {
            Ok(text) => {
                println!("{text}");
                ExitCode::SUCCESS
            }
            Err(e) => fail(1, &e),
        };
    }
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

/// Take or bind the sockets, start, announce, wait for a signal, drain.
async fn run(config: ProxyConfig, announce: Option<PathBuf>) -> Result<(), String> {
    let signals = Signals::new()?;
    let hangup = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    raise_file_limit();
    let mut predecessor = Predecessor::find()?;
    let sockets = sockets(&config, &mut predecessor)?;
    let mut gateway = Gateway::new(config.clone())?;
    let access_log = access_log::open(&config.telemetry, &gateway.metrics)?;
    gateway.log_to(access_log.clone());
    let gateway = Arc::new(gateway);
    let open = listeners(&config, &sockets, &gateway)?;
    let announcement = announcement(&open, &sockets)?;
    if gateway.is_open() {
        let at = open.listeners.iter().map(|(listener, _)| listener.address.to_string()).collect::<Vec<_>>();
        tracing::warn!("auth.keys is empty: everybody who reaches {} may use every model", at.join(", "));
    }

    let stop = CancellationToken::new();
    // Ends later than the rest: after an upgrade the streams of this process still write their lines.
    let served = CancellationToken::new();
    let tasks = TaskTracker::new();
    let xds = Arc::new(XdsStatus::default());
    discover(&config, &gateway, &xds, &tasks, &stop)?;
    tasks.spawn(health::watch::run(Arc::clone(&gateway), stop.clone()));
    tasks.spawn(departure::run(Arc::clone(&gateway), served.clone()));
    tasks.spawn(access_log.clone().reopen_on_hangup(served.clone()));
    tasks.spawn(reload::run(open.watched, Arc::clone(&gateway), hangup, stop.clone()));
    if let Some(predecessor) = &predecessor {
        tracing::info!(pid = predecessor.pid, "taking over");
        // Until then it is the predecessor who answers, on the private port too: nobody is to see a gateway that is not ready.
        while predecessor.has_tables && predecessor.lives() && !gateway.table.load().loaded {
            tokio::time::sleep(TABLES).await;
        }
    }

    let private = duplicate(&sockets, PRIVATE)?;
    let state = PrivateState { gateway: Arc::clone(&gateway), xds };
    tasks.spawn(private::serve(private, state, stop.clone()));
    let data = listener::runtime(&config.public);
    let accepting = TaskTracker::new();
    for (listener, socket) in open.listeners {
        drop(accepting.spawn_on(listener::serve(Arc::clone(&gateway), listener, socket), data.get_handle()));
    }
    accepting.close();

    if let Some(path) = announce {
        penstock_config::announce(&path, &announcement)
            .map_err(|e| format!("--announce {}: {e}", path.display()))?;
    }
    match predecessor.take().map(Predecessor::tell_ready) {
        None => notify(&[NotifyState::Ready]),
        Some(Ok(())) => {}
        Some(Err(e)) => {
            tracing::warn!(error = %e, "the process before this one is gone; its sockets are ours")
        }
    }
    tracing::info!(public = announcement.public, private = announcement.private, "penstock-proxy is up");

    let cut = live(&config, &gateway, signals, sockets, &stop).await?;
    stop.cancel();
    served.cancel();
    tasks.close();
    if tokio::time::timeout(TASKS_END, tasks.wait()).await.is_err() {
        tracing::warn!(left = tasks.len(), "background tasks did not end in time");
    }
    drop(tokio::time::timeout(TASKS_END, accepting.wait()).await);
    data.shutdown_timeout(Duration::from_millis(100));
    let flushed = tokio::task::spawn_blocking(move || access_log.flush(LOG_FLUSH));
    if !flushed.await.unwrap_or(false) {
        tracing::warn!("the access log could not be written to its end in time");
    }
    tracing::info!(cut, "penstock-proxy has stopped");
    Ok(())
}

/// From the first request to the last: until a signal, or until a successor serves. Returns how many had to be cut.
async fn live(
    config: &ProxyConfig,
    gateway: &Arc<Gateway>,
    mut signals: Signals,
    sockets: Vec<Socket>,
    stop: &CancellationToken,
) -> Result<usize, String> {
    let lifecycle = &gateway.lifecycle;
    loop {
        match signals.next().await {
            Asked::Stop => break,
            Asked::Upgrade => {}
        }
        let Some(ready) = upgrade(config, gateway, &mut signals, &sockets).await else {
            if signals.stop_came { break } else { continue }
        };
        // The tables stay as they are, the private port is the successor's, and so is the file of the last good state.
        stop.cancel();
        drop(sockets);
        // Their manager follows the new process from here on; `NotifyAccess=main` lets the old one say so.
        notify(&[NotifyState::MainPid(ready.pid), NotifyState::Ready]);
        tracing::info!(
            pid = ready.pid,
            version = ready.version,
            inflight = lifecycle.inflight(),
            "a successor serves"
        );
        let finish = Duration::from_millis(config.upgrade.finish_ms);
        let deadline_ms = tokio::select! {
            () = lifecycle.hand_over(Duration::from_secs(config.public.keepalive_s + 1)) => 0,
            () = tokio::time::sleep(finish), if !finish.is_zero() => 0,
            () = signals.stop() => config.drain.deadline_ms,
        };
        let rest = DrainConfig { unready_ms: 0, deadline_ms };
        return Ok(lifecycle.drain(&rest, &signals.hurry()).await);
    }
    notify(&[NotifyState::Stopping]);
    // With these open the ports would stay so.
    drop(sockets);
    Ok(lifecycle.drain(&config.drain, &signals.hurry()).await)
}

/// Starts a successor. `None`: it failed, and this process goes on.
async fn upgrade(
    config: &ProxyConfig,
    gateway: &Arc<Gateway>,
    signals: &mut Signals,
    sockets: &[Socket],
) -> Option<Ready> {
    tracing::info!("SIGUSR2: starting a successor");
    let longest = Duration::from_millis(config.upgrade.ready_ms);
    let has_tables = gateway.table.load().loaded;
    let cancel = CancellationToken::new();
    let mut starting = std::pin::pin!(successor::start(sockets, has_tables, longest, &cancel));
    let outcome = tokio::select! {
        outcome = starting.as_mut() => outcome,
        () = signals.stop() => {
            cancel.cancel();
            starting.await
        }
    };
    let result = if outcome.is_ok() { "done" } else { "failed" };
    gateway.metrics.upgrades.with_label_values(&[result]).inc();
    outcome
        .inspect_err(|e| {
            gateway.lifecycle.upgrades.failed(e);
            tracing::error!("the successor failed, this process goes on: {e}");
        })
        .ok()
}

/// Every socket that the settings ask for: the predecessor's, or new ones.
fn sockets(config: &ProxyConfig, predecessor: &mut Option<Predecessor>) -> Result<Vec<Socket>, String> {
    let mut sockets = Vec::new();
    for (name, listener) in config.client_listeners() {
        let setting =
            if name == PUBLIC { "public.listen".into() } else { format!("listeners.{name}.listen") };
        let socket = predecessor::socket(predecessor, &name, &setting, &listener.listen)?;
        listener::widen(&socket.socket, config.public.backlog)?;
        sockets.push(socket);
    }
    let somaxconn = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    if let Some(limit) = listener::narrowed(config.public.backlog, &somaxconn) {
        tracing::warn!(
            "public.backlog is {}, but the kernel holds {limit} connections at most: raise net.core.somaxconn",
            config.public.backlog
        );
    }
    sockets.push(predecessor::socket(predecessor, PRIVATE, "private.listen", &config.private.listen)?);
    Ok(sockets)
}

/// A second handle on the socket of `name`. The first stays with us, to be handed on.
fn duplicate(sockets: &[Socket], name: &str) -> Result<TcpListener, String> {
    let socket = sockets.iter().find(|socket| socket.place.name == name);
    let socket = socket.ok_or_else(|| format!("there is no socket {name}"))?;
    socket.socket.try_clone().map_err(|e| e.to_string())
}

/// The listeners for clients and their certificates.
struct Listeners {
    listeners: Vec<(Arc<Listener>, TcpListener)>,
    watched: Vec<reload::Watched>,
}

fn listeners(config: &ProxyConfig, sockets: &[Socket], gateway: &Gateway) -> Result<Listeners, String> {
    let mut open = Listeners { listeners: Vec::new(), watched: Vec::new() };
    for (name, listener) in config.client_listeners() {
        let socket = duplicate(sockets, &name)?;
        let (listener, watched) =
            Listener::open(&name, listener, &socket).map_err(|e| format!("listeners.{name}: {e}"))?;
        if let Some(watched) = watched {
            let (name, certificates) = watched.in_use();
            gateway.metrics.listeners.certificate(name, certificates.expires_unix_s);
            let subject = &*certificates.subject;
            tracing::info!(listener = name, subject, expires_unix_s = certificates.expires_unix_s, "TLS");
            if watched.has_expired(reload::now_unix_s()) {
                tracing::warn!(listener = name, subject, "the certificate has expired");
            }
            open.watched.push(watched);
        }
        open.listeners.push((listener, socket));
    }
    Ok(open)
}

fn announcement(open: &Listeners, sockets: &[Socket]) -> Result<Announcement, String> {
    let address = |listener: &Arc<Listener>| listener.address.to_string();
    let (public, further): (Vec<_>, Vec<_>) =
        open.listeners.iter().map(|(listener, _)| listener).partition(|listener| &*listener.name == PUBLIC);
    let private = duplicate(sockets, PRIVATE)?.local_addr().map_err(|e| e.to_string())?;
    Ok(Announcement {
        pid: std::process::id(),
        public: public.first().map(|listener| address(listener)).unwrap_or_default(),
        private: private.to_string(),
        listeners: further.iter().map(|listener| (listener.name.to_string(), address(listener))).collect(),
    })
}

/// Tells systemd, where it has started us.
fn notify(news: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(news) {
        tracing::warn!(error = %e, "NOTIFY_SOCKET is set, and nobody can be told there");
    }
}

/// As many files and sockets as the system permits: each request takes two, and the usual limit of 1,024 is there for
/// programs that use select().
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(error = %e, "the limit of open files stays as it is");
    }
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
    tasks.spawn(sample(Arc::clone(gateway), stop.clone()));
    let settings = XdsSettings {
        endpoints: discovery.controlplanes.clone(),
        tls: ClientTls::of(&discovery.tls.ca_file, &discovery.tls.cert_file, &discovery.tls.key_file),
        node_id: node_id(&discovery.node_id),
        ..XdsSettings::default()
    };
    let wants = Wants::new(&settings).map_err(|e| e.to_string())?;
    tasks.spawn(wants.run(Arc::clone(gateway), stop.clone()));
    let client = XdsClient::new(settings).map_err(|e| e.to_string())?;
    let told = Arc::clone(gateway);
    let client = client.with_loads(Box::new(move |name, load| {
        let known = told.table.report(name, load, told.now_ms());
        told.metrics.load_reported(known);
    }));
    tasks.spawn(client.run(states, Arc::clone(status), stop.clone()));
    Ok(())
}

/// Keeps in mind what is under way, for reports that tell of a moment that has passed.
async fn sample(gateway: Arc<Gateway>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_millis(reported::SAMPLE_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        gateway.table.sample(gateway.now_ms());
    }
}

fn node_id(configured: &str) -> String {
    if !configured.is_empty() {
        return configured.to_owned();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    if host.is_empty() { "proxy".into() } else { format!("proxy-{host}") }
}
