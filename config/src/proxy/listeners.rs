//! `[public]` and `[private]`: the sockets.

use serde::{Deserialize, Serialize};

/// `[public]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublicConfig {
    /// host:port for clients; port 0 takes a free one.
    pub listen: String,
    /// Threads that serve requests; 0 means one for each core.
    pub threads: usize,
    /// Whether threads take over each other's work; off costs less per token.
    pub work_stealing: bool,
    /// Whether cleartext HTTP/2 with prior knowledge is spoken beside HTTP/1.1.
    pub h2c: bool,
    /// Seconds an idle connection is kept; 0 closes after each answer.
    pub keepalive_s: u64,
}

impl Default for PublicConfig {
    fn default() -> Self {
        Self { listen: "0.0.0.0:8081".into(), threads: 0, work_stealing: false, h2c: true, keepalive_s: 75 }
    }
}

/// `[private]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrivateConfig {
    /// host:port for probes, metrics and debugging; port 0 takes a free one.
    pub listen: String,
}

impl Default for PrivateConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:18081".into() }
    }
}
