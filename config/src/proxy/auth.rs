//! `[auth]`: who may call.

use serde::{Deserialize, Serialize};

/// `[auth]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Accepted API keys, each `NAME:SHA256_HEX_OF_KEY`; none lets everybody in.
    pub keys: Vec<String>,
}

/// Splits one entry of `auth.keys` into the key's name and the SHA-256 of the key.
///
/// # Errors
/// A sentence that names the entry (never a secret: entries hold hashes) and the form that is accepted.
pub fn parse_key(entry: &str) -> Result<(String, [u8; 32]), String> {
    let form = "expected NAME:HASH with HASH the 64 hex digits of `printf %s KEY | sha256sum`";
    let (name, hash) =
        entry.rsplit_once(':').ok_or_else(|| format!("auth.keys: {entry:?} has no ':'; {form}"))?;
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
        Ok((name.to_owned(), digest))
    } else {
        Err(format!("auth.keys: {entry:?} is malformed; {form}"))
    }
}
