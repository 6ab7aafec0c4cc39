//! Settings of the controlplane process: `config/controlplane.toml` explains each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use crate::access::{AuditConfig, AuthConfig, ObserveConfig, Role, guide_aliases, parse_token};
use crate::logging::LogConfig;
pub use crate::{
    store::{ElectionConfig, StoreConfig},
    tls::TlsConfig,
};

/// Everything the controlplane process can be told. All of it is read once, at start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlPlaneConfig {
    /// How it logs.
    pub log: LogConfig,
    /// Where it listens.
    pub listen: ListenConfig,
    /// Where its state lives.
    pub store: StoreConfig,
    /// Who may write to it.
    pub election: ElectionConfig,
    /// How it deals with nodes.
    pub fleet: FleetConfig,
    /// How it decides.
    pub reconcile: ReconcileConfig,
    /// How it publishes to proxies.
    pub xds: XdsConfig,
    /// What it keeps copies of, and where.
    pub backup: BackupConfig,
    /// What it accepts.
    pub limits: LimitsConfig,
    /// Who may use its API.
    pub auth: AuthConfig,
    /// What it keeps of changes.
    pub audit: AuditConfig,
    /// What it looks at beside itself.
    pub observe: ObserveConfig,
}

/// `[listen]`: IP:PORT addresses; port 0 takes any free one (see `--announce`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenConfig {
    /// REST, console, probes and metrics.
    pub http: String,
    /// xDS to proxies and the fleet sessions of agents.
    pub grpc: String,
    /// TLS on the gRPC side, both as a server and towards other control planes.
    pub tls: TlsConfig,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self { http: "127.0.0.1:18090".into(), grpc: "127.0.0.1:18091".into(), tls: TlsConfig::default() }
    }
}

/// `[fleet]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// How long a node counts as present after its last report, in milliseconds; 1,000 to 600,000.
    pub lease_ttl_ms: u64,
    /// How often a node reports, in milliseconds; 50 up to a third of the lease.
    pub report_interval_ms: u64,
    /// How long a node is lost before its replicas are placed elsewhere, in milliseconds.
    pub lost_grace_ms: u64,
    /// How long a deregistration waits for proxies to acknowledge it, in milliseconds; at most 60,000.
    pub deregister_ack_wait_ms: u64,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            lease_ttl_ms: 10_000,
            report_interval_ms: 500,
            lost_grace_ms: 30_000,
            deregister_ack_wait_ms: 2_000,
        }
    }
}

/// `[reconcile]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReconcileConfig {
    /// Longest pause between two looks at the fleet, in milliseconds; 50 to 600,000.
    pub tick_ms: u64,
    /// Shortest pause between two looks, in milliseconds, so that a burst of changes is planned once.
    pub coalesce_ms: u64,
    /// Most replicas that are started per tick; 1 to 100,000.
    pub max_starts: usize,
    /// Most replicas that are stopped per tick; 1 to 100,000.
    pub max_stops: usize,
    /// A store that could not be followed for longer, in milliseconds, is not acted upon; 0: it always is.
    pub max_view_age_ms: u64,
    /// An engine that was started again so often without getting ready is placed elsewhere; 0: never.
    pub replace_after_restarts: u32,
    /// How long a node on which engines of a model failed gets no replica of it, in seconds; up to 2,592,000.
    pub avoid_node_s: u64,
    /// A spec that failed on so many nodes, and is ready on none, is not placed on further ones; 0: it always is.
    pub hold_after_nodes: u32,
    /// Whether replicas are moved to even out zones, where their deployments allow it.
    pub rebalance: bool,
    /// Seconds between two moves; 1 to 2,592,000.
    pub rebalance_interval_s: u64,
}

