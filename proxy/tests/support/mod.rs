//! A gateway in this process, engines that follow a script, and a client that sees every byte.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)] // test code, shared by several test binaries

pub mod daemon;
pub mod tls;
pub mod watched;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use penstock_config::proxy::ProxyConfig;
use penstock_proto::{v1, xds};
use penstock_proxy::{
    gateway::Gateway,
    listener::{self, Listener},
    telemetry::access_log,
    xds::state::XdsState,
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Anything that takes longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A gateway that routes the model "m" to some engines.
pub struct Proxy {
    pub address: SocketAddr,
    pub gateway: Arc<Gateway>,
    /// Where its listeners listen, by name.
    pub listeners: BTreeMap<String, SocketAddr>,
    /// The certificates of those with TLS.
    pub watched: Vec<listener::reload::Watched>,
}

impl Proxy {
    pub fn start(config: ProxyConfig, engines: &[SocketAddr]) -> Self {
        Self::start_on(config, &state(engines))
    }

    /// A gateway that knows this state.
    pub fn start_on(config: ProxyConfig, state: &XdsState) -> Self {
        let mut gateway = Gateway::new(config.clone()).expect("valid settings");
        if config.telemetry.access_log != "stdout" {
            let log =
                access_log::open(&config.telemetry, &gateway.metrics).expect("a log that can be opened");
            gateway.log_to(log);
        }
        let gateway = Arc::new(gateway);
        gateway.table.apply(state);
        let runtime = listener::runtime(&config.public);
        let (mut listeners, mut watched) = (BTreeMap::new(), Vec::new());
        for (name, settings) in config.client_listeners() {
            let socket = listener::bind(&name, "127.0.0.1:0").expect("a free port");
            let (open, certificates) = Listener::open(&name, settings, &socket).expect("a listener");
            listeners.insert(name, open.address);
            watched.extend(certificates);
            runtime.get_handle().spawn(listener::serve(Arc::clone(&gateway), open, socket));
        }
        // Pingora keeps the handles of such runtimes by thread id, and ids are used again: one that ended would be taken for
        // the next one's. A process has one for life; these live as long as the test binary.
        std::mem::forget(runtime);
        let address = listeners["public"];
        Self { address, gateway, listeners, watched }
    }

    /// Routes the model "m" to these engines from now on.
    pub fn route_to(&self, engines: &[SocketAddr]) {
        self.gateway.table.apply(&state(engines));
    }

    /// Sends `request` on a connection of its own and reads until the gateway closes it.
    pub async fn exchange(&self, request: &[u8]) -> String {
        let mut client = Client::connect(self.address).await;
        client.send(request).await;
        client.read_to_end().await
    }

    /// Waits until nothing is under way any more, at the gateway and at each endpoint.
    pub async fn settles(&self) {
        eventually("nothing is under way", || {
            let idle = self
                .gateway
                .table
                .load()
                .pools
                .values()
                .flat_map(|p| &p.endpoints)
                .all(|e| e.inflight() == 0);
            idle && self.gateway.lifecycle.inflight() == 0 && self.gateway.metrics.inflight.get() == 0
        })
        .await;
    }
}

/// Tables in which "m" is served by endpoints "e0", "e1" and so on.
pub fn state(engines: &[SocketAddr]) -> XdsState {
    fleet(vec![table("m", engines)], vec![route("m", &[("m", 1)], &[])])
}

/// The engines of a pool, as `e0`, `e1`, and so on.
pub fn table(pool: &str, engines: &[SocketAddr]) -> v1::EndpointTable {
    let endpoint = |(i, address): (usize, &SocketAddr)| v1::Endpoint {
        id: format!("e{i}"),
        address: address.to_string(),
        generation: 1,
        state: v1::EndpointState::Ready.into(),
        ..Default::default()
    };
    v1::EndpointTable {
        pool: pool.into(),
        endpoints: engines.iter().enumerate().map(endpoint).collect(),
        ..Default::default()
    }
}

/// A route to deployments, by their names and weights.
pub fn route(model: &str, targets: &[(&str, u32)], fallbacks: &[&str]) -> v1::ModelRoute {
    let target = |(pool, weight): &(&str, u32)| v1::RouteTarget {
        pool: (*pool).into(),
        served_model: (*pool).into(),
        weight: *weight,
        adapter: String::new(),
    };
    v1::ModelRoute {
        model: model.into(),
        targets: targets.iter().map(target).collect(),
        fallbacks: fallbacks.iter().map(|name| (*name).into()).collect(),
        created_unix_s: 7,
        ..Default::default()
    }
}

/// What a control plane that has these would tell.
pub fn fleet(tables: Vec<v1::EndpointTable>, routes: Vec<v1::ModelRoute>) -> XdsState {
    let resource = |type_url: &str, name: String, value: Vec<u8>| xds::Resource {
        name,
        version: "1".into(),
        resource: Some(xds::Any { type_url: type_url.into(), value }),
        ..Default::default()
    };
    let tables = tables
        .iter()
        .map(|table| resource(xds::ENDPOINT_TABLE_TYPE, table.pool.clone(), table.encode_to_vec()));
    let routes = routes
        .iter()
        .map(|route| resource(xds::MODEL_ROUTE_TYPE, route.model.clone(), route.encode_to_vec()));
    let response = |type_url: &str, resources: Vec<xds::Resource>| xds::DeltaDiscoveryResponse {
        type_url: type_url.into(),
        system_version_info: "1.1".into(),
        nonce: "1".into(),
        resources,
        ..Default::default()
    };
    XdsState::default()
        .apply(&response(xds::ENDPOINT_TABLE_TYPE, tables.collect()))
        .and_then(|state| state.apply(&response(xds::MODEL_ROUTE_TYPE, routes.collect())))
        .expect("a good state")
}

/// What an engine does with a request, in order.
#[derive(Debug, Clone)]
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits until the gateway closes the connection.
    UntilClosed,
    /// Closes the connection.
    Close,
    /// Closes it with a reset.
    Reset,
    /// Passes some time.
    Pause(Duration),
}

