//! `/api/v2/placements`: where each model's replicas have their places, with their generations.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use penstock_config::controlplane::Role;
use serde_json::{Value, json};

use super::{
    ask::{Params, Reply},
    deployments::for_eyes,
    error::ApiError,
};
use crate::{
    access::Caller,
    core::Core,
    model::{Placement, validate},
    view::Stored,
};

fn shown(role: Role, stored: &Stored<Placement>) -> Value {
    let placement = &stored.value;
    let shown = json!({
        "model": placement.model,
        "next_ordinal": placement.next_ordinal,
        "scaled_to": placement.scaled_to,
        "assignments": placement.assignments.iter().map(|a| json!({
            "replica_id": a.replica_id,
            "generation": a.generation,
            "node_id": a.node_id,
            "gpu_uuids": a.gpu_uuids,
            "phase": a.phase,
            "moving": a.moving,
            "asleep": a.asleep,
            "spec": a.spec,
        })).collect::<Vec<_>>(),
        "revision": stored.mod_revision,
    });
    for_eyes(role, shown)
}

pub(super) async fn list(
    State(core): State<Arc<Core>>,
    caller: Caller,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let view = core.view();
    let placed = view.models.iter().filter_map(|(name, m)| Some((name.clone(), m.placement.as_ref()?)));
    params.page("placements", placed, |stored| shown(caller.role, stored))
}

pub(super) async fn get(
    State(core): State<Arc<Core>>,
    caller: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<Reply, ApiError> {
    let Ok(Path(name)) = name else { return Err(ApiError::not_found("the model's name is not UTF-8")) };
    validate::model_name(&name)?;
    let view = core.view();
    let stored = view.models.get(&name).and_then(|model| model.placement.as_ref());
    let stored =
        stored.ok_or_else(|| ApiError::not_found(format!("nothing is placed of the model {name:?}")))?;
    Ok(Reply::ok(shown(caller.role, stored), stored.mod_revision))
}
