//! The process: settings, sockets, tasks, and an orderly end.

use std::{
    ffi::OsString,
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use penstock_config::controlplane::{ControlPlaneConfig, guide_aliases};
use serde_json::json;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Gate,
    admin, backup,
    core::Core,
    fleet::{roster::Roster, server::FleetService},
    forward,
    leadership::{Elector, Leader, Leadership},
    metrics::Metrics,
    peers::{link, server::PeersService},
    reconcile,
    store::{EmbeddedStore, EtcdStore, Store, StoreError},
    tls::{self, ServerTls},
    view::ViewKeeper,
    xds::{
        hub::{self, Hub},
        loads::Loads,
        server::AdsService,
    },
};

/// The control plane of Penstock: REST and console on one port, agents and proxies on the other.
#[derive(Debug, Parser)]
#[command(name = "penstock-controlplane", version)]
struct Args {
    /// Settings file; config/controlplane.toml explains every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to write the bound addresses once everything listens.
    #[arg(long, value_name = "FILE")]
    announce: Option<PathBuf>,
    /// Instead of log.level.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Instead of listen.http; :PORT listens on every address.
    #[arg(long, alias = "listen-addr", value_name = "IP:PORT")]
    http_listen: Option<String>,
    /// Instead of listen.grpc.
    #[arg(long, value_name = "IP:PORT")]
    grpc_listen: Option<String>,
    /// Keep the embedded store in DIR/controlplane.redb, instead of store.path.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Share state with other control planes through etcd: its members, as http://HOST:2379, instead of store.endpoints.
    #[arg(
        long,
        alias = "etcd-endpoint",
        value_name = "URL,URL,...",
        value_delimiter = ',',
        conflicts_with = "data_dir"
    )]
    etcd_endpoints: Vec<String>,
    /// Instead of observe.router_url.
    #[arg(long, value_name = "URL")]
    router_url: Option<String>,
}

/// Why the process could not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that cannot work.
    #[error("{0}")]
    Settings(String),
    /// A socket that could not be had.
    #[error("cannot listen on {address} ({setting}): {source}")]
    Bind {
        /// The address.
        address: String,
        /// The setting that names it.
        setting: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The store could not be opened, or failed for good.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The addresses could not be announced.
    #[error("{0}")]
    Announce(io::Error),
    /// A part of the process ended, which none does before the stop.
    #[error("{0} ended unexpectedly")]
    Ended(String),
}

/// Parses `args` (the first names the program), runs until SIGTERM or SIGINT. 0: stopped cleanly; 1: could not run;
/// 2: bad usage or settings.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Nobody may be left to read it.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let config = match settings(&args) {
        Ok(config) => config,
        Err(message) => return fail(2, &message),
    };
    if let Err(message) = penstock_config::logging::init(&config.log) {
        return fail(2, &message);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &format!("cannot start: {error}")),
    };
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Announce)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Announce)?;
        let mut running = std::pin::pin!(run(config, args.announce, stop.clone()));
        tokio::select! {
            outcome = &mut running => return outcome,
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        stop.cancel();
        running.await
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ Error::Settings(_)) => fail(2, &error.to_string()),
        Err(error) => fail(1, &error.to_string()),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("penstock-controlplane: {message}");
    ExitCode::from(code)
}

fn settings(args: &Args) -> Result<ControlPlaneConfig, String> {
    let load = penstock_config::load::<ControlPlaneConfig>;
    let environment = guide_aliases(penstock_config::environment());
    let mut config = load("controlplane", args.config.as_deref(), environment).map_err(|e| e.to_string())?;
    for (flag, setting) in [
        (&args.log_level, &mut config.log.level),
        (&args.http_listen, &mut config.listen.http),
        (&args.grpc_listen, &mut config.listen.grpc),
        (&args.router_url, &mut config.observe.router_url),
    ] {
        if let Some(value) = flag {
            setting.clone_from(value);
        }
    }
    // As the deploy guide writes it.
    if config.listen.http.starts_with(':') {
        config.listen.http.insert_str(0, "0.0.0.0");
    }
    if let Some(dir) = &args.data_dir {
        let path = dir.join("controlplane.redb");
        let text = path.to_str().ok_or("--data-dir: the path is not UTF-8")?;
        config.store.path = text.to_owned();
    }
    if !args.etcd_endpoints.is_empty() {
        config.store.kind = "etcd".into();
        config.store.endpoints.clone_from(&args.etcd_endpoints);
    }
    config.validate()?;
    Ok(config)
}

