//! An agent's session with a follower: handed through to the leader, message by message.
//!
//! So that an agent may dial any control plane, and that what nodes say is known where it is decided upon. The session
//! waits here while nobody leads, and the node's lease is renewed from here all the time: a change of leader must not
//! cost a node its presence, however long it takes. When the leader changes the session ends with a word, and the agent
//! connects again at once.
//!
//! A relayed session carries a mark; a control plane that gets one and does not lead refuses it, so that nothing is
//! handed in circles.

use std::{sync::Arc, time::Duration};

use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES,
    tls::{dial, in_words},
    v1::{self, agent_message::Message, fleet_client::FleetClient},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, metadata::MetadataValue, transport::Channel};

use super::session::{Outbound, PATIENCE, RENEWAL, hello, stopping};
use crate::{core::Core, leadership::Leader, store::StoreError, tls};

/// Metadata of a session that comes from another control plane.
pub(super) const RELAYED: &str = "penstock-relayed";
/// Messages that may wait in either direction.
const WAITING: usize = 64;
/// Pause between two tries to reach the leader.
const RETRY: Duration = Duration::from_millis(100);
/// Longest time to connect to the leader.
const CONNECT: Duration = Duration::from_secs(2);
/// A leader that does not answer a ping for this long is gone; the view mostly tells sooner.
const PING: Duration = Duration::from_secs(3);

/// Runs a session to its end and tells the agent why it ended.
pub(super) async fn run(core: Arc<Core>, mut inbound: Streaming<v1::AgentMessage>, outbound: Outbound) {
    let ended = match hello(&core, &mut inbound).await {
        Ok(hello) => relay(&core, hello, &mut inbound, &outbound).await,
        Err(status) => Err(status),
    };
    let label = if ended.is_ok() { "ok" } else { "failed" };
    core.metrics.forwarded.with_label_values(&[label]).inc();
    if let Err(status) = ended {
        tracing::info!(code = ?status.code(), reason = status.message(), "a relayed fleet session ended");
        // An agent that has gone away needs no reason.
        drop(tokio::time::timeout(PATIENCE, outbound.send(Err(status))).await);
    }
}

async fn relay(
    core: &Core,
    hello: v1::Hello,
    inbound: &mut Streaming<v1::AgentMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let node_id = hello.node_id.clone();
    let mut lease = NodeLease { core, node_id: &node_id, renewed: None };
    let deadline = Instant::now() + PATIENCE;
    let (leader, up, mut down) = loop {
        let leader = wait_for_leader(core, &mut lease, deadline).await?;
        let opened = tokio::select! {
            () = core.stop.cancelled() => return Err(stopping()),
            opened = open(core, &leader, hello.clone()) => opened,
        };
        match opened {
            Ok((up, down)) => break (leader, up, down),
            Err(status) if Instant::now() >= deadline => return Err(status),
            // It is gone, and its lease has not ended yet; or it was elected a moment ago. The agent need not know.
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    };
    tracing::debug!(node_id, leader = leader.id, "a fleet session is relayed");
    loop {
        tokio::select! {
            biased;
            () = core.stop.cancelled() => return Err(stopping()),
            () = core.another_leads(&leader) => {
                return Err(Status::unavailable("the leader has changed: connect again"));
            }
            message = inbound.message() => {
                let Some(message) = message? else { return Ok(()) };
                lease.renew().await;
                match tokio::time::timeout(PATIENCE, up.send(message)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(Status::unavailable("the leader does not read: connect again")),
                }
            }
            message = down.message() => {
                let Some(message) = message? else { return Ok(()) };
                match tokio::time::timeout(PATIENCE, outbound.send(Ok(message))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => return Err(Status::deadline_exceeded("the agent does not read its messages")),
                }
            }
        }
    }
}

/// The agent's lease, as the view knows it.
struct NodeLease<'a> {
    core: &'a Core,
    node_id: &'a str,
    renewed: Option<Instant>,
}

impl NodeLease<'_> {
    /// How often it is renewed.
    fn interval(&self) -> Duration {
        self.core.lease_ttl() / 4
    }

    /// Renews it if it is time; one that has ended, or is not known yet, is the leader's business.
    async fn renew(&mut self) {
        if self.renewed.is_some_and(|renewed| renewed.elapsed() < self.interval()) {
            return;
        }
        self.renewed = Some(Instant::now());
        let lease = self.core.view().nodes.get(self.node_id).map_or(0, |node| node.lease);
        if lease == 0 {
            return;
        }
        match tokio::time::timeout(RENEWAL, self.core.store.lease_keep_alive(lease)).await {
            Ok(Ok(()) | Err(StoreError::LeaseNotFound(_))) => {}
            Ok(Err(_)) | Err(_) => tracing::warn!(node_id = self.node_id, "a node's lease was not renewed"),
        }
    }
}

/// Until somebody leads; the agent gives up by itself and comes back, which is as good.
async fn wait_for_leader(
    core: &Core,
    lease: &mut NodeLease<'_>,
    deadline: Instant,
) -> Result<Leader, Status> {
    let mut views = core.views.clone();
    loop {
        lease.renew().await;
        let leader = views.borrow_and_update().leader.clone();
        if let Some(leader) = leader.map(|stored| stored.value) {
            return Ok(leader);
        }
        tokio::select! {
            () = core.stop.cancelled() => return Err(stopping()),
            changed = views.changed() => changed.map_err(|_| stopping())?,
            () = tokio::time::sleep(lease.interval()) => {}
            () = tokio::time::sleep_until(deadline) => {
                core.metrics.forwarded.with_label_values(&["no_leader"]).inc();
                return Err(Status::unavailable("no control plane leads at the moment: connect again"));
            }
        }
    }
}

/// The leader's end of the session, with the Hello said.
type Opened = (mpsc::Sender<v1::AgentMessage>, Streaming<v1::ControllerMessage>);

async fn open(core: &Core, leader: &Leader, hello: v1::Hello) -> Result<Opened, Status> {
    let (up, stream) = mpsc::channel(WAITING);
    let hello = v1::AgentMessage { message: Some(Message::Hello(hello)) };
    let full = |_| Status::unavailable("the leader does not read: connect again");
    up.try_send(hello).map_err(full)?;
    let channel = channel(core, leader).await?;
    let mut request = Request::new(ReceiverStream::new(stream));
    request.metadata_mut().insert(RELAYED, MetadataValue::from_static("1"));
    let mut client = FleetClient::new(channel)
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let opened = tokio::time::timeout(PATIENCE, client.session(request)).await;
    Ok((up, opened.map_err(|_| unreachable(leader, &"it does not answer"))??.into_inner()))
}

/// A connection to the leader's gRPC.
///
/// # Errors
/// A sentence that names the address.
pub(crate) async fn channel(core: &Core, leader: &Leader) -> Result<Channel, Status> {
    let endpoint = dial(&leader.grpc, tls::client(&core.config.listen.tls).as_ref());
    let endpoint = endpoint
        .map_err(|e| unreachable(leader, &e))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true);
    endpoint.connect().await.map_err(|e| unreachable(leader, &in_words(&e)))
}

fn unreachable(leader: &Leader, why: &dyn std::fmt::Display) -> Status {
    Status::unavailable(format!("the leader cannot be reached at {}: {why}; connect again", leader.grpc))
}
