//! `/api/v2/backup` and `/api/v2/restore`: the site in one document, and the way back. What they do is in [`crate::backup`].

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use penstock_config::controlplane::Role;
use serde_json::{Value, json};

use super::{ask::Params, body, error::ApiError};
use crate::{
    access::Caller,
    audit::{Change, Subject},
    backup::{
        self, Backup, Options, Plan,
        plan::{PlanError, plan},
        schedule::{file_name, unix_now},
    },
    core::Core,
    store::{TxnOutcome, Write, keys},
};

/// Refusals that an error lists; all of them are in the answer to a dry run.
const LISTED: usize = 20;

pub(super) async fn get(State(core): State<Arc<Core>>) -> Result<Response, ApiError> {
    let backup = backup::take(&*core.store, unix_now()).await?;
    tracing::info!(revision = backup.revision, "a backup was handed out");
    let name = format!("attachment; filename=\"{}\"", file_name(&backup));
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::CONTENT_DISPOSITION, name),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    Ok((headers, backup.to_text()).into_response())
}

/// The route has no limit of the usual size: backups have one of their own.
pub(super) async fn restore(
    State(core): State<Arc<Core>>,
    caller: Caller,
    params: Params,
    headers: HeaderMap,
    bytes: Body,
) -> Result<Json<Value>, ApiError> {
    let dry_run = params.flag("dry_run")?;
    let options = Options {
        force: params.flag("force")?,
        only_missing: params.flag("only_missing")?,
        without_placements: params.flag("without_placements")?,
        admin_in_settings: core.gate.settings().iter().any(|token| token.role == Role::Admin),
    };
    let most = core.config.backup.max_bytes;
    let text = axum::body::to_bytes(bytes, most).await.map_err(|_| {
        let message = format!("the backup is larger than {most} bytes (backup.max_bytes), or broke off");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    })?;
    // The same refusals as for any other body, before the document is looked at.
    body(&headers, Ok(text.clone()))?;
    let from = Backup::read(&text).map_err(|refused| bad_backup(refused.to_string()))?;
    let site = core.store.list(keys::ROOT).await?;
    let plan = plan(&site, &from, options, unix_now()).map_err(|error| match error {
        PlanError::Refused(refused) => bad_backup(refused.to_string()),
        PlanError::Site(error) => error.into(),
    })?;
    if dry_run {
        return Ok(Json(shown(&from, &plan, true)));
    }
    if !plan.refusals.is_empty() {
        return Err(guarded(&plan));
    }
    let steps = plan.txns.len();
    for (done, txn) in plan.txns.iter().enumerate() {
        let written: Vec<&str> = txn.writes.iter().map(Write::key).collect();
        let step = json!({ "backup": from.title(), "step": done + 1, "of": steps, "keys": written });
        let subject = Subject { kind: "restore", name: from.checksum.clone(), model: String::new() };
        let change = Change { caller: caller.clone(), subject, before: None, after: Some(step) };
        match core.commit_audited(txn.clone(), change).await? {
            TxnOutcome::Committed { revision } => core.seen(revision).await,
            TxnOutcome::Conflict { failed, .. } => {
                let message = format!(
                    "{} was changed by somebody else meanwhile; {done} of {steps} steps are done: look at the site, then \
                     restore again",
                    failed.key()
                );
                return Err(ApiError::new(StatusCode::CONFLICT, "conflict", message));
            }
        }
    }
    tracing::warn!(steps, forced = options.force, "restored the backup {}", from.title());
    Ok(Json(shown(&from, &plan, false)))
}

fn bad_backup(message: String) -> ApiError {
    ApiError::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_backup",
        format!("{message}; nothing was changed"),
    )
}

fn guarded(plan: &Plan) -> ApiError {
    let more = plan.refusals.len().saturating_sub(LISTED);
    let mut message = String::from("nothing was changed, because what is there would go back or end:");
    for refusal in plan.refusals.iter().take(LISTED) {
        message.push_str(&format!("\n  {refusal}"));
    }
    if more > 0 {
        message.push_str(&format!("\n  and {more} more (dry_run lists all)"));
    }
    message
        .push_str("\nonly_missing=true adds what is missing and leaves the rest; force=true does all of it");
    ApiError::new(StatusCode::CONFLICT, "restore_guarded", message)
}

fn shown(from: &Backup, plan: &Plan, dry_run: bool) -> Value {
    json!({
        "dry_run": dry_run,
        "into_empty": plan.into_empty,
        "backup": {
            "title": from.title(), "made_unix_s": from.made_unix_s, "made_by": from.made_by,
            "revision": from.revision, "term": from.term, "generation": from.generation, "audit": from.audit,
        },
        "changes": plan.changes,
        "refusals": plan.refusals,
    })
}
