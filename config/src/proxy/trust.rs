//! `[trust]`: what callers may not tell an engine.

use serde::{Deserialize, Serialize};

/// `[trust]`. What is listed here is taken out of the requests of everybody but trusted callers (`auth.keys`) and trusted
/// listeners.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrustConfig {
    /// Headers, in lower case.
    pub remove_headers: Vec<String>,
    /// Keys at the top level of a JSON body, and fields of a form.
    pub remove_fields: Vec<String>,
}

impl Default for TrustConfig {
    fn default() -> Self {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            remove_headers: list(&["x-data-parallel-rank", "x-session-id", "x-vllm-priority"]),
            remove_fields: list(&[
                "kv_transfer_params",
                "ec_transfer_params",
                "vllm_xargs",
                "priority",
                "session_id",
            ]),
        }
    }
}

/// Most names in either list: each is compared with each key of a body.
const MAX_NAMES: usize = 64;

impl TrustConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        let header = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        if let Some(name) =
            self.remove_headers.iter().find(|name| name.is_empty() || !name.bytes().all(header))
        {
            return Err(format!(
                "trust.remove_headers has {name:?}; it must be a header's name in lower case"
            ));
        }
        if let Some(name) = self.remove_fields.iter().find(|name| !(1..=64).contains(&name.len())) {
            return Err(format!("trust.remove_fields has {name:?}; a name has 1 to 64 bytes"));
        }
        for (key, names) in
            [("trust.remove_headers", &self.remove_headers), ("trust.remove_fields", &self.remove_fields)]
        {
            if names.len() > MAX_NAMES {
                return Err(format!("{key} has {} names; it may have {MAX_NAMES}", names.len()));
            }
        }
        Ok(())
    }
}
