//! What operators say of a node: cordon, maintenance, taints, labels, role. It sticks until it is undone, through
//! restarts and absences of the node, and may be said of a node before it is there.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection, rejection::PathRejection},
    http::{HeaderMap, StatusCode},
};
use serde_json::{Value, json};

use super::{body, error::ApiError, nodes};
use crate::{
    core::Core,
    model::{NodePolicy, validate},
    store::{Compare, Txn, TxnOutcome, keys},
};

/// Tries before a write that is overtaken again and again is given back to the caller.
const ATTEMPTS: usize = 16;

type Id = Result<Path<String>, PathRejection>;
type Answer = Result<Json<Value>, ApiError>;

/// No new replicas; those that are there stay.
pub(super) async fn cordon(
    State(core): State<Arc<Core>>,
    id: Id,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let reason = reason(&headers, bytes)?;
    let change =
        |before: &NodePolicy| Ok(NodePolicy { cordoned: true, reason: reason.clone(), ..before.clone() });
    write(&core, id, true, change).await
}

/// No new replicas, and those that are there move away.
pub(super) async fn maintenance(
    State(core): State<Arc<Core>>,
    id: Id,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let reason = reason(&headers, bytes)?;
    let change =
        |before: &NodePolicy| Ok(NodePolicy { maintenance: true, reason: reason.clone(), ..before.clone() });
    write(&core, id, true, change).await
}

/// Neither any more. What moved away stays where it is.
pub(super) async fn uncordon(State(core): State<Arc<Core>>, id: Id) -> Answer {
    let change = |before: &NodePolicy| {
        Ok(NodePolicy { cordoned: false, maintenance: false, reason: String::new(), ..before.clone() })
    };
    write(&core, id, true, change).await
}

/// Taints, labels and role: each that is there replaces what was said before.
pub(super) async fn patch(
    State(core): State<Arc<Core>>,
    id: Id,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Answer {
    let asked = body(&headers, bytes)?;
    write(&core, id, false, |before| Ok(validate::node_body(&asked, before)?)).await
}

/// Why, out of a body that may be empty.
fn reason(headers: &HeaderMap, bytes: Result<Bytes, BytesRejection>) -> Result<String, ApiError> {
    if bytes.as_ref().is_ok_and(Bytes::is_empty) {
        return Ok(String::new());
    }
    Ok(validate::reason_body(&body(headers, bytes)?)?)
}

/// Replaces what is said of the node by what `change` makes of it; nothing said is no key.
async fn write(
    core: &Core,
    id: Id,
    must_be_known: bool,
    change: impl Fn(&NodePolicy) -> Result<NodePolicy, ApiError>,
) -> Answer {
    let Ok(Path(id)) = id else { return Err(ApiError::not_found("the node's id is not UTF-8")) };
    validate::node_id(&id)
        .map_err(|reason| ApiError::new(StatusCode::BAD_REQUEST, "invalid_node_id", reason))?;
    if must_be_known {
        // A misspelt name is told at once; labels and taints may be prepared for a node that is to come.
        nodes::one(core, &id)?;
    }
    let key = keys::node_policy(&id);
    for _ in 0..ATTEMPTS {
        let entry = core.store.get(&key).await?;
        let before = match &entry {
            None => NodePolicy { node_id: id.clone(), ..NodePolicy::default() },
            Some(entry) => serde_json::from_slice(&entry.value).map_err(|error| internal(&error))?,
        };
        let after = change(&before)?;
        if after == before {
            break;
        }
        let at = entry.map_or(0, |entry| entry.mod_revision);
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), at));
        let txn = match after.is_empty() {
            true => txn.delete(key.clone()),
            false => txn.put(key.clone(), serde_json::to_vec(&after).map_err(|error| internal(&error))?),
        };
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            let NodePolicy { cordoned, maintenance, reason, .. } = &after;
            tracing::info!(
                node_id = id,
                cordoned,
                maintenance,
                reason,
                revision,
                "an operator spoke of a node"
            );
            core.seen(revision).await;
            return Ok(Json(nodes::one(core, &id).unwrap_or_else(|_| json!({ "node_id": id }))));
        }
    }
    match nodes::one(core, &id) {
        Ok(node) => Ok(Json(node)),
        Err(_) => Ok(Json(json!({ "node_id": id }))),
    }
}

fn internal(error: &serde_json::Error) -> ApiError {
    tracing::error!(%error, "what is stored of a node cannot be read or written");
    let message = "what is stored of the node cannot be read; the log says why";
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
}
