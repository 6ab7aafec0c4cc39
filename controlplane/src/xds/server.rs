//! The gRPC around [`Session`]: one task per stream, which sleeps until the proxy speaks or a snapshot appears.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES,
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    hub::Subscriber,
    loads::{Answer, LoadSession},
    session::{Heard, Session},
    snapshot::Kind,
};
use crate::core::Core;

/// Responses that may wait for one proxy. One of state and one of loads may be outstanding, so this never fills.
const OUTBOUND: usize = 4;
/// A proxy that opens a stream and asks for nothing for this long is cut off.
const PATIENCE: Duration = Duration::from_secs(30);

type Outbound = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// See the module's text.
#[derive(Clone)]
pub struct AdsService {
    core: Arc<Core>,
}

impl AdsService {
    /// The service as tonic takes it.
    pub fn server(core: Arc<Core>) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(Self { core })
            .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsService {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state-of-the-world xDS is not served; use DeltaAggregatedResources"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = request.remote_addr();
        let (outbound, stream) = mpsc::channel(OUTBOUND);
        self.core.tasks.spawn(run(self.core.clone(), request.into_inner(), outbound, peer));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Runs a stream to its end and tells the proxy why it ended.
async fn run(
    core: Arc<Core>,
    mut inbound: Streaming<DeltaDiscoveryRequest>,
    outbound: Outbound,
    peer: Option<SocketAddr>,
) {
    let ended = match first(&core, &mut inbound).await {
        Ok(Some(request)) => {
            let said = request.node.as_ref();
            let node_id = said.map(|node| node.id.clone()).unwrap_or_default();
            let number = core.hub.enter(Subscriber {
                node_id: node_id.clone(),
                peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
                zone: said
                    .and_then(|node| node.locality.as_ref())
                    .map(|l| l.zone.clone())
                    .unwrap_or_default(),
                agent: said.map(|node| node.user_agent_name.clone()).unwrap_or_default(),
                connected: Instant::now(),
                synced: None,
                tables: Default::default(),
                routes: Default::default(),
            });
            core.metrics.xds_subscribers.inc();
            tracing::info!(node_id, "a proxy subscribed");
            let ended = serve(&core, number, request, &mut inbound, &outbound).await;
            core.hub.leave(number);
            core.metrics.xds_subscribers.dec();
            tracing::info!(node_id, ?ended, "a proxy's subscription ended");
            ended
        }
        Ok(None) => Ok(()),
        Err(status) => Err(status),
    };
    if let Err(status) = ended {
        // A proxy that has gone away needs no reason.
        drop(tokio::time::timeout(PATIENCE, outbound.send(Err(status))).await);
    }
}

/// The request that opens a stream; it must say who calls.
async fn first(
    core: &Core,
    inbound: &mut Streaming<DeltaDiscoveryRequest>,
) -> Result<Option<DeltaDiscoveryRequest>, Status> {
    let first = tokio::select! {
        () = core.stop.cancelled() => return Err(stopping()),
        first = tokio::time::timeout(PATIENCE, inbound.message()) => first,
    };
    let Some(request) = first.map_err(|_| Status::deadline_exceeded("nothing was asked for"))?? else {
        return Ok(None);
    };
    let id = request.node.as_ref().map(|node| node.id.as_str()).unwrap_or_default();
    if id.is_empty() || id.len() > 256 {
        return Err(Status::invalid_argument("the first request must carry a node.id of 1 to 256 bytes"));
    }
    Ok(Some(request))
}

async fn serve(
    core: &Core,
    number: u64,
    first: DeltaDiscoveryRequest,
    inbound: &mut Streaming<DeltaDiscoveryRequest>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let mut session = Session::new(Duration::from_millis(core.config.xds.nack_retry_ms));
    let mut loads = LoadSession::default();
    let mut snapshots = core.hub.subscribe();
    let mut news = tokio::time::interval(Duration::from_millis(core.config.xds.load_push_ms));
    news.set_missed_tick_behavior(MissedTickBehavior::Delay);
    take(core, number, (&mut session, &mut loads), first)?;
    loop {
        // Before the first projection there is nothing to tell: an empty answer would be a lie.
        let snapshot = snapshots.borrow_and_update().clone();
        if snapshot.sequence > 0 {
            if let Some((kind, response)) = session.next(&snapshot, Instant::now()) {
                core.metrics.xds_responses.with_label_values(&[kind.label()]).inc();
                if outbound.send(Ok(response)).await.is_err() {
                    return Ok(());
                }
            }
            core.hub.update(number, |subscriber| {
                subscriber.synced = session.synced();
                subscriber.tables = session.status(Kind::Table).clone();
                subscriber.routes = session.status(Kind::Route).clone();
            });
        }
        let retry = session.retry_at().map(tokio::time::Instant::from_std);
        let retry = async {
            match retry {
                Some(at) => {
                    tokio::time::sleep_until(at.max(tokio::time::Instant::now() + Duration::from_millis(50)))
                        .await
                }
                None => std::future::pending().await,
            }
        };
        tokio::pin!(retry);
        // Until there may be something to say of tables and routes; loads come and go beside it.
        loop {
            tokio::select! {
                () = core.stop.cancelled() => return Err(stopping()),
                message = inbound.message() => {
                    let Some(request) = message? else { return Ok(()) };
                    let of_loads = LoadSession::is_addressed(&request);
                    take(core, number, (&mut session, &mut loads), request)?;
                    if !of_loads {
                        break;
                    }
                }
                changed = snapshots.changed() => {
                    changed.map_err(|_| stopping())?;
                    break;
                }
                () = &mut retry => break,
                _ = news.tick(), if loads.is_due() => {
                    let response = loads.next(&core.loads, core.view().published_term(), Instant::now());
                    if let Some(response) = response {
                        core.metrics.xds_responses.with_label_values(&["engine_load"]).inc();
                        if outbound.send(Ok(response)).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}

fn take(
    core: &Core,
    number: u64,
    (session, loads): (&mut Session, &mut LoadSession),
    request: DeltaDiscoveryRequest,
) -> Result<(), Status> {
    if LoadSession::is_addressed(&request) {
        if let Answer::Nack(reason) = loads.hear(request) {
            core.metrics.xds_nacks.with_label_values(&["engine_load"]).inc();
            tracing::warn!(subscriber = number, reason, "a proxy refused news of loads");
        }
        return Ok(());
    }
    let heard = session.hear(request, Instant::now()).map_err(Status::invalid_argument)?;
    if let Heard::Nack(kind) = heard {
        core.metrics.xds_nacks.with_label_values(&[kind.label()]).inc();
        let reason = &session.status(kind).nack_reason;
        tracing::warn!(subscriber = number, kind = kind.label(), reason, "a proxy refused a response");
    }
    Ok(())
}

fn stopping() -> Status {
    Status::unavailable("the control plane is stopping: connect again")
}
