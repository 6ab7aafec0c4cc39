//! `/api/v2/nodes`: which nodes there are, and how they do.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use penstock_proto::v1;
use serde_json::{Value, json};

use super::{
    ask::{Params, Reply},
    error::ApiError,
    gpus,
};
use crate::{
    core::Core,
    model::{NodeObserved, NodePolicy, Phase},
    plan::NodeSeen,
    store::Revision,
    view::View,
};

pub(super) async fn list(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let (view, seen) = (core.view(), core.roster.nodes());
    let names: BTreeSet<&String> = known(&view, &seen).collect();
    let policy = |name: &str| view.node_policies.get(name).map(|stored| &stored.value);
    let items = names.into_iter().map(|name| (name.clone(), name));
    params.page("nodes", items, |name| shown(&view, &seen, name, policy(name)))
}

pub(super) async fn get(
    State(core): State<Arc<Core>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Reply, ApiError> {
    let Ok(Path(id)) = id else { return Err(ApiError::not_found("the node's id is not UTF-8")) };
    one(&core, &id, None).map(|(node, revision)| Reply::ok(node, revision))
}

/// One node as the API shows it, and the revision of what operators say of it (0: nothing). `would_be`: as if they said
/// that.
pub(super) fn one(
    core: &Core,
    id: &str,
    would_be: Option<Option<NodePolicy>>,
) -> Result<(Value, Revision), ApiError> {
    let (view, seen) = (core.view(), core.roster.nodes());
    if !known(&view, &seen).any(|name| name == id) {
        let shown: String = id.chars().take(64).collect();
        return Err(ApiError::not_found(format!("there is no node {shown:?}")));
    }
    let stored = view.node_policies.get(id);
    let policy = match &would_be {
        Some(policy) => policy.as_ref(),
        None => stored.map(|stored| &stored.value),
    };
    Ok((shown(&view, &seen, id, policy), stored.map_or(0, |stored| stored.mod_revision)))
}

/// Every node that is present, assigned to, heard of or spoken of; some more than once.
fn known<'a>(
    view: &'a View,
    seen: &'a BTreeMap<String, Arc<NodeObserved>>,
) -> impl Iterator<Item = &'a String> {
    view.nodes.keys().chain(view.by_node.keys()).chain(seen.keys()).chain(view.node_policies.keys())
}

fn shown(
    view: &View,
    seen: &BTreeMap<String, Arc<NodeObserved>>,
    name: &str,
    policy: Option<&NodePolicy>,
) -> Value {
    let (present, live) = (view.nodes.get(name), seen.get(name));
    let assigned = view.by_node.get(name);
    let engines = assigned.map_or(0, |a| a.values().filter(|(_, a)| a.phase == Phase::Active).count());
    let node = present.map(|stored| &stored.value);
    let live_gpus = live
        .filter(|live| live.connected && !live.gpus.is_empty())
        .map(|live| live.gpus.iter().map(gpus::shown).collect::<Vec<_>>());
    let foreign = live.filter(|live| live.connected).map(|live| {
        let processes = live.foreign.iter().map(|process| {
            json!({
                "pid": process.pid, "kind": process.kind, "model": process.model, "user": process.user,
                "age_s": process.age_s, "rss_mib": process.rss_mib, "port": process.port,
                "gpu_uuids": process.gpu_uuids, "state_dir": process.state_dir,
            })
        });
        processes.collect::<Vec<_>>()
    });
    let programs = live.map(|live| live.programs.iter().map(program).collect::<Vec<_>>());
    let seen_as = NodeSeen {
        zone: view.zone_of(name).unwrap_or_default(),
        labels: node.map(|n| &n.labels),
        policy,
        ..NodeSeen::default()
    };
    let role = seen_as.role();
    let mut labels = node.map(|n| n.labels.clone()).unwrap_or_default();
    labels.extend(policy.into_iter().flat_map(|p| p.labels.clone()));
    json!({
        "node_id": name,
        "state": if present.is_some() { "ready" } else { "lost" },
        "connected": live.is_some_and(|live| live.connected),
        "zone": seen_as.zone,
        "region": node.map_or("", |n| &n.region),
        "labels": labels,
        "gpus": live_gpus.map(|gpus| json!(gpus)).or(node.map(|n| json!(n.gpus))).unwrap_or_else(|| json!([])),
        "gpu_source": live.filter(|live| live.connected).and_then(|live| live.gpu_source.as_ref()).map(gpus::source),
        "programs": programs.unwrap_or_default(),
        "agent_version": node.map_or("", |n| &n.agent_version),
        "advertise_host": node.map_or("", |n| &n.advertise_host),
        "engines": engines,
        "role": role.as_str(),
        "cordoned": policy.is_some_and(|p| p.cordoned),
        "maintenance": policy.is_some_and(|p| p.maintenance),
        "taints": policy.map(|p| json!(p.taints)).unwrap_or_else(|| json!([])),
        "reason": policy.map_or("", |p| &p.reason),
        "disk": live.and_then(|live| live.disk.as_ref()).map(disk),
        "prefetches": live.map(|live| live.prefetches.iter().map(prefetch).collect::<Vec<_>>()).unwrap_or_default(),
        "policy": policy.map(|p| json!(p)),
        "foreign": foreign.unwrap_or_default(),
    })
}

fn disk(disk: &v1::Disk) -> Value {
    json!({ "folder": disk.folder, "free_bytes": disk.free_bytes, "total_bytes": disk.total_bytes })
}

fn prefetch(status: &v1::PrefetchStatus) -> Value {
    json!({ "model": status.model, "state": status.state, "reason": status.reason })
}

fn program(program: &v1::EngineProgram) -> Value {
    json!({
        "name": program.name,
        "kind": program.kind,
        "version": program.version,
        "problem": program.problem,
        "supports": program.supports,
    })
}
