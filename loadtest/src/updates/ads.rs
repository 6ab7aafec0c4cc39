//! A scripted xDS server: the whole fleet once, then endpoints that begin and end to drain, and what the proxy says to it. As
//! the control plane it has one response outstanding at most.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use penstock_proto::{
    v1,
    xds::{
        Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE, Resource,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use prost::Message;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Options, report::Convergence};

/// How long the proxy may take to answer what it was sent.
const PATIENCE: Duration = Duration::from_secs(60);

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// The server, and the fleet it tells of.
pub(crate) struct Ads {
    pub(crate) address: SocketAddr,
    log: Arc<Log>,
    fleet: tokio::sync::Mutex<Fleet>,
    revision: AtomicU64,
    /// The proxy's present subscription.
    subscriber: watch::Receiver<Option<Responses>>,
    interval: Duration,
    per_second: f64,
}

/// What was pushed, and when the proxy had it.
#[derive(Debug, Default)]
pub(super) struct Log {
    pushes: Mutex<Vec<Push>>,
    refused: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Push {
    revision: u64,
    /// When each of its updates was made.
    made: Vec<Instant>,
    acked: Option<Instant>,
    in_use: Option<Instant>,
}

impl Log {
    fn with<T>(&self, change: impl FnOnce(&mut Vec<Push>) -> T) -> T {
        change(&mut self.pushes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn acked(&self, revision: u64) {
        let now = Instant::now();
        self.with(|pushes| {
            if let Some(push) = pushes.iter_mut().rev().find(|push| push.revision == revision) {
                push.acked.get_or_insert(now);
            }
        });
    }

    /// The proxy was seen to use this revision.
    pub(super) fn in_use(&self, revision: u64, now: Instant) {
        self.with(|pushes| {
            let not_yet = pushes.iter_mut().rev().take_while(|push| push.in_use.is_none());
            not_yet.filter(|push| push.revision <= revision).for_each(|push| push.in_use = Some(now));
        });
    }

    fn unanswered(&self) -> usize {
        self.with(|pushes| pushes.iter().filter(|push| push.acked.is_none()).count())
    }

    fn refusal(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long updates took, each from its making.
    pub(super) fn convergence(&self) -> Convergence {
        let mut times = Convergence::default();
        self.with(|pushes| {
            times.pushes = pushes.len() as u64;
            for push in pushes.iter() {
                for made in &push.made {
                    times.note(push.acked.map(|at| at - *made), push.in_use.map(|at| at - *made));
                }
            }
        });
        times
    }
}

/// Every endpoint, by pool.
struct Fleet {
    tables: Vec<v1::EndpointTable>,
    rng: fastrand::Rng,
}

impl Fleet {
    fn new(options: &Options, engines: &[SocketAddr]) -> Self {
        let mut tables: Vec<v1::EndpointTable> = (0..options.pools)
            .map(|pool| v1::EndpointTable { pool: Options::pool(pool), ..Default::default() })
            .collect();
        let count = tables.len();
        for (number, engine) in (0..options.endpoints).zip(engines.iter().cycle()) {
            if let Some(table) = tables.get_mut(number as usize % count) {
                table.endpoints.push(v1::Endpoint {
                    id: format!("{}-{number}", table.pool),
                    address: engine.to_string(),
                    generation: 1,
                    state: v1::EndpointState::Ready.into(),
                    zone: "zone-a".into(),
                    node_id: format!("node-{}", number / 8),
                    ..Default::default()
                });
            }
        }
        Self { tables, rng: fastrand::Rng::with_seed(7) }
    }

    /// One endpoint begins to drain, or ends to; the number of its pool.
    fn change(&mut self) -> usize {
        let pool = self.rng.usize(..self.tables.len());
        if let Some(table) = self.tables.get_mut(pool)
            && let Some(endpoint) = self.rng.choice(&mut table.endpoints)
        {
            let next = match endpoint.state() {
                v1::EndpointState::Ready => v1::EndpointState::Draining,
                _ => v1::EndpointState::Ready,
            };
            endpoint.set_state(next);
        }
        pool
    }

    fn tables(&self, pools: impl IntoIterator<Item = usize>, revision: u64) -> Vec<Resource> {
        let tables = pools.into_iter().filter_map(|pool| self.tables.get(pool));
        tables.map(|table| resource(&table.pool, ENDPOINT_TABLE_TYPE, revision, table)).collect()
    }

    fn routes(&self, revision: u64) -> Vec<Resource> {
        let route = |table: &v1::EndpointTable| {
            let pool = table.pool.clone();
            let route = v1::ModelRoute { model: pool.clone(), pool, ..Default::default() };
            resource(&table.pool, MODEL_ROUTE_TYPE, revision, &route)
        };
        self.tables.iter().map(route).collect()
    }
}

fn resource(name: &str, type_url: &str, revision: u64, message: &impl Message) -> Resource {
    let value = message.encode_to_vec();
    Resource {
        name: name.into(),
        version: revision.to_string(),
        resource: Some(Any { type_url: type_url.into(), value }),
        ..Default::default()
    }
}

fn response(type_url: &str, revision: u64, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: format!("1.{revision}"),
        type_url: type_url.into(),
        nonce: format!("{revision} {type_url}"),
        resources,
        ..Default::default()
    }
}

impl Ads {
    /// Listens; the server ends with `tasks`.
    pub(crate) async fn start(
        options: &Options,
        engines: &[SocketAddr],
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| format!("cannot listen: {e}"))?;
        let address = listener.local_addr().map_err(|e| e.to_string())?;
        let (subscribers, subscriber) = watch::channel(None);
        let log = Arc::<Log>::default();
        let service = Service { log: Arc::clone(&log), subscribers };
        tasks.spawn(async move {
            let server = tonic::transport::Server::builder()
                .add_service(AggregatedDiscoveryServiceServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener));
            // Its end is seen by whoever waits for an answer.
            server.await.unwrap_or_default();
        });
        let per_second = f64::from(options.updates_per_minute) / 60.0;
        let each = Duration::from_secs_f64(1.0 / per_second);
        Ok(Self {
            address,
            log,
            fleet: tokio::sync::Mutex::new(Fleet::new(options, engines)),
            revision: AtomicU64::new(0),
            subscriber,
            interval: each.max(Duration::from_millis(options.coalesce_ms)),
            per_second,
        })
    }

