//! `/api/v2/deployments` and `/api/v2/models`: what operators want, and how far it is.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, Uri},
};
use serde_json::{Value, json};

use super::{body, error::ApiError, show};
use crate::{
    core::Core,
    model::{Deployment, validate},
    store::{Compare, Entry, Revision, Txn, TxnOutcome, keys},
};

const PREFIX: &str = "/api/v2/deployments/";
/// Tries before a write that is overtaken again and again is given back to the caller.
const ATTEMPTS: usize = 16;

type Answer = Result<(StatusCode, Json<Value>), ApiError>;

/// The model in the path; its slashes may be raw or encoded.
fn model_in(uri: &Uri) -> Result<String, ApiError> {
    let raw = uri.path().strip_prefix(PREFIX).unwrap_or_default();
    let name = keys::decode(raw).unwrap_or_else(|| raw.to_owned());
    validate::model_name(&name)?;
    Ok(name)
}

fn unknown(name: &str) -> ApiError {
    ApiError::not_found(format!("there is no deployment of the model {name:?}"))
}

pub(super) async fn list(State(core): State<Arc<Core>>) -> Json<Value> {
    let (view, nodes, reports) = (core.view(), core.roster.nodes(), core.reports.borrow().clone());
    let deployed = view.models.iter().filter_map(|(name, m)| Some((name, m, m.deployment.as_ref()?)));
    let shown: Vec<Value> = deployed
        .map(|(name, model, stored)| {
            let endpoints = show::endpoints(&view, name, model, &nodes);
            let waiting = reports.waiting.get(name).cloned().unwrap_or_default();
            let adapters = show::adapters(&view, model);
            shown(&stored.value, stored.mod_revision, show::status(&endpoints, waiting), &adapters)
        })
        .collect();
    Json(json!({ "deployments": shown }))
}

pub(super) async fn models(State(core): State<Arc<Core>>) -> Json<Value> {
    let view = core.view();
    let deployed = view.models.iter().filter_map(|(name, m)| Some((name, m, m.deployment.as_ref()?)));
    let shown: Vec<Value> = deployed
        .map(|(name, model, stored)| {
            let ready = model.endpoints.values().filter(|e| model.takes_requests(e)).count();
            json!({ "model": name, "replicas": stored.value.replicas, "ready": ready })
        })
        .collect();
    Json(json!({ "models": shown }))
}

pub(super) async fn get(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = model_in(&uri)?;
    let view = core.view();
    let stored = view.models.get(&name).and_then(|m| m.deployment.clone()).ok_or_else(|| unknown(&name))?;
    Ok((StatusCode::OK, Json(with_status(&core, &stored.value, stored.mod_revision))))
}

pub(super) async fn put(
    State(core): State<Arc<Core>>,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = model_in(&uri)?;
    let asked = body(&headers, bytes)?;
    let asked = validate::deployment_body(&name, &asked, core.config.limits.max_replicas)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let change = |before: Option<Deployment>| {
        if before.is_none() {
            let deployed = core.view().models.values().filter(|m| m.deployment.is_some()).count();
            if deployed >= core.config.limits.max_deployments {
                let message = format!("there are {deployed} deployments already (limits.max_deployments)");
                return Err(ApiError::new(StatusCode::FORBIDDEN, "too_many_deployments", message));
            }
            if let Some(route) = core.view().routes.get(&name)
                && !route.value.targets.iter().any(|target| target.model == name)
            {
                let message = format!(
                    "{name:?} is the name of a route that leads elsewhere, and would stay so: delete the route first \
                     (DELETE /api/v2/routes/{name}), or deploy under another name"
                );
                return Err(ApiError::new(StatusCode::CONFLICT, "name_is_a_route", message));
            }
        }
        Ok(Deployment {
            model: name.clone(),
            replicas: asked.replicas,
            spec: asked.spec.clone(),
            created_unix_s: before.map_or(i64::try_from(now).unwrap_or(0), |d| d.created_unix_s),
        })
    };
    let (created, deployment, revision) = write(&core, &name, change).await?;
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(with_status(&core, &deployment, revision))))
}

pub(super) async fn patch(
    State(core): State<Arc<Core>>,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = model_in(&uri)?;
    let replicas = validate::scale_body(&body(&headers, bytes)?, core.config.limits.max_replicas)?;
    let change = |before: Option<Deployment>| {
        before.map(|before| Deployment { replicas, ..before }).ok_or_else(|| unknown(&name))
    };
    let (_, deployment, revision) = write(&core, &name, change).await?;
    Ok((StatusCode::OK, Json(with_status(&core, &deployment, revision))))
}

pub(super) async fn delete(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = model_in(&uri)?;
    let key = keys::deployment(&name);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(&key).await?.ok_or_else(|| unknown(&name))?;
        let deployment = parse(&entry)?;
        let last = with_status(&core, &deployment, entry.mod_revision);
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), entry.mod_revision)).delete(key.clone());
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            tracing::info!(model = name, revision, "a deployment was deleted");
            core.seen(revision).await;
            return Ok((StatusCode::OK, Json(last)));
        }
    }
    Err(ApiError::conflict())
}

/// Replaces the deployment by what `change` makes of it; one that stays the same is not written.
async fn write(
    core: &Core,
    name: &str,
    change: impl Fn(Option<Deployment>) -> Result<Deployment, ApiError>,
) -> Result<(bool, Deployment, Revision), ApiError> {
    let key = keys::deployment(name);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(&key).await?;
        let before = entry.as_ref().map(parse).transpose()?;
        let deployment = change(before.clone())?;
        let at = entry.map_or(0, |entry| entry.mod_revision);
        if before.as_ref() == Some(&deployment) {
            return Ok((false, deployment, at));
        }
        let value = serde_json::to_vec(&deployment).map_err(internal)?;
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), at)).put(key.clone(), value);
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            tracing::info!(
                model = name,
                replicas = deployment.replicas,
                revision,
                "a deployment was written"
            );
            core.seen(revision).await;
            return Ok((before.is_none(), deployment, revision));
        }
    }
    Err(ApiError::conflict())
}

fn parse(entry: &Entry) -> Result<Deployment, ApiError> {
    serde_json::from_slice(&entry.value).map_err(internal)
}

fn internal(error: serde_json::Error) -> ApiError {
    tracing::error!(%error, "a stored deployment cannot be read or written");
    let message = "the stored deployment cannot be read; the log says why";
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
}

fn with_status(core: &Core, deployment: &Deployment, revision: Revision) -> Value {
    let (view, nodes) = (core.view(), core.roster.nodes());
    let name = &deployment.model;
    let model = view.models.get(name);
    let endpoints = model.map(|model| show::endpoints(&view, name, model, &nodes)).unwrap_or_default();
    let adapters = model.map(|model| show::adapters(&view, model)).unwrap_or_default();
    let waiting = core.reports.borrow().waiting.get(name).cloned().unwrap_or_default();
    shown(deployment, revision, show::status(&endpoints, waiting), &adapters)
}

fn shown(
    deployment: &Deployment,
    revision: Revision,
    status: show::Status,
    adapters: &[show::AdapterShown],
) -> Value {
    json!({
        "model": deployment.model,
        "replicas": deployment.replicas,
        "engine": deployment.spec.engine,
        "model_path": deployment.spec.model_path,
        "args": deployment.spec.args,
        "env": deployment.spec.env,
        "gpus_per_replica": deployment.spec.gpus_per_replica,
        "lora": deployment.spec.lora,
        "created_unix_s": deployment.created_unix_s,
        "revision": revision,
        "adapters": adapters,
        "status": status,
    })
}
