//! `/api/v2/deployments` and `/api/v2/models`: what operators want, and how far it is.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::{HeaderMap, StatusCode, Uri},
};
use penstock_config::controlplane::Role;
use serde_json::{Value, json};

use super::{
    ask::{Ask, Params, Reply},
    body,
    edit::{Beside, Edited, Place, Step, edit},
    error::ApiError,
    guard::unix_now,
    revisions, show,
};
use crate::{
    access::Caller,
    audit::{Subject, mask::mask},
    core::Core,
    model::{Deployment, validate},
    plan::scale,
    reconcile::Reports,
    store::{Revision, keys},
    view::{ModelView, Stored, View},
};

const PREFIX: &str = "/api/v2/deployments/";

pub(super) type Answer = Result<Reply, ApiError>;

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

/// What is deployed, by name.
fn deployed(view: &View) -> impl Iterator<Item = (String, (&ModelView, &Stored<Deployment>))> {
    view.models.iter().filter_map(|(name, m)| Some((name.clone(), (&**m, m.deployment.as_ref()?))))
}

pub(super) async fn list(
    State(core): State<Arc<Core>>,
    caller: Caller,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (view, nodes, reports) = (core.view(), core.roster.nodes(), core.reports.borrow().clone());
    params.page("deployments", deployed(&view), |(model, stored)| {
        let deployment = &stored.value;
        let endpoints = show::endpoints(&view, &deployment.model, model, &nodes);
        let adapters = show::adapters(&view, model);
        let status = status(deployment, &endpoints, &reports);
        for_eyes(caller.role, shown(deployment, stored.mod_revision, status, &adapters))
    })
}

pub(super) async fn models(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let view = core.view();
    params.page("models", deployed(&view), |(model, stored)| {
        let ready = model.endpoints.values().filter(|e| model.takes_requests(e)).count();
        json!({ "model": stored.value.model, "replicas": stored.value.replicas, "ready": ready })
    })
}

pub(super) async fn get(State(core): State<Arc<Core>>, caller: Caller, uri: Uri) -> Answer {
    let name = model_in(&uri)?;
    let view = core.view();
    let stored = view.models.get(&name).and_then(|m| m.deployment.clone()).ok_or_else(|| unknown(&name))?;
    let shown = with_status(&core, &stored.value, stored.mod_revision);
    Ok(Reply::ok(for_eyes(caller.role, shown), stored.mod_revision))
}

pub(super) async fn put(
    State(core): State<Arc<Core>>,
    ask: Ask,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = model_in(&uri)?;
    let asked = body(&headers, bytes)?;
    let asked = validate::deployment_body(&name, &asked, core.config.limits.max_replicas)?;
    change(&core, &ask, &name, None, |before| {
        if before.is_none() {
            may_begin(&core, &name)?;
        }
        Ok(Deployment {
            model: name.clone(),
            replicas: asked.replicas,
            spec: asked.spec.clone(),
            created_unix_s: before.map_or_else(unix_now, |d| d.created_unix_s),
            policy: asked.policy.clone(),
        })
    })
    .await
}

/// Whether there may be a deployment of a new name.
fn may_begin(core: &Core, name: &str) -> Result<(), ApiError> {
    let view = core.view();
    let deployed = view.models.values().filter(|m| m.deployment.is_some()).count();
    if deployed >= core.config.limits.max_deployments {
        let message = format!("there are {deployed} deployments already (limits.max_deployments)");
        return Err(ApiError::new(StatusCode::FORBIDDEN, "too_many_deployments", message));
    }
    let route = view.routes.get(name);
    if route.is_some_and(|route| !route.value.targets.iter().any(|target| target.model == name)) {
        let message = format!(
            "{name:?} is the name of a route that leads elsewhere, and would stay so: delete the route first \
             (DELETE /api/v2/routes/{name}), or deploy under another name"
        );
        return Err(ApiError::new(StatusCode::CONFLICT, "name_is_a_route", message));
    }
    Ok(())
}

