//! The process: flags and settings in, everything started in order, and a shutdown that names what it waits for.
//!
//! Start: state folder and its lock → private listener → GPUs → what an earlier agent left (remains ended, engines taken
//! over) → reconciler, fleet session, private server → announce.
//! Stop: engines (drained and ended, or kept) → fleet session, with a last report → private server. A second signal cuts
//! drains short.

use std::{
    ffi::OsString,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use clap::Parser;
use penstock_config::{
    agent::{AgentConfig, EnginesConfig},
    announce,
};
use penstock_proto::tls::ClientTls;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    assignment::{Assignment, Desired},
    board::Board,
    directory::Directory,
    engine::{
        adopt::{self, Survey},
        cgroup::Cgroups,
        context::Context,
        exec,
        logs::Logs,
        ports::Ports,
        probe::Probe,
        procfs,
        programs::Programs,
        records::{Record, Records},
        verdict::Memories,
    },
    fleet::{Fleet, Identity, SessionStatus},
    foreign::Foreign,
    gpu,
    intake::Intake,
    janitor,
    metrics::Metrics,
    private::{self, Shown},
    reconcile::{OnShutdown, Reconciler},
    registrations::Registry,
    state::{StateDir, StateError, stem},
    warm::prefetch::{self, Prefetcher},
};

/// How long a starting agent waits for its predecessor, which may just be ending its last engine.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// Added to the sum of an engine's stopping times: the time that the agent itself may take.
const STOP_MARGIN: Duration = Duration::from_secs(10);
/// How long requests to the private server may take once it closes.
const HTTP_CLOSE: Duration = Duration::from_secs(1);

/// Why the agent cannot run, or did not stop cleanly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state folder.
    #[error("{0}")]
    State(String),
    /// The private listener.
    #[error("cannot listen on {address} (setting private.listen): {source}")]
    Listen {
        /// As the settings have it.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Something that the process needs of the system.
    #[error("{0}")]
    System(String),
    /// Engines that could not be ended in time; their records are kept for the next agent.
    #[error("engines that could not be ended in time: {0}")]
    Left(String),
}

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::State(error.to_string())
    }
}

/// Runs one GPU node's engines for the control plane.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// Settings file; every key is explained in config/agent.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Write the bound addresses to this file, as JSON, once the agent is up
    #[arg(long, value_name = "FILE")]
    announce: Option<PathBuf>,
    /// Log filter, as "debug" or "info,penstock_agent=debug"; wins over the settings
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// This node's name in the fleet; wins over the settings
    #[arg(long, value_name = "ID")]
    node_id: Option<String>,
    /// This node's fault domain; wins over the settings
    #[arg(long, value_name = "ZONE")]
    zone: Option<String>,
    /// etcd's members, through which the control plane is found: http://HOST:PORT, with commas between; wins over the settings
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    etcd_endpoints: Vec<String>,
}

/// The agent process: parses `args` (the first is the program's name), runs until SIGTERM or SIGINT.
///
/// Exit codes: 0 clean stop, 1 runtime failure, 2 bad usage or settings.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let flags = match Flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(error) => {
            error.print().ok();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let announce = flags.announce.clone();
    let config = match settings(flags) {
        Ok(config) => config,
        Err(message) => return fail(&message, 2),
    };
    if let Err(message) = penstock_config::logging::init(&config.log) {
        return fail(&message, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start the runtime: {error}"), 1),
    };
    let result = runtime.block_on(run_until_signalled(config, announce));
    // A driver call that hangs must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string(), 1),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("penstock agent: {message}");
    ExitCode::from(code)
}

fn settings(flags: Flags) -> Result<AgentConfig, String> {
    let mut config: AgentConfig =
        penstock_config::load("agent", flags.config.as_deref(), penstock_config::environment())
            .map_err(|e| e.to_string())?;
    if let Some(level) = flags.log_level {
        config.log.level = level;
    }
    if let Some(node_id) = flags.node_id {
        config.node_id = node_id;
    }
    if let Some(zone) = flags.zone {
        config.zone = zone;
    }
    if !flags.etcd_endpoints.is_empty() {
        config.controlplane.etcd_endpoints = flags.etcd_endpoints;
    }
    config.validate()?;
    config.engines.programs.iter().try_for_each(|(name, program)| exec::check(name, program))?;
    Ok(config)
}