/// Runs a control plane until `shutdown` is cancelled, then ends it: streams are closed with a word, so that peers
/// connect again elsewhere or later, requests are finished, and the store is closed.
///
/// `announce`: a file that gets the bound addresses once everything listens.
pub async fn run(
    config: ControlPlaneConfig,
    announce: Option<PathBuf>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.validate().map_err(Error::Settings)?;
    let tls = Some(&config.listen.tls).filter(|tls| tls.is_on()).map(ServerTls::load).transpose();
    let tls = tls.map_err(|e| Error::Settings(format!("listen.tls: {e}")))?;
    let http = bind(&config.listen.http, "listen.http").await?;
    let grpc = bind(&config.listen.grpc, "listen.grpc").await?;
    let store: Arc<dyn Store> = if config.store.is_etcd() {
        Arc::new(EtcdStore::new(config.store.clone()))
    } else {
        let path = PathBuf::from(&config.store.path);
        Arc::new(EmbeddedStore::open(&path, config.store.history_events).await?)
    };
    let outcome = with_store(config, announce, shutdown, store.clone(), http, (grpc, tls)).await;
    store.close().await;
    outcome
}

async fn with_store(
    mut config: ControlPlaneConfig,
    announce: Option<PathBuf>,
    shutdown: CancellationToken,
    store: Arc<dyn Store>,
    http: TcpListener,
    (grpc, tls): (TcpListener, Option<ServerTls>),
) -> Result<(), Error> {
    let metrics = Arc::new(Metrics::new().map_err(|e| Error::Settings(format!("metrics: {e}")))?);
    let addresses = (local(&http)?, local(&grpc)?);
    let leader = introduce(&mut config, &addresses);
    let mut keeper = ViewKeeper::new(store.clone(), metrics.clone());
    let (leadership, elector) = if config.store.is_etcd() {
        let ttl = Duration::from_millis(config.election.lease_ttl_ms);
        let may_lead = config.election.may_lead();
        let views = keeper.subscribe();
        let (elector, leadership) =
            Elector::new(store.clone(), views, leader, ttl, may_lead, metrics.clone());
        (leadership, Some(elector))
    } else {
        let leadership = Leadership::seize(&store, &leader).await?;
        keeper.load().await?;
        metrics.leading.set(1);
        (leadership, None)
    };
    let grace = Duration::from_millis(config.limits.shutdown_grace_ms);
    let stop = shutdown.child_token();
    let core = Arc::new(Core {
        store,
        leadership,
        gate: Gate::new(&config.auth),
        views: keeper.subscribe(),
        roster: Roster::default(),
        logs: Default::default(),
        demands: Default::default(),
        hub: Hub::default(),
        followers: Default::default(),
        loads: Loads::default(),
        reports: watch::Sender::default(),
        metrics,
        stop: stop.clone(),
        tasks: TaskTracker::new(),
        started: Instant::now(),
        config,
    });
    let (ended, mut first_ended) = watch::channel(None);
    let parts = Parts { core: core.clone(), ended };
    parts.spawn("the view", keeper.run());
    if let Some(elector) = elector {
        let stop = core.stop.clone();
        parts.serve("the election", async move {
            elector.run(stop).await;
            Ok(())
        });
    }
    parts.spawn("reconcile", reconcile::run(core.clone()));
    parts.spawn("backups", backup::schedule::run(core.clone()));
    parts.spawn("publishing", hub::publish(core.clone()));
    if core.config.store.is_etcd() {
        parts.spawn("the link to the leader", link::run(core.clone()));
    }
    parts.serve("the gRPC server", serve_grpc(core.clone(), grpc, tls));
    parts.serve("the HTTP server", serve_http(core.clone(), http));
    core.tasks.close();
    let (term, revision, store) = (core.view().term, core.view().revision, core.store.kind());
    tracing::info!(http = addresses.0, grpc = addresses.1, store, term, revision, "the control plane is up");
    if core.gate.is_open(&core.view()) && !is_loopback(&addresses.0) {
        tracing::warn!(
            http = addresses.0,
            "there are no tokens: whoever reaches this address may do everything (see [auth] in the settings)"
        );
    }
    let announced = announce.map_or(Ok(()), |file| {
        let addresses = json!({ "pid": std::process::id(), "http": addresses.0, "grpc": addresses.1 });
        penstock_config::announce(&file, &addresses)
    });
    let outcome = match announced {
        Err(error) => Err(Error::Announce(error)),
        Ok(()) => tokio::select! {
            () = stop.cancelled() => Ok(()),
            error = core.store.failed() => Err(error.into()),
            _ = first_ended.changed() => {
                Err(Error::Ended(first_ended.borrow().clone().unwrap_or_else(|| "a part".to_owned())))
            }
        },
    };
    stop.cancel();
    if tokio::time::timeout(grace, core.tasks.wait()).await.is_err() {
        tracing::warn!(tasks = core.tasks.len(), "what still ran after limits.shutdown_grace_ms was dropped");
    }
    tracing::info!("the control plane has stopped");
    outcome
}

