//! What stands before every handler: who calls, how often, whether they may, whether the query makes sense, and whether
//! the request was made before.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::{
    ask::{DRY_RUN, Params},
    error::ApiError,
    table::Access,
};
use crate::{
    access::{Caller, Marker, Refusal, Unknown, hash},
    core::Core,
    store::{Compare, StoreError, Txn, TxnOutcome, keys},
};

/// Names a request that may be sent more than once.
pub(super) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Marks an answer that was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// How long a request waits for the store to be read after the start: who calls is not known before.
const FIRST_VIEW: Duration = Duration::from_secs(2);
/// Longest answer that is kept for repetitions: what etcd takes in one value, with room to spare.
const MAX_KEPT_BYTES: usize = 512 << 10;

/// What is asked of requests to one route.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) access: Access,
    pub(super) query: Vec<&'static str>,
    /// Its changes are made once for each Idempotency-Key.
    pub(super) repeatable: bool,
}

/// See the module's text.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) core: Arc<Core>,
    /// By method and path, as the router has it.
    pub(super) rules: Arc<[(Method, &'static str, Rule)]>,
}

pub(super) async fn guard(
    State(guard): State<Guard>,
    matched: MatchedPath,
    request: Request,
    next: Next,
) -> Response {
    let method = match *request.method() {
        Method::HEAD => Method::GET,
        ref method => method.clone(),
    };
    // What no rule is about is no route either: it is answered 405.
    let rule = guard.rules.iter().find(|(m, path, _)| *m == method && *path == matched.as_str());
    let Some((_, _, rule)) = rule else { return next.run(request).await };
    if rule.access != Access::Open && guard.core.view().revision == 0 {
        let mut views = guard.core.views.clone();
        drop(tokio::time::timeout(FIRST_VIEW, views.wait_for(|view| view.revision > 0)).await);
    }
    match admit(&guard.core, rule, request) {
        Ok((request, repeatable)) => match repeatable {
            Some(caller) => once(&guard.core, caller, request, next).await,
            None => next.run(request).await,
        },
        Err(error) => error.into_response(),
    }
}

/// The request with what handlers take from it, and its caller if it shall be done only once.
fn admit(core: &Core, rule: &Rule, request: Request) -> Result<(Request, Option<Caller>), ApiError> {
    let (mut parts, body) = request.into_parts();
    let mut caller = None;
    if let Access::Role(role) = rule.access {
        let refused = |reason: &str| core.metrics.http_refused.with_label_values(&[reason]).inc();
        let who = core.gate.admit(&parts.headers, &core.view(), unix_now()).map_err(|refusal| match refusal {
            Refusal::Unknown(unknown) => {
                refused("unauthenticated");
                let message = match unknown {
                    Unknown::Missing => "this needs a token: send Authorization: Bearer TOKEN",
                    Unknown::Wrong => "nobody has this token; it is mistyped, or was withdrawn",
                    Unknown::Expired => "this token has expired",
                };
                ApiError::new(StatusCode::UNAUTHORIZED, "unauthenticated", message)
            }
            Refusal::TooEarly => {
                let message = "the store has not been read yet since the start, so that nobody is known; try again";
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
            }
            Refusal::TooMany(seconds) => {
                refused("rate_limited");
                let limit = core.config.auth.rate_limit_per_minute;
                let message = format!(
                    "this token has made {limit} requests in a minute, which is the limit; there is room again in \
                     {seconds} s"
                );
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message).after(seconds)
            }
        })?;
        if who.role < role {
            refused("forbidden");
            let (name, has) = (&who.name, who.role);
            let message = format!("this takes the role {role}; the token {name:?} has the role {has}");
            return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", message));
        }
        let who = Caller::new(who, &parts);
        parts.extensions.insert(who.clone());
        caller = Some(who);
    }
    let params = Params::parse(parts.uri.query(), &rule.query)?;
    let dry_run = params.flag("dry_run").unwrap_or(false);
    parts.extensions.insert(params);
    let repeatable = rule.repeatable && key_of(&parts.headers)?.is_some();
    // A dry run changes nothing: there is nothing to be done once.
    let caller = caller.filter(|_| repeatable && !dry_run);
    Ok((Request::from_parts(parts, body), caller))
}

/// The Idempotency-Key of a request, if it has one.
fn key_of(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
    key.filter(|key| key.bytes().all(|b| b.is_ascii_graphic())).map(Some).ok_or_else(|| {
        let message = "Idempotency-Key is malformed: accepted are 1 to 255 visible ASCII characters";
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_header", message).of("Idempotency-Key")
    })
}

/// What is kept of a request with an Idempotency-Key.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    /// Of its method, path, query and body.
    fingerprint: String,
    /// None: it has made its change, and no answer is known yet.
    answer: Option<Answered>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Answered {
    status: u16,
    etag: Option<String>,
    body: String,
}

