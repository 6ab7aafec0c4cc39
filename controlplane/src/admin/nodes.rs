//! `/api/v2/nodes` and `/api/v2/proxies`: who is connected, and how they do.

use std::{collections::BTreeSet, sync::Arc};

use axum::{Json, extract::State};
use serde_json::{Value, json};

use crate::{core::Core, model::Phase, xds::session::KindStatus};

pub(super) async fn list(State(core): State<Arc<Core>>) -> Json<Value> {
    let (view, seen) = (core.view(), core.roster.nodes());
    let names: BTreeSet<&String> = view.nodes.keys().chain(view.by_node.keys()).chain(seen.keys()).collect();
    let shown: Vec<Value> = names
        .into_iter()
        .map(|name| {
            let (present, live) = (view.nodes.get(name), seen.get(name));
            let assigned = view.by_node.get(name);
            let engines = assigned.map_or(0, |a| a.values().filter(|(_, a)| a.phase == Phase::Active).count());
            let node = present.map(|stored| &stored.value);
            let live_gpus = live.filter(|live| live.connected && !live.gpus.is_empty()).map(|live| {
                let gpus = live.gpus.iter().map(|gpu| {
                    json!({
                        "uuid": gpu.uuid, "name": gpu.name, "memory_total_mib": gpu.memory_total_mib,
                        "memory_used_mib": gpu.memory_used_mib, "utilization_percent": gpu.utilization_percent,
                        "temperature_c": gpu.temperature_c, "fault": gpu.fault,
                    })
                });
                gpus.collect::<Vec<_>>()
            });
            json!({
                "node_id": name,
                "state": if present.is_some() { "ready" } else { "lost" },
                "connected": live.is_some_and(|live| live.connected),
                "zone": node.map_or("", |n| &n.zone),
                "region": node.map_or("", |n| &n.region),
                "labels": node.map(|n| json!(n.labels)).unwrap_or_else(|| json!({})),
                "gpus": live_gpus.map(|gpus| json!(gpus)).or(node.map(|n| json!(n.gpus))).unwrap_or_else(|| json!([])),
                "agent_version": node.map_or("", |n| &n.agent_version),
                "advertise_host": node.map_or("", |n| &n.advertise_host),
                "engines": engines,
            })
        })
        .collect();
    Json(json!({ "nodes": shown }))
}

pub(super) async fn proxies(State(core): State<Arc<Core>>) -> Json<Value> {
    let kind = |kind: &KindStatus| {
        json!({
            "version_acked": kind.acked.map(|v| v.to_string()).unwrap_or_default(),
            "nacks": kind.nacks,
            "last_nack": kind.nack_reason,
        })
    };
    let shown: Vec<Value> = core
        .hub
        .subscribers()
        .iter()
        .map(|s| {
            let reasons = [&s.tables.nack_reason, &s.routes.nack_reason];
            let last_nack = reasons.into_iter().find(|reason| !reason.is_empty());
            let acked = s.tables.acked.max(s.routes.acked);
            json!({
                "node_id": s.node_id,
                "peer": s.peer,
                "connected_s": s.connected.elapsed().as_secs(),
                "version_acked": acked.map(|v| v.to_string()).unwrap_or_default(),
                "version_synced": s.synced.map(|v| v.to_string()).unwrap_or_default(),
                "last_nack": last_nack.map_or("", |reason| reason.as_str()),
                "endpoint_tables": kind(&s.tables),
                "model_routes": kind(&s.routes),
            })
        })
        .collect();
    Json(json!({ "proxies": shown, "version": core.hub.snapshot().version.to_string() }))
}
