//! `/api/v2/tokens`: who may use the API, made and withdrawn at run time; and whose token a request has.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::{HeaderMap, StatusCode},
};
use penstock_config::controlplane::Role;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use super::{
    ask::{Ask, Params, Reply},
    body,
    edit::{Beside, Place, Step, edit},
    error::ApiError,
    guard::{IDEMPOTENCY_KEY, unix_now},
};
use crate::{
    access::{Caller, MAX_TOKENS, StoredToken, hash, keeps_an_admin},
    audit::Subject,
    core::Core,
    model::validate::{TokenBody, token_body, token_name},
    store::{Entry, keys},
    view::View,
};

/// What the console and other clients ask first.
pub(super) async fn whoami(State(core): State<Arc<Core>>, caller: Caller) -> Json<Value> {
    let view = core.view();
    let expires = view.tokens.get(&caller.name).and_then(|stored| stored.value.expires_unix_s);
    Json(json!({
        "name": caller.name,
        "role": caller.role,
        "open": core.gate.is_open(&view),
        "expires_unix_s": expires,
    }))
}

fn shown(token: &StoredToken) -> Value {
    json!({
        "name": token.name,
        "role": token.role,
        "created_unix_s": token.created_unix_s,
        "created_by": token.created_by,
        "expires_unix_s": token.expires_unix_s,
        "expired": token.is_expired(unix_now()),
    })
}

pub(super) async fn list(State(core): State<Arc<Core>>, params: Params) -> Result<Json<Value>, ApiError> {
    let view = core.view();
    let all = view.tokens.iter().map(|(name, stored)| (name.clone(), &stored.value));
    params.page("tokens", all, shown)
}

fn place(name: &str) -> Place {
    let subject = Subject { kind: "token", name: name.into(), model: String::new() };
    // Whether an admin is left depends on all tokens: two changes must not be decided upon by the same state.
    Place { subject, key: keys::token(name), beside: Some(keys::TOKENS_CHANGED.into()) }
}

/// The view, if it has the last change of a token.
fn settled(core: &Core, changed: Option<&Entry>) -> Result<Arc<View>, ApiError> {
    let view = core.view();
    match changed.is_none_or(|entry| entry.mod_revision <= view.revision) {
        true => Ok(view),
        false => Err(ApiError::conflict()),
    }
}

fn step(name: &str, after: Option<StoredToken>) -> Step<StoredToken> {
    Step { after, beside: Beside::Put(name.as_bytes().to_vec()) }
}

pub(super) async fn create(
    State(core): State<Arc<Core>>,
    caller: Caller,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Reply, ApiError> {
    if headers.contains_key(IDEMPOTENCY_KEY) {
        let message = "a token is shown once and kept nowhere, so this takes no Idempotency-Key: if an answer was lost, \
                       withdraw the token by its name and make another";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_header", message).of("Idempotency-Key"));
    }
    let TokenBody { name, role, expires_in_s } = token_body(&body(&headers, bytes)?)?;
    let mut secret = [0_u8; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the system gives no random numbers")
    })?;
    let token: String = "pst_"
        .chars()
        .chain(secret.iter().flat_map(|b| format!("{b:02x}").into_bytes()).map(char::from))
        .collect();
    let now = unix_now();
    let made = StoredToken {
        name: name.clone(),
        role,
        sha256: hash(token.as_bytes()),
        created_unix_s: now,
        created_by: caller.name.clone(),
        expires_unix_s: expires_in_s.map(|s| now.saturating_add(i64::from(s))),
    };
    let ask = Ask { caller, dry_run: false, conditions: Default::default() };
    let edited = edit(&core, &ask, &place(&name), |before: Option<&StoredToken>, changed| {
        if before.is_some_and(|before| !before.is_expired(now)) {
            let message = format!("there is a token {name:?}: withdraw it first, or choose another name");
            return Err(ApiError::new(StatusCode::CONFLICT, "token_exists", message).of("name"));
        }
        let view = settled(&core, changed)?;
        if view.tokens.len() >= MAX_TOKENS {
            let message = format!("there are {MAX_TOKENS} tokens, which is the most: withdraw some");
            return Err(ApiError::new(StatusCode::CONFLICT, "too_many_tokens", message));
        }
        let others = view.tokens.values().map(|stored| &stored.value).filter(|other| other.name != name);
        if !keeps_an_admin(core.gate.settings(), others.chain([&made])) {
            let message = "the first token must be an admin's that does not expire: with it the API is closed to \
                           whoever has none, and nobody could make another";
            return Err(ApiError::new(StatusCode::CONFLICT, "no_admin_left", message).of("role"));
        }
        Ok(step(&name, Some(made.clone())))
    })
    .await?;
    let mut body = shown(&made);
    body["token"] = token.into();
    Ok(Reply { status: StatusCode::CREATED, body, revision: edited.revision, dry_run: false })
}

pub(super) async fn delete(
    State(core): State<Arc<Core>>,
    ask: Ask,
    name: Result<Path<String>, PathRejection>,
) -> Result<Reply, ApiError> {
    let Ok(Path(name)) = name else { return Err(ApiError::not_found("the token's name is not UTF-8")) };
    token_name(&name)?;
    let edited = edit(&core, &ask, &place(&name), |before: Option<&StoredToken>, changed| {
        if before.is_none() {
            return Err(ApiError::not_found(format!("there is no token {name:?}")));
        }
        let view = settled(&core, changed)?;
        let others = view.tokens.values().map(|stored| &stored.value).filter(|other| other.name != name);
        let was_admin = before.is_some_and(|before| before.role == Role::Admin);
        if was_admin && !keeps_an_admin(core.gate.settings(), others) {
            let message = "this is the last admin's token that does not expire: without it nobody could make another, \
                           and without any the API would be open to everybody; make another first";
            return Err(ApiError::new(StatusCode::CONFLICT, "no_admin_left", message));
        }
        Ok(step(&name, None))
    })
    .await?;
    let body = edited.before.as_ref().map(shown).unwrap_or_default();
    Ok(Reply { status: StatusCode::OK, body, revision: edited.revision, dry_run: edited.dry_run })
}
