//! `/api/v2/cluster/status`, `/readyz` and `/metrics`.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    ask::Ask,
    edit::{Place, edit},
    error::ApiError,
};
use crate::{audit::Subject, core::Core, store::keys};

/// Probes do not wait for a store longer than this.
const STORE_PATIENCE: Duration = Duration::from_secs(1);

/// Why this process should get no work; empty when it should.
async fn reasons(core: &Core) -> Vec<String> {
    let mut reasons = Vec::new();
    if core.stop.is_cancelled() {
        reasons.push("it is stopping".to_owned());
    }
    match tokio::time::timeout(STORE_PATIENCE, core.store.get(keys::LEADER)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => reasons.push(error.to_string()),
        Err(_) => reasons.push(format!("the store does not answer within {STORE_PATIENCE:?}")),
    }
    if core.hub.snapshot().sequence == 0 {
        reasons.push("no snapshot has been published yet".to_owned());
    }
    reasons
}

pub(super) async fn readyz(State(core): State<Arc<Core>>) -> Response {
    let reasons = reasons(&core).await;
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let snapshot = core.hub.snapshot().version.to_string();
    (status, Json(json!({ "ready": reasons.is_empty(), "reasons": reasons, "version": snapshot })))
        .into_response()
}

pub(super) async fn metrics(State(core): State<Arc<Core>>) -> Result<Response, ApiError> {
    core.metrics.observe_view(&core.view());
    core.metrics.uptime_seconds.set(core.started.elapsed().as_secs_f64());
    let text = core.metrics.render().map_err(|error| {
        tracing::error!(%error, "metrics cannot be rendered");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "metrics cannot be rendered")
    })?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

pub(super) async fn status(State(core): State<Arc<Core>>) -> Json<Value> {
    let (view, reasons) = (core.view(), reasons(&core).await);
    let deployed = view.models.values().filter(|m| m.deployment.is_some()).count();
    let ready =
        view.models.values().flat_map(|m| m.endpoints.values().filter(|e| m.takes_requests(e))).count();
    Json(json!({
        "term": view.published_term(),
        "revision": view.revision,
        "store": core.store.kind(),
        "leader": core.leadership.term().is_some(),
        "leader_id": view.leader.as_ref().map_or("", |leader| &leader.value.id),
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": core.started.elapsed().as_secs(),
        "models": deployed,
        "endpoints_ready": ready,
        "nodes": view.nodes.len(),
        "held": core.reports.borrow().held,
        "published": core.hub.snapshot().version.to_string(),
        "proxies": core.hub.subscribers().len(),
        "publish_held": core.hub.held().sentences(),
        "readyz": { "ready": reasons.is_empty(), "reasons": reasons },
    }))
}

/// An operator's word that what is held back may pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LetPass {
    passed: Vec<String>,
    /// Of the store when it was said, so that no two are the same.
    at_revision: u64,
}

/// Lets pass what is held back from proxies, here and on every other control plane: a word in the store, which each of them
/// reads.
pub(super) async fn publish(State(core): State<Arc<Core>>, ask: Ask) -> Result<Json<Value>, ApiError> {
    let word = LetPass { passed: core.hub.held().sentences(), at_revision: core.view().revision };
    let subject = Subject { kind: "publish", name: "let-pass".into(), model: String::new() };
    let place = Place { subject, key: keys::LET_PASS.into(), beside: None };
    let edited = edit(&core, &ask, &place, |_: Option<&LetPass>, _| Ok(Some(word.clone()).into())).await?;
    if !edited.dry_run {
        tracing::warn!(held = ?word.passed, "an operator lets pass what was held back from proxies");
        core.seen(edited.revision).await;
    }
    Ok(Json(json!({ "passed": word.passed, "revision": edited.revision })))
}
