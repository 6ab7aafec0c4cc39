//! `/api/v2/proxies`: everybody who is told, by whichever control plane. The leader hears of its followers' over their
//! links; one that answers while nobody leads shows its own.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use penstock_proto::{Version, v1};
use serde_json::{Map, Value, json};

use super::{ask::Params, error::ApiError};
use crate::core::Core;

/// One subscriber, and who tells it.
struct Listed {
    controlplane: String,
    state: v1::ProxyState,
    /// Since that was said.
    age: Duration,
}

pub(super) async fn proxies(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let listed = all(&core);
    let items = listed.iter().map(|l| (format!("{} {}", l.state.node_id, l.state.address), l));
    let mut page = params.page("proxies", items, shown)?;
    page.0["version"] = core.hub.snapshot().version.to_string().into();
    Ok(page)
}

fn all(core: &Core) -> Vec<Listed> {
    let own = core.hub.states(usize::MAX).into_iter().map(|state| Listed {
        controlplane: core.config.election.id.clone(),
        state,
        age: Duration::ZERO,
    });
    let mut listed: Vec<Listed> = own.collect();
    for follower in core.followers.linked() {
        let Some((proxies, said)) = follower.proxies else { continue };
        listed.extend(proxies.iter().map(|state| Listed {
            controlplane: follower.id.clone(),
            state: state.clone(),
            age: said.elapsed(),
        }));
    }
    listed.sort_by(|a, b| (&a.state.node_id, &a.state.address).cmp(&(&b.state.node_id, &b.state.address)));
    listed
}

fn shown(Listed { controlplane, state, age }: &Listed) -> Value {
    let types = state.kinds.iter().map(|kind| {
        let shown = json!({
            "version_acked": text(version(kind.acked.as_ref())),
            "nacks": kind.nacks,
            "last_nack": kind.nack_reason,
            "refused": kind.refused,
        });
        (kind.kind.clone(), shown)
    });
    let last_nack = state.kinds.iter().map(|kind| kind.nack_reason.as_str()).find(|r| !r.is_empty());
    let connected = Duration::from_millis(state.connected_ms).saturating_add(*age);
    json!({
        "node_id": state.node_id,
        "agent": state.agent,
        "zone": state.zone,
        "controlplane": controlplane,
        "peer": state.address,
        "protocol": state.protocol,
        "connected_s": connected.as_secs(),
        "version_acked": text(state.kinds.iter().filter_map(|kind| version(kind.acked.as_ref())).max()),
        "version_synced": text(version(state.synced.as_ref())),
        "nacks": state.kinds.iter().map(|kind| kind.nacks).fold(0, u64::saturating_add),
        "last_nack": last_nack.unwrap_or_default(),
        "types": types.collect::<Map<String, Value>>(),
    })
}

fn version(said: Option<&v1::TableVersion>) -> Option<Version> {
    said.map(|said| Version { term: said.term, revision: said.revision })
}

fn text(version: Option<Version>) -> String {
    version.map(|version| version.to_string()).unwrap_or_default()
}
