//! Settings of the agent process: `config/agent.toml` explains each.

use serde::{Deserialize, Serialize};

use crate::logging::LogConfig;

/// Everything the agent process can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// How it logs.
    pub log: LogConfig,
}
