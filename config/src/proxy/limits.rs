//! `[limits]`: how much a client may send, and how slowly.

use serde::{Deserialize, Serialize};

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Client connections at one time, all listeners together; 0: as many as the system gives.
    pub connections: usize,
    /// Longest time from a connection's beginning, or from the first byte of a later request, to the end of the head.
    pub head_ms: u64,
    /// Longest TLS handshake, a PROXY protocol header included.
    pub handshake_ms: u64,
    /// Requests under way on one HTTP/2 connection.
    pub http2_streams: u32,
    /// HTTP/2 streams that a client may have reset before they were looked at; one more ends its connection.
    pub http2_resets: usize,
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
            connections: 50_000,
            head_ms: 15_000,
            handshake_ms: 10_000,
            http2_streams: 256,
            http2_resets: 20,
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
