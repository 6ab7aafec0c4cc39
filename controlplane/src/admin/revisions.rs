//! `/api/v2/revisions`, `/api/v2/diff` and `/api/v2/rollback`: what a deployment was, and the way back.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, Query, State,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{body, deployments, error::ApiError};
use crate::{
    core::Core,
    model::{
        revisions::{History, Revision, differences, rolled_back},
        validate,
    },
    store::{Revision as StoreRevision, keys},
};

type Name = Result<Path<String>, PathRejection>;

/// Two revisions; without `to` the present one, without `from` the one before `to`.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Between {
    from: Option<u64>,
    to: Option<u64>,
}

/// A model's history, and the store's revision of its key; 0 if there is none.
pub(super) async fn read(core: &Core, model: &str) -> Result<(History, StoreRevision), ApiError> {
    let Some(entry) = core.store.get(&keys::revisions(model)).await? else {
        return Ok((History { model: model.to_owned(), revisions: Vec::new() }, 0));
    };
    let history = serde_json::from_slice(&entry.value).map_err(|error| {
        tracing::error!(%error, model, "stored revisions cannot be read");
        let message = "the stored revisions cannot be read; the log says why";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    })?;
    Ok((history, entry.mod_revision))
}

/// The history of a model that is deployed.
async fn of(core: &Core, name: Name) -> Result<(String, History), ApiError> {
    let Ok(Path(name)) = name else { return Err(ApiError::not_found("the model's name is not UTF-8")) };
    validate::model_name(&name)?;
    if core.store.get(&keys::deployment(&name)).await?.is_none() {
        return Err(ApiError::not_found(format!("there is no deployment of the model {name:?}")));
    }
    let (history, _) = read(core, &name).await?;
    Ok((name, history))
}

fn missing(reason: String) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "no_such_revision", reason)
}

/// Newest first, each with what it changed.
pub(super) async fn list(State(core): State<Arc<Core>>, name: Name) -> Result<Json<Value>, ApiError> {
    let (name, history) = of(&core, name).await?;
    let all = &history.revisions;
    let changes = |at: usize| {
        let before = at.checked_sub(1).and_then(|before| all.get(before));
        before.zip(all.get(at)).map(|(before, after)| differences(before, after)).unwrap_or_default()
    };
    let shown = all.iter().enumerate().rev().map(|(at, revision)| {
        json!({
            "number": revision.number,
            "unix_s": revision.unix_s,
            "rolled_back_to": revision.rolled_back_to,
            "changes": changes(at),
        })
    });
    Ok(Json(json!({ "model": name, "revisions": shown.collect::<Vec<_>>() })))
}

/// What differs between two revisions.
pub(super) async fn diff(
    State(core): State<Arc<Core>>,
    name: Name,
    between: Result<Query<Between>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Ok(Query(between)) = between else {
        let message = "from and to must be numbers of revisions: ?from=3&to=5";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_query", message));
    };
    let (name, history) = of(&core, name).await?;
    let newest = history.revisions.last().map_or(1, |revision| revision.number);
    let to = history.find(between.to.unwrap_or(newest)).map_err(missing)?;
    let from: &Revision = match between.from {
        Some(number) => history.find(number).map_err(missing)?,
        None => history.find(to.number.saturating_sub(1)).map_err(missing)?,
    };
    let changes = differences(from, to);
    Ok(Json(json!({ "model": name, "from": from.number, "to": to.number, "changes": changes })))
}

/// Makes the deployment what it was: `{"to": 3}`, or with an empty body what it was before its last change.
pub(super) async fn rollback(
    State(core): State<Arc<Core>>,
    name: Name,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> deployments::Answer {
    let to = match bytes.as_ref().is_ok_and(Bytes::is_empty) {
        true => None,
        false => validate::rollback_body(&body(&headers, bytes)?)?,
    };
    let (name, history) = of(&core, name).await?;
    let revision = match to {
        Some(number) => history.find(number),
        None => history.previous(),
    };
    let revision = revision.map_err(missing)?;
    deployments::change(&core, &name, Some(revision.number), |before| {
        let unknown = || ApiError::not_found(format!("there is no deployment of the model {name:?}"));
        before.map(|before| rolled_back(&before, revision)).ok_or_else(unknown)
    })
    .await
}
