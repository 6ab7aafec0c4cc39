//! The gRPC around [`Session`]: one task per stream, which sleeps until the proxy speaks or a snapshot appears. Both protocols,
//! delta and state of the world, are the same but for their words (`Protocol`).

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES,
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Node,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    hub::Subscriber,
    kind::Kind,
    loads::{Answer, LoadSession},
    peer,
    session::{self, Heard, Reply, Session},
    sotw,
};
use crate::core::Core;

/// Responses that may wait for one proxy. One of each kind may be outstanding, and one of loads, so this never fills.
const OUTBOUND: usize = 8;
/// A proxy that opens a stream and asks for nothing for this long is cut off.
const PATIENCE: Duration = Duration::from_secs(30);

type Outbound<P> = mpsc::Sender<Result<<P as Protocol>::Response, Status>>;

/// One of the two protocols.
trait Protocol: Send + 'static {
    /// Its name in the API.
    const NAME: &'static str;
    type Request: Send + 'static;
    type Response: Send + 'static;

    fn node(request: &Self::Request) -> Option<&Node>;

    /// The request in delta's words; None: nothing is to be heard in it.
    fn heard(request: Self::Request, session: &Session) -> Option<DeltaDiscoveryRequest>;

    fn told(reply: &Reply, session: &Session) -> Self::Response;

    /// News of loads; None: they cannot be told in these words.
    fn news(loads: DeltaDiscoveryResponse) -> Option<Self::Response>;
}

struct Delta;

impl Protocol for Delta {
    const NAME: &'static str = "delta";
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn heard(request: Self::Request, _: &Session) -> Option<DeltaDiscoveryRequest> {
        Some(request)
    }

    fn told(reply: &Reply, _: &Session) -> Self::Response {
        session::delta(reply)
    }

    fn news(loads: DeltaDiscoveryResponse) -> Option<Self::Response> {
        Some(loads)
    }
}

struct WholeState;

impl Protocol for WholeState {
    const NAME: &'static str = "state_of_the_world";
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn heard(request: Self::Request, session: &Session) -> Option<DeltaDiscoveryRequest> {
        sotw::heard(request, session)
    }

    fn told(reply: &Reply, session: &Session) -> Self::Response {
        sotw::told(reply, session)
    }

    fn news(_: DeltaDiscoveryResponse) -> Option<Self::Response> {
        None
    }
}

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

    fn open<P: Protocol>(
        &self,
        request: Request<Streaming<P::Request>>,
    ) -> Response<ReceiverStream<Result<P::Response, Status>>> {
        let peer = request.remote_addr();
        let (outbound, stream) = mpsc::channel(OUTBOUND);
        self.core.tasks.spawn(run::<P>(self.core.clone(), request.into_inner(), outbound, peer));
        Response::new(ReceiverStream::new(stream))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsService {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Ok(self.open::<WholeState>(request))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Ok(self.open::<Delta>(request))
    }
}

/// Runs a stream to its end and tells the proxy why it ended.
async fn run<P: Protocol>(
    core: Arc<Core>,
    mut inbound: Streaming<P::Request>,
    outbound: Outbound<P>,
    address: Option<SocketAddr>,
) {
    let ended = match first::<P>(&core, &mut inbound).await {
        Ok(Some((peer, request))) => {
            let node_id = peer.node_id.clone();
            let number = core.hub.enter(Subscriber {
                peer,
                address: address.map(|address| address.to_string()).unwrap_or_default(),
                protocol: P::NAME,
                connected: Instant::now(),
                synced: None,
                kinds: Vec::new(),
            });
            core.metrics.xds_subscribers.inc();
            tracing::info!(node_id, protocol = P::NAME, "a proxy subscribed");
            let ended = serve::<P>(&core, number, request, &mut inbound, &outbound).await;
            core.hub.leave(number);
            core.metrics.xds_subscribers.dec();
            tracing::info!(node_id, ?ended, "a proxy's subscription ended");
            ended
        }
        Ok(None) => Ok(()),
        Err(status) => {
            tracing::warn!(?address, reason = status.message(), "a subscription was refused");
            Err(status)
        }
    };
    if let Err(status) = ended {
        // A proxy that has gone away needs no reason.
        drop(tokio::time::timeout(PATIENCE, outbound.send(Err(status))).await);
    }
}

