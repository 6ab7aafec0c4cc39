//! The private HTTP side: REST, the console, probes, metrics.
//!
//! Reads come from the view, writes are single transactions, and a write answers only when the view has it: what was
//! put can be read back at once. Every refusal has the one shape of `error::ApiError`.

mod cluster;
mod deployments;
mod endpoints;
mod error;
mod node_policies;
mod nodes;
mod revisions;
mod routes;
mod show;

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::Value;

use crate::{core::Core, model::validate};
use error::ApiError;

/// Every route.
pub fn router(core: Arc<Core>) -> Router {
    let limit = DefaultBodyLimit::max(core.config.limits.max_body_bytes);
    Router::new()
        .route("/", get(console_page))
        .route("/v1/admin/ui", get(console_page))
        .route("/console/app.js", get(console_script))
        .route("/console/style.css", get(console_style))
        .route("/livez", get(|| async { "ok" }))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(cluster::readyz))
        .route("/metrics", get(cluster::metrics))
        .route("/api/v2/deployments", get(deployments::list))
        .route(
            "/api/v2/deployments/{*model}",
            get(deployments::get).put(deployments::put).patch(deployments::patch).delete(deployments::delete),
        )
        .route("/api/v2/routes", get(routes::list))
        .route("/api/v2/routes/{*name}", get(routes::get).put(routes::put).delete(routes::delete))
        .route("/api/v2/models", get(deployments::models))
        .route("/api/v2/endpoints", get(endpoints::list))
        .route("/api/v2/endpoints/{id}", get(endpoints::get))
        .route("/api/v2/endpoints/{id}/drain", post(endpoints::drain))
        .route("/api/v2/endpoints/{id}/undrain", post(endpoints::undrain))
        .route("/api/v2/nodes", get(nodes::list))
        .route("/api/v2/nodes/{id}", get(nodes::get).patch(node_policies::patch))
        .route("/api/v2/nodes/{id}/cordon", post(node_policies::cordon))
        .route("/api/v2/nodes/{id}/maintenance", post(node_policies::maintenance))
        .route("/api/v2/nodes/{id}/uncordon", post(node_policies::uncordon))
        .route("/api/v2/revisions/{*model}", get(revisions::list))
        .route("/api/v2/diff/{*model}", get(revisions::diff))
        .route("/api/v2/rollback/{*model}", post(revisions::rollback))
        .route("/api/v2/wake/{*model}", post(deployments::wake))
        .route("/api/v2/proxies", get(nodes::proxies))
        .route("/api/v2/cluster/status", get(cluster::status))
        .route("/api/v2/cluster/publish", post(cluster::publish))
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

async fn console_page() -> impl IntoResponse {
    let policy = "default-src 'self'; frame-ancestors 'none'";
    let headers =
        [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, policy)];
    (headers, include_str!("../console/index.html"))
}

async fn console_script() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/javascript; charset=utf-8")], include_str!("../console/app.js"))
}

async fn console_style() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/css; charset=utf-8")], include_str!("../console/style.css"))
}

/// A request's JSON body.
fn body(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or_default());
    let essence = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    if let Some(kind) = essence.filter(|kind| kind != "application/json") {
        let message = format!("the body must be application/json, not {kind:?}");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let bytes = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            "the body is larger than is accepted",
        ),
        _ => ApiError::new(StatusCode::BAD_REQUEST, "invalid_body", "the body could not be read to its end"),
    })?;
    validate::json(&bytes).map_err(|reason| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {reason}"))
    })
}