async fn run_until_signalled(config: AgentConfig, announce: Option<PathBuf>) -> Result<(), Error> {
    let system = |e: io::Error| Error::System(format!("cannot wait for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let (shutdown, hurry) = (CancellationToken::new(), CancellationToken::new());
    let signals = async {
        for token in [&shutdown, &hurry] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = run_with(config, announce, shutdown.clone(), hurry.clone()) => result,
        () = signals => Ok(()),
    }
}

/// The agent, until `shutdown`: engines are then stopped, or kept, as the setting `on_shutdown` says.
///
/// `announce`: file that gets the bound address once the agent is up. Becomes a child subreaper: orphans of engines become
/// children of this process.
///
/// # Errors
/// The state folder or the private address cannot be had, or engines could not be ended in time.
pub async fn run(
    config: AgentConfig,
    announce: Option<PathBuf>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    run_with(config, announce, shutdown, CancellationToken::new()).await
}

async fn run_with(
    config: AgentConfig,
    announce: Option<PathBuf>,
    shutdown: CancellationToken,
    hurry: CancellationToken,
) -> Result<(), Error> {
    let node_id = node_id(&config)?;
    let (state, _lock) = StateDir::open(&expand_home(&config.state_dir)?, LOCK_WAIT).await?;
    let (listener, private) = listen(&config.private.listen).await?;
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!(%error, "cannot become a child subreaper: orphans of engines go to init");
    }
    let opened = gpu::open(&config.gpus, &node_id, state.root()).map_err(Error::System)?;
    let (report, gpus) = gpu::handle(&opened);
    let cx = Arc::new(context(&config, state.clone(), gpus, hurry)?);
    let sampler = gpu::Sampler::new(cx.clone(), opened, &config.gpus, report);

    let left = clear_away(&cx).await;
    let stored = state.load_assignments().unwrap_or_else(|| recorded(&left));
    let intake = Intake::new(state, stored);
    let hold = Instant::now() + Duration::from_millis(config.controlplane.first_assignments_ms);
    let reconciler = Reconciler::new(cx.clone(), intake.subscribe(), left.alive, hold);
    let session = Arc::new(Mutex::new(SessionStatus::default()));
    let tls = &config.controlplane.tls;
    let fleet = Fleet {
        directory: Directory::new(&config.controlplane).map_err(Error::System)?,
        cx: cx.clone(),
        config: config.controlplane.clone(),
        tls: ClientTls::of(&tls.ca_file, &tls.cert_file, &tls.key_file),
        identity: identity(&config, &node_id),
        intake,
        status: session.clone(),
    };
    let programs = cx.programs.clone();
    let shown = Shown { node_id, cx: cx.clone(), session, stopping: shutdown.clone() };

    let tasks = TaskTracker::new();
    let (stop_fleet, stop_http) = (CancellationToken::new(), CancellationToken::new());
    tasks.spawn(prefetch::ahead(fleet.cx.clone(), stop_fleet.clone()));
    tasks.spawn(programs.follow(stop_fleet.clone()));
    tasks.spawn(fleet.run(stop_fleet.clone()));
    tasks.spawn(janitor::run(cx.clone(), stop_fleet.clone()));
    tasks.spawn(serve(listener, shown, stop_http.clone()));
    if let Some(sampler) = sampler {
        tasks.spawn(sampler.run(stop_fleet.clone()));
    }
    let on_shutdown = if config.on_shutdown == "keep" { OnShutdown::Keep } else { OnShutdown::Stop };
    let announced = announce_to(announce, private);
    if announced.is_err() {
        shutdown.cancel();
    }
    tracing::info!(%private, "agent up");
    let left = reconciler.run(shutdown, on_shutdown, longest_stop(&config)).await;

    stop_fleet.cancel();
    stop_http.cancel();
    tasks.close();
    tasks.wait().await;
    cx.cgroups.close();
    announced?;
    if left.is_empty() { Ok(()) } else { Err(Error::Left(left.join(", "))) }
}

fn context(
    config: &AgentConfig,
    state: StateDir,
    gpus: gpu::Handle,
    hurry: CancellationToken,
) -> Result<Context, Error> {
    Ok(Context {
        config: config.engines.clone(),
        warm: config.warm.clone(),
        prefetch: Prefetcher::new(&config.warm),
        gpu_config: config.gpus.clone(),
        deregister: Duration::from_millis(config.controlplane.deregister_ms),
        records: Records::new(state.engines()),
        programs: Programs::new(&config.engines.programs, state.versions()),
        boot_id: procfs::boot_id(),
        board: Board::new(),
        registry: Registry::new(),
        cgroups: Cgroups::open(&config.engines.cgroup, state.root(), config.engines.memory_max_mib)
            .map_err(Error::System)?,
        logs: Logs::default(),
        memories: Memories::default(),
        foreign: Foreign::default(),
        ports: Ports::default(),
        probe: Probe::new().map_err(|e| Error::System(format!("cannot make an HTTP client: {e}")))?,
        gpus,
        metrics: Metrics::new().map_err(|e| Error::System(format!("cannot make the metrics: {e}")))?,
        state,
        hurry,
    })
}

/// Looks at what an earlier agent left, and ends what is neither a living engine nor part of one.
async fn clear_away(cx: &Context) -> Survey {
    let records = cx.records.all();
    let found = adopt::survey(&records, &cx.boot_id, &adopt::look(&cx.state, &cx.cgroups));
    if !found.remains.is_empty() {
        tracing::warn!(
            processes = found.remains.len(),
            "ending what engines of an earlier agent left behind"
        );
        let find = || adopt::survey(&records, &cx.boot_id, &adopt::look(&cx.state, &cx.cgroups)).remains;
        let give_up = Duration::from_millis(cx.config.kill_ms);
        for process in adopt::end_remains(find, cx.orphan_term(), give_up).await {
            tracing::error!(pid = process.pid, "what an earlier engine left cannot be ended");
        }
    }
    for record in records.iter().filter(|record| !found.alive.contains(record)) {
        cx.deregister(&record.assignment);
        cx.forget(&record.assignment.replica_id);
    }
    let alive: Vec<String> = found.alive.iter().map(|record| stem(&record.assignment.replica_id)).collect();
    cx.cgroups.sweep(|stem| alive.iter().any(|alive| alive == stem));
    found
}

/// Where the stored assignments are lost, what runs is what was wanted.
fn recorded(left: &Survey) -> Desired {
    let assignment = |r: &Record| Assignment { asleep: r.asleep, ..r.assignment.clone() };
    let assignments = left.alive.iter().map(assignment).collect();
    Desired { assignments, ..Desired::default() }
}

fn identity(config: &AgentConfig, node_id: &str) -> Identity {
    Identity {
        node_id: node_id.to_owned(),
        advertise_host: config.engines.advertise_host.clone(),
        zone: config.zone.clone(),
        region: config.region.clone(),
        labels: config.labels.clone().into_iter().collect(),
    }
}

fn node_id(config: &AgentConfig) -> Result<String, Error> {
    if !config.node_id.is_empty() {
        return Ok(config.node_id.clone());
    }
    let unknown = |why: String| Error::System(format!("cannot tell the host's name ({why}); set node_id"));
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| unknown(e.to_string()))?;
    let name = name.trim();
    if name.is_empty() { Err(unknown("it is empty".into())) } else { Ok(name.to_owned()) }
}

