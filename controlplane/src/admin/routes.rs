//! `/api/v2/routes`: which names lead to which deployments.
//!
//! What is read has one more field than what is put: `missing` names the targets and fallbacks that are not there at this moment.
//! Deployments and adapters without a route of their own are listed with the one they have anyway, as `"implicit": true`.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, Uri},
};
use serde_json::{Value, json};

use super::{
    ask::{Ask, Params, Reply},
    body,
    edit::{Place, edit},
    error::ApiError,
    guard::unix_now,
};
use crate::{
    audit::Subject,
    core::Core,
    model::{
        Route, RouteTarget,
        route::{self, DEFAULT_WEIGHT, Known},
        validate::{self, FieldError},
    },
    store::{Revision, keys},
    view::View,
};

const PREFIX: &str = "/api/v2/routes/";

type Answer = Result<Reply, ApiError>;

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

    /// The route of a name, be it one that nobody made, and its revision.
    fn route(&self, name: &str) -> Option<(Value, Revision)> {
        if let Some(stored) = self.view.routes.get(name) {
            let revision = stored.mod_revision;
            return Some((self.shown(&stored.value, revision, false), revision));
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
        // What nobody made has no revision of its own to compare.
        Some((self.shown(&route, deployment.mod_revision, true), 0))
    }
}

pub(super) async fn list(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let view = core.view();
    let names = Names::new(&view);
    let known = &names.known;
    let all: BTreeSet<&str> =
        known.routes.keys().chain(&known.deployed).chain(&known.adapters).copied().collect();
    let routes = all.into_iter().map(|name| (name.to_owned(), name));
    params.page("routes", routes, |name| names.route(name).map(|(route, _)| route).unwrap_or_default())
}

pub(super) async fn get(State(core): State<Arc<Core>>, uri: Uri) -> Answer {
    let name = name_in(&uri)?;
    let view = core.view();
    let (shown, revision) = Names::new(&view).route(&name).ok_or_else(|| unknown(&name))?;
    Ok(Reply::ok(shown, revision))
}

fn place(name: &str) -> Place {
    let subject = Subject { kind: "route", name: name.into(), model: name.into() };
    Place { subject, key: keys::route(name), beside: None }
}

/// What it refers to is checked against the view, the write against the route's own revision alone: a deployment deleted at
/// the same moment is missing then, as it would be a moment later, and of a circle that two writes close together proxies
/// take each name once.
pub(super) async fn put(
    State(core): State<Arc<Core>>,
    ask: Ask,
    uri: Uri,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let name = name_in(&uri)?;
    let asked = route::route_body(&name, &body(&headers, bytes)?)?;
    let edited = edit(&core, &ask, &place(&name), |before: Option<&Route>, _| {
        let view = core.view();
        route::check(&name, &asked, &Names::new(&view).known)?;
        if before.is_none() && view.routes.len() >= core.config.limits.max_routes {
            let message = format!("there are {} routes already (limits.max_routes)", view.routes.len());
            return Err(ApiError::new(StatusCode::FORBIDDEN, "too_many_routes", message));
        }
        let route = Route {
            name: name.clone(),
            targets: asked.targets.clone(),
            fallbacks: asked.fallbacks.clone(),
            created_unix_s: before.map_or_else(unix_now, |route| route.created_unix_s),
        };
        Ok(Some(route).into())
    })
    .await?;
    let (status, revision, dry_run) = (edited.status(), edited.revision, edited.dry_run);
    let view = core.view();
    let names = Names::new(&view);
    let body = edited.after.map(|route| names.shown(&route, revision, false)).unwrap_or_default();
    Ok(Reply { status, body, revision, dry_run })
}

pub(super) async fn delete(State(core): State<Arc<Core>>, ask: Ask, uri: Uri) -> Answer {
    let name = name_in(&uri)?;
    let edited = edit(&core, &ask, &place(&name), |before: Option<&Route>, _| {
        if before.is_some() {
            return Ok(None.into());
        }
        let view = core.view();
        Err(match Names::new(&view).known.is_target(&name) {
            true => ApiError::not_found(format!(
                "{name:?} has no route but the one that every deployment and adapter has by itself"
            )),
            false => unknown(&name),
        })
    })
    .await?;
    let view = core.view();
    let names = Names::new(&view);
    let body = edited.before.map(|last| names.shown(&last, edited.revision, false)).unwrap_or_default();
    Ok(Reply { status: StatusCode::OK, body, revision: edited.revision, dry_run: edited.dry_run })
}
