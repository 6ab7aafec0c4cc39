//! `[auth]`: who may call.

use serde::{Deserialize, Serialize};

/// `[auth]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Accepted API keys, each `NAME:SHA256_HEX_OF_KEY`, with `:trusted` behind it for a caller who may give engines orders
    /// (see [`super::TrustConfig`]), and `:no-resume` for one whose streams end with their engine (see
    /// [`super::ResumeConfig`]); none lets everybody in.
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
    /// Whether this caller's streams go on at another engine when they lose theirs.
    pub resume: bool,
}

/// Reads one entry of `auth.keys`.
///
/// # Errors
/// A sentence that names the entry (never a secret: entries hold hashes) and the form that is accepted.
pub fn parse_key(entry: &str) -> Result<KeyEntry, String> {
    let form = "expected NAME:HASH, with :trusted, :no-resume or both behind it, and HASH the 64 hex digits of \
                `printf %s KEY | sha256sum`";
    let (mut rest, mut trusted, mut resume) = (entry, false, true);
    loop {
        rest = match (rest.strip_suffix(":trusted"), rest.strip_suffix(":no-resume")) {
            (Some(before), _) if !trusted => {
                trusted = true;
                before
            }
            (_, Some(before)) if resume => {
                resume = false;
                before
            }
            _ => break,
        };
    }
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
        Ok(KeyEntry { name: name.to_owned(), hash: digest, trusted, resume })
    } else {
        Err(format!("auth.keys: {entry:?} is malformed; {form}"))
    }
}
