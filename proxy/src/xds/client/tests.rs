use std::{net::SocketAddr, pin::Pin, time::Duration};

use penstock_proto::{
    Version, v1,
    xds::{
        Any, DiscoveryRequest, DiscoveryResponse, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use prost::Message;
use tokio::{io::copy_bidirectional, net::TcpListener, net::TcpStream, task::JoinHandle};
use tokio_stream::wrappers::{ReceiverStream as Responses, TcpListenerStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Streaming};

use super::*;

type ResponseSender = mpsc::Sender<Result<DeltaDiscoveryResponse, tonic::Status>>;

/// One stream that a client opened, in the hands of the test.
struct Stream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: ResponseSender,
}

/// An ADS server that does nothing by itself: it hands each stream to the test.
struct Ads(mpsc::Sender<Stream>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Pin<Box<Responses<Result<DiscoveryResponse, tonic::Status>>>>;
    type DeltaAggregatedResourcesStream = Responses<Result<DeltaDiscoveryResponse, tonic::Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, tonic::Status> {
        Err(tonic::Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, tonic::Status> {
        let (responses, outbound) = mpsc::channel(16);
        let stream = Stream { requests: request.into_inner(), responses };
        self.0.send(stream).await.map_err(|_| tonic::Status::unavailable("the test is over"))?;
        Ok(Response::new(Responses::new(outbound)))
    }
}

struct Server {
    address: SocketAddr,
    streams: mpsc::Receiver<Stream>,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(16);
        let service = AggregatedDiscoveryServiceServer::new(Ads(sender));
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serving.await.expect("served") });
        Self { address, streams, _task: AbortOnDropHandle::new(task) }
    }

    async fn stream(&mut self) -> Stream {
        soon(self.streams.recv()).await.expect("a stream")
    }
}

impl Stream {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        soon(self.requests.message()).await.expect("open").expect("a request")
    }

    /// Both subscriptions that begin a session.
    async fn subscriptions(&mut self) -> [DeltaDiscoveryRequest; 2] {
        let both = [self.request().await, self.request().await];
        assert_eq!([&both[0].type_url, &both[1].type_url], [ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE]);
        for subscription in &both {
            assert_eq!(subscription.resource_names_subscribe, ["*"]);
            assert_eq!(subscription.response_nonce, "");
            let node = subscription.node.as_ref().expect("a node");
            assert_eq!(
                (node.id.as_str(), node.locality.as_ref().expect("set").zone.as_str()),
                ("proxy-1", "zone-1")
            );
        }
        both
    }

    /// Sends a response and gives the answer to it.
    async fn send(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let (nonce, type_url) = (response.nonce.clone(), response.type_url.clone());
        self.responses.send(Ok(response)).await.expect("open");
        let answer = self.request().await;
        assert_eq!((&answer.response_nonce, &answer.type_url), (&nonce, &type_url));
        assert!(answer.resource_names_subscribe.is_empty() && answer.initial_resource_versions.is_empty());
        answer
    }

    /// Tables and routes of one model, both accepted.
    async fn serve(&mut self, version: &str, endpoints: &[&str]) {
        assert_eq!(self.send(tables(version, endpoints)).await.error_detail, None);
        assert_eq!(self.send(routes(version)).await.error_detail, None);
    }
}

