//! `/api/v2/logs` and `/api/observe`: this process's last lines, its metrics as JSON, what waits on what, and how the proxy
//! that `observe.router_url` names is doing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Json, body::Body, extract::State, http::Request};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};

use super::{ask::Params, error::ApiError};
use crate::core::Core;

/// Longest time for the proxy to answer.
const ROUTER_PATIENCE: Duration = Duration::from_secs(2);
/// What is read of its answer.
const ROUTER_BYTES: usize = 64 << 10;
/// Lines that come where no number is given, as in the deploy guide.
const LINES: u64 = 200;

pub(super) async fn logs(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let most = penstock_config::logging::KEPT_LINES;
    let count = params.number("lines", 1, most as u64)?.unwrap_or(LINES);
    let lines = penstock_config::logging::recent(usize::try_from(count).unwrap_or(most));
    Ok(Json(json!({ "process": core.config.election.id, "lines": lines })))
}

pub(super) async fn metrics(State(core): State<Arc<Core>>) -> Json<Value> {
    core.metrics.observe_view(&core.view());
    core.metrics.uptime_seconds.set(core.started.elapsed().as_secs_f64());
    Json(json!({ "process": core.config.election.id, "metrics": core.metrics.summary() }))
}

pub(super) async fn waiting(State(core): State<Arc<Core>>) -> Json<Value> {
    let (view, reports) = (core.view(), core.reports.borrow().clone());
    let deployed = view.models.iter().filter_map(|(name, m)| Some((name, m.deployment.as_ref()?)));
    let models: Vec<Value> = deployed
        .map(|(name, stored)| {
            json!({
                "model": name,
                "wanted": reports.wanted.get(name).copied().unwrap_or(stored.value.replicas),
                "stalled": reports.stalled.contains(name),
                "waiting": reports.waiting.get(name).cloned().unwrap_or_default(),
            })
        })
        .collect();
    Json(json!({ "held": reports.held, "models": models }))
}

pub(super) async fn router(State(core): State<Arc<Core>>) -> Result<Json<Value>, ApiError> {
    let url = core.config.observe.router_url.trim_end_matches('/');
    if url.is_empty() {
        return Err(ApiError::not_found("no proxy is named in observe.router_url"));
    }
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(ROUTER_PATIENCE));
    let client: Client<HttpConnector, Body> = Client::builder(TokioExecutor::new()).build(connector);
    let began = Instant::now();
    let asked = tokio::time::timeout(ROUTER_PATIENCE, async {
        let request =
            Request::get(format!("{url}/healthz")).body(Body::empty()).map_err(|e| e.to_string())?;
        let response = client.request(request).await.map_err(|e| e.to_string())?;
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(Body::new(response.into_body()), ROUTER_BYTES).await;
        let body = body.map_err(|e| e.to_string())?;
        Ok::<_, String>((status, String::from_utf8_lossy(&body).chars().take(1_024).collect::<String>()))
    })
    .await;
    let outcome = asked.unwrap_or_else(|_| Err(format!("no answer within {ROUTER_PATIENCE:?}")));
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (healthy, status, body, error) = match outcome {
        Ok((status, body)) => (status == 200, status, body, String::new()),
        Err(error) => (false, 0, String::new(), error),
    };
    Ok(Json(json!({
        "url": url, "healthy": healthy, "status": status, "body": body, "error": error, "took_ms": took_ms,
    })))
}
