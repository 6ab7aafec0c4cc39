//! `[discovery]`: where endpoint tables come from.

use serde::{Deserialize, Serialize};

use crate::tls::TlsConfig;

/// `[discovery]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiscoveryConfig {
    /// This proxy's name towards the control plane; empty takes the host's name.
    pub node_id: String,
    /// gRPC addresses of the control planes, tried in turn.
    pub controlplanes: Vec<String>,
    /// TLS towards them.
    pub tls: TlsConfig,
    /// File that keeps the last good tables; empty keeps none.
    pub snapshot_file: String,
}

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self {
            node_id: String::new(),
            controlplanes: vec!["http://127.0.0.1:18091".into()],
            tls: TlsConfig::default(),
            snapshot_file: "/var/lib/penstock/proxy-snapshot".into(),
        }
    }
}