impl Default for ReconcileConfig {
    fn default() -> Self {
        Self {
            tick_ms: 1_000,
            coalesce_ms: 20,
            max_starts: 200,
            max_stops: 50,
            max_view_age_ms: 15_000,
            replace_after_restarts: 5,
            avoid_node_s: 1_800,
            hold_after_nodes: 3,
            rebalance: false,
            rebalance_interval_s: 86_400,
        }
    }
}

/// `[xds]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XdsConfig {
    /// Shortest pause between two pushed snapshots, in milliseconds; 0 pushes each change by itself.
    pub push_coalesce_ms: u64,
    /// After how long a response that a proxy refused is offered again unchanged, in milliseconds.
    pub nack_retry_ms: u64,
    /// Shortest pause between two messages with engines' loads to one proxy, in milliseconds.
    pub load_push_ms: u64,
    /// Share of the fleet's endpoints that may be missing without news before they stay in the tables; 0 to 100, 0: any.
    pub guard_max_loss_percent: u8,
    /// What a stock Envoy is told.
    pub envoy: EnvoyConfig,
}

impl Default for XdsConfig {
    fn default() -> Self {
        Self {
            push_coalesce_ms: 20,
            nack_retry_ms: 30_000,
            load_push_ms: 100,
            guard_max_loss_percent: 50,
            envoy: EnvoyConfig::default(),
        }
    }
}

/// `[xds.envoy]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnvoyConfig {
    /// Where Envoys shall listen, IP:PORT; empty: they are told nothing.
    pub listen: String,
    /// Largest body of a request, in bytes; 1,024 to 1,073,741,824.
    pub max_body_bytes: u32,
    /// Longest silence of a stream, in seconds; 0: any.
    pub idle_timeout_s: u64,
    /// Longest time to connect to an engine, in milliseconds; 50 to 60,000.
    pub connect_timeout_ms: u64,
}

impl Default for EnvoyConfig {
    fn default() -> Self {
        Self {
            listen: String::new(),
            max_body_bytes: 32 << 20,
            idle_timeout_s: 300,
            connect_timeout_ms: 2_000,
        }
    }
}

/// `[backup]`: copies that the leader makes by the clock. Those that are asked for need no setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupConfig {
    /// Folder for backups; it is made if missing. Empty: none are made by the clock.
    pub dir: String,
    /// From one backup to the next, in seconds.
    pub every_s: u64,
    /// How many of the newest are kept.
    pub keep: usize,
    /// For how many of the newest days, by UTC, the last backup of the day is kept besides.
    pub keep_days: usize,
    /// Largest backup that can be restored over REST, in bytes.
    pub max_bytes: usize,
}

impl Default for BackupConfig {
    fn default() -> Self {
        Self { dir: String::new(), every_s: 3_600, keep: 24, keep_days: 14, max_bytes: 256 << 20 }
    }
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Largest REST request body, in bytes.
    pub max_body_bytes: usize,
    /// Most replicas of one deployment.
    pub max_replicas: u32,
    /// Most deployments.
    pub max_deployments: usize,
    /// Most routes, implicit ones not counted.
    pub max_routes: usize,
    /// Longest a clean stop may take before what still runs is dropped, in milliseconds.
    pub shutdown_grace_ms: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 1 << 20,
            max_replicas: 10_000,
            max_deployments: 10_000,
            max_routes: 10_000,
            shutdown_grace_ms: 5_000,
        }
    }
}

