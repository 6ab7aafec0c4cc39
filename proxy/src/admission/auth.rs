//! API keys, compared as hashes.
//!
//! The settings hold SHA-256 of each key, never the key: a key is a long random string, so a fast hash is enough, and
//! finding the hash in a map tells nothing about the key by its timing.

use std::collections::HashMap;

use http::{
    HeaderMap,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use penstock_config::proxy::{KeyEntry, parse_key};
use sha2::{Digest, Sha256};

use crate::error::GatewayError;

/// How a browser, which cannot set headers on a WebSocket, sends its key: as a subprotocol with this prefix (OpenAI's form).
pub const WEBSOCKET_KEY_PREFIX: &str = "openai-insecure-api-key.";

/// The accepted keys. Empty: everybody may enter.
#[derive(Debug, Default)]
pub struct KeyRing {
    keys: HashMap<[u8; 32], KeyEntry>,
}

/// Who is calling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller<'a> {
    /// The key's name; empty when the gateway is open.
    pub name: &'a str,
    /// Whether engines may be told what `[trust]` keeps from them.
    pub trusted: bool,
    /// Whether this caller's streams go on at another engine when they lose theirs (`:no-resume` says that they do not).
    pub resume: bool,
}

impl Default for Caller<'_> {
    fn default() -> Self {
        Self { name: "", trusted: false, resume: true }
    }
}

impl KeyRing {
    /// From `auth.keys`.
    ///
    /// # Errors
    /// The sentence of [`parse_key`] for the first entry that is malformed.
    pub fn new(entries: &[String]) -> Result<Self, String> {
        let keys =
            entries.iter().map(|e| parse_key(e).map(|key| (key.hash, key))).collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// Whether nobody is asked for a key.
    pub fn is_open(&self) -> bool {
        self.keys.is_empty()
    }

    /// Who is calling, by `Authorization: Bearer`, or `x-api-key` as Anthropic's clients send it, or a WebSocket's
    /// subprotocol ([`WEBSOCKET_KEY_PREFIX`]).
    ///
    /// # Errors
    /// [`GatewayError::MissingKey`], [`GatewayError::InvalidKey`].
    pub fn caller(&self, headers: &HeaderMap) -> Result<Caller<'_>, GatewayError> {
        if self.is_open() {
            return Ok(Caller::default());
        }
        let key = bearer(headers)
            .or_else(|| headers.get("x-api-key").map(|v| v.as_bytes()))
            .or_else(|| websocket_key(headers))
            .filter(|key| !key.is_empty())
            .ok_or(GatewayError::MissingKey)?;
        let digest: [u8; 32] = Sha256::digest(key).into();
        let key = self.keys.get(&digest).ok_or(GatewayError::InvalidKey)?;
        Ok(Caller { name: &key.name, trusted: key.trusted, resume: key.resume })
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

fn websocket_key(headers: &HeaderMap) -> Option<&[u8]> {
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    protocols
        .flat_map(|value| value.split(','))
        .find_map(|name| name.trim().strip_prefix(WEBSOCKET_KEY_PREFIX))
        .map(str::as_bytes)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn ring() -> KeyRing {
        let hash: String = Sha256::digest(b"secret").iter().map(|b| format!("{b:02x}")).collect();
        let ours: String = Sha256::digest(b"ours").iter().map(|b| format!("{b:02x}")).collect();
        let picky: String = Sha256::digest(b"once").iter().map(|b| format!("{b:02x}")).collect();
        let entries =
            [format!("alice:{hash}"), format!("batch:{ours}:trusted"), format!("picky:{picky}:no-resume")];
        KeyRing::new(&entries).expect("valid")
    }

    const ALICE: Result<Caller<'static>, GatewayError> =
        Ok(Caller { name: "alice", trusted: false, resume: true });

    fn with(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn a_known_key_has_a_name() {
        assert_eq!(ring().caller(&with("authorization", "Bearer secret")), ALICE);
        assert_eq!(ring().caller(&with("authorization", "bearer  secret")), ALICE);
        assert_eq!(ring().caller(&with("x-api-key", "secret")), ALICE);
    }

    #[test]
    fn a_key_can_be_trusted_and_come_as_a_subprotocol() {
        let trusted = Ok(Caller { name: "batch", trusted: true, resume: true });
        assert_eq!(ring().caller(&with("authorization", "Bearer ours")), trusted);
        let protocols = with("sec-websocket-protocol", "realtime, openai-insecure-api-key.secret");
        assert_eq!(ring().caller(&protocols), ALICE);
        assert_eq!(ring().caller(&with("sec-websocket-protocol", "realtime")), Err(GatewayError::MissingKey));
    }

    #[test]
    fn a_key_can_be_left_out_of_resumes() {
        let picky = Ok(Caller { name: "picky", trusted: false, resume: false });
        assert_eq!(ring().caller(&with("authorization", "Bearer once")), picky);
        assert!(Caller::default().resume, "an open gateway resumes");
    }

    #[test]
    fn no_key_and_a_wrong_key_are_told_apart() {
        assert_eq!(ring().caller(&HeaderMap::new()), Err(GatewayError::MissingKey));
        assert_eq!(ring().caller(&with("authorization", "Basic abc")), Err(GatewayError::MissingKey));
        assert_eq!(ring().caller(&with("authorization", "Bearer ")), Err(GatewayError::MissingKey));
        assert_eq!(ring().caller(&with("authorization", "Bearer nope")), Err(GatewayError::InvalidKey));
    }

    #[test]
    fn without_keys_everybody_enters() {
        assert_eq!(KeyRing::default().caller(&HeaderMap::new()), Ok(Caller::default()));
    }
}
