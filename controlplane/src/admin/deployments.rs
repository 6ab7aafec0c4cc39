//! `/api/v2/deployments` and `/api/v2/models`: what operators want, and how far it is.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::{HeaderMap, StatusCode, Uri},
};
use serde_json::{Value, json};

use super::{body, error::ApiError, revisions, show};
use crate::{
    core::Core,
    model::{Deployment, validate},
    plan::scale,
    reconcile::Reports,
    store::{Compare, Entry, Revision, Txn, TxnOutcome, keys},
};

const PREFIX: &str = "/api/v2/deployments/";
/// Tries before a write that is overtaken again and again is given back to the caller.
const ATTEMPTS: usize = 16;

pub(super) type Answer = Result<(StatusCode, Json<Value>), ApiError>;

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
            let adapters = show::adapters(&view, model);
            shown(&stored.value, stored.mod_revision, status(&stored.value, &endpoints, &reports), &adapters)
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
            created_unix_s: before.map_or_else(unix_now, |d| d.created_unix_s),
            policy: asked.policy.clone(),
        })
    };
    let (created, deployment, revision) = write(&core, &name, None, change).await?;
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
    let asked = validate::patch_body(&body(&headers, bytes)?, core.config.limits.max_replicas)?;
    let change = |before: Option<Deployment>| {
        let mut deployment = before.ok_or_else(|| unknown(&name))?;
        deployment.replicas = asked.replicas.unwrap_or(deployment.replicas);
        let rollout = &mut deployment.policy.rollout;
        rollout.paused = asked.paused.unwrap_or(rollout.paused);
        Ok(deployment)
    };
    self::change(&core, &name, None, change).await
}

/// Changes a deployment and answers with what it is then. `rolled_back_to`: the revision that the change comes from.
pub(super) async fn change(
    core: &Core,
    name: &str,
    rolled_back_to: Option<u64>,
    change: impl Fn(Option<Deployment>) -> Result<Deployment, ApiError>,
) -> Answer {
    let (_, deployment, revision) = write(core, name, rolled_back_to, change).await?;
    Ok((StatusCode::OK, Json(with_status(core, &deployment, revision))))
}

pub(super) async fn delete(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = model_in(&uri)?;
    let key = keys::deployment(&name);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(&key).await?.ok_or_else(|| unknown(&name))?;
        let deployment = parse(&entry)?;
        let last = with_status(&core, &deployment, entry.mod_revision);
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), entry.mod_revision))
            .delete(key.clone())
            .delete(keys::revisions(&name));
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            tracing::info!(model = name, revision, "a deployment was deleted");
            core.seen(revision).await;
            return Ok((StatusCode::OK, Json(last)));
        }
    }
    Err(ApiError::conflict())
}

/// Somebody waits for a model that sleeps: it gets a replica again. Says how many it shall have now.
pub(super) async fn wake(
    State(core): State<Arc<Core>>,
    model: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let Ok(Path(name)) = model else { return Err(ApiError::not_found("the model's name is not UTF-8")) };
    validate::model_name(&name)?;
    let queued = match bytes.as_ref().is_ok_and(Bytes::is_empty) {
        true => 1,
        false => validate::wake_body(&body(&headers, bytes)?)?,
    };
    let view = core.view();
    let model = view.models.get(&name);
    let stored = model.and_then(|m| m.deployment.as_ref()).ok_or_else(|| unknown(&name))?;
    core.demands.ask(&name, queued, Instant::now());
    let scaled_to = model.and_then(|m| m.placement.as_ref()).and_then(|p| p.value.scaled_to);
    let wanted = scale::present(&stored.value, scaled_to);
    Ok((StatusCode::ACCEPTED, Json(json!({ "model": name, "queued": queued, "wanted": wanted }))))
}

/// Replaces the deployment by what `change` makes of it; one that stays the same is not written.
async fn write(
    core: &Core,
    name: &str,
    rolled_back_to: Option<u64>,
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
        let mut txn = Txn::new().when(Compare::ModRevision(key.clone(), at)).put(key.clone(), value);
        let (history, history_at) = revisions::read(core, name).await?;
        // Of one that was there before there were revisions, the former state is the first.
        let history = match before.as_ref().filter(|_| history.revisions.is_empty()) {
            Some(before) => history.with(before, None, before.created_unix_s).unwrap_or(history),
            None => history,
        };
        if let Some(history) = history.with(&deployment, rolled_back_to, unix_now()) {
            let (key, value) = (keys::revisions(name), serde_json::to_vec(&history).map_err(internal)?);
            txn = txn.when(Compare::ModRevision(key.clone(), history_at)).put(key, value);
        }
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

fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(now).unwrap_or(0)
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
    let reports = core.reports.borrow().clone();
    shown(deployment, revision, status(deployment, &endpoints, &reports), &adapters)
}

fn status(deployment: &Deployment, endpoints: &[show::EndpointShown], reports: &Reports) -> show::Status {
    let name = &deployment.model;
    let waiting = reports.waiting.get(name).cloned().unwrap_or_default();
    show::Status {
        wanted: match deployment.policy.autoscaling {
            Some(_) => reports.wanted.get(name).copied().unwrap_or(deployment.replicas),
            None => deployment.replicas,
        },
        stalled: reports.stalled.contains(name),
        ..show::status(endpoints, waiting)
    }
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
        "resources": deployment.spec.resources,
        "placement": deployment.policy.placement,
        "rollout": deployment.policy.rollout,
        "disruption": deployment.policy.disruption,
        "autoscaling": deployment.policy.autoscaling,
        "lora": deployment.spec.lora,
        "created_unix_s": deployment.created_unix_s,
        "revision": revision,
        "adapters": adapters,
        "status": status,
    })
}