/// A request as an engine saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub head: String,
    pub body: Vec<u8>,
    /// Requests that came before it on its connection.
    pub before: usize,
}

/// An engine that follows a script.
pub struct Engine {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    closed_at: Arc<Mutex<Vec<Instant>>>,
    pub connections: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Engine {
    /// `script` gives the steps for the n-th request.
    pub async fn start(script: impl Fn(usize) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::replying(move |number, _| script(number)).await
    }

    /// The same with a look at the request.
    pub async fn replying(script: impl Fn(usize, &Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::replying_at("127.0.0.1:0", script).await
    }

    /// The same at an address.
    pub async fn replying_at(
        address: &str,
        script: impl Fn(usize, &Seen) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, closed_at) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<Mutex<Vec<Instant>>>::default());
        let connections = Arc::<AtomicUsize>::default();
        let script = Arc::new(script);
        let mut tasks = JoinSet::new();
        let (s, c, n) = (Arc::clone(&seen), Arc::clone(&closed_at), Arc::clone(&connections));
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                n.fetch_add(1, SeqCst);
                open.spawn(converse(stream, Arc::clone(&s), Arc::clone(&c), Arc::clone(&script)));
            }
        });
        Self { address, seen, closed_at, connections, _tasks: tasks }
    }

    /// An engine that answers every request with `answer`.
    pub async fn answering(answer: String) -> Self {
        Self::start(move |_| vec![Step::Send(answer.clone().into_bytes())]).await
    }

    /// Requests that were no probes.
    pub fn served(&self) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| seen.head.starts_with("post")).count()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// When `UntilClosed` steps ended.
    pub fn closed_at(&self) -> Vec<Instant> {
        self.closed_at.lock().unwrap().clone()
    }
}

