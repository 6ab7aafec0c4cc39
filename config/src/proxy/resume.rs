//! `[resume]`: streams that go on at another engine.

use serde::{Deserialize, Serialize};

/// What is done for a request that wants its answer whole, while its engine is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unary {
    /// It is asked for as it came; an engine lost before the answer is whole costs a retry.
    #[default]
    Retry,
    /// A stream is asked for where that is equivalent, so that what was generated is not lost.
    Stream,
}

/// `[resume]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResumeConfig {
    /// Whether streams that lose their engine go on at another.
    pub enabled: bool,
    /// Most times that one stream goes on.
    pub attempts: u32,
    /// Silence in decode after which a stream goes on elsewhere.
    pub stall_ms: u64,
    /// Resumes a second, for each model.
    pub per_second: u32,
    /// Resumes at one time beyond that.
    pub burst: u32,
    /// Whether engines are asked for token ids, without which only text can be continued.
    pub token_ids: bool,
    /// Whether they are taken out again for clients that did not ask for them.
    pub strip_token_ids: bool,
    /// What is done for whole answers.
    pub unary: Unary,
    /// Streams that are moved off one endpoint, a second, by this proxy.
    pub moves_per_second: u32,
}

impl Default for ResumeConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            attempts: 3,
            stall_ms: 15_000,
            per_second: 200,
            burst: 2_000,
            token_ids: true,
            strip_token_ids: false,
            unary: Unary::Retry,
            moves_per_second: 5,
        }
    }
}

impl ResumeConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        let positive = [
            ("attempts", u64::from(self.attempts)),
            ("stall_ms", self.stall_ms),
            ("per_second", u64::from(self.per_second)),
            ("burst", u64::from(self.burst)),
            ("moves_per_second", u64::from(self.moves_per_second)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!(
                "resume.{key} is 0; it must be at least 1; resume.enabled = false turns all of it off"
            ));
        }
        if self.strip_token_ids && !self.token_ids {
            return Err("resume.strip_token_ids is true though resume.token_ids is false: \
                        there is nothing to take out"
                .into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_names_its_key() {
        let error = |change: fn(&mut ResumeConfig)| {
            let mut config = ResumeConfig::default();
            change(&mut config);
            config.validate().expect_err("refused")
        };
        assert!(error(|r| r.attempts = 0).contains("resume.attempts is 0"));
        assert!(error(|r| r.stall_ms = 0).contains("resume.stall_ms is 0"));
        assert!(error(|r| r.per_second = 0).contains("resume.per_second is 0"));
        assert!(error(|r| r.burst = 0).contains("resume.burst is 0"));
        assert!(error(|r| r.moves_per_second = 0).contains("resume.moves_per_second is 0"));
        let strip = error(|r| (r.token_ids, r.strip_token_ids) = (false, true));
        assert!(strip.contains("resume.strip_token_ids"), "{strip}");
        ResumeConfig::default().validate().expect("defaults");
    }
}
