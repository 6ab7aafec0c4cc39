//! Who may use the control plane's API, and what is kept of what they did: `[auth]` and `[audit]`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a caller may do; each role may do everything that those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads everything but tokens.
    Viewer,
    /// Changes what shall run.
    Operator,
    /// Decides who may do what, and moves whole states.
    Admin,
}

impl Role {
    /// Every role, the least first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// As written in settings and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// From its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `[auth]`: who may use the REST API.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Accepted tokens, each `TOKEN:ROLE`. With none here and none in the store everybody may do everything.
    pub tokens: Vec<String>,
    /// Most requests of one token in any minute, over all control planes; 0: no limit.
    pub rate_limit_per_minute: u32,
    /// How long the answer to a request with an Idempotency-Key is kept, in seconds; 60 to 604,800.
    pub idempotency_ttl_s: u64,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self { tokens: Vec::new(), rate_limit_per_minute: 120, idempotency_ttl_s: 86_400 }
    }
}

/// Tokens are secrets: only their number is shown.
impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("tokens", &self.tokens.len())
            .field("rate_limit_per_minute", &self.rate_limit_per_minute)
            .field("idempotency_ttl_s", &self.idempotency_ttl_s)
            .finish()
    }
}

/// `[audit]`: what is kept of changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// The newest records that are kept; 100 to 100,000.
    pub keep: u64,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { keep: 2_000 }
    }
}

/// `[observe]`: what `/api/observe` looks at beside the control plane itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObserveConfig {
    /// `http://HOST:PORT` of a proxy, whose health `/api/observe/router` tells; empty: none.
    pub router_url: String,
}

/// Splits one entry of `auth.tokens`.
///
/// # Errors
/// What is wrong with it and what is accepted, without the token.
pub fn parse_token(entry: &str) -> Result<(&str, Role), String> {
    let (token, role) = entry.rsplit_once(':').ok_or("has no ':'; accepted is TOKEN:ROLE")?;
    let role = Role::named(role).ok_or_else(|| {
        // What stands behind the last ':' may be a part of the token.
        format!(
            "ends with no role; accepted is TOKEN:ROLE with ROLE one of {}",
            Role::ALL.map(Role::as_str).join(", ")
        )
    })?;
    if token.is_empty() || token.len() > 512 || !token.bytes().all(|b| b.is_ascii_graphic() && b != b',') {
        return Err("has a token that is not 1 to 512 visible ASCII characters without ','".into());
    }
    Ok((token, role))
}

impl AuthConfig {
    /// Refuses values that cannot work, in words that hold no token.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn validate(&self) -> Result<(), String> {
        let mut seen = std::collections::BTreeSet::new();
        for (n, entry) in self.tokens.iter().enumerate() {
            let (token, _) =
                parse_token(entry).map_err(|why| format!("auth.tokens: entry {} {why}", n + 1))?;
            if !seen.insert(token) {
                return Err(format!("auth.tokens: entry {} has a token that an earlier one has", n + 1));
            }
        }
        Ok(())
    }
}

impl ObserveConfig {
    /// Refuses a URL that cannot work.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn validate(&self) -> Result<(), String> {
        let url = self.router_url.as_str();
        let authority = url.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        let port = authority.and_then(|authority| authority.rsplit_once(':'));
        let good = port.is_some_and(|(host, port)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
            !host.is_empty() && host.chars().all(plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if url.is_empty() || good {
            return Ok(());
        }
        Err(format!("observe.router_url is {url:?}: give http://HOST:PORT of a proxy, or nothing"))
    }
}

/// The deploy guide's variables as settings of the control plane: `NEBULA_AUTH_TOKENS="t1:admin,t2:viewer"` and
/// `NEBULA_AUTH_RATE_LIMIT_PER_MINUTE=120`. A setting under its own name wins over its alias.
pub fn guide_aliases(env: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = env.into_iter().collect();
    let list = |text: &str| {
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        toml::Value::Array(entries.map(|entry| entry.to_owned().into()).collect()).to_string()
    };
    for (alias, name, list_of) in [
        ("NEBULA_AUTH_TOKENS", "PENSTOCK_CONTROLPLANE__AUTH__TOKENS", true),
        ("NEBULA_AUTH_RATE_LIMIT_PER_MINUTE", "PENSTOCK_CONTROLPLANE__AUTH__RATE_LIMIT_PER_MINUTE", false),
    ] {
        let own = env.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
        let Some((_, text)) = env.iter().find(|(given, text)| given == alias && !text.is_empty()) else {
            continue;
        };
        if !own {
            let value = if list_of { list(text) } else { text.trim().to_owned() };
            env.push((name.to_owned(), value));
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_from_behind_and_never_shown() {
        assert_eq!(parse_token("a:b:admin"), Ok(("a:b", Role::Admin)));
        for (entry, part) in [
            ("secret", "no ':'"),
            ("secret:boss", "viewer, operator, admin"),
            (":admin", "1 to 512"),
            ("sec ret:admin", "1 to 512"),
        ] {
            let config = AuthConfig { tokens: vec![entry.into()], ..AuthConfig::default() };
            let error = config.validate().expect_err(entry);
            assert!(error.starts_with("auth.tokens: entry 1 ") && error.contains(part), "{error}");
            assert!(!error.contains("sec") && !format!("{config:?}").contains("sec"), "{error}");
        }
        let twice = AuthConfig { tokens: vec!["t:admin".into(), "t:viewer".into()], ..AuthConfig::default() };
        assert!(twice.validate().expect_err("twice").contains("entry 2"));
    }

    #[test]
    fn the_guides_variables_are_settings_unless_ours_are_there() {
        let pair = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let guide =
            [("NEBULA_AUTH_TOKENS", "t1:admin, t2:viewer"), ("NEBULA_AUTH_RATE_LIMIT_PER_MINUTE", "7")];
        let load = crate::load::<crate::controlplane::ControlPlaneConfig>;
        let config = load("controlplane", None, guide_aliases(guide.map(pair))).expect("valid");
        assert_eq!(
            (config.auth.tokens.as_slice(), config.auth.rate_limit_per_minute),
            (&["t1:admin".to_owned(), "t2:viewer".to_owned()][..], 7)
        );
        let own = [guide[0], ("PENSTOCK_CONTROLPLANE__AUTH__TOKENS", "['o:admin']")];
        let config = load("controlplane", None, guide_aliases(own.map(pair))).expect("valid");
        assert_eq!(config.auth.tokens, ["o:admin"]);
        assert!(guide_aliases([pair(("NEBULA_AUTH_TOKENS", ""))]).len() == 1, "empty: off");
    }

    #[test]
    fn a_router_is_a_plain_url() {
        for good in ["", "http://gw:8081", "http://[::1]:1/"] {
            ObserveConfig { router_url: good.into() }.validate().expect(good);
        }
        for bad in ["gw:8081", "https://gw:1", "http://gw", "http://gw:0", "http://u@gw:1"] {
            let error = ObserveConfig { router_url: bad.into() }.validate().expect_err(bad);
            assert!(error.starts_with("observe.router_url is "), "{error}");
        }
    }
}