pub(super) async fn patch(
    State(core): State<Arc<Core>>,
    ask: Ask,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = model_in(&uri)?;
    let asked = validate::patch_body(&body(&headers, bytes)?, core.config.limits.max_replicas)?;
    change(&core, &ask, &name, None, |before| {
        let mut deployment = before.cloned().ok_or_else(|| unknown(&name))?;
        deployment.replicas = asked.replicas.unwrap_or(deployment.replicas);
        let rollout = &mut deployment.policy.rollout;
        rollout.paused = asked.paused.unwrap_or(rollout.paused);
        Ok(deployment)
    })
    .await
}

fn place(name: &str) -> Place {
    let subject = Subject { kind: "deployment", name: name.into(), model: name.into() };
    Place { subject, key: keys::deployment(name), beside: Some(keys::revisions(name)) }
}

/// Changes a deployment, with its history, and answers with what it is then. `rolled_back_to`: the revision that the
/// change comes from.
pub(super) async fn change(
    core: &Core,
    ask: &Ask,
    name: &str,
    rolled_back_to: Option<u64>,
    change: impl Fn(Option<&Deployment>) -> Result<Deployment, ApiError>,
) -> Answer {
    let edited = edit(core, ask, &place(name), |before: Option<&Deployment>, history| {
        let deployment = change(before)?;
        let history = revisions::read(name, history)?;
        // Of one that was there before there were revisions, the former state is the first.
        let history = match before.filter(|_| history.revisions.is_empty()) {
            Some(before) => history.with(before, None, before.created_unix_s).unwrap_or(history),
            None => history,
        };
        let beside = match history.with(&deployment, rolled_back_to, unix_now()) {
            None => Beside::Leave,
            Some(history) => {
                let value = serde_json::to_vec(&history);
                Beside::Put(value.map_err(|error| ApiError::unreadable("deployment", &error))?)
            }
        };
        Ok(Step { after: Some(deployment), beside })
    })
    .await?;
    reply(core, edited)
}

fn reply(core: &Core, edited: Edited<Deployment>) -> Answer {
    let (status, revision, dry_run) = (edited.status(), edited.revision, edited.dry_run);
    let deployment = edited.after.or(edited.before);
    let body = deployment.map(|deployment| with_status(core, &deployment, revision)).unwrap_or_default();
    Ok(Reply { status, body, revision, dry_run })
}

pub(super) async fn delete(State(core): State<Arc<Core>>, ask: Ask, uri: Uri) -> Answer {
    let name = model_in(&uri)?;
    let view = core.view();
    let edited = edit(&core, &ask, &place(&name), |before: Option<&Deployment>, _| match before {
        Some(_) => Ok(Step { after: None, beside: Beside::Delete }),
        None => Err(unknown(&name)),
    })
    .await?;
    // As it was: what ends now is not what was asked about.
    let last = edited.before.as_ref().map(|last| with_status_in(&core, &view, last, edited.revision));
    let body = last.unwrap_or_default();
    Ok(Reply { status: StatusCode::OK, body, revision: edited.revision, dry_run: edited.dry_run })
}

/// Somebody waits for a model that sleeps: it gets a replica again. Says how many it shall have now.
pub(super) async fn wake(
    State(core): State<Arc<Core>>,
    model: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
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

/// What `role` may see of `value`: whoever only reads does not see secrets.
pub(super) fn for_eyes(role: Role, value: Value) -> Value {
    if role == Role::Viewer { mask(&value) } else { value }
}

fn with_status(core: &Core, deployment: &Deployment, revision: Revision) -> Value {
    with_status_in(core, &core.view(), deployment, revision)
}

fn with_status_in(core: &Core, view: &View, deployment: &Deployment, revision: Revision) -> Value {
    let nodes = core.roster.nodes();
    let name = &deployment.model;
    let model = view.models.get(name);
    let endpoints = model.map(|model| show::endpoints(view, name, model, &nodes)).unwrap_or_default();
    let adapters = model.map(|model| show::adapters(view, model)).unwrap_or_default();
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
    let mut shown = json!({
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
        "warm": deployment.spec.warm,
        "created_unix_s": deployment.created_unix_s,
        "revision": revision,
        "adapters": adapters,
        "status": status,
    });
    // The typed fields that are set, beside the others.
    let options = serde_json::to_value(&deployment.spec.options);
    if let (Value::Object(shown), Ok(Value::Object(options))) = (&mut shown, options) {
        shown.extend(options);
    }
    shown
}
