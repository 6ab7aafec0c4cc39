//! The leader's end of links, and the word of proxies that wait.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{
    PEERS_PROTOCOL_VERSION,
    v1::{self, follower_message::Message},
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Follower;
use crate::{core::Core, model::validate, xds::loads::MOST_AT_ONCE};

/// Messages to one follower that may wait.
const OUTBOUND: usize = 4;
/// A follower that says nothing at first, or does not read for this long, is gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most models in one word of demand.
const MOST_WANTED: usize = 10_000;
/// Longest name of who waits, in bytes.
const MAX_SOURCE: usize = 256;

type Outbound = mpsc::Sender<Result<v1::LeaderMessage, Status>>;

/// See the module's text.
#[derive(Clone)]
pub struct PeersService {
    core: Arc<Core>,
}

impl PeersService {
    /// Links, as tonic takes them.
    pub fn links(core: Arc<Core>) -> v1::peers_server::PeersServer<Self> {
        v1::peers_server::PeersServer::new(Self { core })
    }

    /// Proxies' words, as tonic takes them.
    pub fn wants(core: Arc<Core>) -> v1::gateways_server::GatewaysServer<Self> {
        v1::gateways_server::GatewaysServer::new(Self { core })
    }
}

#[tonic::async_trait]
impl v1::gateways_server::Gateways for PeersService {
    async fn want(&self, request: Request<v1::Demand>) -> Result<Response<v1::DemandTaken>, Status> {
        take_demand(&self.core, request.into_inner())?;
        Ok(Response::new(v1::DemandTaken {}))
    }
}

#[tonic::async_trait]
impl v1::peers_server::Peers for PeersService {
    type LinkStream = ReceiverStream<Result<v1::LeaderMessage, Status>>;

    async fn link(
        &self,
        request: Request<Streaming<v1::FollowerMessage>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        if self.core.leadership.elected().is_none() {
            return Err(leads_no_more());
        }
        let (outbound, stream) = mpsc::channel(OUTBOUND);
        self.core.tasks.spawn(run(self.core.clone(), request.into_inner(), outbound));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Notes what is waited for. A model that is not deployed is passed over: its route may just be on its way out.
fn take_demand(core: &Core, demand: v1::Demand) -> Result<(), Status> {
    if demand.source.is_empty() || demand.source.len() > MAX_SOURCE {
        return Err(Status::invalid_argument("a demand must say whose it is, in 1 to 256 bytes"));
    }
    if demand.models.len() > MOST_WANTED {
        return Err(Status::invalid_argument(format!("a demand names at most {MOST_WANTED} models")));
    }
    let view = core.view();
    let known = |wanted: &v1::Wanted| {
        validate::model_name(&wanted.model).is_ok()
            && view.models.get(&wanted.model).is_some_and(|model| model.deployment.is_some())
    };
    let models = demand.models.into_iter().filter(known).map(|wanted| (wanted.model, wanted.queued));
    core.demands.says(&demand.source, models, Instant::now());
    Ok(())
}

/// Runs a link to its end and tells the follower why it ended.
async fn run(core: Arc<Core>, mut inbound: Streaming<v1::FollowerMessage>, outbound: Outbound) {
    let ended = match hello(&core, &mut inbound).await {
        Ok(follower) => {
            let id = follower.id.clone();
            let number = core.followers.enter(follower);
            core.metrics.followers.inc();
            tracing::info!(id, "a control plane follows this one");
            let ended = serve(&core, number, &id, &mut inbound, &outbound).await;
            core.followers.leave(number);
            core.metrics.followers.dec();
            tracing::info!(id, ?ended, "a follower's link ended");
            ended
        }
        Err(status) => Err(status),
    };
    if let Err(status) = ended {
        // One that has gone away needs no reason.
        drop(tokio::time::timeout(PATIENCE, outbound.send(Err(status))).await);
    }
}

async fn hello(core: &Core, inbound: &mut Streaming<v1::FollowerMessage>) -> Result<Follower, Status> {
    let first = tokio::select! {
        () = core.stop.cancelled() => return Err(stopping()),
        first = tokio::time::timeout(PATIENCE, inbound.message()) => first,
    };
    let first = first.map_err(|_| Status::deadline_exceeded("no hello within 10 seconds"))??;
    let Some(Message::Hello(hello)) = first.and_then(|message| message.message) else {
        return Err(Status::invalid_argument("a link begins with a hello"));
    };
    if hello.protocol_version != PEERS_PROTOCOL_VERSION {
        return Err(Status::failed_precondition(format!(
            "the follower links with version {}, this control plane with {PEERS_PROTOCOL_VERSION}: run the same release on \
             both",
            hello.protocol_version
        )));
    }
    if hello.id.is_empty() || hello.id.len() > MAX_SOURCE {
        return Err(Status::invalid_argument("a hello must carry an id of 1 to 256 bytes"));
    }
    Ok(Follower { id: hello.id, zone: hello.zone, version: hello.version, acknowledged: None, proxies: None })
}

async fn serve(
    core: &Core,
    number: u64,
    id: &str,
    inbound: &mut Streaming<v1::FollowerMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let term = core.leadership.elected();
    let mut news = tokio::time::interval(Duration::from_millis(core.config.xds.load_push_ms));
    news.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut mark = 0;
    loop {
        tokio::select! {
            () = core.stop.cancelled() => return Err(stopping()),
            () = core.leadership.lost(term) => return Err(leads_no_more()),
            message = inbound.message() => {
                let Some(message) = message? else { return Ok(()) };
                match message.message {
                    Some(Message::Proxies(proxies)) => core.followers.acknowledged(number, proxies.acknowledged),
                    Some(Message::List(list)) => core.followers.has(number, list.proxies, Instant::now()),
                    // Its name, not what it says: a follower speaks for its own proxies only.
                    Some(Message::Demand(demand)) => {
                        take_demand(core, v1::Demand { source: id.to_owned(), ..demand })?;
                    }
                    Some(Message::Hello(_)) => return Err(Status::invalid_argument("a link has one hello, at its start")),
                    // A newer release may say more than this one knows.
                    None => {}
                }
            }
            _ = news.tick() => {
                let (newer, loads) = core.loads.newer(mark, MOST_AT_ONCE, Instant::now());
                mark = newer;
                if loads.is_empty() {
                    continue;
                }
                let loads = loads.into_iter().map(|(name, load)| v1::NamedLoad { name, load: Some(load) });
                let message = v1::LeaderMessage { loads: loads.collect() };
                match tokio::time::timeout(PATIENCE, outbound.send(Ok(message))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => return Err(Status::deadline_exceeded("the follower does not read its messages")),
                }
            }
        }
    }
}

fn stopping() -> Status {
    Status::unavailable("the control plane is stopping: connect again")
}

fn leads_no_more() -> Status {
    Status::unavailable("this control plane does not lead: connect to the one that does")
}
