//! `/api/v2/routes`: which names lead to which deployments.
//!
//! What is read has one more field than what is put: `missing` names the targets and fallbacks that are not there at this moment.
//! Deployments and adapters without a route of their own are listed with the one they have anyway, as `"implicit": true`.

use std::{
    collections::BTreeSet,
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

use super::{body, error::ApiError};
use crate::{
    core::Core,
    model::{
        Route, RouteTarget,
        route::{self, DEFAULT_WEIGHT, Known},
        validate::{self, FieldError},
    },
    store::{Compare, Entry, Revision, Txn, TxnOutcome, keys},
    view::View,
};

const PREFIX: &str = "/api/v2/routes/";
/// Tries before a write that is overtaken again and again is given back to the caller.
const ATTEMPTS: usize = 16;

type Answer = Result<(StatusCode, Json<Value>), ApiError>;

/// The name in the path; its slashes may be raw or encoded.
fn name_in(uri: &Uri) -> Result<String, ApiError> {
    let raw = uri.path().strip_prefix(PREFIX).unwrap_or_default();
    let name = keys::decode(raw).unwrap_or_else(|| raw.to_owned());
    validate::model_name(&name).map_err(|error| FieldError { field: "name".into(), ..error })?;
    Ok(name)
}

fn unknown(name: &str) -> ApiError {
    ApiError::not_found(format!("there is neither a route nor a deployment named {name:?}"))
}

/// A view, and what routes may refer to in it.
struct Names<'a> {
    view: &'a View,
    known: Known<'a>,
}

impl<'a> Names<'a> {
    fn new(view: &'a View) -> Self {
        let deployed = view.models.iter().filter(|(_, model)| model.deployment.is_some());
        let routes = view.routes.iter().map(|(name, stored)| (name.as_str(), &*stored.value.fallbacks));
        let known = Known {
            deployed: deployed.map(|(name, _)| name.as_str()).collect(),
            adapters: view.models.values().flat_map(|model| model.adapters()).collect(),
            routes: routes.collect(),
        };
        Self { view, known }
    }

    fn shown(&self, route: &Route, revision: Revision, implicit: bool) -> Value {
        let targets = route.targets.iter().map(|target| &target.model);
        let missing = targets.filter(|name| !self.known.is_target(name));
        let missing = missing.chain(route.fallbacks.iter().filter(|name| !self.known.is_name(name)));
        json!({
            "name": route.name,
            "targets": route.targets,
            "fallbacks": route.fallbacks,
            "missing": missing.collect::<Vec<_>>(),
            "implicit": implicit,
            "created_unix_s": route.created_unix_s,
            "revision": revision,
        })
    }

    /// The route of a name, be it one that nobody made.
    fn route(&self, name: &str) -> Option<Value> {
        if let Some(stored) = self.view.routes.get(name) {
            return Some(self.shown(&stored.value, stored.mod_revision, false));
        }
        let named = self.view.models.get(name).filter(|model| model.deployment.is_some());
        let mut models = self.view.models.values();
        let model = named.or_else(|| models.find(|model| model.adapters().contains(name)))?;
        let deployment = model.deployment.as_ref()?;
        let route = Route {
            name: name.to_owned(),
            targets: vec![RouteTarget { model: name.to_owned(), weight: DEFAULT_WEIGHT }],
            fallbacks: Vec::new(),
            created_unix_s: deployment.value.created_unix_s,
        };
        Some(self.shown(&route, deployment.mod_revision, true))
    }
}

pub(super) async fn list(State(core): State<Arc<Core>>) -> Json<Value> {
    let view = core.view();
    let names = Names::new(&view);
    let known = &names.known;
    let all: BTreeSet<&str> =
        known.routes.keys().chain(&known.deployed).chain(&known.adapters).copied().collect();
    let routes: Vec<Value> = all.into_iter().filter_map(|name| names.route(name)).collect();
    Json(json!({ "routes": routes }))
}

pub(super) async fn get(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = name_in(&uri)?;
    let view = core.view();
    let shown = Names::new(&view).route(&name).ok_or_else(|| unknown(&name))?;
    Ok((StatusCode::OK, Json(shown)))
}

/// What it refers to is checked against the view, the write against the route's own revision alone: a deployment deleted at
/// the same moment is missing then, as it would be a moment later, and of a circle that two writes close together proxies
/// take each name once.
pub(super) async fn put(
    State(core): State<Arc<Core>>,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = name_in(&uri)?;
    let asked = route::route_body(&name, &body(&headers, bytes)?)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let key = keys::route(&name);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(&key).await?;
        let before = entry.as_ref().map(parse).transpose()?;
        let view = core.view();
        let names = Names::new(&view);
        route::check(&name, &asked, &names.known)?;
        if before.is_none() && view.routes.len() >= core.config.limits.max_routes {
            let message = format!("there are {} routes already (limits.max_routes)", view.routes.len());
            return Err(ApiError::new(StatusCode::FORBIDDEN, "too_many_routes", message));
        }
        let route = Route {
            name: name.clone(),
            targets: asked.targets.clone(),
            fallbacks: asked.fallbacks.clone(),
            created_unix_s: before.as_ref().map_or(i64::try_from(now).unwrap_or(0), |r| r.created_unix_s),
        };
        let at = entry.map_or(0, |entry| entry.mod_revision);
        if before.as_ref() == Some(&route) {
            return Ok((StatusCode::OK, Json(names.shown(&route, at, false))));
        }
        let value = serde_json::to_vec(&route).map_err(internal)?;
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), at)).put(key.clone(), value);
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            tracing::info!(route = name, revision, "a route was written");
            core.seen(revision).await;
            let status = if before.is_none() { StatusCode::CREATED } else { StatusCode::OK };
            return Ok((status, Json(Names::new(&core.view()).shown(&route, revision, false))));
        }
    }
    Err(ApiError::conflict())
}

pub(super) async fn delete(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = name_in(&uri)?;
    let key = keys::route(&name);
    for _ in 0..ATTEMPTS {
        let Some(entry) = core.store.get(&key).await? else {
            let view = core.view();
            return Err(match Names::new(&view).known.is_target(&name) {
                true => ApiError::not_found(format!(
                    "{name:?} has no route but the one that every deployment and adapter has by itself"
                )),
                false => unknown(&name),
            });
        };
        let route = parse(&entry)?;
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), entry.mod_revision)).delete(key.clone());
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            tracing::info!(route = name, revision, "a route was deleted");
            core.seen(revision).await;
            let last = Names::new(&core.view()).shown(&route, entry.mod_revision, false);
            return Ok((StatusCode::OK, Json(last)));
        }
    }
    Err(ApiError::conflict())
}

fn parse(entry: &Entry) -> Result<Route, ApiError> {
    serde_json::from_slice(&entry.value).map_err(internal)
}

fn internal(error: serde_json::Error) -> ApiError {
    tracing::error!(%error, "a stored route cannot be read or written");
    let message = "the stored route cannot be read; the log says why";
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
}