async fn converse(
    mut stream: TcpStream,
    seen: Arc<Mutex<Vec<Seen>>>,
    closed_at: Arc<Mutex<Vec<Instant>>>,
    script: Arc<impl Fn(usize, &Seen) -> Vec<Step>>,
) {
    let mut before = 0;
    while let Some(mut request) = read_request(&mut stream).await {
        request.before = before;
        before += 1;
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push(request.clone());
            seen.len() - 1
        };
        for step in script(number, &request) {
            match step {
                Step::Send(bytes) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Step::UntilClosed => {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).await.ok();
                    closed_at.lock().unwrap().push(Instant::now());
                    return;
                }
                Step::Close => return,
                Step::Reset => {
                    stream.set_zero_linger().unwrap();
                    return;
                }
                Step::Pause(time) => tokio::time::sleep(time).await,
            }
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap().to_ascii_lowercase();
    let length: usize = head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
        .map_or(0, |l| l.trim().parse().unwrap());
    let mut body = bytes[head_end..].to_vec();
    while body.len() < length {
        if stream.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Seen { head, body, before: 0 })
}

/// A client that sees every byte.
pub struct Client {
    pub stream: TcpStream,
    pub received: Vec<u8>,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), received: Vec::new() }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Reads until `text` has come.
    pub async fn read_until(&mut self, text: &str) -> String {
        let found = async {
            while !contains(&self.received, text.as_bytes()) {
                if self.stream.read_buf(&mut self.received).await.unwrap() == 0 {
                    panic!("closed before {text:?}: {}", String::from_utf8_lossy(&self.received));
                }
            }
        };
        if tokio::time::timeout(PATIENCE, found).await.is_err() {
            panic!("no {text:?} in {:?}", String::from_utf8_lossy(&self.received));
        }
        String::from_utf8_lossy(&self.received).into_owned()
    }

    pub async fn read_to_end(&mut self) -> String {
        let read = self.stream.read_to_end(&mut self.received);
        // A reset after the answer is an end, too.
        tokio::time::timeout(PATIENCE, read).await.expect("the gateway closes the connection").ok();
        String::from_utf8_lossy(&self.received).into_owned()
    }

    /// Reads one answer with a Content-Length and forgets it.
    pub async fn read_answer(&mut self) -> String {
        self.read_until("\r\n\r\n").await;
        let text = String::from_utf8_lossy(&self.received).into_owned();
        let (head, _) = text.split_once("\r\n\r\n").unwrap();
        let length: usize = head
            .to_ascii_lowercase()
            .lines()
            .find_map(|l| l.strip_prefix("content-length: ").map(|l| l.trim().parse().unwrap()))
            .expect("a length");
        let end = head.len() + 4 + length;
        while self.received.len() < end {
            assert!(self.stream.read_buf(&mut self.received).await.unwrap() > 0, "closed inside an answer");
        }
        let rest = self.received.split_off(end);
        String::from_utf8(std::mem::replace(&mut self.received, rest)).unwrap()
    }
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Ejections for a reason.
pub fn ejections(proxy: &Proxy, reason: &str) -> u64 {
    proxy.gateway.metrics.ejections.with_label_values(&[reason]).get()
}

/// Waits for a condition, not for luck.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not so within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A POST with a length; the connection closes after the answer.
pub fn post(path: &str, body: &str) -> Vec<u8> {
    post_with(path, "connection: close\r\n", body)
}

pub fn post_with(path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

pub const CHAT: &str = "/v1/chat/completions";

pub fn chat(stream: bool) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"stream":{stream},"model":"m"}}"#)
}

pub fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

pub const SSE_HEAD: &str = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

pub fn delta(text: &str) -> String {
    format!("data: {{\"id\":\"c\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
}

/// A whole streamed answer.
pub fn sse(texts: &[&str]) -> String {
    let events: String = texts.iter().map(|t| chunk(&delta(t))).collect();
    format!("{SSE_HEAD}{events}{}0\r\n\r\n", chunk("data: [DONE]\n\n"))
}

pub fn json_answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// An address at which nobody listens.
pub async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}
