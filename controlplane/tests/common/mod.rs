//! A control plane in this process, and scripted peers over real sockets: an agent and a proxy.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part of this one")]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use penstock_config::controlplane::ControlPlaneConfig;
use penstock_controlplane::Error;
use penstock_proto::{
    v1::{self, agent_message, controller_message, fleet_client::FleetClient},
    xds::{self, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use prost::Message;
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

/// Waits until `get` gives something; fails the test, in words, after ten seconds.
pub async fn wait<T>(what: &str, mut get: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = get().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A running control plane.
pub struct Plane {
    pub http: String,
    pub grpc: String,
    client: reqwest::Client,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Plane {
    /// On the store in `dir`, with short times.
    pub async fn start(dir: &Path) -> Self {
        Self::start_with(dir, |_| {}).await
    }

    pub async fn start_with(dir: &Path, tweak: impl FnOnce(&mut ControlPlaneConfig)) -> Self {
        let mut config = ControlPlaneConfig::default();
        config.listen.http = "127.0.0.1:0".into();
        config.listen.grpc = "127.0.0.1:0".into();
        config.store.path = dir.join("store.redb").to_str().unwrap().into();
        config.fleet.lease_ttl_ms = 1_500;
        config.fleet.report_interval_ms = 50;
        config.fleet.lost_grace_ms = 500;
        config.reconcile.tick_ms = 100;
        tweak(&mut config);
        let announce = dir.join("announce.json");
        drop(std::fs::remove_file(&announce));
        let stop = CancellationToken::new();
        let task = tokio::spawn(penstock_controlplane::run(config, Some(announce.clone()), stop.clone()));
        let text = wait("the announce file", async || std::fs::read_to_string(&announce).ok()).await;
        let addresses: Value = serde_json::from_str(&text).unwrap();
        let address = |name: &str| addresses[name].as_str().unwrap().to_owned();
        let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
        Self { http: address("http"), grpc: address("grpc"), client, stop, task }
    }

    /// One that runs elsewhere; stopping it is its owner's.
    pub fn at(http: &str, grpc: &str) -> Self {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
        let task = tokio::spawn(async { Ok(()) });
        Self { http: http.into(), grpc: grpc.into(), client, stop: CancellationToken::new(), task }
    }

    /// Stops cleanly; the peers' streams end with a word.
    pub async fn stop(self) {
        self.stop.cancel();
        let outcome =
            tokio::time::timeout(Duration::from_secs(10), self.task).await.expect("it stops in time");
        outcome.unwrap().unwrap();
    }

    pub async fn call(&self, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("http://{}{path}", self.http));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or(Value::Null))
    }

    /// As `token` (empty: nobody), with further headers; the answer with its headers.
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        token: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> (u16, Value, reqwest::header::HeaderMap) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("http://{}{path}", self.http));
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null), headers)
    }

    /// A GET as it comes.
    pub async fn fetch(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("http://{}{path}", self.http)).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call("GET", path, None).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// The endpoint as the API shows it.
    pub async fn endpoint(&self, id: &str) -> Option<Value> {
        let (status, body) = self.call("GET", &format!("/api/v2/endpoints/{id}"), None).await;
        (status == 200).then_some(body)
    }

    pub async fn wait_endpoint_state(&self, id: &str, state: &str) {
        let what = format!("{id} to be {state}");
        wait(&what, async || self.endpoint(id).await.filter(|e| e["state"] == state)).await;
    }

    pub async fn metric(&self, line: &str) -> f64 {
        let text = self.fetch("/metrics").await.text().await.unwrap();
        let value = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {line} in {text}")).parse().unwrap()
    }
}

/// What an agent has been told.
#[derive(Default)]
struct AgentSeen {
    welcome: Option<v1::Welcome>,
    assignments: Option<v1::Assignments>,
    registrations: Vec<v1::RegistrationResult>,
    deregistrations: Vec<v1::DeregistrationResult>,
    log_requests: Vec<v1::LogRequest>,
    ended: Option<Status>,
}