/// The request that opens a stream; it must say who calls.
async fn first<P: Protocol>(
    core: &Core,
    inbound: &mut Streaming<P::Request>,
) -> Result<Option<(peer::Peer, P::Request)>, Status> {
    let first = tokio::select! {
        () = core.stop.cancelled() => return Err(stopping()),
        first = tokio::time::timeout(PATIENCE, inbound.message()) => first,
    };
    let Some(request) = first.map_err(|_| Status::deadline_exceeded("nothing was asked for"))?? else {
        return Ok(None);
    };
    let peer = peer::Peer::of(P::node(&request)).map_err(|refusal| match refusal {
        peer::Refusal::Unnamed(words) => Status::invalid_argument(words),
        peer::Refusal::Unknown(words) => Status::failed_precondition(words),
    })?;
    Ok(Some((peer, request)))
}

async fn serve<P: Protocol>(
    core: &Core,
    number: u64,
    first: P::Request,
    inbound: &mut Streaming<P::Request>,
    outbound: &Outbound<P>,
) -> Result<(), Status> {
    let mut session = Session::new(Duration::from_millis(core.config.xds.nack_retry_ms));
    let mut loads = LoadSession::default();
    let mut snapshots = core.hub.subscribe();
    let mut news = tokio::time::interval(Duration::from_millis(core.config.xds.load_push_ms));
    news.set_missed_tick_behavior(MissedTickBehavior::Delay);
    take::<P>(core, number, (&mut session, &mut loads), first)?;
    loop {
        // Before the first projection there is nothing to tell: an empty answer would be a lie.
        let snapshot = snapshots.borrow_and_update().clone();
        if snapshot.sequence > 0 {
            while let Some(reply) = session.next(&snapshot, Instant::now()) {
                core.metrics.xds_responses.with_label_values(&[reply.kind.label()]).inc();
                if outbound.send(Ok(P::told(&reply, &session))).await.is_err() {
                    return Ok(());
                }
            }
            core.hub.update(number, |subscriber| {
                subscriber.synced = session.synced();
                subscriber.kinds = session.status();
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
                    if take::<P>(core, number, (&mut session, &mut loads), request)? {
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
                    if let Some(response) = response.and_then(P::news) {
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

/// Whether there may be something new to say of anything but loads.
fn take<P: Protocol>(
    core: &Core,
    number: u64,
    (session, loads): (&mut Session, &mut LoadSession),
    request: P::Request,
) -> Result<bool, Status> {
    let Some(request) = P::heard(request, session) else { return Ok(false) };
    if LoadSession::is_addressed(&request) {
        if P::NAME != Delta::NAME {
            return Err(Status::invalid_argument(
                "news of loads are told over DeltaAggregatedResources only",
            ));
        }
        if let Answer::Nack(reason) = loads.hear(request) {
            core.metrics.xds_nacks.with_label_values(&["engine_load"]).inc();
            tracing::warn!(subscriber = number, reason, "a proxy refused news of loads");
        }
        return Ok(false);
    }
    if core.config.xds.envoy.listen.is_empty()
        && Kind::from_url(&request.type_url).is_some_and(Kind::is_envoys)
    {
        let words =
            "Envoy's resources are not served: xds.envoy.listen is empty in the control plane's settings";
        return Err(Status::failed_precondition(words));
    }
    let heard = session.hear(request, Instant::now()).map_err(Status::invalid_argument)?;
    if let Heard::Nack(kind) = heard {
        core.metrics.xds_nacks.with_label_values(&[kind.label()]).inc();
        let reason = session.nack_reason(kind);
        tracing::warn!(subscriber = number, kind = kind.label(), reason, "a proxy refused a response");
    }
    Ok(true)
}

fn stopping() -> Status {
    Status::unavailable("the control plane is stopping: connect again")
}
