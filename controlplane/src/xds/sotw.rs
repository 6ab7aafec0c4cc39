//! State of the world on top of [`Session`]: each request names everything that is wanted, each response holds everything that
//! there is of kinds that are told whole, and what changed of the others. Pure.
//!
//! A subscriber that connects again says which version it has, not of what: it is sent everything once.

use std::collections::BTreeSet;

use penstock_proto::xds;

use super::{
    kind::Kind,
    session::{Reply, Session},
};

/// A request in the words of the delta protocol; None: it answers a response that is not the last one, and the subscriber will
/// say again what it wants with the answer to that.
pub fn heard(request: xds::DiscoveryRequest, session: &Session) -> Option<xds::DeltaDiscoveryRequest> {
    let kind = Kind::from_url(&request.type_url);
    let nonce = request.response_nonce;
    if kind.is_some_and(|kind| !nonce.is_empty() && session.nonce(kind) != nonce) {
        return None;
    }
    let wanted: BTreeSet<String> = request.resource_names.into_iter().collect();
    let (subscribe, unsubscribe) = match kind.and_then(|kind| session.wanted(kind)) {
        None => (wanted.into_iter().collect(), Vec::new()),
        Some(before) => {
            (wanted.difference(before).cloned().collect(), before.difference(&wanted).cloned().collect())
        }
    };
    Some(xds::DeltaDiscoveryRequest {
        node: request.node,
        type_url: request.type_url,
        response_nonce: nonce,
        error_detail: request.error_detail,
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        ..Default::default()
    })
}

/// A reply as a subscriber to the state of the world gets it; `session` is the one that made it.
pub fn told(reply: &Reply, session: &Session) -> xds::DiscoveryResponse {
    let type_url = reply.kind.url();
    let bodies: Vec<_> = if reply.kind.is_told_whole() {
        let known: BTreeSet<_> = session.known(reply.kind).map(|(name, r)| (name, &r.body)).collect();
        known.into_iter().map(|(_, body)| body).collect()
    } else {
        reply.changed.iter().map(|(_, resource)| &resource.body).collect()
    };
    let resources = bodies
        .into_iter()
        .map(|body| xds::Any { type_url: type_url.clone(), value: body.to_vec() })
        .collect();
    xds::DiscoveryResponse {
        version_info: reply.version.to_string(),
        resources,
        nonce: reply.nonce.clone(),
        type_url,
        ..Default::default()
    }
}

#[cfg(test)]
#[path = "sotw_tests.rs"]
mod tests;
