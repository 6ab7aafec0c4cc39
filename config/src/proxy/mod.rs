//! Settings of the proxy process, a file for each section: `config/proxy.toml` explains every key.

mod auth;
mod discovery;
mod drain;
mod health;
mod limits;
mod listeners;
mod queue;
mod resume;
mod routing;
mod telemetry;
mod trust;
mod upstream;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::{
    auth::{AuthConfig, KeyEntry, parse_key},
    discovery::DiscoveryConfig,
    drain::{DrainConfig, UpgradeConfig},
    health::HealthConfig,
    limits::LimitsConfig,
    listeners::{ListenerConfig, PUBLIC, PrivateConfig, PublicConfig},
    queue::QueueConfig,
    resume::{ResumeConfig, Unary},
    routing::{Policy, RoutingConfig},
    telemetry::TelemetryConfig,
    trust::TrustConfig,
    upstream::{Patience, UpstreamConfig},
};
use crate::logging::LogConfig;

/// Everything the proxy can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// How it logs.
    pub log: LogConfig,
    /// Where clients connect, and with how many threads they are served.
    pub public: PublicConfig,
    /// Further sockets for clients, by name: TLS, PROXY protocol.
    pub listeners: BTreeMap<String, ListenerConfig>,
    /// Probes, metrics and debugging.
    pub private: PrivateConfig,
    /// Where endpoint tables come from.
    pub discovery: DiscoveryConfig,
    /// Who may call.
    pub auth: AuthConfig,
    /// What callers may not tell an engine.
    pub trust: TrustConfig,
    /// How much a client may send, and how slowly.
    pub limits: LimitsConfig,
    /// How engines are called.
    pub upstream: UpstreamConfig,
    /// What happens while every engine of a model is at its limit.
    pub queue: QueueConfig,
    /// When a stream that loses its engine goes on at another.
    pub resume: ResumeConfig,
    /// Which endpoint takes a request.
    pub routing: RoutingConfig,
    /// When an endpoint is left out of picks, and how that is found out.
    pub health: HealthConfig,
    /// What is told about each request.
    pub telemetry: TelemetryConfig,
    /// How it stops.
    pub drain: DrainConfig,
    /// How it gives way to a new binary.
    pub upgrade: UpgradeConfig,
}

impl ProxyConfig {
    /// Every socket for clients, by name, `[public]` first where there is one.
    pub fn client_listeners(&self) -> Vec<(String, ListenerConfig)> {
        let public = (!self.public.listen.is_empty()).then(|| (PUBLIC.to_owned(), self.public.listener()));
        let further = self.listeners.iter().map(|(name, listener)| (name.clone(), listener.clone()));
        public.into_iter().chain(further).collect()
    }

    /// Rules that types cannot say. The error names the key and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        for key in &self.auth.keys {
            parse_key(key)?;
        }
        let positive = [
            ("limits.head_ms", self.limits.head_ms),
            ("limits.handshake_ms", self.limits.handshake_ms),
            ("limits.http2_streams", u64::from(self.limits.http2_streams)),
            ("upgrade.ready_ms", self.upgrade.ready_ms),
            ("limits.body_bytes", self.limits.body_bytes as u64),
            ("limits.header_bytes", self.limits.header_bytes as u64),
            ("limits.body_idle_ms", self.limits.body_idle_ms),
            ("limits.body_total_ms", self.limits.body_total_ms),
            ("limits.write_stall_ms", self.limits.write_stall_ms),
            ("limits.websocket_idle_ms", self.limits.websocket_idle_ms),
            ("limits.json_depth", self.limits.json_depth as u64),
            ("upstream.connect_ms", self.upstream.connect_ms),
            ("upstream.attempts", self.upstream.attempts as u64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; it must be at least 1"));
        }
        if self.limits.buffered_bytes < self.limits.body_bytes {
            return Err(format!(
                "limits.buffered_bytes is {}; it must be at least limits.body_bytes, {}",
                self.limits.buffered_bytes, self.limits.body_bytes
            ));
        }
        self.health.validate()?;
        self.upstream.validate()?;
        self.queue.validate()?;
        self.resume.validate()?;
        self.routing.validate()?;
        self.telemetry.validate()?;
        self.trust.validate()?;
        listeners::validate(&self.public, &self.listeners)?;
        if self.discovery.controlplanes.is_empty() && self.discovery.snapshot_file.is_empty() {
            return Err("discovery.controlplanes is empty, and so is discovery.snapshot_file: \
                        name at least one, or there is nothing to route to"
                .into());
        }
        let discovery = &self.discovery;
        discovery.tls.validate_endpoints("discovery.tls", "discovery.controlplanes", &discovery.controlplanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        ProxyConfig::default().validate().expect("defaults");
    }

    #[test]
    fn a_key_entry_is_a_name_and_a_hash() {
        let entry = format!("alice:{}", "ab".repeat(32));
        let key = |trusted, resume| KeyEntry { name: "alice".into(), hash: [0xab; 32], trusted, resume };
        assert_eq!(parse_key(&entry), Ok(key(false, true)));
        assert_eq!(parse_key(&format!("{entry}:trusted")), Ok(key(true, true)));
        assert_eq!(parse_key(&format!("{entry}:no-resume")), Ok(key(false, false)));
        assert_eq!(parse_key(&format!("{entry}:trusted:no-resume")), Ok(key(true, false)));
        assert_eq!(parse_key(&format!("{entry}:no-resume:trusted")), Ok(key(true, false)));
        for bad in [
            "",
            "alice",
            "alice:xyz",
            ":00",
            &format!("alice:{}", "zz".repeat(32)),
            &format!("a:{}", "é".repeat(32)),
            &format!("{entry}:other"),
            &format!("{entry}:trusted:trusted"),
            &format!("{entry}:no-resume:"),
            ":trusted",
        ] {
            let error = parse_key(bad).expect_err(bad);
            assert!(error.contains("NAME:HASH"), "{error}");
        }
    }

    #[test]
    fn impossible_settings_name_their_key() {
        let mut config = ProxyConfig::default();
        config.upstream.attempts = 0;
        assert!(config.validate().expect_err("attempts").contains("upstream.attempts"));
        let mut config = ProxyConfig::default();
        config.limits.buffered_bytes = 1;
        assert!(config.validate().expect_err("buffered").contains("limits.buffered_bytes"));
        let routing = |change: fn(&mut RoutingConfig)| {
            let mut config = ProxyConfig::default();
            change(&mut config.routing);
            config.validate().expect_err("routing")
        };
        assert!(routing(|r| r.load_bound_percent = 99).contains("routing.load_bound_percent is 99"));
        assert!(routing(|r| r.session_header = "a b".into()).contains("routing.session_header"));
        let trust = |change: fn(&mut TrustConfig)| {
            let mut config = ProxyConfig::default();
            change(&mut config.trust);
            config.validate().expect_err("trust")
        };
        assert!(trust(|t| t.remove_headers.push("X-Upper".into())).contains("trust.remove_headers"));
        assert!(trust(|t| t.remove_fields.push(String::new())).contains("trust.remove_fields"));
        assert!(trust(|t| t.remove_fields = vec!["x".into(); 65]).contains("65 names"));
        assert!(routing(|r| r.prefix_block_bytes = 1).contains("16 to 1048576"));
    }

    #[test]
    fn a_policy_is_written_as_it_is_named() {
        for policy in Policy::ALL {
            assert_eq!(serde_json::to_value(policy).expect("a name"), policy.name());
        }
    }
}
