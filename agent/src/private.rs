//! The private HTTP server: probes, metrics, and what runs here and why.
//!
//! `/engines/health` is 503 until every engine of this node is ready and routed to, and says which are not.
//! `/livez` and `/healthz` say that the process answers. `/readyz` is 503 until a control plane has welcomed this agent
//! once, and while it stops; a control plane that goes away later does not make it unready, since engines go on.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    board::EngineView,
    engine::{State as EngineState, context::Context},
    fleet::SessionStatus,
    gpu,
};

/// What the server shows.
#[derive(Clone)]
pub(crate) struct Shown {
    /// This node.
    pub(crate) node_id: String,
    /// Everything about engines and GPUs.
    pub(crate) cx: Arc<Context>,
    /// How the session stands.
    pub(crate) session: Arc<Mutex<SessionStatus>>,
    /// Cancelled once the agent stops.
    pub(crate) stopping: CancellationToken,
}

/// The routes.
pub(crate) fn router(shown: Shown) -> Router {
    let gpus = gpu::routes(shown.cx.gpus.clone());
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/engines", get(engines))
        .route("/engines/health", get(engines_health))
        .with_state(shown)
        .merge(gpus)
}

async fn readyz(State(shown): State<Shown>) -> Response {
    let session = shown.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut reasons = Vec::new();
    if shown.stopping.is_cancelled() {
        reasons.push("the agent is stopping".to_owned());
    }
    if !session.was_welcomed {
        let why =
            if session.last_error.is_empty() { String::new() } else { format!(": {}", session.last_error) };
        reasons.push(format!("no control plane has welcomed this agent yet{why}"));
    }
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "status": if reasons.is_empty() { "ready" } else { "notready" },
        "reasons": reasons,
        "connected_to": session.connected_to,
        "last_session_error": session.last_error,
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(shown): State<Shown>) -> Response {
    let gpus = shown.cx.gpus.borrow().clone();
    match shown.cx.metrics.render(&shown.cx.board.all(), &gpus) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// All or nothing, for whoever waits for the whole node; each engine's own state is in `/engines`.
async fn engines_health(State(shown): State<Shown>) -> Response {
    let engines = shown.cx.board.all();
    // One that sleeps is as it should be.
    let is_up = |view: &&EngineView| match view.state {
        EngineState::Ready => view.registration == "accepted",
        state => state == EngineState::Asleep,
    };
    let waits = |view: &EngineView| {
        json!({
            "id": view.assignment.replica_id,
            "state": view.state.name(),
            "registration": view.registration,
            "reason": view.told(),
        })
    };
    let not_ready: Vec<Value> = engines.iter().filter(|view| !is_up(view)).map(waits).collect();
    let (status, word) = match not_ready.is_empty() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "notready"),
    };
    (status, Json(json!({"status": word, "engines": engines.len(), "not_ready": not_ready}))).into_response()
}

async fn engines(State(shown): State<Shown>) -> Json<Value> {
    let engines: Vec<Value> = shown.cx.board.all().iter().map(|view| engine(&shown, view)).collect();
    let programs = shown.cx.programs.shown();
    let programs = programs.iter().map(|program| {
        json!({
            "name": program.name,
            "kind": program.kind,
            "version": program.version,
            "problem": program.problem,
            "supports": program.supports,
        })
    });
    let programs: Vec<Value> = programs.collect();
    Json(json!({"node_id": shown.node_id, "programs": programs, "engines": engines}))
}

fn engine(shown: &Shown, view: &EngineView) -> Value {
    let load = view.load.map(|(load, at)| {
        json!({
            "running": load.running,
            "waiting": load.waiting,
            "kv_used_ratio": load.kv_used_ratio,
            "age_ms": u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    });
    let assignment = &view.assignment;
    json!({
        "id": assignment.replica_id,
        "model": assignment.model,
        "generation": assignment.generation,
        "state": view.state.name(),
        "registration": view.registration,
        "pid": view.pid,
        "port": view.port,
        "address": view.address,
        "restarts": view.restarts,
        "reason": view.told(),
        "failures": view.failures,
        "gave_up": view.gave_up,
        "missing_metrics": view.missing,
        "gpu_uuids": assignment.gpu_uuids,
        "load": load,
        "command": view.command,
        "started": view.started.way.map(|way| way.name()),
        "ready_ms": u64::try_from(view.started.took.as_millis()).unwrap_or(u64::MAX),
        "start_note": view.started.note,
        "version": view.origin.version,
        "kv_events_address": view.origin.kv_events_address,
        "notes": view.origin.notes,
        "log": shown.cx.state.log(&assignment.replica_id),
    })
}
