//! Settings of the controlplane process: `config/controlplane.toml` explains each.

use serde::{Deserialize, Serialize};

use crate::logging::LogConfig;

/// Everything the controlplane process can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlPlaneConfig {
    /// How it logs.
    pub log: LogConfig,
}
