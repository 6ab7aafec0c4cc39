//! `[upstream]`: how engines are called.

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
