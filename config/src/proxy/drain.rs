//! `[drain]`: how the process stops.

use serde::{Deserialize, Serialize};

/// `[drain]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrainConfig {
    /// Time between "not ready" and the listener's closing, for load balancers to notice.
    pub unready_ms: u64,
    /// Longest wait for requests to finish; what is left then gets an error event.
    pub deadline_ms: u64,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { unready_ms: 0, deadline_ms: 60_000 }
    }
}
