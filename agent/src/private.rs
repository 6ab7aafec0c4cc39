//! The private HTTP server: probes, metrics, and what runs here and why.
//!
//! `/engines/health` is 503 until every engine of this node is ready and routed to, and says which are not.
//! `/livez` and `/healthz` say that the process answers. `/readyz` is 503 until a control plane has welcomed this agent
//! once, and while it stops; a control plane that goes away later does not make it unready, since engines go on.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use penstock_proto::v1;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;

use crate::{
    board::EngineView,
    engine::{State as EngineState, context::Context},
    fleet::SessionStatus,
    gpu,
    state::stem,
    tail::{self, MOST_LINES, Wanted},
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
        .route("/engines/{id}/logs", get(logs))
        .route("/foreign", get(foreign))
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
        "last_exit": view.last_exit.as_ref().map(|exit| {
            json!({
                "cause": exit.cause.label(),
                "detail": exit.detail,
                "advice": exit.cause.advice(),
                "retry_helps": exit.cause.retry_helps(),
                "age_s": exit.at.elapsed().as_secs(),
            })
        }),
        "memory": memory(shown, &assignment.replica_id),
    })
}

/// In bytes, where the kernel counts it for the engine.
fn memory(shown: &Shown, replica_id: &str) -> Value {
    let cgroup = shown.cx.cgroups.find(&stem(replica_id));
    let counted = cgroup.map(|cgroup| cgroup.memory()).filter(|memory| memory.current.is_some());
    counted.map_or(
        Value::Null,
        |memory| json!({ "current": memory.current, "peak": memory.peak, "oom_kills": memory.oom_kills }),
    )
}

/// What `/engines/ID/logs` may be asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogQuery {
    lines: u32,
    follow: bool,
    previous: bool,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self { lines: 200, follow: false, previous: false }
    }
}

async fn logs(
    State(shown): State<Shown>,
    Path(replica_id): Path<String>,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Response {
    let LogQuery { lines, follow, previous } = match query {
        Ok(Query(query)) if query.lines <= MOST_LINES => query,
        Ok(_) => return refused(StatusCode::BAD_REQUEST, format!("lines is more than {MOST_LINES}")),
        Err(error) => {
            let accepted =
                format!("accepted are lines=0..{MOST_LINES}, follow=true|false, previous=true|false");
            return refused(StatusCode::BAD_REQUEST, format!("{}; {accepted}", error.body_text()));
        }
    };
    let (parts, mut reading) = mpsc::channel(4);
    let wanted = Wanted { replica_id, lines, follow, previous };
    let reader = tokio::spawn(tail::pump(shown.cx.clone(), wanted, parts));
    let Some(first) = reading.recv().await else {
        return match reader.await {
            Ok(Ok(())) => text(Body::empty()),
            Ok(Err(why)) => refused(StatusCode::NOT_FOUND, why),
            Err(broken) => refused(StatusCode::INTERNAL_SERVER_ERROR, broken.to_string()),
        };
    };
    let rest = ReceiverStream::new(reading);
    let all = tokio_stream::once(first).chain(rest);
    let stopping = shown.stopping.clone();
    // One that follows would else hold up the agent's end.
    let all = all.take_while(move |_| !stopping.is_cancelled()).map(Ok::<_, Infallible>);
    text(Body::from_stream(all))
}

fn text(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

fn refused(status: StatusCode, why: String) -> Response {
    (status, why + "\n").into_response()
}

async fn foreign(State(shown): State<Shown>) -> Json<Value> {
    let process = |process: v1::ForeignProcess| {
        json!({
            "pid": process.pid,
            "kind": process.kind,
            "model": process.model,
            "user": process.user,
            "age_s": process.age_s,
            "rss_mib": process.rss_mib,
            "port": process.port,
            "gpu_uuids": process.gpu_uuids,
            "state_dir": process.state_dir,
        })
    };
    let all: Vec<Value> = shown.cx.foreign.all().into_iter().map(process).collect();
    Json(json!({ "processes": all }))
}
