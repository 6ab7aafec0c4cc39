//! `[telemetry]`: what is told about each request.

use serde::{Deserialize, Serialize};

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Where the line of each request goes: "stdout", "off", or a file's path.
    pub access_log: String,
    /// Lines that may wait to be written.
    pub access_log_queue: usize,
    /// One request in so many has its routing recorded though nothing went wrong; 0: none.
    pub decisions_sample: u32,
    /// Routing decisions kept in memory; 0: none.
    pub decisions_kept: usize,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            access_log: "stdout".into(),
            access_log_queue: 8_192,
            decisions_sample: 100,
            decisions_kept: 4_096,
        }
    }
}

impl TelemetryConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        let log = self.access_log.as_str();
        if !matches!(log, "stdout" | "off") && !log.contains(['/', '.']) {
            return Err(format!(
                "telemetry.access_log is {log:?}; it must be \"stdout\", \"off\", or a file's path with a / or a . in it"
            ));
        }
        let ranges = [
            ("telemetry.access_log_queue", self.access_log_queue, 1, 1 << 20),
            ("telemetry.decisions_kept", self.decisions_kept, 0, 1 << 20),
        ];
        match ranges.iter().find(|(_, value, least, most)| value < least || value > most) {
            Some((key, value, least, most)) => Err(format!("{key} is {value}; it must be {least} to {most}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_destination_is_no_file_name() {
        let error = |change: fn(&mut TelemetryConfig)| {
            let mut config = TelemetryConfig::default();
            change(&mut config);
            config.validate().expect_err("refused")
        };
        assert!(error(|c| c.access_log = "stduot".into()).contains("telemetry.access_log is \"stduot\""));
        assert!(error(|c| c.access_log = String::new()).contains("\"off\""));
        assert!(error(|c| c.access_log_queue = 0).contains("1 to 1048576"));
        for good in ["stdout", "off", "/var/log/x", "access.log"] {
            let config = TelemetryConfig { access_log: good.into(), ..TelemetryConfig::default() };
            config.validate().expect(good);
        }
    }
}
