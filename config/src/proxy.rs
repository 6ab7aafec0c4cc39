//! Settings of the proxy process: `config/proxy.toml` explains each.

use serde::{Deserialize, Serialize};

use crate::logging::LogConfig;

/// Everything the proxy process can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// How it logs.
    pub log: LogConfig,
}
