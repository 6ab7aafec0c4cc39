//! The private server's routes about GPUs: `GET /gpus`; `POST /gpus/{uuid}/clear` after an operator has seen to a GPU, on
//! the machine where it was reset; and for pretended GPUs `PUT` and `DELETE /gpus/{uuid}/fault`.

use std::time::{Duration, Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use serde_json::{Value, json};

use super::{Cleared, Handle, shown, simulated::Fault};

/// How long a request waits for the driver.
const PATIENCE: Duration = Duration::from_secs(5);

/// The routes.
pub(crate) fn routes(gpus: Handle) -> Router {
    Router::new()
        .route("/gpus", get(list))
        .route("/gpus/{uuid}/clear", post(clear))
        .route("/gpus/{uuid}/fault", put(befall).delete(heal))
        .with_state(gpus)
}

async fn list(State(gpus): State<Handle>) -> Json<Value> {
    let report = gpus.borrow().clone();
    let source = report.source(Instant::now());
    Json(json!({
        "source": source.kind,
        "driver_version": source.driver_version,
        "cuda_version": source.cuda_version,
        "reading_age_ms": source.reading_age_ms,
        "reason": report.reason,
        "gpus": report.gpus.iter().map(shown).collect::<Vec<_>>(),
    }))
}

async fn clear(State(gpus): State<Handle>, Path(uuid): Path<String>) -> Response {
    match gpus.clear(&uuid, PATIENCE).await {
        Cleared::Seen(gpu) => Json(*gpu).into_response(),
        Cleared::Unknown => unknown(&gpus, &uuid),
        Cleared::Later => {
            let text = "the driver does not answer at the moment; the GPU is cleared with the next reading";
            (StatusCode::ACCEPTED, Json(json!({"message": text}))).into_response()
        }
    }
}

async fn befall(State(gpus): State<Handle>, Path(uuid): Path<String>, body: Bytes) -> Response {
    let Some(simulation) = &gpus.desk.simulation else { return real() };
    let fault: Fault = match serde_json::from_slice(&body) {
        Ok(fault) => fault,
        Err(error) => {
            let text = format!("the body is no fault of a GPU: {error}, as {{\"xid\": 79}}");
            return refusal(StatusCode::BAD_REQUEST, &text);
        }
    };
    if !simulation.lock().befall(&uuid, fault) {
        return unknown(&gpus, &uuid);
    }
    after(&gpus, &uuid).await
}

async fn heal(State(gpus): State<Handle>, Path(uuid): Path<String>) -> Response {
    let Some(simulation) = &gpus.desk.simulation else { return real() };
    if !simulation.lock().heal(&uuid) {
        return unknown(&gpus, &uuid);
    }
    after(&gpus, &uuid).await
}

/// The GPU once what happened to it has been read.
async fn after(gpus: &Handle, uuid: &str) -> Response {
    let report = gpus.fresh(PATIENCE).await;
    let gpu = report.as_ref().and_then(|report| report.gpus.iter().find(|gpu| gpu.uuid == uuid));
    match gpu {
        Some(gpu) => Json(shown(gpu)).into_response(),
        None => refusal(StatusCode::SERVICE_UNAVAILABLE, "the GPUs were not read in time"),
    }
}

fn real() -> Response {
    let text = "faults are for pretended GPUs (agent setting gpus.source = \"simulated\")";
    refusal(StatusCode::CONFLICT, text)
}

fn unknown(gpus: &Handle, uuid: &str) -> Response {
    let known: Vec<String> = gpus.borrow().gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
    let shown: String = uuid.chars().take(64).collect();
    refusal(
        StatusCode::NOT_FOUND,
        &format!("there is no GPU {shown:?} on this node; it has {}", known.join(", ")),
    )
}

fn refusal(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({"error": {"message": message}}))).into_response()
}