/// Lets a request through, unless it was before: then its answer is given again.
async fn once(core: &Core, mut caller: Caller, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let given = match key_of(&parts.headers) {
        Ok(key) => key.unwrap_or_default().to_owned(),
        Err(error) => return error.into_response(),
    };
    // With the extensions, among which is the limit.
    let mut asked = Request::new(body);
    asked.extensions_mut().clone_from(&parts.extensions);
    let body = match Bytes::from_request(asked, &()).await {
        Ok(body) => body,
        Err(rejection) => return ApiError::from(rejection).into_response(),
    };
    let key = keys::idempotency(&hash(format!("{}\n{given}", caller.name).as_bytes()));
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    let fingerprint = hash(format!("{}\n{target}\n{}", parts.method, hash(&body)).as_bytes());
    let marker = match begin(core, &key, &fingerprint).await {
        Ok(Ok(marker)) => Arc::new(marker),
        Ok(Err(answer)) => return answer,
        Err(error) => return error.into_response(),
    };
    caller.marker = Some(marker.clone());
    parts.extensions.insert(caller);
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    finish(core, &marker, fingerprint, response).await
}

/// The marker of a request that is new, or the answer to one that is not.
async fn begin(core: &Core, key: &str, fingerprint: &str) -> Result<Result<Marker, Response>, ApiError> {
    let outcome = |label: &str| core.metrics.idempotency.with_label_values(&[label]).inc();
    let unreadable = |error: serde_json::Error| ApiError::unreadable("answer", &error);
    let Some(entry) = core.store.get(key).await? else {
        let ttl = Duration::from_secs(core.config.auth.idempotency_ttl_s);
        let lease = core.store.lease_grant(ttl).await?;
        let kept = Kept { fingerprint: fingerprint.to_owned(), answer: None };
        let value = serde_json::to_vec(&kept).map_err(unreadable)?;
        return Ok(Ok(Marker { key: key.to_owned(), value, lease, written: AtomicBool::new(false) }));
    };
    let kept: Kept = serde_json::from_slice(&entry.value).map_err(unreadable)?;
    if kept.fingerprint != fingerprint {
        outcome("mismatch");
        let message = "another request (method, path, query or body) was sent with this Idempotency-Key; a key is for \
                       one request and its repetitions";
        let error = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_mismatch", message);
        return Ok(Err(error.of("Idempotency-Key").into_response()));
    }
    let Some(answer) = kept.answer else {
        outcome("unknown");
        return Ok(Err(ApiError::begun().into_response()));
    };
    outcome("replayed");
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    let mut response = (status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response();
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    if let Some(etag) = answer.etag.and_then(|etag| etag.parse().ok()) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    Ok(Err(response))
}

/// Keeps the answer of a request that succeeded. One that failed may be sent again under its key.
async fn finish(core: &Core, marker: &Marker, fingerprint: String, response: Response) -> Response {
    let written = marker.written.load(Ordering::Acquire);
    let status = response.status();
    if !status.is_success() {
        // After an error of ours the change may have been made all the same: then the marker must stay.
        if !written && !status.is_server_error() {
            drop(core.store.lease_revoke(marker.lease).await);
        }
        return response;
    }
    if response.headers().contains_key(DRY_RUN) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let bytes = match axum::body::to_bytes(body, usize::MAX).await {
        Ok(bytes) => bytes,
        Err(_) => Bytes::new(),
    };
    if let Err(error) = keep(core, marker, fingerprint, &parts, &bytes, written).await {
        tracing::warn!(%error, "the answer to a request with an Idempotency-Key could not be kept");
    }
    Response::from_parts(parts, Body::from(bytes))
}

async fn keep(
    core: &Core,
    marker: &Marker,
    fingerprint: String,
    parts: &axum::http::response::Parts,
    bytes: &Bytes,
    written: bool,
) -> Result<(), StoreError> {
    if bytes.len() > MAX_KEPT_BYTES {
        return Ok(());
    }
    let etag = parts.headers.get(header::ETAG).and_then(|etag| etag.to_str().ok()).map(str::to_owned);
    let body = String::from_utf8_lossy(bytes).into_owned();
    let kept = Kept { fingerprint, answer: Some(Answered { status: parts.status.as_u16(), etag, body }) };
    let value = serde_json::to_vec(&kept).map_err(|e| StoreError::Invalid(e.to_string()))?;
    let there = match written {
        true => Compare::Value(marker.key.clone(), marker.value.clone().into()),
        false => Compare::Absent(marker.key.clone()),
    };
    let txn = Txn::new().when(there).put_leased(marker.key.clone(), value, marker.lease);
    if let TxnOutcome::Committed { .. } = core.commit(txn).await? {
        core.metrics.idempotency.with_label_values(&["kept"]).inc();
    }
    Ok(())
}

/// Unix seconds, by this machine's clock.
pub(super) fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(now).unwrap_or(i64::MAX)
}
