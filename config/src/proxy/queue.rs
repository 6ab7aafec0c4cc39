//! `[queue]`: what happens while every engine of a model is at its limit.

use serde::{Deserialize, Serialize};

/// `[queue]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// Requests that may wait here, per model; 0: none waits.
    pub max_waiting: usize,
    /// Longest wait; then 503 with Retry-After.
    pub deadline_ms: u64,
    /// Longest wait for a model that sleeps until it has started; then 503 with Retry-After.
    pub wake_ms: u64,
    /// Requests that may wait inside an engine that reports a queue.
    pub engine_waiting: u32,
    /// KV cache use, in percent, from which on only one may.
    pub kv_percent: u32,
    /// After an engine's busy answer, time after which one request more than it held is tried, then two, then four.
    pub busy_step_ms: u64,
    /// Requests of this proxy that one engine may have; 0: as many as it takes.
    pub engine_inflight: u32,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_waiting: 1_024,
            deadline_ms: 10_000,
            wake_ms: 300_000,
            engine_waiting: 4,
            kv_percent: 95,
            busy_step_ms: 250,
            engine_inflight: 0,
        }
    }
}

impl QueueConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        if self.deadline_ms == 0 || self.wake_ms == 0 || self.busy_step_ms == 0 {
            return Err("queue.deadline_ms, queue.wake_ms and queue.busy_step_ms must be at least 1; \
                        queue.max_waiting = 0 turns waiting off"
                .into());
        }
        if self.kv_percent > 100 {
            return Err(format!("queue.kv_percent is {}; it must be 0 to 100", self.kv_percent));
        }
        Ok(())
    }
}
