//! The private port: probes, metrics, and a look inside (`debug`). Never behind auth, never on the public network.
//!
//! `/livez` says that the process runs and nothing else. `/readyz` is 200 while there are routes and no drain; with the
//! control plane away it stays 200 and says `degraded`, since requests are served.

mod debug;

use std::{net::TcpListener, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    gateway::Gateway,
    health,
    telemetry::metrics,
    upgrade::{VERSION, command::Process},
    xds::status::XdsStatus,
};

/// What the handlers look at.
#[derive(Debug, Clone)]
pub struct PrivateState {
    /// The gateway.
    pub gateway: Arc<Gateway>,
    /// The control plane's connection.
    pub xds: Arc<XdsStatus>,
}

/// All routes of the private port.
pub fn router(state: PrivateState) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .route("/debug/endpoints", get(debug::endpoints))
        .route("/debug/snapshot", get(debug::snapshot))
        .route("/debug/decisions", get(debug::decisions))
        .route("/debug/decisions/{request_id}", get(debug::decision))
        .route("/debug/process", get(debug_process))
        .with_state(state)
}

/// Serves them on `socket` until `stop`.
pub async fn serve(socket: TcpListener, state: PrivateState, stop: CancellationToken) {
    let listener = socket.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(socket));
    let served = match listener {
        Ok(listener) => {
            axum::serve(listener, router(state)).with_graceful_shutdown(stop.cancelled_owned()).await
        }
        Err(e) => Err(e),
    };
    if let Err(e) = served {
        tracing::error!(error = %e, "the private port is lost");
    }
}

async fn readyz(State(state): State<PrivateState>) -> Response {
    let snapshot = Arc::clone(&state.gateway.table.load());
    let xds = state.xds.view();
    let draining = state.gateway.lifecycle.is_draining();
    let ready = snapshot.loaded && !draining;
    let status = match (draining, snapshot.loaded, xds.connected) {
        (true, ..) => "draining",
        (_, false, _) => "waiting for a first snapshot",
        (_, _, true) => "ok",
        (_, _, false) => "degraded: no control plane, serving the last good snapshot",
    };
    let body = json!({
        "ready": ready,
        "status": status,
        "snapshot_version": snapshot.version.to_string(),
        "last_response_age_s": xds.last_response_age.map(|age| age.as_secs()),
        "controlplane": {
            "connected": xds.connected,
            "endpoint": xds.endpoint,
            "last_error": xds.last_error,
            "last_nack": xds.last_nack,
        },
        "models": snapshot.routes.len(),
        "endpoints": health::count(&snapshot, state.gateway.now_ms()),
        "inflight": state.gateway.lifecycle.inflight(),
        "uptime_s": state.gateway.now_ms() / 1_000,
    });
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(body)).into_response()
}

async fn show_metrics(State(state): State<PrivateState>) -> String {
    let gateway = &state.gateway;
    gateway.metrics.render(&metrics::State {
        snapshot: &gateway.table.load(),
        xds: &state.xds.view(),
        draining: gateway.lifecycle.is_draining(),
        body_bytes_held: gateway.bodies.held_bytes(),
        now_ms: gateway.now_ms(),
        max_ejected_percent: gateway.config().health.max_ejected_percent,
    })
}

async fn debug_process(State(state): State<PrivateState>) -> Json<Process> {
    Json(Process {
        pid: std::process::id(),
        version: VERSION.into(),
        uptime_s: state.gateway.now_ms() / 1_000,
        upgrades: state.gateway.lifecycle.upgrades.view(),
    })
}
