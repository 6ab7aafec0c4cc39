//! How subscribers do, in the words in which control planes tell each other and the REST API.

use penstock_proto::{Version, v1};

use super::hub::{Hub, Subscriber};

/// Most resources that are named of those which a subscriber does not take.
const MOST_REFUSED: usize = 100;

impl Hub {
    /// Every subscriber, oldest first, at most so many.
    pub fn states(&self, most: usize) -> Vec<v1::ProxyState> {
        self.subscribers().iter().take(most).map(state).collect()
    }
}

fn state(subscriber: &Subscriber) -> v1::ProxyState {
    let kinds = subscriber.kinds.iter().map(|(kind, status)| v1::ProxyKind {
        kind: kind.label().into(),
        acked: status.acked.map(version),
        nacks: status.nacks,
        nack_reason: status.nack_reason.clone(),
        refused: status.refused.iter().take(MOST_REFUSED).map(ToString::to_string).collect(),
    });
    v1::ProxyState {
        node_id: subscriber.peer.node_id.clone(),
        agent: subscriber.peer.agent.clone(),
        zone: subscriber.peer.zone.clone(),
        address: subscriber.address.clone(),
        protocol: subscriber.protocol.into(),
        connected_ms: u64::try_from(subscriber.connected.elapsed().as_millis()).unwrap_or(u64::MAX),
        synced: subscriber.synced.map(version),
        kinds: kinds.collect(),
    }
}

fn version(version: Version) -> v1::TableVersion {
    v1::TableVersion { term: version.term, revision: version.revision }
}
