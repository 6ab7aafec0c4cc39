//! `/api/v2/audit` (and the guide's `/api/audit-logs`): what operators changed, and whether the record of it is whole.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde_json::{Value, json};

use super::{ask::Params, error::ApiError};
use crate::{
    audit::log::{self, Filter},
    core::Core,
};

/// Newest first; a cursor is the number of the last record of the page before.
pub(super) async fn list(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let below = params.number("cursor", 1, u64::MAX)?;
    let (model, actor, kind) = (params.name("model")?, params.name("actor")?, params.name("kind")?);
    let filter = Filter { model, actor, kind };
    let (records, more) = log::page(&*core.store, below, &filter, params.limit()?).await?;
    let next = records.last().filter(|_| more).map(|shown| shown.record.number.to_string());
    Ok(Json(json!({ "records": records, "next_cursor": next })))
}

pub(super) async fn verify(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let number = params.number("number", 1, u64::MAX)?;
    let hash = params.text("hash").map(str::to_ascii_lowercase);
    let is_hash = |hash: &String| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    let noted = match (number, hash) {
        (None, None) => None,
        (Some(number), Some(hash)) if is_hash(&hash) => Some((number, hash)),
        _ => {
            let message = "number and hash go together: a record's number, and the 64 hex digits noted of it";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_parameter", message).of("hash"));
        }
    };
    let noted = noted.as_ref().map(|(number, hash)| (*number, hash.as_str()));
    let verdict = log::verify(&*core.store, noted).await?;
    if !verdict.intact || verdict.noted == Some(false) {
        tracing::error!(broken = ?verdict.broken, "the audit is not what it was");
    }
    Ok(Json(json!(verdict)))
}