    pub(super) fn log(&self) -> Arc<Log> {
        Arc::clone(&self.log)
    }

    /// The last that was pushed.
    pub(super) fn revision(&self) -> u64 {
        self.revision.load(Relaxed)
    }

    /// Waits for the proxy and tells it the whole fleet.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        let mut subscriber = self.subscriber.clone();
        let subscribed = timeout(PATIENCE, subscriber.wait_for(Option::is_some)).await;
        subscribed.map_err(|_| "the proxy did not subscribe")?.map_err(|e| e.to_string())?;
        let fleet = self.fleet.lock().await;
        self.revision.store(1, Relaxed);
        self.send(response(ENDPOINT_TABLE_TYPE, 1, fleet.tables(0..fleet.tables.len(), 1))).await?;
        self.send(response(MODEL_ROUTE_TYPE, 1, fleet.routes(1))).await
    }

    async fn send(&self, response: DeltaDiscoveryResponse) -> Result<(), String> {
        if let Some(why) = self.log.refusal() {
            return Err(format!("the proxy refused an update: {why}"));
        }
        let responses = self.subscriber.borrow().clone().ok_or("the proxy is not subscribed")?;
        responses.send(Ok(response)).await.map_err(|_| "the proxy has left".to_owned())
    }

    /// Changes endpoints at the asked rate for `length`; how many were changed.
    pub(super) async fn update_for(&self, length: Duration) -> Result<u64, String> {
        let (began, mut done) = (Instant::now(), 0u64);
        let mut waiting: (Vec<usize>, Vec<Instant>) = Default::default();
        let mut fleet = self.fleet.lock().await;
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let past = began.elapsed().min(length);
            // Each is made when it is due, whether or not the push before was on time.
            let (mut pools, mut made) = (Vec::new(), Vec::new());
            while let due = Duration::from_secs_f64((done + 1) as f64 / self.per_second)
                && due <= past
            {
                pools.push(fleet.change());
                made.push(began + due);
                done += 1;
            }
            waiting.0.append(&mut pools);
            waiting.1.append(&mut made);
            // As the control plane: nothing more while an answer is outstanding; meanwhile changes gather.
            if !waiting.0.is_empty() && self.log.unanswered() == 0 {
                let (mut pools, made) = std::mem::take(&mut waiting);
                pools.sort_unstable();
                pools.dedup();
                let revision = self.revision.fetch_add(1, Relaxed) + 1;
                let push = response(ENDPOINT_TABLE_TYPE, revision, fleet.tables(pools, revision));
                self.log.with(|pushes| pushes.push(Push { revision, made, acked: None, in_use: None }));
                self.send(push).await?;
            }
            if began.elapsed() > length + PATIENCE {
                return Err("the proxy does not answer updates".into());
            }
            if past >= length && waiting.0.is_empty() {
                return Ok(done);
            }
        }
    }

    /// Waits until every push was answered.
    pub(super) async fn settle(&self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while self.log.unanswered() > 0 {
            if Instant::now() > deadline {
                return Err(format!("{} pushes were not answered", self.log.unanswered()));
            }
            sleep(Duration::from_millis(10)).await;
        }
        self.log.refusal().map_or(Ok(()), |why| Err(format!("the proxy refused an update: {why}")))
    }
}

/// The gRPC service: hands each subscription over and notes what the proxy answers.
struct Service {
    log: Arc<Log>,
    subscribers: watch::Sender<Option<Responses>>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Pin<Box<ReceiverStream<Result<DiscoveryResponse, Status>>>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outbound) = mpsc::channel(16);
        let mut requests = request.into_inner();
        let log = Arc::clone(&self.log);
        // Ends with the stream, when the proxy or the server goes.
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if let Some(error) = request.error_detail {
                    *log.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.message);
                }
                let revision = request.response_nonce.split(' ').next().and_then(|r| r.parse().ok());
                if let Some(revision) = revision {
                    log.acked(revision);
                }
            }
        });
        self.subscribers.send_replace(Some(responses));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}