fn expand_home(path: &str) -> Result<PathBuf, Error> {
    let Some(rest) = path.strip_prefix("~/") else { return Ok(PathBuf::from(path)) };
    match std::env::home_dir() {
        Some(home) if !home.as_os_str().is_empty() => Ok(home.join(rest)),
        _ => Err(Error::State(format!(
            "state_dir is {path:?} and there is no home folder; set state_dir to a full path"
        ))),
    }
}

async fn listen(address: &str) -> Result<(TcpListener, SocketAddr), Error> {
    let named = |source| Error::Listen { address: address.to_owned(), source };
    let listener = TcpListener::bind(address).await.map_err(named)?;
    let bound = listener.local_addr().map_err(named)?;
    Ok((listener, bound))
}

async fn serve(listener: TcpListener, shown: Shown, stop: CancellationToken) {
    let closing = stop.clone();
    let server =
        axum::serve(listener, private::router(shown)).with_graceful_shutdown(closing.cancelled_owned());
    let cut_off = async {
        stop.cancelled().await;
        tokio::time::sleep(HTTP_CLOSE).await;
    };
    tokio::select! {
        served = server => if let Err(error) = served {
            tracing::error!(%error, "the private server ended");
        },
        () = cut_off => {}
    }
}

fn announce_to(file: Option<PathBuf>, private: SocketAddr) -> Result<(), Error> {
    let Some(file) = file else { return Ok(()) };
    let addresses = serde_json::json!({"pid": std::process::id(), "private": private.to_string()});
    announce(&file, &addresses).map_err(|e| Error::System(e.to_string()))
}

/// The longest time that stopping all engines at once may take.
fn longest_stop(config: &AgentConfig) -> Duration {
    let EnginesConfig { settle_ms, drain_ms, term_ms, orphan_term_ms, kill_ms, .. } = config.engines;
    let engine =
        config.controlplane.deregister_ms + settle_ms.max(drain_ms) + term_ms + orphan_term_ms + 2 * kill_ms;
    Duration::from_millis(engine + config.gpus.release_ms) + STOP_MARGIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_settings_and_settings_are_checked() {
        let flags = |args: &[&str]| {
            Flags::try_parse_from(["agent"].iter().chain(args).map(OsString::from)).expect("valid flags")
        };
        let config = settings(flags(&["--node-id", "n1", "--zone", "z", "--log-level", "debug"])).unwrap();
        assert_eq!(
            (config.node_id.as_str(), config.zone.as_str(), config.log.level.as_str()),
            ("n1", "z", "debug")
        );
        assert!(settings(flags(&["--node-id", "a/b"])).unwrap_err().contains("node_id"));
    }

    #[test]
    fn a_home_folder_is_expanded_only_at_the_beginning() {
        assert_eq!(expand_home("/a/~/b").unwrap(), PathBuf::from("/a/~/b"));
        assert!(expand_home("~/x").unwrap().ends_with("x"));
        assert!(!expand_home("~/x").unwrap().starts_with("~"));
    }
}