fn response(type_url: &str, version: &str, message: &impl Message) -> DeltaDiscoveryResponse {
    let any = Any { type_url: type_url.to_owned(), value: message.encode_to_vec() };
    DeltaDiscoveryResponse {
        system_version_info: version.to_owned(),
        type_url: type_url.to_owned(),
        nonce: format!("nonce-{version}-{type_url}"),
        resources: vec![Resource {
            name: "m".to_owned(),
            version: version.to_owned(),
            resource: Some(any),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn tables(version: &str, addresses: &[&str]) -> DeltaDiscoveryResponse {
    let endpoint = |address: &&str| v1::Endpoint {
        id: format!("id-{address}"),
        address: (*address).to_owned(),
        state: v1::EndpointState::Ready as i32,
        ..Default::default()
    };
    let table = v1::EndpointTable {
        pool: "m".to_owned(),
        endpoints: addresses.iter().map(endpoint).collect(),
        ..Default::default()
    };
    response(ENDPOINT_TABLE_TYPE, version, &table)
}

fn routes(version: &str) -> DeltaDiscoveryResponse {
    let route = v1::ModelRoute { model: "m".to_owned(), pool: "m".to_owned(), ..Default::default() };
    response(MODEL_ROUTE_TYPE, version, &route)
}

/// A running client and what it publishes.
struct Running {
    states: watch::Receiver<Arc<XdsState>>,
    status: Arc<XdsStatus>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

fn quick(endpoints: &[SocketAddr]) -> XdsSettings {
    XdsSettings {
        endpoints: endpoints.iter().map(ToString::to_string).collect(),
        node_id: "proxy-1".to_owned(),
        zone: "zone-1".to_owned(),
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        ..Default::default()
    }
}

fn start(settings: XdsSettings) -> Running {
    start_client(XdsClient::new(settings).expect("good settings"))
}

fn start_client(client: XdsClient) -> Running {
    let (cell, states) = watch::channel(Arc::default());
    let (status, shutdown) = (Arc::<XdsStatus>::default(), CancellationToken::new());
    let task = tokio::spawn(client.run(cell, Arc::clone(&status), shutdown.clone()));
    Running { states, status, shutdown, task }
}

impl Running {
    /// Waits for a state of this version and gives its endpoints' addresses.
    async fn addresses_at(&mut self, version: &str) -> Vec<String> {
        let version: Version = version.parse().expect("a version");
        let wait = self.states.wait_for(|state| state.version() == version && state.is_complete());
        let state = soon(wait).await.expect("running");
        state.table("m").expect("there").endpoints.iter().map(|endpoint| endpoint.address.clone()).collect()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        soon(self.task).await.expect("ended in peace");
    }
}

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("in time")
}

async fn until(condition: impl Fn() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// A client that wants loads, and those that it heard of.
fn start_with_loads(settings: XdsSettings) -> (Running, mpsc::Receiver<(String, u32)>) {
    let (heard, loads) = mpsc::channel(16);
    let sink: LoadSink =
        Box::new(move |name, load| heard.try_send((name.to_owned(), load.running)).expect("room"));
    (start_client(XdsClient::new(settings).expect("good settings").with_loads(sink)), loads)
}

#[tokio::test]
async fn loads_are_asked_for_once_the_state_is_complete_and_change_nothing_of_it() {
    let mut server = Server::start().await;
    let (mut running, mut loads) = start_with_loads(quick(&[server.address]));
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.5", &["127.0.0.1:1"]).await;
    assert_eq!(stream.request().await.type_url, ENGINE_LOAD_TYPE);
    running.addresses_at("1.5").await;
    running.states.mark_unchanged();
    let load = v1::EngineLoad { running: 3, ..Default::default() };
    let news = response(ENGINE_LOAD_TYPE, "1.900", &load);
    assert_eq!(stream.send(news).await.error_detail, None);
    assert_eq!(soon(loads.recv()).await, Some(("m".to_owned(), 3)));
    let stale = response(ENGINE_LOAD_TYPE, "0.901", &load);
    assert!(stream.send(stale).await.error_detail.is_some_and(|e| e.message.contains("term 0")));
    assert!(loads.try_recv().is_err());
    assert!(!running.states.has_changed().expect("running"), "no state came of it");
    // Nor does the number of a load stand in the way of the next table.
    assert_eq!(stream.send(tables("1.6", &["127.0.0.1:2"])).await.error_detail, None);
    assert_eq!(running.addresses_at("1.6").await, ["127.0.0.1:2"]);
    running.stop().await;
}

#[tokio::test]
async fn a_control_plane_without_loads_is_asked_without_and_its_state_is_kept() {
    let mut server = Server::start().await;
    let (mut running, _loads) = start_with_loads(quick(&[server.address]));
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.5", &["127.0.0.1:1"]).await;
    let asked = stream.request().await;
    let refusal = format!("resources of type {:?} are not served here; others are", asked.type_url);
    stream.responses.send(Err(tonic::Status::invalid_argument(refusal))).await.expect("open");
    let mut stream = server.stream().await;
    assert_eq!(stream.subscriptions().await[0].initial_resource_versions.len(), 1, "it is resumed");
    assert_eq!(stream.send(tables("1.6", &["127.0.0.1:2"])).await.error_detail, None);
    assert_eq!(running.addresses_at("1.6").await, ["127.0.0.1:2"], "and no loads were asked for again");
    running.stop().await;
}

#[tokio::test]
async fn good_responses_are_acknowledged_and_published_once_complete() {
    let mut server = Server::start().await;
    let mut client = start(quick(&[server.address]));
    let mut stream = server.stream().await;
    for subscription in stream.subscriptions().await {
        assert!(subscription.initial_resource_versions.is_empty(), "nothing is held yet");
    }
    assert_eq!(stream.send(tables("1.1", &["127.0.0.1:1"])).await.error_detail, None);
    assert!(!client.states.has_changed().expect("running"), "half a state is not published");
    assert_eq!(stream.send(routes("1.1")).await.error_detail, None);
    assert_eq!(client.addresses_at("1.1").await, ["127.0.0.1:1"]);
    assert_eq!(stream.send(tables("1.2", &["127.0.0.1:1", "127.0.0.1:2"])).await.error_detail, None);
    assert_eq!(client.addresses_at("1.2").await.len(), 2);

    let view = client.status.view();
    assert!(view.connected && view.last_response_age.is_some());
    assert_eq!((view.acks, view.nacks, view.reconnects), (3, 0, 0));
    assert_eq!((view.version, view.last_error), (Some("1.2".parse().expect("a version")), None));
    assert_eq!(view.endpoint, server.address.to_string());
    client.stop().await;
}

#[tokio::test]
async fn a_bad_response_is_refused_with_its_reasons_and_the_last_good_state_stays() {
    let mut server = Server::start().await;
    let mut client = start(quick(&[server.address]));
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.1", &["127.0.0.1:1"]).await;
    client.addresses_at("1.1").await;
    client.states.mark_unchanged();

    let refused = stream.send(tables("1.2", &["nowhere", "127.0.0.1:0"])).await.error_detail.expect("a NACK");
    assert_eq!(refused.code, Code::InvalidArgument as i32);
    for reason in ["address \"nowhere\" is not host:port", "address \"127.0.0.1:0\" is not host:port"] {
        assert!(refused.message.contains(reason), "{}", refused.message);
    }
    assert!(!client.states.has_changed().expect("running"));
    assert_eq!(client.addresses_at("1.1").await, ["127.0.0.1:1"]);
    let view = client.status.view();
    assert_eq!((view.nacks, view.last_nack), (1, Some(refused.message)));

    assert_eq!(stream.send(tables("1.3", &["127.0.0.1:3"])).await.error_detail, None, "the stream goes on");
    assert_eq!(client.addresses_at("1.3").await, ["127.0.0.1:3"]);
    client.stop().await;
}

#[tokio::test]
async fn what_was_refused_is_asked_for_again_in_a_new_session() {
    let mut server = Server::start().await;
    let settings = XdsSettings { resync_after: Duration::from_millis(30), ..quick(&[server.address]) };
    let mut client = start(settings);
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.1", &["127.0.0.1:1"]).await;
    assert!(stream.send(tables("1.2", &["nowhere"])).await.error_detail.is_some());

    let mut stream = server.stream().await;
    let [tables_wanted, routes_wanted] = stream.subscriptions().await;
    assert_eq!(tables_wanted.initial_resource_versions["m"], "1.1", "what is held, not what was refused");
    assert_eq!(routes_wanted.initial_resource_versions["m"], "1.1");
    assert_eq!(stream.send(tables("1.2", &["127.0.0.1:2"])).await.error_detail, None);
    assert_eq!(client.addresses_at("1.2").await, ["127.0.0.1:2"]);
    client.stop().await;
}

#[tokio::test]
async fn a_lost_session_changes_nothing_and_is_resumed() {
    let mut server = Server::start().await;
    let mut client = start(quick(&[server.address]));
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.1", &["127.0.0.1:1"]).await;
    client.addresses_at("1.1").await;

    for (round, failure) in [Some(tonic::Status::unavailable("restarting")), None].into_iter().enumerate() {
        if let Some(failure) = failure {
            stream.responses.send(Err(failure)).await.expect("open");
        }
        drop(stream);
        stream = server.stream().await;
        let [tables_wanted, routes_wanted] = stream.subscriptions().await;
        assert_eq!(tables_wanted.initial_resource_versions["m"], "1.1");
        assert_eq!(routes_wanted.initial_resource_versions["m"], "1.1");
        assert_eq!(client.addresses_at("1.1").await, ["127.0.0.1:1"], "still serving");
        assert_eq!(client.status.view().reconnects, round as u64 + 1);
    }
    stream.responses.send(Ok(tables("1.2", &["127.0.0.1:2"]))).await.expect("open");
    assert_eq!(client.addresses_at("1.2").await, ["127.0.0.1:2"]);
    assert!(client.status.view().connected);
    client.stop().await;
}

#[tokio::test]
async fn the_next_control_plane_is_tried_when_one_is_gone() {
    // Bound and dropped: nobody listens there.
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("bound").local_addr().expect("bound");
    let (mut one, mut two) = (Server::start().await, Server::start().await);
    let mut client = start(quick(&[gone, one.address, two.address]));
    let mut version = 0;
    // Whichever comes first, a lost one is followed by the other; the gone one between them is passed over.
    for _ in 0..4 {
        let mut stream = soon(async {
            tokio::select! {
                stream = one.streams.recv() => stream,
                stream = two.streams.recv() => stream,
            }
        })
        .await
        .expect("a stream");
        stream.subscriptions().await;
        version += 1;
        stream.serve(&format!("1.{version}"), &["127.0.0.1:1"]).await;
        client.addresses_at(&format!("1.{version}")).await;
    }
    client.stop().await;
}

#[tokio::test]
async fn a_control_plane_that_is_not_there_is_waited_for() {
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("bound").local_addr().expect("bound");
    let client = start(quick(&[gone]));
    until(|| client.status.view().reconnects >= 3).await;
    let view = client.status.view();
    assert!(!view.connected);
    assert!(
        view.last_error.as_deref().is_some_and(|error| error.contains("refused")),
        "{:?}",
        view.last_error
    );
    client.stop().await;
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_noticed_by_pings() {
    let mut server = Server::start().await;
    // A cable that can be cut: it goes on accepting, and forwards nothing any more.
    let cable = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = cable.local_addr().expect("bound");
    let (cut, upstream) = (CancellationToken::new(), server.address);
    let forward = {
        let cut = cut.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((mut inbound, _)) = cable.accept().await {
                let mut outbound = TcpStream::connect(upstream).await.expect("connected");
                tokio::select! {
                    _ = copy_bidirectional(&mut inbound, &mut outbound) => {}
                    () = cut.cancelled() => {}
                }
                kept.push((inbound, outbound));
            }
        }))
    };
    let settings = XdsSettings {
        keepalive_interval: Duration::from_millis(50),
        keepalive_timeout: Duration::from_millis(50),
        connect_timeout: Duration::from_millis(100),
        ..quick(&[address])
    };
    let mut client = start(settings);
    let mut stream = server.stream().await;
    stream.subscriptions().await;
    stream.serve("1.1", &["127.0.0.1:1"]).await;
    client.addresses_at("1.1").await;
    cut.cancel();
    until(|| !client.status.view().connected).await;
    until(|| client.status.view().reconnects >= 2).await;
    assert_eq!(client.addresses_at("1.1").await, ["127.0.0.1:1"]);
    client.stop().await;
    drop(forward);
}

#[test]
fn settings_that_cannot_work_are_refused_in_words() {
    let with = |endpoints: &[&str]| XdsSettings {
        endpoints: endpoints.iter().map(|&endpoint| endpoint.to_owned()).collect(),
        node_id: "p".to_owned(),
        ..Default::default()
    };
    for good in ["127.0.0.1:18091", "control-plane:18091", "http://[::1]:18091", "http://cp:1/"] {
        assert!(XdsClient::new(with(&[good])).is_ok(), "{good}");
    }
    for bad in ["", "cp", "https://cp:1", "cp:0", "http://cp", "http://cp:1/x", "a b:1", "unix:///x"] {
        let error = XdsClient::new(with(&["cp:1", bad])).expect_err(bad);
        assert_eq!(error, XdsSettingsError::BadEndpoint(bad.to_owned()));
    }
    assert_eq!(XdsClient::new(with(&[])).expect_err("none"), XdsSettingsError::NoEndpoints);
    let nameless = XdsSettings { node_id: String::new(), ..with(&["cp:1"]) };
    assert_eq!(XdsClient::new(nameless).expect_err("none"), XdsSettingsError::NoNodeId);
}

#[test]
fn pauses_grow_to_their_limit_and_are_spread() {
    let (min, max) = (Duration::from_millis(100), Duration::from_secs(5));
    assert_eq!(backoff(0, min, max, 0.0), Duration::from_millis(50));
    assert_eq!(backoff(0, min, max, 1.0), min);
    assert_eq!(backoff(2, min, max, 1.0), Duration::from_millis(400));
    for rounds in [10, 31, 32, u32::MAX] {
        assert_eq!(backoff(rounds, min, max, 1.0), max);
        assert_eq!(backoff(rounds, min, max, 0.0), max / 2);
    }
    assert_eq!(cut("水水".to_owned(), 5), "水");
}