/// Starts the parts of the process; the first that ends too early is told of.
struct Parts {
    core: Arc<Core>,
    ended: watch::Sender<Option<String>>,
}

impl Parts {
    /// A loop that is cut short at the stop.
    fn spawn(&self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let stop = self.core.stop.clone();
        self.serve(name, async move {
            stop.run_until_cancelled_owned(part).await;
            Ok(())
        });
    }

    /// A part that ends by itself at the stop.
    fn serve(&self, name: &'static str, part: impl Future<Output = Result<(), String>> + Send + 'static) {
        let (stop, ended) = (self.core.stop.clone(), self.ended.clone());
        self.core.tasks.spawn(async move {
            let outcome = part.await;
            if let Err(error) = &outcome {
                tracing::error!(error, "{name} failed");
            }
            if !stop.is_cancelled() {
                let why = outcome.err().map(|error| format!(": {error}")).unwrap_or_default();
                ended.send_replace(Some(format!("{name}{why}")));
            }
        });
    }
}

async fn serve_http(core: Arc<Core>, listener: TcpListener) -> Result<(), String> {
    let stop = core.stop.clone();
    let app = forward::before(core.clone(), admin::router(core));
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned());
    server.await.map_err(|e| e.to_string())
}

async fn serve_grpc(core: Arc<Core>, listener: TcpListener, tls: Option<ServerTls>) -> Result<(), String> {
    let stop = core.stop.clone();
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        // A peer that vanished without a word is noticed within 15 seconds.
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(FleetService::server(core.clone()))
        .add_service(PeersService::links(core.clone()))
        .add_service(PeersService::wants(core.clone()))
        .add_service(AdsService::server(core.clone()));
    let served = match tls {
        None => {
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await
        }
        Some(tls) => {
            let (accepted, incoming) = tls::incoming();
            let accept = tls::accept(listener, tls.config(), accepted, core.metrics.clone(), stop.clone());
            let watch = tls.watch(core.metrics.clone());
            tokio::select! {
                served = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()) => served,
                () = async { tokio::join!(accept, stop.run_until_cancelled(watch)); std::future::pending().await } => Ok(()),
            }
        }
    };
    served.map_err(|e| e.to_string())
}

/// How the other control planes shall know this one; what was left empty is filled in.
fn introduce(config: &mut ControlPlaneConfig, (http, grpc): &(String, String)) -> Leader {
    let election = &mut config.election;
    let or = |given: &str, otherwise: &str| if given.is_empty() { otherwise } else { given }.to_owned();
    election.advertise_http = or(&election.advertise_http, http);
    election.advertise_grpc = or(&election.advertise_grpc, grpc);
    election.id = or(&election.id, &election.advertise_grpc);
    Leader {
        id: election.id.clone(),
        http: election.advertise_http.clone(),
        grpc: election.advertise_grpc.clone(),
        zone: election.zone.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

async fn bind(address: &str, setting: &'static str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Bind {
        address: address.to_owned(),
        setting,
        source,
    })
}

fn is_loopback(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
}

fn local(listener: &TcpListener) -> Result<String, Error> {
    listener.local_addr().map(|address| address.to_string()).map_err(Error::Announce)
}
