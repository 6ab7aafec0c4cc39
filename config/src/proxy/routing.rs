//! `[routing]`: which endpoint takes a request.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
    /// Age at which an engine's report of its load is not believed any more; 0: reports are not looked at.
    pub load_stale_ms: u64,
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
            load_stale_ms: 1_000,
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
    pub(super) fn validate(&self) -> Result<(), String> {
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
