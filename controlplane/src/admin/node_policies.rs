//! What operators say of a node: cordon, maintenance, taints, labels, role. It sticks until it is undone, through
//! restarts and absences of the node, and may be said of a node before it is there.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection, rejection::PathRejection},
    http::{HeaderMap, StatusCode},
};
use serde_json::{Value, json};

use super::{
    ask::{Ask, Reply},
    body,
    edit::{Place, edit},
    error::ApiError,
    nodes,
};
use crate::{
    audit::Subject,
    core::Core,
    model::{NodePolicy, validate},
    store::keys,
};

type Id = Result<Path<String>, PathRejection>;
type Answer = Result<Reply, ApiError>;
type Body = Result<Bytes, BytesRejection>;

/// No new replicas; those that are there stay.
pub(super) async fn cordon(
    State(core): State<Arc<Core>>,
    ask: Ask,
    id: Id,
    headers: HeaderMap,
    bytes: Body,
) -> Answer {
    let reason = reason(&headers, bytes)?;
    let change = |before: NodePolicy| Ok(NodePolicy { cordoned: true, reason: reason.clone(), ..before });
    write(&core, &ask, id, true, change).await
}

/// No new replicas, and those that are there move away.
pub(super) async fn maintenance(
    State(core): State<Arc<Core>>,
    ask: Ask,
    id: Id,
    headers: HeaderMap,
    bytes: Body,
) -> Answer {
    let reason = reason(&headers, bytes)?;
    let change = |before: NodePolicy| Ok(NodePolicy { maintenance: true, reason: reason.clone(), ..before });
    write(&core, &ask, id, true, change).await
}

/// Neither any more. What moved away stays where it is.
pub(super) async fn uncordon(State(core): State<Arc<Core>>, ask: Ask, id: Id) -> Answer {
    let change = |before: NodePolicy| {
        Ok(NodePolicy { cordoned: false, maintenance: false, reason: String::new(), ..before })
    };
    write(&core, &ask, id, true, change).await
}

/// A deployed model that the node shall have on its disks, or shall not be told to have any more.
pub(super) async fn prefetch(
    State(core): State<Arc<Core>>,
    ask: Ask,
    id: Id,
    headers: HeaderMap,
    bytes: Body,
) -> Answer {
    let (model, remove) = validate::prefetch_body(&body(&headers, bytes)?)?;
    let deployed = core.view().models.get(&model).is_some_and(|m| m.deployment.is_some());
    if !deployed && !remove {
        let message = format!("there is no deployment of the model {model:?}, which says what to fetch");
        return Err(ApiError::not_found(message));
    }
    write(&core, &ask, id, true, |mut before| {
        match remove {
            true => drop(before.prefetch.remove(&model)),
            false => drop(before.prefetch.insert(model.clone())),
        }
        Ok(before)
    })
    .await
}

/// Taints, labels and role: each that is there replaces what was said before.
pub(super) async fn patch(
    State(core): State<Arc<Core>>,
    ask: Ask,
    id: Id,
    headers: HeaderMap,
    bytes: Body,
) -> Answer {
    let asked = body(&headers, bytes)?;
    write(&core, &ask, id, false, |before| Ok(validate::node_body(&asked, &before)?)).await
}

/// Everything that is said of a node, in place of what was said before.
pub(super) async fn put(
    State(core): State<Arc<Core>>,
    ask: Ask,
    id: Id,
    headers: HeaderMap,
    bytes: Body,
) -> Answer {
    let asked = body(&headers, bytes)?;
    write(&core, &ask, id, false, |before| Ok(validate::node_policy_body(&before.node_id, &asked)?)).await
}

/// Why, out of a body that may be empty.
fn reason(headers: &HeaderMap, bytes: Body) -> Result<String, ApiError> {
    if bytes.as_ref().is_ok_and(Bytes::is_empty) {
        return Ok(String::new());
    }
    Ok(validate::reason_body(&body(headers, bytes)?)?)
}

/// Replaces what is said of the node by what `change` makes of it; nothing said is no key.
async fn write(
    core: &Core,
    ask: &Ask,
    id: Id,
    must_be_known: bool,
    change: impl Fn(NodePolicy) -> Result<NodePolicy, ApiError>,
) -> Answer {
    let Ok(Path(id)) = id else { return Err(ApiError::not_found("the node's id is not UTF-8")) };
    validate::node_id(&id)
        .map_err(|reason| ApiError::new(StatusCode::BAD_REQUEST, "invalid_node_id", reason))?;
    if must_be_known {
        // A misspelt name is told at once; labels and taints may be prepared for a node that is to come.
        nodes::one(core, &id, None)?;
    }
    let subject = Subject { kind: "node", name: id.clone(), model: String::new() };
    let place = Place { subject, key: keys::node_policy(&id), beside: None };
    let edited = edit(core, ask, &place, |before: Option<&NodePolicy>, _| {
        let before = before.cloned();
        let after = change(before.unwrap_or(NodePolicy { node_id: id.clone(), ..NodePolicy::default() }))?;
        Ok(Some(after).filter(|after| !after.is_empty()).into())
    })
    .await?;
    let would_be = edited.dry_run.then(|| edited.after.clone());
    let shown = nodes::one(core, &id, would_be);
    let body: Value = shown.map_or_else(|_| json!({ "node_id": id }), |(node, _)| node);
    let revision = if edited.after.is_some() { edited.revision } else { 0 };
    Ok(Reply { status: StatusCode::OK, body, revision, dry_run: edited.dry_run })
}
