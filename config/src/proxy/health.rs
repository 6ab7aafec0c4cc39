//! `[health]`: when an endpoint is left out of picks, and how the proxy finds out.

use serde::{Deserialize, Serialize};

/// `[health]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// Failures in a row, of requests or of probes, that eject an endpoint.
    pub consecutive_failures: u32,
    /// First ejection's length; each further one in a row is twice as long.
    pub base_ejection_ms: u64,
    /// Longest ejection.
    pub max_ejection_ms: u64,
    /// Largest share of a pool that may be out on suspicion at one time, in percent.
    pub max_ejected_percent: u32,
    /// After an ejection: requests tried at a time, and how many must be answered for the endpoint to be back.
    pub trial_requests: u32,
    /// Share of requests answered below which an endpoint is ejected if the others do better, in percent; 0: never.
    pub success_rate_percent: u32,
    /// In pools of five and more: hundredths of a standard deviation below the mean that make an outlier; 0: never.
    pub success_rate_stdev_percent: u32,
    /// Requests within ten seconds without which a success rate says nothing.
    pub success_rate_requests: u32,
    /// Times the pool's usual time to first token that is too slow; 0: speed ejects nobody.
    pub latency_factor: u32,
    /// And at least this much slower than usual.
    pub latency_floor_ms: u64,
    /// Between probes of an endpoint that no traffic proves alive; 0: no probes.
    pub probe_interval_ms: u64,
    /// Longest wait for a probe's answer.
    pub probe_timeout_ms: u64,
    /// What a probe asks for.
    pub probe_path: String,
    /// Probes answered in a row that bring an unreachable endpoint back before its time.
    pub probe_successes: u32,
    /// Silence of streams that were flowing after which an engine is examined; 0: never.
    pub hang_ms: u64,
    /// The same where nothing flowed yet: requests that wait for their first token.
    pub hang_waiting_ms: u64,
    /// Longest wait for the one token that such an engine is asked for.
    pub canary_ms: u64,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            consecutive_failures: 3,
            base_ejection_ms: 1_000,
            max_ejection_ms: 30_000,
            max_ejected_percent: 67,
            trial_requests: 3,
            success_rate_percent: 70,
            success_rate_stdev_percent: 190,
            success_rate_requests: 20,
            latency_factor: 3,
            latency_floor_ms: 1_000,
            probe_interval_ms: 5_000,
            probe_timeout_ms: 1_000,
            probe_path: "/health".into(),
            probe_successes: 2,
            hang_ms: 5_000,
            hang_waiting_ms: 30_000,
            canary_ms: 10_000,
        }
    }
}

impl HealthConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        let positive = [
            ("health.consecutive_failures", u64::from(self.consecutive_failures)),
            ("health.base_ejection_ms", self.base_ejection_ms),
            ("health.trial_requests", u64::from(self.trial_requests)),
            ("health.success_rate_requests", u64::from(self.success_rate_requests)),
            ("health.probe_timeout_ms", self.probe_timeout_ms),
            ("health.probe_successes", u64::from(self.probe_successes)),
            ("health.hang_waiting_ms", self.hang_waiting_ms),
            ("health.canary_ms", self.canary_ms),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; it must be at least 1"));
        }
        if self.max_ejection_ms < self.base_ejection_ms {
            return Err(format!(
                "health.max_ejection_ms is {}; it must be at least health.base_ejection_ms, {}",
                self.max_ejection_ms, self.base_ejection_ms
            ));
        }
        let percents = [
            ("health.max_ejected_percent", self.max_ejected_percent),
            ("health.success_rate_percent", self.success_rate_percent),
        ];
        if let Some((key, value)) = percents.iter().find(|(_, value)| *value > 100) {
            return Err(format!("{key} is {value}; it must be 0 to 100"));
        }
        let visible = |byte: u8| byte.is_ascii_graphic();
        if !self.probe_path.starts_with('/') || !self.probe_path.bytes().all(visible) {
            return Err(format!(
                "health.probe_path is {:?}; it must be a path, such as \"/health\"",
                self.probe_path
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_settings_name_their_key() {
        let wrong = |change: fn(&mut HealthConfig)| {
            let mut config = HealthConfig::default();
            change(&mut config);
            config.validate().expect_err("wrong")
        };
        assert!(wrong(|h| h.trial_requests = 0).contains("health.trial_requests is 0"));
        assert!(wrong(|h| h.max_ejected_percent = 101).contains("health.max_ejected_percent is 101"));
        assert!(wrong(|h| h.max_ejection_ms = 1).contains("health.max_ejection_ms is 1"));
        assert!(wrong(|h| h.probe_path = "health".into()).contains("must be a path"));
        assert!(wrong(|h| h.probe_path = "/a b".into()).contains("must be a path"));
    }
}
