//! `penstock doctor`: gathers what there is to know of a site; [`super::judge`] says what it means.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use penstock_config::controlplane::ControlPlaneConfig;
use penstock_controlplane::store::members::{self, Member};
use reqwest::{Client, Url};
use serde_json::Value;

use super::{certificate, findings, judge, machine};
use crate::{
    api::{ApiError, ControlPlane, root_cause},
    args::DoctorArgs,
    commands::connect,
    output::show,
    up::last_proxy,
};

/// Everything that was found out, judged by [`judge::all`].
#[derive(Debug)]
pub(super) struct Facts {
    /// This program's release.
    pub(super) version: String,
    /// The control plane that was asked, and those that should be there as well.
    pub(super) planes: Vec<Plane>,
    pub(super) nodes: Result<Vec<Value>, String>,
    pub(super) deployments: Result<Vec<Value>, String>,
    pub(super) endpoints: Result<Vec<Value>, String>,
    /// With the version that the control plane has.
    pub(super) proxies: Result<(Vec<Value>, String), String>,
    /// Private ports of proxies.
    pub(super) looked_at: Vec<ProxyLook>,
    /// None: no settings file was given, or it names no etcd.
    pub(super) etcd: Option<Vec<Member>>,
    /// Files that the settings name, with the end of their certificates.
    pub(super) certificates: Vec<(String, Result<i64, String>)>,
    /// Folders with what is free and what there is.
    pub(super) disks: Vec<(PathBuf, u64, u64)>,
    /// Interval and last success of scheduled backups; None: not known.
    pub(super) backups: Option<(f64, f64)>,
    pub(super) now_unix_s: i64,
}

impl Default for Facts {
    fn default() -> Self {
        let unknown = || Err("nobody was asked".to_owned());
        Self {
            version: String::new(),
            planes: Vec::new(),
            nodes: unknown(),
            deployments: unknown(),
            endpoints: unknown(),
            proxies: Err("nobody was asked".into()),
            looked_at: Vec::new(),
            etcd: None,
            certificates: Vec::new(),
            disks: Vec::new(),
            backups: None,
            now_unix_s: 0,
        }
    }
}

/// A control plane.
#[derive(Debug)]
pub(super) struct Plane {
    pub(super) address: String,
    /// `/api/v2/cluster/status`.
    pub(super) status: Result<Value, String>,
}

/// A proxy's private port.
#[derive(Debug)]
pub(super) struct ProxyLook {
    pub(super) address: String,
    /// `/readyz` and `/metrics`.
    pub(super) says: Result<(Value, String), String>,
}

pub(crate) async fn run(args: &DoctorArgs) -> Result<(), ApiError> {
    let facts = gather(args).await?;
    let found = judge::all(&facts);
    show(args.remote.output, &findings::json(&found), || findings::text(&found))?;
    findings::verdict(&found, args.strict)
}

/// What could not be found out is a fact as well: only arguments that cannot be used are errors.
async fn gather(args: &DoctorArgs) -> Result<Facts, ApiError> {
    let server = connect(&args.remote)?;
    let config = args.config.as_deref().map(settings).transpose()?;
    let mut facts = Facts {
        version: env!("CARGO_PKG_VERSION").into(),
        now_unix_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(0)),
        ..Facts::default()
    };
    facts.planes.push(plane(&server).await);
    for address in &args.others {
        let token = args.remote.server.token.clone();
        facts.planes.push(plane(&ControlPlane::new(address, "--also", token)?).await);
    }
    let list = async |things: &str| server.list(things).await.map_err(|error| error.to_string());
    facts.nodes = list("nodes").await;
    facts.deployments = list("deployments").await;
    facts.endpoints = list("endpoints").await;
    facts.proxies = proxies(&server).await.map_err(|error| error.to_string());
    let client = Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .timeout(Duration::from_secs(10))
        .build()
        .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
    facts.backups = backups(&client, server.address()).await;
    let data_dir = args.remote.server.data_dir.as_deref();
    let mut private = args.proxy.clone();
    if private.is_empty() && args.remote.server.controlplane.is_none() {
        private.extend(last_proxy(data_dir).map(|(address, _)| address));
    }
    for address in private {
        facts.looked_at.push(look(&client, address).await);
    }
    let mut folders: Vec<PathBuf> = data_dir.map(Path::to_path_buf).into_iter().collect();
    if let Some(config) = &config {
        let store = &config.store;
        if store.is_etcd() {
            facts.etcd = Some(members::look(store).await);
        } else {
            folders.push(Path::new(&store.path).to_path_buf());
        }
        if !config.backup.dir.is_empty() {
            folders.push(Path::new(&config.backup.dir).to_path_buf());
        }
        let tls = &config.listen.tls;
        let named = [
            ("store.ca_file", &store.ca_file),
            ("store.cert_file", &store.cert_file),
            ("listen.tls.ca_file", &tls.ca_file),
            ("listen.tls.cert_file", &tls.cert_file),
        ];
        for (setting, file) in named.into_iter().filter(|(_, file)| !file.is_empty()) {
            facts.certificates.push((format!("{setting} ({file})"), certificate::expires(Path::new(file))));
        }
    }
    for folder in folders {
        facts.disks.extend(machine::disk(&folder).map(|(free, total)| (folder, free, total)));
    }
    Ok(facts)
}

fn settings(file: &Path) -> Result<ControlPlaneConfig, ApiError> {
    let load = penstock_config::load::<ControlPlaneConfig>;
    let config = load("controlplane", Some(file), penstock_config::environment());
    let config = config.map_err(|error| ApiError::Usage(error.to_string()))?;
    config.validate().map_err(|error| ApiError::Usage(format!("{}: {error}", file.display())))?;
    Ok(config)
}

async fn plane(server: &ControlPlane) -> Plane {
    let status = server.get(&["api", "v2", "cluster", "status"]).await;
    Plane { address: server.address().to_owned(), status: status.map_err(|error| error.to_string()) }
}

async fn proxies(server: &ControlPlane) -> Result<(Vec<Value>, String), ApiError> {
    let page = server.get(&["api", "v2", "proxies"]).await?;
    let version = page.get("version").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok((server.list("proxies").await?, version))
}

async fn fetch(client: &Client, base: &str, path: &str) -> Result<String, String> {
    let url =
        Url::parse(base).and_then(|base| base.join(path)).map_err(|error| format!("{base}: {error}"))?;
    let answer = client.get(url).send().await.map_err(|error| root_cause(&error))?;
    answer.text().await.map_err(|error| root_cause(&error))
}

async fn look(client: &Client, address: String) -> ProxyLook {
    let says = async {
        let ready = fetch(client, &address, "/readyz").await?;
        let ready = serde_json::from_str(&ready).map_err(|_| "its /readyz is not a proxy's".to_owned())?;
        Ok((ready, fetch(client, &address, "/metrics").await?))
    };
    let says = says.await;
    ProxyLook { address, says }
}

async fn backups(client: &Client, base: &str) -> Option<(f64, f64)> {
    let text = fetch(client, base, "/metrics").await.ok()?;
    let interval = judge::metric(&text, "penstock_controlplane_backup_interval_seconds")?;
    let last = judge::metric(&text, "penstock_controlplane_backup_last_success_timestamp_seconds")?;
    Some((interval, last))
}