impl ControlPlaneConfig {
    /// Refuses values that cannot work; the text names the key, what it holds and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        for (key, value) in [("listen.http", &self.listen.http), ("listen.grpc", &self.listen.grpc)] {
            if value.parse::<SocketAddr>().is_err() {
                return Err(format!(
                    "{key} is {value:?}: give an IP address and a port, such as 127.0.0.1:18090 or [::1]:0"
                ));
            }
        }
        let envoys = &self.xds.envoy.listen;
        if !envoys.is_empty() && !envoys.parse::<SocketAddr>().is_ok_and(|address| address.port() > 0) {
            return Err(format!(
                "xds.envoy.listen is {envoys:?}: give an IP address and a port, such as 0.0.0.0:8081, or leave it empty"
            ));
        }
        self.listen.tls.validate("listen.tls")?;
        self.store.validate()?;
        self.auth.validate()?;
        self.observe.validate()?;
        if self.store.is_etcd() {
            let listen = [("listen.http", &*self.listen.http), ("listen.grpc", &*self.listen.grpc)];
            self.election.validate(listen)?;
        }
        let ranges = [
            ("store.history_events", self.store.history_events as u64, 100, 10_000_000),
            ("store.request_timeout_ms", self.store.request_timeout_ms, 500, 60_000),
            ("store.member_timeout_ms", self.store.member_timeout_ms, 100, self.store.request_timeout_ms),
            ("fleet.lease_ttl_ms", self.fleet.lease_ttl_ms, 1_000, 600_000),
            ("fleet.report_interval_ms", self.fleet.report_interval_ms, 50, self.fleet.lease_ttl_ms / 3),
            ("fleet.lost_grace_ms", self.fleet.lost_grace_ms, 0, 86_400_000),
            ("fleet.deregister_ack_wait_ms", self.fleet.deregister_ack_wait_ms, 0, 60_000),
            ("reconcile.tick_ms", self.reconcile.tick_ms, 50, 600_000),
            ("reconcile.coalesce_ms", self.reconcile.coalesce_ms, 1, 10_000),
            ("reconcile.max_starts", self.reconcile.max_starts as u64, 1, 100_000),
            ("reconcile.max_stops", self.reconcile.max_stops as u64, 1, 100_000),
            ("reconcile.max_view_age_ms", self.reconcile.max_view_age_ms, 0, 86_400_000),
            (
                "reconcile.replace_after_restarts",
                u64::from(self.reconcile.replace_after_restarts),
                0,
                1_000_000,
            ),
            ("reconcile.avoid_node_s", self.reconcile.avoid_node_s, 0, 2_592_000),
            ("reconcile.hold_after_nodes", u64::from(self.reconcile.hold_after_nodes), 0, 1_000_000),
            ("reconcile.rebalance_interval_s", self.reconcile.rebalance_interval_s, 1, 2_592_000),
            ("xds.push_coalesce_ms", self.xds.push_coalesce_ms, 0, 10_000),
            ("xds.nack_retry_ms", self.xds.nack_retry_ms, 100, 3_600_000),
            ("xds.load_push_ms", self.xds.load_push_ms, 10, 250),
            ("backup.every_s", self.backup.every_s, 1, 604_800),
            ("backup.keep", self.backup.keep as u64, 1, 10_000),
            ("backup.keep_days", self.backup.keep_days as u64, 0, 3_650),
            ("backup.max_bytes", self.backup.max_bytes as u64, 1_024, 4 << 30),
            ("xds.guard_max_loss_percent", self.xds.guard_max_loss_percent.into(), 0, 100),
            ("xds.envoy.max_body_bytes", self.xds.envoy.max_body_bytes.into(), 1_024, 1 << 30),
            ("xds.envoy.idle_timeout_s", self.xds.envoy.idle_timeout_s, 0, 86_400),
            ("xds.envoy.connect_timeout_ms", self.xds.envoy.connect_timeout_ms, 50, 60_000),
            ("limits.max_body_bytes", self.limits.max_body_bytes as u64, 1_024, 64 << 20),
            ("limits.max_replicas", u64::from(self.limits.max_replicas), 1, 1_000_000),
            ("limits.max_deployments", self.limits.max_deployments as u64, 1, 1_000_000),
            ("limits.max_routes", self.limits.max_routes as u64, 0, 1_000_000),
            ("auth.rate_limit_per_minute", u64::from(self.auth.rate_limit_per_minute), 0, 1_000_000),
            ("auth.idempotency_ttl_s", self.auth.idempotency_ttl_s, 60, 604_800),
            ("audit.keep", self.audit.keep, 100, 100_000),
            ("limits.shutdown_grace_ms", self.limits.shutdown_grace_ms, 100, 600_000),
        ];
        for (key, value, low, high) in ranges {
            if value < low || value > high {
                return Err(format!("{key} is {value}: accepted is {low} to {high}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_accepted() {
        ControlPlaneConfig::default().validate().expect("defaults");
    }

    #[test]
    fn a_refusal_names_the_key_and_what_is_accepted() {
        let mut config = ControlPlaneConfig::default();
        config.listen.grpc = "localhost".into();
        assert!(config.validate().expect_err("no port").starts_with("listen.grpc is \"localhost\""));
        let mut config = ControlPlaneConfig::default();
        config.fleet.report_interval_ms = 9_000;
        let error = config.validate().expect_err("longer than a third of the lease");
        assert_eq!(error, "fleet.report_interval_ms is 9000: accepted is 50 to 3333");
        let mut config = ControlPlaneConfig::default();
        config.store.kind = "mysql".into();
        assert!(config.validate().expect_err("unknown").contains("embedded"));
    }

    #[test]
    fn settings_for_etcd_that_cannot_work_are_refused_in_words() {
        let etcd = |change: fn(&mut ControlPlaneConfig)| {
            let mut config = ControlPlaneConfig::default();
            config.store.kind = "etcd".into();
            change(&mut config);
            config.validate().err().unwrap_or_default()
        };
        assert_eq!(etcd(|_| {}), "");
        assert_eq!(etcd(|c| c.store.endpoints = vec!["a:2379".into(), "http://[::1]:2379".into()]), "");
        for (change, part) in [
            ((|c| c.store.endpoints.clear()) as fn(&mut ControlPlaneConfig), "store.endpoints is empty"),
            (|c| c.store.endpoints = vec!["http://a".into()], "store.endpoints has \"http://a\""),
            (|c| c.store.endpoints = vec!["ftp://a:1".into()], "store.endpoints has"),
            (|c| c.store.endpoints = vec!["https://a:1".into()], "https needs the file"),
            (|c| c.store.ca_file = "ca.pem".into(), "http must not"),
            (|c| c.store.cert_file = "c.pem".into(), "go together"),
            (|c| c.store.username = "u".into(), "store.username"),
            (|c| c.store.password = "p".into(), "store.username"),
            (|c| c.store.prefix = "/x/".into(), "store.prefix"),
            (|c| c.election.lease_ttl_ms = 2_500, "election.lease_ttl_ms"),
            (|c| c.listen.grpc = "0.0.0.0:18091".into(), "election.advertise_grpc is empty"),
            (|c| c.election.advertise_http = "host".into(), "election.advertise_http is \"host\""),
        ] {
            let error = etcd(change);
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_control_plane_in_an_arbitration_zone_never_leads() {
        let mut config = ElectionConfig { zone: "az1".into(), ..ElectionConfig::default() };
        assert!(config.may_lead());
        config.zone = "reserved-arbitration".into();
        assert!(!config.may_lead());
        config.arbitration_zones.clear();
        assert!(config.may_lead());
        config.candidate = false;
        assert!(!config.may_lead());
    }

    #[test]
    fn the_commented_file_holds_every_default() {
        let text = include_str!("../controlplane.toml");
        let parsed: ControlPlaneConfig = toml::from_str(text).expect("valid");
        assert_eq!(parsed, ControlPlaneConfig::default());
        let written: toml::Table = toml::from_str(text).expect("valid");
        let complete = toml::Table::try_from(ControlPlaneConfig::default()).expect("serializes");
        for (section, keys) in &complete {
            for key in keys.as_table().expect("sections").keys() {
                let there = written.get(section).and_then(|s| s.get(key)).is_some();
                assert!(there, "controlplane.toml lacks {section}.{key}");
            }
        }
    }
}
