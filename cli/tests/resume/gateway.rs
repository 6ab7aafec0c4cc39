//! A gateway in this process, and engines that are processes of their own.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_config::proxy::{Policy, ProxyConfig};
use penstock_proto::{v1, xds};
use penstock_proxy::{
    gateway::Gateway,
    listener::{self, Listener},
    telemetry::metrics::State,
    xds::{state::XdsState, status::XdsStatus},
};
use prost::Message;
use serde_json::Value;
use tempfile::TempDir;

/// For anything, on a machine that is busy with other tests.
pub(crate) const LONGEST: Duration = Duration::from_secs(60);

/// The model that all engines serve.
pub(crate) const MODEL: &str = "sim-model";

/// A simulated engine; it ends with this.
pub(crate) struct Engine {
    pub(crate) address: SocketAddr,
    child: Child,
    _folder: TempDir,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Engine {
    /// Starts one with more flags and waits until it is ready.
    pub(crate) async fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let announce = folder.path().join("announce.json");
        let child = Command::new(env!("CARGO_BIN_EXE_penstock"))
            .args(["engine-sim", "serve", MODEL, "--host", "127.0.0.1", "--port", "0"])
            .args(["--sim-no-core", "--sim-load-ms", "1", "--sim-speed", "0", "--sim-announce"])
            .arg(&announce)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut engine = Self { address: ([127, 0, 0, 1], 0).into(), child, _folder: folder };
        let deadline = Instant::now() + LONGEST;
        loop {
            let text = std::fs::read(&announce).unwrap_or_default();
            if let Ok(said) = serde_json::from_slice::<Value>(&text) {
                engine.address = said["address"].as_str().unwrap().parse().unwrap();
                return engine;
            }
            assert!(Instant::now() < deadline, "an engine did not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Has its next streams fail so; `[]` for none.
    pub(crate) async fn faults(&self, client: &reqwest::Client, faults: &Value) {
        let url = format!("http://{}/sim/faults", self.address);
        client.delete(&url).send().await.unwrap().error_for_status().unwrap();
        let answer = client.post(&url).json(faults).send().await.unwrap();
        assert!(answer.status().is_success(), "{faults}: {}", answer.text().await.unwrap());
    }
}

/// A gateway.
pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) gateway: Arc<Gateway>,
}

/// Settings under which nobody is left out for failing as often as these tests want.
pub(crate) fn config() -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.health.consecutive_failures = u32::MAX;
    config.health.max_ejected_percent = 0;
    config.routing.policy = Policy::SessionAffinity;
    config.resume.stall_ms = 150;
    config.upstream.first_byte_ms = 5_000;
    config
}

impl Proxy {
    /// One that knows these engines.
    pub(crate) fn start(config: ProxyConfig, engines: &[&Engine]) -> Self {
        Self::at(config, &engines.iter().map(|engine| engine.address).collect::<Vec<_>>())
    }

    /// From now on it knows these.
    #[allow(dead_code)] // of those who share this file not all need it
    pub(crate) fn knows(&self, engines: &[SocketAddr]) {
        self.gateway.table.apply(&state(engines));
    }

    /// One that knows the engines at these addresses.
    pub(crate) fn at(config: ProxyConfig, engines: &[SocketAddr]) -> Self {
        let gateway = Arc::new(Gateway::new(config.clone()).unwrap());
        gateway.table.apply(&state(engines));
        let runtime = listener::runtime(&config.public);
        let (name, settings) = config.client_listeners().into_iter().next().unwrap();
        let socket = listener::bind(&name, "127.0.0.1:0").unwrap();
        let (open, _) = Listener::open(&name, settings, &socket).unwrap();
        let url = format!("http://{}", open.address);
        runtime.get_handle().spawn(listener::serve(Arc::clone(&gateway), open, socket));
        // Pingora keeps the handles of such runtimes by thread id, and ids are used again: these live as long as the process.
        std::mem::forget(runtime);
        Self { url, gateway }
    }

    /// Of a metric, all series together.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let text = self.gateway.metrics.render(&State {
            snapshot: &self.gateway.table.load(),
            xds: &XdsStatus::default().view(),
            draining: false,
            body_bytes_held: 0,
            now_ms: 0,
            max_ejected_percent: 0,
        });
        let of_name =
            text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        of_name.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Waits until nothing is under way any more.
    pub(crate) async fn settles(&self) {
        let deadline = Instant::now() + LONGEST;
        loop {
            let table = self.gateway.table.load();
            let held: u32 = table.pools.values().flat_map(|pool| &pool.endpoints).map(|e| e.inflight()).sum();
            if held == 0 && self.gateway.metrics.inflight.get() == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{held} held");
            drop(table);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Tables in which the model is served by endpoints "e0", "e1" and so on.
fn state(engines: &[SocketAddr]) -> XdsState {
    let endpoint = |(i, address): (usize, &SocketAddr)| v1::Endpoint {
        id: format!("e{i}"),
        address: address.to_string(),
        generation: 1,
        state: v1::EndpointState::Ready.into(),
        ..Default::default()
    };
    let table = v1::EndpointTable {
        pool: MODEL.into(),
        endpoints: engines.iter().enumerate().map(endpoint).collect(),
        ..Default::default()
    };
    let target =
        v1::RouteTarget { pool: MODEL.into(), served_model: MODEL.into(), weight: 1, ..Default::default() };
    let route = v1::ModelRoute { model: MODEL.into(), targets: vec![target], ..Default::default() };
    let response = |type_url: &str, value: Vec<u8>| xds::DeltaDiscoveryResponse {
        type_url: type_url.into(),
        system_version_info: "1.1".into(),
        nonce: "1".into(),
        resources: vec![xds::Resource {
            name: MODEL.into(),
            version: "1".into(),
            resource: Some(xds::Any { type_url: type_url.into(), value }),
            ..Default::default()
        }],
        ..Default::default()
    };
    XdsState::default()
        .apply(&response(xds::ENDPOINT_TABLE_TYPE, table.encode_to_vec()))
        .and_then(|state| state.apply(&response(xds::MODEL_ROUTE_TYPE, route.encode_to_vec())))
        .unwrap()
}
