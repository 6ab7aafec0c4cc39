//! `/api/v2/revisions`, `/api/v2/diff` and `/api/v2/rollback`: what a deployment was, and the way back.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::{HeaderMap, StatusCode},
};
use penstock_config::controlplane::Role;
use serde_json::{Value, json};

use super::{
    ask::{Ask, Params},
    body, deployments,
    error::ApiError,
};
use crate::{
    access::Caller,
    audit::mask::mask_field,
    core::Core,
    model::{
        revisions::{Difference, History, Revision, differences, rolled_back},
        validate,
    },
    store::{Entry, keys},
};

type Name = Result<Path<String>, PathRejection>;

/// A model's history out of its entry.
pub(super) fn read(model: &str, entry: Option<&Entry>) -> Result<History, ApiError> {
    let Some(entry) = entry else {
        return Ok(History { model: model.to_owned(), revisions: Vec::new() });
    };
    serde_json::from_slice(&entry.value).map_err(|error| ApiError::unreadable("revisions", &error))
}

/// What differs, as the caller may see it.
fn shown(caller: &Caller, before: &Revision, after: &Revision) -> Vec<Difference> {
    let mut all = differences(before, after);
    if caller.role == Role::Viewer {
        for found in &mut all {
            for value in [&mut found.before, &mut found.after].into_iter().flatten() {
                mask_field(&found.field, value);
            }
        }
    }
    all
}

/// The history of a model that is deployed.
async fn of(core: &Core, name: Name) -> Result<(String, History), ApiError> {
    let Ok(Path(name)) = name else { return Err(ApiError::not_found("the model's name is not UTF-8")) };
    validate::model_name(&name)?;
    if core.store.get(&keys::deployment(&name)).await?.is_none() {
        return Err(ApiError::not_found(format!("there is no deployment of the model {name:?}")));
    }
    let history = read(&name, core.store.get(&keys::revisions(&name)).await?.as_ref())?;
    Ok((name, history))
}

fn missing(reason: String) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "no_such_revision", reason)
}

/// Newest first, each with what it changed.
pub(super) async fn list(
    State(core): State<Arc<Core>>,
    caller: Caller,
    name: Name,
) -> Result<Json<Value>, ApiError> {
    let (name, history) = of(&core, name).await?;
    let all = &history.revisions;
    let changes = |at: usize| {
        let before = at.checked_sub(1).and_then(|before| all.get(before));
        before.zip(all.get(at)).map(|(before, after)| shown(&caller, before, after)).unwrap_or_default()
    };
    let listed = all.iter().enumerate().rev().map(|(at, revision)| {
        json!({
            "number": revision.number,
            "unix_s": revision.unix_s,
            "rolled_back_to": revision.rolled_back_to,
            "changes": changes(at),
        })
    });
    Ok(Json(json!({ "model": name, "revisions": listed.collect::<Vec<_>>() })))
}

/// What differs between two revisions.
pub(super) async fn diff(
    State(core): State<Arc<Core>>,
    caller: Caller,
    params: Params,
    name: Name,
) -> Result<Json<Value>, ApiError> {
    // Without `to` the present one, without `from` the one before `to`.
    let number = |name| params.number(name, 1, u64::from(u32::MAX));
    let (asked_from, asked_to) = (number("from")?, number("to")?);
    let (name, history) = of(&core, name).await?;
    let newest = history.revisions.last().map_or(1, |revision| revision.number);
    let to = history.find(asked_to.unwrap_or(newest)).map_err(missing)?;
    let from: &Revision = match asked_from {
        Some(number) => history.find(number).map_err(missing)?,
        None => history.find(to.number.saturating_sub(1)).map_err(missing)?,
    };
    let changes = shown(&caller, from, to);
    Ok(Json(json!({ "model": name, "from": from.number, "to": to.number, "changes": changes })))
}

/// Makes the deployment what it was: `{"to": 3}`, or with an empty body what it was before its last change.
pub(super) async fn rollback(
    State(core): State<Arc<Core>>,
    ask: Ask,
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
    deployments::change(&core, &ask, &name, Some(revision.number), |before| {
        let unknown = || ApiError::not_found(format!("there is no deployment of the model {name:?}"));
        before.map(|before| rolled_back(before, revision)).ok_or_else(unknown)
    })
    .await
}
