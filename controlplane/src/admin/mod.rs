//! The private HTTP side: REST, the console, probes, metrics.
//!
//! `api` is the table of every route with its role; the router, the `guard` that authorises, and the API's document
//! (`openapi`) are made from it. Reads come from the view. Changes go through `edit`: one transaction with the change's record
//! in the audit, and an answer only when the view has it, so that what was put can be read back at once. Every refusal has the
//! one shape of `error`.

mod api;
mod ask;
mod audit;
mod backup;
mod cluster;
mod console;
mod deployments;
mod edit;
mod endpoints;
mod error;
mod gpus;
mod guard;
mod logs;
mod node_policies;
mod nodes;
mod observe;
mod openapi;
mod placements;
mod proxies;
mod revisions;
mod routes;
mod show;
mod table;
mod tokens;

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    middleware,
    response::Response,
};
use serde_json::Value;

use crate::{core::Core, model::validate};
use error::ApiError;
use guard::{Guard, Rule};

/// Every route.
pub fn router(core: Arc<Core>) -> Router {
    let limit = DefaultBodyLimit::max(core.config.limits.max_body_bytes);
    let mut router = Router::new();
    let mut rules = Vec::new();
    for row in api::rows() {
        let rule = Rule { access: row.access, query: row.query, repeatable: row.repeatable };
        rules.push((row.method, row.path, rule));
        router = router.route(row.path, row.handler);
    }
    let guard = Guard { core: core.clone(), rules: rules.into() };
    router
        .route_layer(middleware::from_fn_with_state(guard, guard::guard))
        .fallback(|| async {
            ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path")
        })
        .method_not_allowed_fallback(|| async {
            let message = "this path does not take this method; the Allow header names those it takes";
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        })
        .layer(limit)
        .layer(middleware::map_response_with_state(core.clone(), count))
        .with_state(core)
}

async fn count(State(core): State<Arc<Core>>, response: Response) -> Response {
    let class = match response.status().as_u16() {
        ..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    };
    core.metrics.http_requests.with_label_values(&[class]).inc();
    response
}

/// A request's JSON body.
fn body(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or_default());
    let essence = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    if let Some(kind) = essence.filter(|kind| kind != "application/json") {
        let message = format!("the body must be application/json, not {kind:?}");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let bytes = body?;
    validate::json(&bytes).map_err(|reason| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {reason}"))
    })
}
