//! A look inside: `/debug/snapshot`, `/debug/endpoints`, `/debug/decisions`. All JSON.
//!
//! What is routable is read from the snapshot in use, an immutable value: neither picks nor updates notice. Answers about
//! large fleets come in pages of a bounded length and are made on a thread that serves nothing else.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::PrivateState;
use crate::{
    endpoints::{Endpoint, Pool, Route, Snapshot, departure, table::Target},
    health,
    telemetry::decisions::Decision,
};

/// Entries of a page, unless `limit` says otherwise.
const PAGE: usize = 1_000;
/// Most entries of a page.
const LARGEST_PAGE: usize = 10_000;

/// What one endpoint is and how it is doing.
#[derive(Debug, Serialize)]
struct EndpointView<'a> {
    id: &'a str,
    address: &'a str,
    generation: u64,
    zone: &'a str,
    draining: bool,
    ejected: bool,
    health: Value,
    inflight: u32,
    adapters: &'a BTreeSet<String>,
    weight_percent: u32,
    departure: Option<departure::Shown>,
    reported: Option<Value>,
}

fn view(endpoint: &Endpoint, now_ms: u64) -> EndpointView<'_> {
    EndpointView {
        id: &endpoint.id,
        address: &endpoint.address,
        generation: endpoint.generation,
        zone: &endpoint.zone,
        draining: endpoint.draining,
        ejected: endpoint.is_ejected(now_ms),
        health: health::describe(endpoint, now_ms),
        inflight: endpoint.inflight(),
        adapters: &endpoint.adapters,
        weight_percent: endpoint.weight_percent,
        departure: endpoint.departure(),
        reported: endpoint.reported(now_ms).map(|report| {
            json!({
                "running": report.running,
                "waiting": report.waiting,
                "kv_used_permille": report.kv_used_permille,
                "age_ms": report.age_ms,
            })
        }),
    }
}

fn route_view(route: &Route) -> Value {
    let target = |target: &Arc<Target>| {
        json!({
            "pool": &*target.pool,
            "served_model": target.served_model,
            "weight": target.weight,
            "adapter": target.adapter,
        })
    };
    json!({
        "model": &*route.model,
        "targets": route.targets.iter().map(target).collect::<Value>(),
        "fallbacks": route.fallbacks,
        "parent": route.parent,
        "created_unix_s": route.created_unix_s,
    })
}

fn pool_view(name: &str, pool: &Pool, now_ms: u64) -> Value {
    let count = |is: fn(&Endpoint, u64) -> bool| pool.endpoints.iter().filter(|e| is(e, now_ms)).count();
    json!({
        "pool": name,
        "endpoints": pool.endpoints.len(),
        "draining": count(|e, _| e.draining),
        "ejected": count(|e, now_ms| e.is_ejected(now_ms)),
        "inflight": pool.endpoints.iter().map(|e| u64::from(e.inflight())).sum::<u64>(),
        "retries_left": pool.budget.left(),
    })
}

/// `?model=&limit=&after=`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    model: Option<String>,
    limit: Option<usize>,
    after: Option<String>,
}

impl Ask {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(PAGE).clamp(1, LARGEST_PAGE)
    }
}

/// What the query asks for, and of what, or a 400 that says what is accepted.
fn asked(
    query: Result<Query<Ask>, QueryRejection>,
    state: &PrivateState,
) -> Result<(Ask, Arc<Snapshot>), Box<Response>> {
    let refused = |e: QueryRejection| {
        let message =
            format!("{}; accepted: model=NAME, limit=1 to {LARGEST_PAGE}, after=CURSOR", e.body_text());
        Box::new(failed(StatusCode::BAD_REQUEST, "invalid_query", &message))
    };
    let ask = query.map(|Query(ask)| ask).map_err(refused)?;
    match &ask.after {
        Some(cursor) if !cursor.contains('\n') => Err(Box::new(failed(
            StatusCode::BAD_REQUEST,
            "invalid_query",
            "after is not a cursor; take the whole of `next` from the page before",
        ))),
        _ => Ok((ask, Arc::clone(&state.gateway.table.load()))),
    }
}

fn failed(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({"error": {"code": code, "message": message}}))).into_response()
}

