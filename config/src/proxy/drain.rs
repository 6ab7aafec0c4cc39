//! `[drain]` and `[upgrade]`: how the process stops, and how it gives way to its successor.

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

/// `[upgrade]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpgradeConfig {
    /// Longest time the successor may take to be ready; after that it is ended, and this process goes on.
    pub ready_ms: u64,
    /// Longest time for this process to finish its requests once the successor serves; 0: as long as they take.
    pub finish_ms: u64,
}

impl Default for UpgradeConfig {
    fn default() -> Self {
        Self { ready_ms: 60_000, finish_ms: 0 }
    }
}
