//! `/api/v2/models/{model}/replicas/{id}/logs`: an engine's log, from its node, as plain text that may go on.

use std::{io, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use futures_util::stream;

use super::{ask::Params, error::ApiError};
use crate::{
    core::Core,
    fleet::logs::{LogStream, Refusal, Wanted},
};

/// Lines that come where no number is given.
const LINES: u64 = 200;
/// Most lines that can be asked for.
pub(super) const MOST_LINES: u64 = 10_000;
/// Longest wait for the agent's first word.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn of_replica(
    State(core): State<Arc<Core>>,
    params: Params,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, ApiError> {
    let Ok(Path((model, replica_id))) = path else {
        return Err(ApiError::not_found("the model or the replica's id is not UTF-8"));
    };
    let lines = params.number("lines", 0, MOST_LINES)?.unwrap_or(LINES);
    let (follow, previous) = (params.flag("follow")?, params.flag("previous")?);
    let node = node_of(&core, &model, &replica_id)?;
    let lines = u32::try_from(lines).unwrap_or(u32::MAX);
    let wanted = Wanted { replica_id, lines, follow, previous };
    let mut stream = core.logs.open(&node, wanted).map_err(|refusal| {
        let code = match refusal {
            Refusal::NotConnected(_) => "agent_not_connected",
            Refusal::TooMany => "too_many_logs",
        };
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, refusal.to_string())
    })?;
    let silent = |why: &str| {
        let message =
            format!("the agent of node {node} {why}; an agent of an earlier release does not know how to");
        ApiError::new(StatusCode::BAD_GATEWAY, "agent_silent", message)
    };
    let first = tokio::time::timeout(PATIENCE, stream.next()).await;
    let first = first.map_err(|_| silent(&format!("has not sent the log within {PATIENCE:?}")))?;
    let first = first.ok_or_else(|| silent("has lost its session before it sent the log"))?;
    if first.last && !first.error.is_empty() {
        return Err(ApiError::not_found(first.error));
    }
    let state = Reading { core, stream: (!first.last).then_some(stream), first: Some(first.data.into()) };
    let mut response = Response::new(Body::from_stream(stream::unfold(state, next)));
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    Ok(response)
}

/// The node of a replica that has a place, or is registered still.
fn node_of(core: &Core, model: &str, replica_id: &str) -> Result<String, ApiError> {
    let view = core.view();
    let known = view.models.get(model);
    let placed = known.and_then(|m| m.placement.as_ref()?.value.find(replica_id)).map(|a| a.node_id.clone());
    let registered = || known.and_then(|m| m.endpoints.get(replica_id)).map(|e| e.node_id.clone());
    placed.or_else(registered).ok_or_else(|| {
        let shown = |text: &str| text.chars().take(64).collect::<String>();
        ApiError::not_found(format!("the model {:?} has no replica {:?}", shown(model), shown(replica_id)))
    })
}

struct Reading {
    core: Arc<Core>,
    /// None: the end has come.
    stream: Option<LogStream>,
    first: Option<Bytes>,
}

/// The next part of the body. One whose end was not seen breaks off, so that nobody takes it for whole.
async fn next(mut reading: Reading) -> Option<(io::Result<Bytes>, Reading)> {
    if let Some(first) = reading.first.take().filter(|first| !first.is_empty()) {
        return Some((Ok(first), reading));
    }
    loop {
        let stream = reading.stream.as_mut()?;
        let part = tokio::select! {
            part = stream.next() => part,
            () = reading.core.stop.cancelled() => None,
        };
        let Some(part) = part else {
            reading.stream = None;
            let broken = io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the session with the node's agent has ended",
            );
            return Some((Err(broken), reading));
        };
        if part.last {
            reading.stream = None;
            if !part.error.is_empty() {
                return Some((Err(io::Error::other(part.error)), reading));
            }
        } else if !part.data.is_empty() {
            return Some((Ok(part.data.into()), reading));
        }
    }
}
