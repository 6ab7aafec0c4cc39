//! `[upstream]`: how engines are called.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
    /// Where a model needs more patience, or less: by the name that clients use.
    pub by_model: BTreeMap<String, Patience>,
}

/// `[upstream.by_model."NAME"]`: a 0 takes the value of `[upstream]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Patience {
    /// Longest wait for the first byte of an answer.
    pub first_byte_ms: u64,
    /// Longest pause between two reads of an answer.
    pub idle_ms: u64,
}

impl UpstreamConfig {
    /// How long to wait for the engines of `model`.
    pub fn patience(&self, model: &str) -> Patience {
        let own = self.by_model.get(model).copied().unwrap_or_default();
        let or = |own: u64, common: u64| if own > 0 { own } else { common };
        Patience {
            first_byte_ms: or(own.first_byte_ms, self.first_byte_ms),
            idle_ms: or(own.idle_ms, self.idle_ms),
        }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        let common = [("upstream.first_byte_ms", self.first_byte_ms), ("upstream.idle_ms", self.idle_ms)];
        match common.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(format!("{key} is 0; it must be at least 1")),
            None => Ok(()),
        }
    }
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
            by_model: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_may_have_patience_of_its_own() {
        let own = Patience { first_byte_ms: 5, idle_ms: 0 };
        let config = UpstreamConfig { by_model: [("slow".into(), own)].into(), ..UpstreamConfig::default() };
        assert_eq!(config.patience("slow"), Patience { first_byte_ms: 5, idle_ms: 120_000 });
        assert_eq!(config.patience("other").first_byte_ms, 300_000);
    }
}
