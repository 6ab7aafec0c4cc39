//! API keys, compared as hashes.
//!
//! The settings hold SHA-256 of each key, never the key: a key is a long random string, so a fast hash is enough, and
//! finding the hash in a map tells nothing about the key by its timing.

use std::collections::HashMap;

use http::{HeaderMap, header::AUTHORIZATION};
use penstock_config::proxy::parse_key;
use sha2::{Digest, Sha256};

use crate::error::GatewayError;

/// The accepted keys. Empty: everybody may enter.
#[derive(Debug, Default)]
pub struct KeyRing {
    names: HashMap<[u8; 32], String>,
}

impl KeyRing {
    /// From `auth.keys`.
    ///
    /// # Errors
    /// The sentence of [`parse_key`] for the first entry that is malformed.
    pub fn new(entries: &[String]) -> Result<Self, String> {
        let names = entries
            .iter()
            .map(|e| parse_key(e).map(|(name, hash)| (hash, name)))
            .collect::<Result<_, _>>()?;
        Ok(Self { names })
    }

    /// Whether nobody is asked for a key.
    pub fn is_open(&self) -> bool {
        self.names.is_empty()
    }

    /// The caller's name; empty when the gateway is open. `Authorization: Bearer` or, as Anthropic's clients send it,
    /// `x-api-key`.
    ///
    /// # Errors
    /// [`GatewayError::MissingKey`], [`GatewayError::InvalidKey`].
    pub fn caller(&self, headers: &HeaderMap) -> Result<&str, GatewayError> {
        if self.is_open() {
            return Ok("");
        }
        let key = bearer(headers)
            .or_else(|| headers.get("x-api-key").map(|v| v.as_bytes()))
            .filter(|key| !key.is_empty())
            .ok_or(GatewayError::MissingKey)?;
        let digest: [u8; 32] = Sha256::digest(key).into();
        self.names.get(&digest).map(String::as_str).ok_or(GatewayError::InvalidKey)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn ring() -> KeyRing {
        let hash: String = Sha256::digest(b"secret").iter().map(|b| format!("{b:02x}")).collect();
        KeyRing::new(&[format!("alice:{hash}")]).expect("valid")
    }

    fn with(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn a_known_key_has_a_name() {
        assert_eq!(ring().caller(&with("authorization", "Bearer secret")), Ok("alice"));
        assert_eq!(ring().caller(&with("authorization", "bearer  secret")), Ok("alice"));
        assert_eq!(ring().caller(&with("x-api-key", "secret")), Ok("alice"));
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
        assert_eq!(KeyRing::default().caller(&HeaderMap::new()), Ok(""));
    }
}
