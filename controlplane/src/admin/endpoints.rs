//! `/api/v2/endpoints`: every replica, and the operator's drain, which sticks until it is undone or the replica ends.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
};
use serde_json::Value;

use super::{
    ask::{Ask, Params, Reply},
    edit::{Place, edit},
    error::ApiError,
    show::{self, EndpointShown},
};
use crate::{audit::Subject, core::Core, model::desired::Drain, store::keys};

type Id = Result<Path<String>, PathRejection>;

/// By model, and in each by number.
pub(super) async fn list(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let (view, nodes) = (core.view(), core.roster.nodes());
    let all = view.models.iter().flat_map(|(name, model)| {
        let endpoints = show::endpoints(&view, name, model, &nodes).into_iter();
        // Ids of one model differ in their numbers: a longer one is a larger one.
        let mut keyed: Vec<_> =
            endpoints.map(|e| (format!("{name} {:04} {}", e.id.len(), e.id), e)).collect();
        keyed.sort_by(|(a, _), (b, _)| a.cmp(b));
        keyed
    });
    params.page("endpoints", all, |endpoint| serde_json::to_value(&endpoint).unwrap_or_default())
}

pub(super) async fn get(State(core): State<Arc<Core>>, id: Id) -> Result<Json<EndpointShown>, ApiError> {
    Ok(Json(find(&core, id)?))
}

/// The last word counts: one that does not move streams stops an earlier one that does.
pub(super) async fn drain(
    State(core): State<Arc<Core>>,
    params: Params,
    ask: Ask,
    id: Id,
) -> Result<Reply, ApiError> {
    set(&core, &ask, id, Some(params.flag("move_streams")?)).await
}

pub(super) async fn undrain(State(core): State<Arc<Core>>, ask: Ask, id: Id) -> Result<Reply, ApiError> {
    set(&core, &ask, id, None).await
}

/// `moves`: whether its streams are moved; None: it is not drained.
async fn set(core: &Core, ask: &Ask, id: Id, moves: Option<bool>) -> Result<Reply, ApiError> {
    let endpoint = find(core, id)?;
    let (model, id) = (&endpoint.model, &endpoint.id);
    let place = Place {
        subject: Subject { kind: "endpoint", name: id.clone(), model: model.clone() },
        key: keys::drain(model, id),
        // Only while the replica has a place: else nothing would ever take the key away.
        beside: Some(keys::placement(model)),
    };
    let edited = edit(core, ask, &place, |_: Option<&Drain>, _| {
        let drain = |move_streams| Drain { model: model.clone(), replica_id: id.clone(), move_streams };
        Ok(moves.map(drain).into())
    })
    .await?;
    let shown = serde_json::to_value(find_id(core, id)?).unwrap_or_default();
    Ok(Reply { status: StatusCode::OK, body: shown, revision: 0, dry_run: edited.dry_run })
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