/// A scripted agent: reports every 50 ms until dropped, and does otherwise what it is told by the test.
pub struct Agent {
    seen: Arc<Mutex<AgentSeen>>,
    /// What it reports.
    pub engines: Arc<Mutex<BTreeMap<String, v1::EngineStatus>>>,
    outbound: mpsc::Sender<v1::AgentMessage>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

pub fn hello(node_id: &str, gpus: usize) -> v1::Hello {
    let gpu = |n| v1::Gpu { uuid: format!("{node_id}-g{n}"), ..Default::default() };
    v1::Hello {
        node_id: node_id.into(),
        agent_version: "test".into(),
        protocol_version: penstock_proto::FLEET_PROTOCOL_VERSION,
        advertise_host: "127.0.0.1".into(),
        zone: "z1".into(),
        gpus: (0..gpus).map(gpu).collect(),
        ..Default::default()
    }
}

impl Agent {
    pub async fn connect(plane: &Plane, node_id: &str, gpus: usize) -> Self {
        let agent = Self::connect_as(plane, hello(node_id, gpus)).await;
        wait("assignments", async || agent.seen.lock().unwrap().assignments.clone()).await;
        agent
    }

    pub async fn connect_as(plane: &Plane, hello: v1::Hello) -> Self {
        let (outbound, stream) = mpsc::channel(64);
        let gpus = hello.gpus.clone();
        let first = v1::AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        outbound.send(first).await.unwrap();
        let mut client = FleetClient::connect(format!("http://{}", plane.grpc)).await.unwrap();
        let inbound = client.session(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let (seen, engines) = (Arc::<Mutex<AgentSeen>>::default(), Arc::<Mutex<BTreeMap<_, _>>>::default());
        let reading = tokio::spawn(read(inbound, seen.clone()));
        let reporting = tokio::spawn(report(outbound.clone(), engines.clone(), gpus));
        Self { seen, engines, outbound, tasks: vec![reading, reporting] }
    }

    pub async fn send(&self, message: agent_message::Message) {
        self.outbound.send(v1::AgentMessage { message: Some(message) }).await.unwrap();
    }

    pub fn welcome(&self) -> v1::Welcome {
        self.seen.lock().unwrap().welcome.expect("welcomed")
    }

    pub fn assignments(&self) -> Vec<v1::Assignment> {
        self.seen.lock().unwrap().assignments.clone().map(|a| a.assignments).unwrap_or_default()
    }

    pub async fn wait_assigned(&self, count: usize) -> Vec<v1::Assignment> {
        let what = format!("{count} assignments");
        wait(&what, async || Some(self.assignments()).filter(|a| a.len() == count)).await
    }

    /// Everything that was said of logs, once it satisfies `is`.
    pub async fn log_requests(&self, is: impl Fn(&[v1::LogRequest]) -> bool) -> Vec<v1::LogRequest> {
        let requests = || self.seen.lock().unwrap().log_requests.clone();
        wait("requests for logs", async || Some(requests()).filter(|all| is(all))).await
    }

    pub async fn ended(&self) -> Status {
        wait("the session to end", async || self.seen.lock().unwrap().ended.clone()).await
    }

    /// Reports the engine as running and registers it.
    pub async fn serve(&self, a: &v1::Assignment, port: u16) -> v1::RegistrationResult {
        let address = format!("127.0.0.1:{port}");
        let status = v1::EngineStatus {
            model: a.model.clone(),
            replica_id: a.replica_id.clone(),
            generation: a.generation,
            state: v1::EngineState::Ready.into(),
            address: address.clone(),
            pid: 4242,
            load: Some(v1::EngineLoad {
                running: 3,
                waiting: 1,
                kv_used_ratio: 0.5,
                age_ms: 0,
                generation: 0,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.engines.lock().unwrap().insert(a.replica_id.clone(), status);
        self.register(a, a.generation, &address).await
    }

    pub async fn register(
        &self,
        a: &v1::Assignment,
        generation: u64,
        address: &str,
    ) -> v1::RegistrationResult {
        self.register_with(a, generation, address, &[]).await
    }

    pub async fn register_with(
        &self,
        a: &v1::Assignment,
        generation: u64,
        address: &str,
        adapters: &[&str],
    ) -> v1::RegistrationResult {
        let before = self.seen.lock().unwrap().registrations.len();
        let registration = v1::Registration {
            model: a.model.clone(),
            replica_id: a.replica_id.clone(),
            generation,
            address: address.into(),
            pid: 4242,
            adapters: adapters.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        };
        self.send(agent_message::Message::Register(registration)).await;
        wait("a registration's result", async || self.seen.lock().unwrap().registrations.get(before).cloned())
            .await
    }

    pub async fn deregister(&self, a: &v1::Assignment) {
        let deregistration = v1::Deregistration {
            model: a.model.clone(),
            replica_id: a.replica_id.clone(),
            generation: a.generation,
        };
        self.send(agent_message::Message::Deregister(deregistration)).await;
    }

    pub fn deregistered(&self, id: &str) -> bool {
        self.seen.lock().unwrap().deregistrations.iter().any(|d| d.replica_id == id)
    }

    pub async fn wait_deregistered(&self, id: &str) {
        wait("a deregistration's result", async || self.deregistered(id).then_some(())).await;
    }

    /// The engine has ended: it is reported no more.
    pub fn end(&self, id: &str) {
        self.engines.lock().unwrap().remove(id);
    }
}

async fn read(mut inbound: Streaming<v1::ControllerMessage>, seen: Arc<Mutex<AgentSeen>>) {
    use controller_message::Message;
    loop {
        let message = inbound.message().await;
        let mut seen = seen.lock().unwrap();
        match message {
            Ok(Some(message)) => match message.message.unwrap() {
                Message::Welcome(welcome) => seen.welcome = Some(welcome),
                Message::Assignments(assignments) => seen.assignments = Some(assignments),
                Message::Registration(result) => seen.registrations.push(result),
                Message::Deregistration(result) => seen.deregistrations.push(result),
                Message::Log(request) => seen.log_requests.push(request),
                Message::Prefetches(_) => {}
            },
            Ok(None) => return seen.ended = Some(Status::ok("it was closed")),
            Err(status) => return seen.ended = Some(status),
        }
    }
}

async fn report(
    outbound: mpsc::Sender<v1::AgentMessage>,
    engines: Arc<Mutex<BTreeMap<String, v1::EngineStatus>>>,
    gpus: Vec<v1::Gpu>,
) {
    loop {
        let engines = engines.lock().unwrap().values().cloned().collect();
        let report = v1::NodeReport { engines, gpus: gpus.clone(), ..Default::default() };
        let message = v1::AgentMessage { message: Some(agent_message::Message::Report(report)) };
        if outbound.send(message).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a proxy has applied.
#[derive(Debug, Clone, Default)]
pub struct Applied {
    pub tables: BTreeMap<String, v1::EndpointTable>,
    pub routes: BTreeMap<String, v1::ModelRoute>,
    /// Everything received in order, as "T+a", "T-a", "R+a", "R-a".
    pub log: Vec<String>,
    pub version: String,
    versions: BTreeMap<(String, String), String>,
    /// A route came whose table was not there.
    pub dangling: bool,
    pub ended: Option<String>,
}

impl Applied {
    pub fn state_of(&self, pool: &str, id: &str) -> Option<v1::EndpointState> {
        self.tables.get(pool)?.endpoints.iter().find(|e| e.id == id).map(v1::Endpoint::state)
    }
}

/// A scripted proxy: applies and acknowledges everything, unless told to refuse or to be silent.
pub struct Proxy {
    pub applied: Arc<Mutex<Applied>>,
    /// Refuses responses that hold this resource, with this reason.
    pub refuse: Arc<Mutex<Option<(String, String)>>>,
    /// Answers nothing while set.
    pub mute: Arc<Mutex<bool>>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub async fn connect(plane: &Plane, node_id: &str) -> Self {
        Self::connect_with(plane, node_id, Applied::default()).await
    }

    /// With what an earlier connection left behind.
    pub async fn connect_with(plane: &Plane, node_id: &str, applied: Applied) -> Self {
        let (outbound, stream) = mpsc::channel(64);
        for url in [xds::ENDPOINT_TABLE_TYPE, xds::MODEL_ROUTE_TYPE] {
            let known = applied.versions.iter().filter(|((kind, _), _)| kind == url);
            let request = xds::DeltaDiscoveryRequest {
                node: Some(xds::Node { id: node_id.into(), ..Default::default() }),
                type_url: url.into(),
                resource_names_subscribe: vec!["*".into()],
                initial_resource_versions: known.map(|((_, name), v)| (name.clone(), v.clone())).collect(),
                ..Default::default()
            };
            outbound.send(request).await.unwrap();
        }
        let client =
            AggregatedDiscoveryServiceClient::connect(format!("http://{}", plane.grpc)).await.unwrap();
        let mut client = client.max_decoding_message_size(penstock_proto::MAX_GRPC_MESSAGE_BYTES);
        let inbound =
            client.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let applied = Arc::new(Mutex::new(applied));
        let (refuse, mute) = (Arc::default(), Arc::default());
        let task = tokio::spawn(subscribe(
            inbound,
            outbound,
            applied.clone(),
            Arc::clone(&refuse),
            Arc::clone(&mute),
        ));
        Self { applied, refuse, mute, task }
    }

    pub fn now(&self) -> Applied {
        self.applied.lock().unwrap().clone()
    }

    pub async fn wait(&self, what: &str, holds: impl Fn(&Applied) -> bool) -> Applied {
        wait(what, async || Some(self.now()).filter(&holds)).await
    }
}

async fn subscribe(
    mut inbound: Streaming<xds::DeltaDiscoveryResponse>,
    outbound: mpsc::Sender<xds::DeltaDiscoveryRequest>,
    applied: Arc<Mutex<Applied>>,
    refuse: Arc<Mutex<Option<(String, String)>>>,
    mute: Arc<Mutex<bool>>,
) {
    loop {
        let response = match inbound.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return,
            Err(status) => return applied.lock().unwrap().ended = Some(status.message().to_owned()),
        };
        let refusal = refuse.lock().unwrap().clone();
        let refusal = refusal.filter(|(name, _)| response.resources.iter().any(|r| r.name == *name));
        let verdict = xds::DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: refusal.map(|(_, message)| xds::Status { code: 3, message, details: vec![] }),
            ..Default::default()
        };
        while *mute.lock().unwrap() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if verdict.error_detail.is_none() {
            apply(&mut applied.lock().unwrap(), response);
        }
        if outbound.send(verdict).await.is_err() {
            return;
        }
    }
}

fn apply(applied: &mut Applied, response: xds::DeltaDiscoveryResponse) {
    let is_table = response.type_url == xds::ENDPOINT_TABLE_TYPE;
    let letter = if is_table { 'T' } else { 'R' };
    applied.version = response.system_version_info;
    for resource in response.resources {
        let body = resource.resource.unwrap().value;
        let name = resource.name;
        applied.log.push(format!("{letter}+{name}"));
        applied.versions.insert((response.type_url.clone(), name.clone()), resource.version);
        if is_table {
            applied.tables.insert(name, v1::EndpointTable::decode(&body[..]).unwrap());
        } else {
            applied.routes.insert(name, v1::ModelRoute::decode(&body[..]).unwrap());
        }
    }
    for name in response.removed_resources {
        applied.log.push(format!("{letter}-{name}"));
        applied.versions.remove(&(response.type_url.clone(), name.clone()));
        if is_table { drop(applied.tables.remove(&name)) } else { drop(applied.routes.remove(&name)) }
    }
    let mut targets = applied.routes.values().flat_map(|route| &route.targets);
    applied.dangling |= targets.any(|target| !applied.tables.contains_key(&target.pool));
}
