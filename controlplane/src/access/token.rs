//! Tokens: what is kept of them, and whose a presented one is. Pure.
//!
//! Only SHA-256 hashes are kept, also of those in the settings. A token is 256 bits of chance, so its hash needs no salt and
//! no slow function; hashes are compared in constant time, and every one of them, so that an answer's time tells nothing.

use penstock_config::controlplane::{Role, parse_token};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// Most tokens in the store.
pub const MAX_TOKENS: usize = 1_000;

/// `/tokens/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredToken {
    /// Its name, for people and for the audit.
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    /// SHA-256 of the token, in hex.
    pub sha256: String,
    /// When it was made.
    pub created_unix_s: i64,
    /// The token it was made with.
    #[serde(default)]
    pub created_by: String,
    /// From when on it is not accepted; None: it always is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_unix_s: Option<i64>,
}

impl StoredToken {
    /// Whether it is not accepted any more.
    pub fn is_expired(&self, now_unix_s: i64) -> bool {
        self.expires_unix_s.is_some_and(|at| at <= now_unix_s)
    }
}

/// A token of the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownToken {
    /// Made from its hash, so that each control plane calls it the same.
    pub name: String,
    /// What its bearer may do.
    pub role: Role,
    sha256: String,
}

/// The tokens of `auth.tokens`; malformed entries are left out, which the settings' check has refused before.
pub fn of_settings(entries: &[String]) -> Vec<KnownToken> {
    let known = entries.iter().filter_map(|entry| parse_token(entry).ok());
    known
        .map(|(token, role)| {
            let sha256 = hash(token.as_bytes());
            KnownToken { name: format!("settings-{}", sha256.get(..8).unwrap_or_default()), role, sha256 }
        })
        .collect()
}

/// Who presents a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The token's name.
    pub name: String,
    /// Its role.
    pub role: Role,
}

/// Why nobody was recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// Nothing was presented.
    Missing,
    /// No token of these bytes.
    Wrong,
    /// It was one once.
    Expired,
}

/// Whose token `presented` is, among those of the settings and those stored.
///
/// # Errors
/// Why it is nobody's.
pub fn identify<'a>(
    presented: Option<&str>,
    settings: &[KnownToken],
    stored: impl IntoIterator<Item = &'a StoredToken>,
    now_unix_s: i64,
) -> Result<Identity, Unknown> {
    let presented = presented.ok_or(Unknown::Missing)?;
    let sha256 = hash(presented.as_bytes());
    let mut found = Err(Unknown::Wrong);
    for token in stored {
        if is_same(&token.sha256, &sha256) {
            found = match token.is_expired(now_unix_s) {
                true => Err(Unknown::Expired),
                false => Ok(Identity { name: token.name.clone(), role: token.role }),
            };
        }
    }
    for token in settings {
        if is_same(&token.sha256, &sha256) {
            found = Ok(Identity { name: token.name.clone(), role: token.role });
        }
    }
    found
}

/// Whether somebody could still make tokens, if these were all: an admin whose token does not expire.
pub fn keeps_an_admin<'a>(
    settings: &[KnownToken],
    stored: impl IntoIterator<Item = &'a StoredToken>,
) -> bool {
    settings.iter().any(|token| token.role == Role::Admin)
        || stored.into_iter().any(|token| token.role == Role::Admin && token.expires_unix_s.is_none())
}

/// SHA-256 in hex.
pub fn hash(bytes: &[u8]) -> String {
    let hash = digest(&SHA256, bytes);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// In a time that depends on the lengths alone.
fn is_same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, token: &str, role: Role, expires_unix_s: Option<i64>) -> StoredToken {
        let sha256 = hash(token.as_bytes());
        StoredToken {
            name: name.into(),
            role,
            sha256,
            created_unix_s: 0,
            created_by: String::new(),
            expires_unix_s,
        }
    }

    #[test]
    fn a_token_is_known_by_its_hash_until_it_expires() {
        let settings = of_settings(&["root:admin".into()]);
        let all = [stored("ci", "c", Role::Operator, None), stored("guest", "g", Role::Viewer, Some(100))];
        let who = |token: Option<&str>, now| identify(token, &settings, &all, now).map(|i| (i.name, i.role));
        assert_eq!(who(Some("c"), 0), Ok(("ci".into(), Role::Operator)));
        assert_eq!(who(Some("g"), 99), Ok(("guest".into(), Role::Viewer)));
        assert_eq!(who(Some("g"), 100), Err(Unknown::Expired));
        assert_eq!(who(Some("C"), 0), Err(Unknown::Wrong));
        assert_eq!(who(Some(""), 0), Err(Unknown::Wrong));
        assert_eq!(who(None, 0), Err(Unknown::Missing));
        assert_eq!(who(Some("root"), 0), Ok(("settings-4813494d".into(), Role::Admin)));
    }

    #[test]
    fn somebody_must_be_left_who_can_make_tokens() {
        let forever = stored("a", "a", Role::Admin, None);
        let passing = stored("b", "b", Role::Admin, Some(1));
        let operator = stored("c", "c", Role::Operator, None);
        assert!(keeps_an_admin(&[], [&forever, &operator]));
        assert!(!keeps_an_admin(&[], [&passing, &operator]));
        assert!(keeps_an_admin(&of_settings(&["x:admin".into()]), [&operator]));
    }
}
