//! Who may use the REST API: tokens with roles, and how many requests each may make.
//!
//! A token comes from the settings or from the store; without any, here or there, everybody may do everything, which is
//! for one machine. A request is authorised by the control plane that answers it, from its own view, so reads go on being
//! authorised while nobody leads. The leader counts the requests of each token: what followers hand on is counted where it
//! is answered, and what they answer themselves they have counted by the leader (see `forward`). While nobody leads, each
//! control plane counts what it answers; a new leader begins at zero.

mod limiter;
mod token;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::Instant,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, HeaderName, header, request::Parts},
};
use penstock_config::controlplane::{AuthConfig, Role};

use crate::{store::LeaseId, view::View};
pub use limiter::Limiter;
pub use token::{
    Identity, KnownToken, MAX_TOKENS, StoredToken, Unknown, hash, identify, keeps_an_admin, of_settings,
};

/// Names the control plane that handed a request on.
pub const FORWARDED_BY: HeaderName = HeaderName::from_static("penstock-forwarded-by");
/// The address of the client whose request was handed on.
pub const CLIENT: HeaderName = HeaderName::from_static("penstock-client");
/// Who calls where no tokens are.
pub const ANYBODY: &str = "anybody";

/// What decides on requests.
#[derive(Debug)]
pub struct Gate {
    settings: Vec<KnownToken>,
    limit: u32,
    limiter: Mutex<Limiter>,
    started: Instant,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody is known by what it presents.
    Unknown(Unknown),
    /// The store has not been read yet since the start: whether there are tokens is not known.
    TooEarly,
    /// The token made too many requests; there is room again in so many seconds.
    TooMany(u64),
}

impl Gate {
    /// By the settings.
    pub fn new(config: &AuthConfig) -> Self {
        Self {
            settings: of_settings(&config.tokens),
            limit: config.rate_limit_per_minute,
            limiter: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// No tokens anywhere: everybody may do everything. Never before the store was read.
    pub fn is_open(&self, view: &View) -> bool {
        self.settings.is_empty() && view.tokens.is_empty() && view.revision > 0
    }

    /// Requests are counted at all.
    pub fn counts(&self, view: &View) -> bool {
        self.limit > 0 && !self.is_open(view)
    }

    /// Tokens of the settings.
    pub fn settings(&self) -> &[KnownToken] {
        &self.settings
    }

    /// Who sends a request, which is counted.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn admit(&self, headers: &HeaderMap, view: &View, now_unix_s: i64) -> Result<Identity, Refusal> {
        if self.is_open(view) {
            return Ok(Identity { name: ANYBODY.into(), role: Role::Admin });
        }
        let stored = view.tokens.values().map(|stored| &stored.value);
        let found = identify(bearer(headers), &self.settings, stored, now_unix_s);
        let who = found.map_err(|unknown| match view.revision {
            0 => Refusal::TooEarly,
            _ => Refusal::Unknown(unknown),
        })?;
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        limiter.take(&who.name, self.limit, self.started.elapsed()).map_err(Refusal::TooMany)?;
        Ok(who)
    }
}

/// The token that a request presents.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = text.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Who sent a request that was let in, and how it came: an extractor for handlers that change something. Everything that
/// the audit says of a change but what was changed.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The token's name, or [`ANYBODY`].
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The request's method.
    pub method: String,
    /// The request's path, without its query.
    pub path: String,
    /// The address that the request came from.
    pub peer: String,
    /// The client's address, as the control plane says that handed the request on; empty if none did.
    pub client: String,
    /// That control plane; empty if none.
    pub forwarded_by: String,
    /// What is written with the first change that it makes.
    pub marker: Option<Arc<Marker>>,
}

/// The key by which a repetition of a request is recognised. It is written with the request's first change, so that the
/// change is never made twice; the answer is put there afterwards.
#[derive(Debug)]
pub struct Marker {
    /// Where.
    pub key: String,
    /// What, as long as there is no answer.
    pub value: Vec<u8>,
    /// For how long.
    pub lease: LeaseId,
    /// It was written.
    pub written: AtomicBool,
}

impl Caller {
    /// From a request that `who` sent.
    pub fn new(who: Identity, parts: &Parts) -> Self {
        let peer = parts.extensions.get::<ConnectInfo<std::net::SocketAddr>>();
        let text = |name: &HeaderName| {
            let value = parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
            value.chars().take(128).collect::<String>()
        };
        let forwarded_by = text(&FORWARDED_BY);
        Self {
            name: who.name,
            role: who.role,
            method: parts.method.to_string(),
            path: parts.uri.path().chars().take(1_024).collect(),
            peer: peer.map(|ConnectInfo(peer)| peer.to_string()).unwrap_or_default(),
            client: if forwarded_by.is_empty() { String::new() } else { text(&CLIENT) },
            forwarded_by,
            marker: None,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = axum::http::StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        // Every route that is not open has been through the gate, which puts it there.
        parts.extensions.get::<Self>().cloned().ok_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_let_in_before_it_is_known_whether_there_are_tokens() {
        let unread = View::default();
        let read = View { revision: 1, ..View::default() };
        let nobody = HeaderMap::new();
        let open = Gate::new(&AuthConfig::default());
        assert_eq!(open.admit(&nobody, &unread, 0), Err(Refusal::TooEarly));
        assert_eq!(open.admit(&nobody, &read, 0).map(|who| who.name), Ok(ANYBODY.to_owned()));
        let closed = Gate::new(&AuthConfig { tokens: vec!["t:viewer".into()], ..AuthConfig::default() });
        let mut known = HeaderMap::new();
        known.insert(header::AUTHORIZATION, "bearer t".parse().expect("a header"));
        assert_eq!(closed.admit(&known, &unread, 0).map(|who| who.role), Ok(Role::Viewer));
        assert_eq!(closed.admit(&nobody, &read, 0), Err(Refusal::Unknown(Unknown::Missing)));
    }
}
