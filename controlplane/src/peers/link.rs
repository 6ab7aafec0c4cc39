//! A follower's end of the link: kept up for as long as another leads.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES, PEERS_PROTOCOL_VERSION,
    v1::{self, follower_message::Message, peers_client::PeersClient},
    xds::split_load_name,
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{core::Core, fleet::relay, leadership::Leader};

/// Messages that may wait for the leader; one that takes none of so many is not reading.
const WAITING: usize = 16;
/// Pause between two tries to reach the leader.
const RETRY: Duration = Duration::from_millis(200);
/// Shortest pause between two words about proxies: a hundred that acknowledge together cost a few.
const COALESCE: Duration = Duration::from_millis(10);
/// How often what is waited for is told again: well within the time for which the leader believes it.
const REPEAT: Duration = Duration::from_secs(5);
/// Shortest pause between two lists of proxies: people read them.
const LIST: Duration = Duration::from_secs(1);
/// Most proxies in one list.
const MOST_LISTED: usize = 10_000;
/// Longest time for a link to open.
const PATIENCE: Duration = Duration::from_secs(5);

/// Keeps the link up for as long as another control plane leads. Runs for ever.
pub async fn run(core: Arc<Core>) {
    let mut views = core.views.clone();
    let mut complaint = String::new();
    loop {
        let leader = views.borrow_and_update().leader.as_ref().map(|leader| leader.value.clone());
        let another = leader.filter(|leader| leader.id != core.config.election.id);
        let Some(leader) = another else {
            if views.changed().await.is_err() {
                return;
            }
            continue;
        };
        let ended = tokio::select! {
            ended = link(&core, &leader) => ended,
            () = core.another_leads(&leader) => continue,
        };
        if let Err(status) = ended
            && complaint != status.message()
        {
            tracing::warn!(
                leader = leader.id,
                reason = status.message(),
                "the link to the leader broke off; trying again"
            );
            complaint = status.message().to_owned();
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn link(core: &Core, leader: &Leader) -> Result<(), Status> {
    let (up, stream) = mpsc::channel(WAITING);
    say(
        &up,
        Message::Hello(v1::PlaneHello {
            id: core.config.election.id.clone(),
            zone: core.config.election.zone.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            protocol_version: PEERS_PROTOCOL_VERSION,
        }),
    )?;
    let opening = async {
        let channel = relay::channel(core, leader).await?;
        let mut client = PeersClient::new(channel).max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES);
        client.link(ReceiverStream::new(stream)).await
    };
    let opened = tokio::time::timeout(PATIENCE, opening).await;
    let mut down = opened.map_err(|_| Status::unavailable("the leader does not answer"))??.into_inner();
    tracing::info!(leader = leader.id, "linked to the leader");
    let (mut subscribers, mut snapshots) = (core.hub.changes(), core.hub.subscribe());
    let mut demands = core.demands.changes();
    let (mut said, mut wanted, mut listed) = (None, false, false);
    let mut pulse = tokio::time::interval(COALESCE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut repeat = tokio::time::interval(REPEAT);
    let mut list = tokio::time::interval(LIST);
    list.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let acknowledged = core.hub.acknowledged();
        if said != Some(acknowledged) {
            say(&up, Message::Proxies(v1::ProxyStates { acknowledged }))?;
            said = Some(acknowledged);
        }
        pulse.tick().await;
        tokio::select! {
            message = down.message() => {
                let Some(message) = message? else { return Ok(()) };
                let now = Instant::now();
                for named in message.loads {
                    if let (Some((pool, id)), Some(load)) = (split_load_name(&named.name), named.load) {
                        core.loads.put(pool, id, &load, now);
                    }
                }
            }
            changed = subscribers.changed() => {
                changed.map_err(|_| stopping())?;
                listed = false;
            }
            _ = list.tick() => if !listed {
                let proxies = core.hub.states(MOST_LISTED);
                say(&up, Message::List(v1::ProxyList { proxies }))?;
                listed = true;
            },
            changed = snapshots.changed() => changed.map_err(|_| stopping())?,
            changed = demands.changed() => {
                changed.map_err(|_| stopping())?;
                wanted = want(core, &up)?;
            }
            _ = repeat.tick() => if wanted {
                wanted = want(core, &up)?;
            },
        }
    }
}

/// Tells what is waited for here. Whether anything is.
fn want(core: &Core, up: &mpsc::Sender<v1::FollowerMessage>) -> Result<bool, Status> {
    let now = core.demands.now(Instant::now());
    let models: Vec<_> =
        now.into_iter().map(|(model, demand)| v1::Wanted { model, queued: demand.queued }).collect();
    let any = !models.is_empty();
    say(up, Message::Demand(v1::Demand { source: core.config.election.id.clone(), models }))?;
    Ok(any)
}

fn say(up: &mpsc::Sender<v1::FollowerMessage>, message: Message) -> Result<(), Status> {
    let message = v1::FollowerMessage { message: Some(message) };
    up.try_send(message).map_err(|_| Status::unavailable("the leader does not read"))
}

fn stopping() -> Status {
    Status::unavailable("the control plane is stopping")
}
