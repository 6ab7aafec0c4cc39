//! Settings of the proxy process: `config/proxy.toml` explains each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::logging::LogConfig;

/// Everything the proxy can be told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// How it logs.
    pub log: LogConfig,
    /// Where clients connect, and with how many threads they are served.
    pub public: PublicConfig,
    /// Probes, metrics and debugging.
    pub private: PrivateConfig,
    /// Where endpoint tables come from.
    pub discovery: DiscoveryConfig,
    /// Who may call.
    pub auth: AuthConfig,
    /// How much a client may send, and how slowly.
    pub limits: LimitsConfig,
    /// How engines are called.
    pub upstream: UpstreamConfig,
    /// Which endpoint takes a request.
    pub routing: RoutingConfig,
    /// When an endpoint is left out of picks.
    pub outlier: OutlierConfig,
    /// How it stops.
    pub drain: DrainConfig,
}

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

/// `[discovery]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiscoveryConfig {
    /// This proxy's name towards the control plane; empty takes the host's name.
    pub node_id: String,
    /// gRPC addresses of the control planes, tried in turn.
    pub controlplanes: Vec<String>,
    /// File that keeps the last good tables; empty keeps none.
    pub snapshot_file: String,
}

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self {
            node_id: String::new(),
            controlplanes: vec!["http://127.0.0.1:18091".into()],
            snapshot_file: "/var/lib/penstock/proxy-snapshot".into(),
        }
    }
}

/// `[auth]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Accepted API keys, each `NAME:SHA256_HEX_OF_KEY`; none lets everybody in.
    pub keys: Vec<String>,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Largest request body.
    pub body_bytes: usize,
    /// Largest sum of header names and values.
    pub header_bytes: usize,
    /// Bodies held in memory at one time, all requests together.
    pub buffered_bytes: usize,
    /// Longest pause in an upload.
    pub body_idle_ms: u64,
    /// Longest upload.
    pub body_total_ms: u64,
    /// Longest time a client may take to accept bytes of an answer.
    pub write_stall_ms: u64,
    /// Deepest nesting of a JSON body.
    pub json_depth: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            body_bytes: 32 << 20,
            header_bytes: 32 << 10,
            buffered_bytes: 1 << 30,
            body_idle_ms: 10_000,
            body_total_ms: 120_000,
            write_stall_ms: 30_000,
            json_depth: 128,
        }
    }
}

/// `[upstream]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamConfig {
    /// Longest TCP connect.
    pub connect_ms: u64,
    /// Longest wait for the first byte of an answer: queue, prefill and, for unary requests, the whole generation.
    pub first_byte_ms: u64,
    /// Longest pause between two reads of an answer.
    pub idle_ms: u64,
    /// How long an unused connection is kept. Below the engine's own keep-alive (vLLM: 5 s), so that we close first.
    pub keepalive_ms: u64,
    /// Unused connections kept, all engines together.
    pub keepalive_connections: usize,
    /// Engines tried for one request, the first included.
    pub attempts: usize,
    /// Retries allowed as a share of requests, in percent.
    pub retry_percent: u32,
    /// Retries a second always allowed, whatever the share says.
    pub retry_floor_per_s: u32,
    /// Unary answers up to this size are held until whole, so that an engine lost meanwhile costs a retry and not an error.
    pub unary_buffer_bytes: usize,
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            connect_ms: 2_000,
            first_byte_ms: 300_000,
            idle_ms: 120_000,
            keepalive_ms: 4_000,
            keepalive_connections: 4_096,
            attempts: 3,
            retry_percent: 10,
            retry_floor_per_s: 10,
            unary_buffer_bytes: 256 << 10,
        }
    }
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The least busy of all.
    #[default]
    LeastLoaded,
    /// The less busy of two random ones.
    PowerOfTwo,
    /// In turn.
    RoundRobin,
    /// Who probably has the prompt's beginning in its cache, up to the load bound.
    PrefixAffinity,
    /// Always the same for a session, up to the load bound.
    SessionAffinity,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 5] =
        [Self::LeastLoaded, Self::PowerOfTwo, Self::RoundRobin, Self::PrefixAffinity, Self::SessionAffinity];

    /// As it is written in settings and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeastLoaded => "least_loaded",
            Self::PowerOfTwo => "power_of_two",
            Self::RoundRobin => "round_robin",
            Self::PrefixAffinity => "prefix_affinity",
            Self::SessionAffinity => "session_affinity",
        }
    }
}

/// `[routing]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoutingConfig {
    /// How an endpoint is chosen.
    pub policy: Policy,
    /// Other policies for some models, by the name that clients use.
    pub policy_by_model: BTreeMap<String, Policy>,
    /// Largest load that affinity may put on an endpoint, in percent of the average.
    pub load_bound_percent: u32,
    /// Requests that are never too many for affinity, whatever the average.
    pub load_bound_floor: u32,
    /// Time over which a new endpoint's share grows from a tenth to all; 0: all at once.
    pub slow_start_ms: u64,
    /// This proxy's zone; empty: zones are not looked at.
    pub zone: String,
    /// Requests by which an endpoint of another zone must be less busy to be taken.
    pub zone_spill: u32,
    /// Header that names a request's session; empty: none.
    pub session_header: String,
    /// Cookie that does, where the header is missing; empty: none.
    pub session_cookie: String,
    /// Secret of the hashes that affinity uses; empty: a random one for each start.
    pub hash_key: String,
    /// Bytes of prompt in a block of prefix affinity.
    pub prefix_block_bytes: usize,
    /// Blocks of a prompt that prefix affinity looks at.
    pub prefix_blocks: usize,
    /// Blocks that prefix affinity remembers, for each model.
    pub prefix_entries: usize,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            policy_by_model: BTreeMap::new(),
            load_bound_percent: 150,
            load_bound_floor: 4,
            slow_start_ms: 10_000,
            zone: String::new(),
            zone_spill: 4,
            session_header: "x-session-affinity".into(),
            session_cookie: String::new(),
            hash_key: String::new(),
            prefix_block_bytes: 512,
            prefix_blocks: 128,
            prefix_entries: 65_536,
        }
    }
}

