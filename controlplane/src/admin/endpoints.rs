//! `/api/v2/endpoints`: every replica, and the operator's drain, which sticks until it is undone or the replica ends.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde_json::{Value, json};

use super::{
    error::ApiError,
    show::{self, EndpointShown},
};
use crate::{
    core::Core,
    model::desired::Drain,
    store::{Compare, Txn, TxnOutcome, keys},
};

type Id = Result<Path<String>, PathRejection>;

pub(super) async fn list(State(core): State<Arc<Core>>) -> Json<Value> {
    let (view, nodes) = (core.view(), core.roster.nodes());
    let all = view.models.iter().flat_map(|(name, model)| show::endpoints(&view, name, model, &nodes));
    Json(json!({ "endpoints": all.collect::<Vec<_>>() }))
}

pub(super) async fn get(State(core): State<Arc<Core>>, id: Id) -> Result<Json<EndpointShown>, ApiError> {
    Ok(Json(find(&core, id)?))
}

pub(super) async fn drain(State(core): State<Arc<Core>>, id: Id) -> Result<Json<EndpointShown>, ApiError> {
    let endpoint = find(&core, id)?;
    let drain = Drain { model: endpoint.model.clone(), replica_id: endpoint.id.clone() };
    let value = serde_json::to_vec(&drain).map_err(|_| ApiError::conflict())?;
    let key = keys::drain(&drain.model, &drain.replica_id);
    // Only while the replica has a place: else nothing would ever take the key away.
    let placement = core.store.get(&keys::placement(&drain.model)).await?.map_or(0, |e| e.mod_revision);
    let txn = Txn::new()
        .when(Compare::Absent(key.clone()))
        .when(Compare::ModRevision(keys::placement(&drain.model), placement))
        .put(key.clone(), value);
    finish(&core, txn, &key, &endpoint, true).await
}

pub(super) async fn undrain(State(core): State<Arc<Core>>, id: Id) -> Result<Json<EndpointShown>, ApiError> {
    let endpoint = find(&core, id)?;
    let key = keys::drain(&endpoint.model, &endpoint.id);
    let txn = Txn::new().when(Compare::Exists(key.clone())).delete(key.clone());
    finish(&core, txn, &key, &endpoint, false).await
}

/// Commits; a condition on `key` itself that does not hold means that it is as wanted already.
async fn finish(
    core: &Core,
    txn: Txn,
    key: &str,
    endpoint: &EndpointShown,
    drained: bool,
) -> Result<Json<EndpointShown>, ApiError> {
    match core.commit(txn).await? {
        TxnOutcome::Committed { revision } => {
            tracing::info!(replica_id = endpoint.id, drained, "an operator set a drain");
            core.seen(revision).await;
        }
        TxnOutcome::Conflict { failed, .. } if failed.key() == key => {}
        TxnOutcome::Conflict { .. } => return Err(ApiError::conflict()),
    }
    Ok(Json(find_id(core, &endpoint.id)?))
}

fn find(core: &Core, id: Id) -> Result<EndpointShown, ApiError> {
    let Ok(Path(id)) = id else { return Err(ApiError::not_found("the endpoint's id is not UTF-8")) };
    find_id(core, &id)
}

fn find_id(core: &Core, id: &str) -> Result<EndpointShown, ApiError> {
    let (view, nodes) = (core.view(), core.roster.nodes());
    let has = |m: &crate::view::ModelView| {
        m.endpoints.contains_key(id) || m.placement.as_ref().is_some_and(|p| p.value.find(id).is_some())
    };
    let owners = view.models.iter().filter(|(_, model)| has(model));
    let mut all = owners.flat_map(|(name, model)| show::endpoints(&view, name, model, &nodes));
    all.find(|endpoint| endpoint.id == id).ok_or_else(|| {
        let shown: String = id.chars().take(64).collect();
        ApiError::not_found(format!("there is no endpoint {shown:?}"))
    })
}
