//! `[auth]`: who may call.

use serde::{Deserialize, Serialize};

/// `[auth]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Accepted API keys, each `NAME:SHA256_HEX_OF_KEY`, with `:trusted` behind it for a caller who may give engines orders
    /// (see [`super::TrustConfig`]); none lets everybody in.
    pub keys: Vec<String>,
}

/// One entry of `auth.keys`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEntry {
    /// The caller's name.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// Whether what this caller sends is not cleaned.
    pub trusted: bool,
}

/// Reads one entry of `auth.keys`.
///
/// # Errors
/// A sentence that names the entry (never a secret: entries hold hashes) and the form that is accepted.
pub fn parse_key(entry: &str) -> Result<KeyEntry, String> {
    let form =
        "expected NAME:HASH or NAME:HASH:trusted, with HASH the 64 hex digits of `printf %s KEY | sha256sum`";
    let (rest, trusted) = match entry.strip_suffix(":trusted") {
        Some(rest) => (rest, true),
        None => (entry, false),
    };
    let (name, hash) =
        rest.rsplit_once(':').ok_or_else(|| format!("auth.keys: {entry:?} has too few ':'; {form}"))?;
    let mut digest = [0u8; 32];
    let valid = !name.is_empty()
        && hash.len() == 64
        && hash.is_ascii()
        && digest.iter_mut().enumerate().all(|(i, byte)| {
            match u8::from_str_radix(&hash[2 * i..2 * i + 2], 16) {
                Ok(value) => {
                    *byte = value;
                    true
                }
                Err(_) => false,
            }
        });
    if valid {
        Ok(KeyEntry { name: name.to_owned(), hash: digest, trusted })
    } else {
        Err(format!("auth.keys: {entry:?} is malformed; {form}"))
    }
}