impl RoutingConfig {
    fn validate(&self) -> Result<(), String> {
        if self.load_bound_percent < 100 {
            return Err(format!(
                "routing.load_bound_percent is {}; it must be at least 100",
                self.load_bound_percent
            ));
        }
        let header = &self.session_header;
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if !header.bytes().all(token) {
            return Err(format!(
                "routing.session_header is {header:?}; it must be a header's name, or empty"
            ));
        }
        let ranges = [
            ("routing.prefix_block_bytes", self.prefix_block_bytes, 16, 1 << 20),
            ("routing.prefix_blocks", self.prefix_blocks, 1, 65_536),
            ("routing.prefix_entries", self.prefix_entries, 1, 1 << 26),
        ];
        match ranges.iter().find(|(_, value, least, most)| value < least || value > most) {
            Some((key, value, least, most)) => Err(format!("{key} is {value}; it must be {least} to {most}")),
            None => Ok(()),
        }
    }
}

/// `[outlier]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierConfig {
    /// Failures in a row that eject an endpoint.
    pub consecutive_failures: u32,
    /// First ejection's length; each further one in a row is twice as long.
    pub base_ejection_ms: u64,
    /// Longest ejection.
    pub max_ejection_ms: u64,
    /// Largest share of a pool that may be out at one time, in percent.
    pub max_ejected_percent: u32,
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self {
            consecutive_failures: 3,
            base_ejection_ms: 1_000,
            max_ejection_ms: 30_000,
            max_ejected_percent: 67,
        }
    }
}

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

impl ProxyConfig {
    /// Rules that types cannot say. The error names the key and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        for key in &self.auth.keys {
            parse_key(key)?;
        }
        let positive = [
            ("limits.body_bytes", self.limits.body_bytes as u64),
            ("limits.header_bytes", self.limits.header_bytes as u64),
            ("limits.body_idle_ms", self.limits.body_idle_ms),
            ("limits.body_total_ms", self.limits.body_total_ms),
            ("limits.write_stall_ms", self.limits.write_stall_ms),
            ("limits.json_depth", self.limits.json_depth as u64),
            ("upstream.connect_ms", self.upstream.connect_ms),
            ("upstream.first_byte_ms", self.upstream.first_byte_ms),
            ("upstream.idle_ms", self.upstream.idle_ms),
            ("upstream.attempts", self.upstream.attempts as u64),
            ("outlier.consecutive_failures", u64::from(self.outlier.consecutive_failures)),
            ("outlier.base_ejection_ms", self.outlier.base_ejection_ms),
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
        if self.outlier.max_ejected_percent > 100 {
            return Err(format!(
                "outlier.max_ejected_percent is {}; it must be 0 to 100",
                self.outlier.max_ejected_percent
            ));
        }
        self.routing.validate()?;
        if self.discovery.controlplanes.is_empty() && self.discovery.snapshot_file.is_empty() {
            return Err("discovery.controlplanes is empty, and so is discovery.snapshot_file: \
                        name at least one, or there is nothing to route to"
                .into());
        }
        Ok(())
    }
}

/// Splits one entry of `auth.keys` into the key's name and the SHA-256 of the key.
///
/// # Errors
/// A sentence that names the entry (never a secret: entries hold hashes) and the form that is accepted.
pub fn parse_key(entry: &str) -> Result<(String, [u8; 32]), String> {
    let form = "expected NAME:HASH with HASH the 64 hex digits of `printf %s KEY | sha256sum`";
    let (name, hash) =
        entry.rsplit_once(':').ok_or_else(|| format!("auth.keys: {entry:?} has no ':'; {form}"))?;
    let mut digest = [0u8; 32];
    let valid = !name.is_empty()
        && hash.len() == 64
        && hash.is_ascii()
        && digest.iter_mut().enumerate().all(|(i, byte)| {
            match u8::from_str_radix(&hash[2 * i..2 * i + 2], 16) {
                Ok(value) => {
                    *byte = value;
                    true
                }
                Err(_) => false,
            }
        });
    if valid {
        Ok((name.to_owned(), digest))
    } else {
        Err(format!("auth.keys: {entry:?} is malformed; {form}"))
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
        assert_eq!(parse_key(&entry), Ok(("alice".into(), [0xab; 32])));
        for bad in [
            "",
            "alice",
            "alice:xyz",
            ":00",
            &format!("alice:{}", "zz".repeat(32)),
            &format!("a:{}", "é".repeat(32)),
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
        assert!(routing(|r| r.prefix_block_bytes = 1).contains("16 to 1048576"));
    }

    #[test]
    fn a_policy_is_written_as_it_is_named() {
        for policy in Policy::ALL {
            assert_eq!(serde_json::to_value(policy).expect("a name"), policy.name());
        }
    }
}
