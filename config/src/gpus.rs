//! `[gpus]` of the agent: where its GPUs are read from, and what is made of what they say.

use serde::{Deserialize, Serialize};

/// `[gpus]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// "auto" (NVML where there is a driver, else none), "nvml", "simulated" or "none".
    pub source: String,
    /// GPUs to pretend, with source "simulated".
    pub simulated_count: u32,
    /// Memory of each pretended GPU.
    pub simulated_memory_mib: u64,
    /// Pretended GPUs that share a fast link; 0: none do.
    pub simulated_link_group: u32,
    /// NUMA nodes that the pretended GPUs hang on; 0: not told.
    pub simulated_numa_nodes: u32,
    /// File with what befalls pretended GPUs, and when; empty: nothing.
    pub simulated_script: String,
    /// Path or name of NVML's library; empty takes the system's.
    pub nvml_library: String,
    /// Time between two readings.
    pub sample_ms: u64,
    /// A reading that takes longer leaves the last one standing, marked as old.
    pub stale_ms: u64,
    /// Longest wait for the driver to take back the memory of an engine that has ended.
    pub release_ms: u64,
    /// Whether an engine is started only where the memory that it will take is free.
    pub memory_check: bool,
    /// What is made of what GPUs say.
    pub policy: GpuPolicyConfig,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            source: "auto".into(),
            simulated_count: 8,
            simulated_memory_mib: 81_920,
            simulated_link_group: 4,
            simulated_numa_nodes: 2,
            simulated_script: String::new(),
            nvml_library: String::new(),
            sample_ms: 1_000,
            stale_ms: 10_000,
            release_ms: 30_000,
            memory_check: true,
            policy: GpuPolicyConfig::default(),
        }
    }
}

/// What a sign of trouble leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuAction {
    /// The GPU is faulty.
    Fault,
    /// The GPU is degraded.
    Degrade,
    /// Nothing; the figures are shown all the same.
    Ignore,
}

/// `[gpus.policy]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuPolicyConfig {
    /// What a faulty GPU leads to: "pull" (its engines leave routing and end, nothing is placed on it) or "report".
    pub on_fault: String,
    /// Share of requests that an engine on a degraded GPU gets, in percent of that of others; 100: the same.
    pub degraded_weight_percent: u32,
    /// XIDs that make a GPU faulty, until an operator clears them or the machine boots.
    pub fault_xids: Vec<u32>,
    /// XIDs that make a GPU degraded, as long.
    pub degrade_xids: Vec<u32>,
    /// Other XIDs are applications' errors: so many within the window make a GPU degraded; 0: never.
    pub application_xids: u32,
    /// The window.
    pub application_xids_s: u64,
    /// Uncorrected ECC errors since the driver was loaded.
    pub ecc_uncorrected: GpuAction,
    /// A row remapping or a page retirement that waits for a reset.
    pub remap_pending: GpuAction,
    /// A row remapping that failed.
    pub remap_failed: GpuAction,
    /// At its slowdown temperature, or slowed down by hardware because of heat, for `hot_s`.
    pub hot: GpuAction,
    /// How long; and how long it must be over.
    pub hot_s: u64,
    /// The driver does not read it, for `unreadable_s`. A GPU that the driver says is lost is faulty in any case.
    pub unreadable: GpuAction,
    /// How long; until then it is degraded.
    pub unreadable_s: u64,
}

impl Default for GpuPolicyConfig {
    fn default() -> Self {
        Self {
            on_fault: "pull".into(),
            degraded_weight_percent: 100,
            fault_xids: vec![48, 62, 64, 74, 79, 95, 119, 120, 140, 143],
            degrade_xids: vec![63, 92, 94, 121],
            application_xids: 20,
            application_xids_s: 600,
            ecc_uncorrected: GpuAction::Fault,
            remap_pending: GpuAction::Degrade,
            remap_failed: GpuAction::Fault,
            hot: GpuAction::Degrade,
            hot_s: 10,
            unreadable: GpuAction::Fault,
            unreadable_s: 30,
        }
    }
}

impl GpuConfig {
    /// Rules that types cannot say.
    ///
    /// # Errors
    /// A sentence that names the key and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        const SOURCES: [&str; 4] = ["auto", "nvml", "simulated", "none"];
        if !SOURCES.contains(&self.source.as_str()) {
            return Err(format!("gpus.source is {:?}; accepted: {}", self.source, SOURCES.join(", ")));
        }
        let positive = [("sample_ms", self.sample_ms), ("stale_ms", self.stale_ms)];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("gpus.{key} is 0; it must be at least 1"));
        }
        if !self.simulated_script.is_empty() && self.source != "simulated" {
            return Err(format!(
                "gpus.simulated_script is set and gpus.source is {:?}; a script is for \"simulated\"",
                self.source
            ));
        }
        let policy = &self.policy;
        if !["pull", "report"].contains(&policy.on_fault.as_str()) {
            return Err(format!("gpus.policy.on_fault is {:?}; accepted: pull, report", policy.on_fault));
        }
        if !(1..=100).contains(&policy.degraded_weight_percent) {
            return Err(format!(
                "gpus.policy.degraded_weight_percent is {}; accepted: 1 to 100",
                policy.degraded_weight_percent
            ));
        }
        match policy.fault_xids.iter().find(|xid| policy.degrade_xids.contains(xid)) {
            Some(xid) => Err(format!(
                "gpus.policy.fault_xids and gpus.policy.degrade_xids both have {xid}; choose one"
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut GpuConfig)) -> String {
        let mut config = GpuConfig::default();
        change(&mut config);
        config.validate().expect_err("must be refused")
    }

    #[test]
    fn impossible_settings_name_their_key_and_what_is_accepted() {
        GpuConfig::default().validate().expect("defaults");
        assert!(
            refused(|c| c.source = "amd".into()).contains("gpus.source is \"amd\"; accepted: auto, nvml")
        );
        assert!(refused(|c| c.stale_ms = 0).contains("gpus.stale_ms is 0"));
        assert!(refused(|c| c.simulated_script = "x".into()).contains("a script is for \"simulated\""));
        assert!(refused(|c| c.policy.on_fault = "kill".into()).contains("accepted: pull, report"));
        assert!(refused(|c| c.policy.degraded_weight_percent = 0).contains("accepted: 1 to 100"));
        assert!(refused(|c| c.policy.degrade_xids.push(79)).contains("both have 79"));
    }

    #[test]
    fn an_action_is_one_of_three_words() {
        let config: GpuConfig = toml::from_str("[policy]\nhot = 'fault'\n").expect("valid");
        assert_eq!(config.policy.hot, GpuAction::Fault);
        let wrong = toml::from_str::<GpuConfig>("[policy]\nhot = 'melt'\n").expect_err("refused").to_string();
        assert!(wrong.contains("`fault`, `degrade`, `ignore`"), "{wrong}");
    }
}