/// Runs `make` where it keeps nobody waiting, and sends what it made.
async fn made(make: impl FnOnce() -> String + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(make).await {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => failed(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the answer could not be made"),
    }
}

/// Everything routable: which version, since when and from where, routes and pools on the first page, and endpoints by
/// pool and id, a page at a time. `next` is where the next page is asked for; null on the last.
pub(super) async fn snapshot(
    State(state): State<PrivateState>,
    query: Result<Query<Ask>, QueryRejection>,
) -> Response {
    let (ask, snapshot) = match asked(query, &state) {
        Ok(asked) => asked,
        Err(refused) => return *refused,
    };
    if let Some(model) = ask.model.as_deref().filter(|model| !snapshot.routes.contains_key(*model)) {
        let message = format!("there is no route for the model {model:?}");
        return failed(StatusCode::NOT_FOUND, "not_found", &message);
    }
    let heard = state.xds.view().last_response_age;
    let source = match (snapshot.loaded, heard) {
        (false, _) => "none",
        (_, None) => "disk",
        (_, Some(_)) => "controlplane",
    };
    let head = json!({
        "version": snapshot.version.to_string(),
        "term": snapshot.version.term,
        "revision": snapshot.version.revision,
        "source": source,
        "age_s": snapshot.applied.map(|at| at.elapsed().as_secs()),
        "last_response_age_s": heard.map(|age| age.as_secs()),
    });
    let now_ms = state.gateway.now_ms();
    made(move || page(&snapshot, &ask, head, now_ms).to_string()).await
}

fn page(snapshot: &Snapshot, ask: &Ask, mut head: Value, now_ms: u64) -> Value {
    let limit = ask.limit();
    let routes: Vec<&Route> = match &ask.model {
        Some(model) => snapshot.routes.get(model).map(|route| &**route).into_iter().collect(),
        None => snapshot.routes.values().map(|route| &**route).collect(),
    };
    let wanted = |name: &str| {
        let mut targets = routes.iter().flat_map(|route| &route.targets);
        ask.model.is_none() || targets.any(|target| &*target.pool == name)
    };
    let mut pools: Vec<(&String, &Arc<Pool>)> =
        snapshot.pools.iter().filter(|(name, _)| wanted(name)).collect();
    pools.sort_unstable_by_key(|(name, _)| *name);
    let total: usize = pools.iter().map(|(_, pool)| pool.endpoints.len()).sum();
    let after = ask.after.as_deref().and_then(|cursor| cursor.split_once('\n'));
    let rest = pools.iter().flat_map(|(name, pool)| {
        // Endpoints are in the order of their ids.
        let from = match after {
            Some((last, _)) if name.as_str() < last => pool.endpoints.len(),
            Some((last, id)) if name.as_str() == last => pool.endpoints.partition_point(|e| &*e.id <= id),
            _ => 0,
        };
        pool.endpoints.iter().skip(from).map(move |endpoint| (name.as_str(), endpoint))
    });
    let mut rest = rest.peekable();
    let mut shown: Vec<Value> = Vec::with_capacity(limit.min(total));
    let mut last = None;
    for (pool, endpoint) in rest.by_ref().take(limit) {
        let mut entry = json!(view(endpoint, now_ms));
        entry["pool"] = pool.into();
        shown.push(entry);
        last = Some((pool, &endpoint.id));
    }
    let next = last.filter(|_| rest.peek().is_some()).map(|(pool, id)| {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &limit.to_string()).append_pair("after", &format!("{pool}\n{id}"));
        if let Some(model) = &ask.model {
            query.append_pair("model", model);
        }
        format!("/debug/snapshot?{}", query.finish())
    });
    if after.is_none() {
        head["routes"] = routes.iter().take(LARGEST_PAGE).map(|route| route_view(route)).collect();
        head["routes_total"] = routes.len().into();
        head["pools"] =
            pools.iter().take(LARGEST_PAGE).map(|(name, pool)| pool_view(name, pool, now_ms)).collect();
        head["pools_total"] = pools.len().into();
    }
    head["endpoints"] = shown.into();
    head["endpoints_total"] = total.into();
    head["next"] = next.into();
    head
}

/// The endpoints of every model, or of one; at most `limit` of each.
pub(super) async fn endpoints(
    State(state): State<PrivateState>,
    query: Result<Query<Ask>, QueryRejection>,
) -> Response {
    let (ask, snapshot) = match asked(query, &state) {
        Ok(asked) => asked,
        Err(refused) => return *refused,
    };
    let now_ms = state.gateway.now_ms();
    made(move || {
        let models: serde_json::Map<String, Value> = snapshot
            .routes
            .iter()
            .filter(|(name, _)| ask.model.as_ref().is_none_or(|model| model == *name))
            .map(|(name, route)| {
                let pools = route.targets.iter().filter_map(|target| snapshot.pools.get(&*target.pool));
                let endpoints = pools.flat_map(|pool| &pool.endpoints).take(ask.limit());
                (name.clone(), endpoints.map(|endpoint| json!(view(endpoint, now_ms))).collect())
            })
            .collect();
        json!({"version": snapshot.version.to_string(), "models": models}).to_string()
    })
    .await
}

/// How the latest recorded requests were routed, the last first.
pub(super) async fn decisions(
    State(state): State<PrivateState>,
    query: Result<Query<Ask>, QueryRejection>,
) -> Response {
    let (ask, _) = match asked(query, &state) {
        Ok(asked) => asked,
        Err(refused) => return *refused,
    };
    made(move || {
        let limit = ask.limit.unwrap_or(100).clamp(1, LARGEST_PAGE);
        let found = state.gateway.telemetry.decisions.latest(ask.model.as_deref(), limit);
        let found: Vec<&Decision> = found.iter().map(|decision| &**decision).collect();
        json!({"decisions": found}).to_string()
    })
    .await
}

/// How one request was routed.
pub(super) async fn decision(State(state): State<PrivateState>, Path(request_id): Path<String>) -> Response {
    let decisions = &state.gateway.telemetry.decisions;
    match decisions.find(&request_id) {
        Some(decision) => Json(&*decision).into_response(),
        None if decisions.is_on() => failed(
            StatusCode::NOT_FOUND,
            "not_found",
            "this proxy has no record of that request: another proxy served it, or it is older than what is kept \
             (telemetry.decisions_kept), or nothing went wrong with it and it was not sampled \
             (telemetry.decisions_sample, or the header x-penstock-explain: 1)",
        ),
        None => failed(
            StatusCode::NOT_FOUND,
            "not_found",
            "telemetry.decisions_kept is 0: nothing is recorded here",
        ),
    }
}
