//! How a deployment wants to be placed, rolled out, protected and scaled, and how an operator wants a node to be used.
//!
//! Everything has a default that changes nothing, and defaults are not stored: a value that an older control plane wrote
//! reads the same. `docs/placement.md` explains each field to operators. Whole numbers only, so that two equal wishes
//! compare equal.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

/// What each GPU of a replica must offer beyond being there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Free memory that each of its GPUs must have, in bytes; 0: any GPU will do.
    pub gpu_memory_bytes: u64,
    /// Its GPUs may also be used by other replicas that share theirs, as far as their memory reaches.
    pub share_gpu: bool,
}

impl Resources {
    /// Nothing is asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Everything but the engine: part of a deployment, and no reason for a rollout when it changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Which nodes, and how spread.
    pub placement: PlacementPolicy,
    /// How a changed spec takes over.
    pub rollout: RolloutPolicy,
    /// What voluntary changes must leave.
    pub disruption: DisruptionPolicy,
    /// None: the number of replicas is the deployment's.
    pub autoscaling: Option<Autoscaling>,
}

impl Policy {
    /// Nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Which nodes a replica may go to, and how replicas spread over them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlacementPolicy {
    /// Labels that a node must have with these values. "zone", "region" and "node_id" stand for the node's own.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that do not matter.
    pub tolerations: Vec<Toleration>,
    /// Over zones, softly.
    pub spread: SpreadPolicy,
    /// The rebalancer may move replicas, where it is on.
    pub rebalance: bool,
}

/// How far zones may differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpreadPolicy {
    /// How many more replicas the fullest zone may have than the emptiest; at least 1.
    pub max_skew: u32,
    /// With fewer zones than this the emptiest counts as having none; 0: any number will do.
    pub min_domains: u32,
}

impl Default for SpreadPolicy {
    fn default() -> Self {
        Self { max_skew: 1, min_domains: 0 }
    }
}

/// What a taint does to replicas that do not tolerate it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaintEffect {
    /// Other nodes are preferred.
    PreferNoSchedule,
    /// No new ones.
    NoSchedule,
    /// No new ones, and those that are there move away.
    NoExecute,
}

impl TaintEffect {
    /// As written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreferNoSchedule => "prefer_no_schedule",
            Self::NoSchedule => "no_schedule",
            Self::NoExecute => "no_execute",
        }
    }
}

/// A node's "not for everybody".
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Taint {
    /// What it is about.
    pub key: String,
    /// Which of several; may be empty.
    #[serde(default)]
    pub value: String,
    /// What it does.
    pub effect: TaintEffect,
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, effect } = self;
        match value.is_empty() {
            true => write!(f, "{key}:{}", effect.as_str()),
            false => write!(f, "{key}={value}:{}", effect.as_str()),
        }
    }
}

/// A deployment's "that does not matter".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toleration {
    /// The taint's key; empty: every taint.
    #[serde(default)]
    pub key: String,
    /// The taint's value; None: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The taint's effect; None: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
}

impl Toleration {
    /// Whether it covers a taint.
    pub fn covers(&self, taint: &Taint) -> bool {
        (self.key.is_empty() || self.key == taint.key)
            && self.value.as_ref().is_none_or(|value| *value == taint.value)
            && self.effect.is_none_or(|effect| effect == taint.effect)
    }
}

/// How a changed spec takes over.
///
/// Streams are moved unless it says otherwise, and after ten seconds: by then a usual answer has ended by itself and costs nobody
/// a second prefill, and of the 30 s that an agent waits by default, most are left to move the long ones one after another.
/// Not moved, they would all leave at once when that time is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RolloutPolicy {
    /// Replicas that may exist beyond the wanted number while old ones are replaced.
    pub max_surge: u32,
    /// Replicas that may be missing from the wanted number while old ones are replaced.
    pub max_unavailable: u32,
    /// A rollout that gets nothing done for this long is reported as stalled; 0: never.
    pub progress_deadline_s: u32,
    /// Nothing is replaced because of a changed spec.
    pub paused: bool,
    /// Streams that a replica still has some time after it began to leave, for whatever reason, are moved to others.
    pub move_streams: bool,
    /// That time.
    pub move_streams_after_s: u32,
}

impl Default for RolloutPolicy {
    fn default() -> Self {
        Self {
            max_surge: 1,
            max_unavailable: 0,
            progress_deadline_s: 600,
            paused: false,
            move_streams: true,
            move_streams_after_s: 10,
        }
    }
}

/// What voluntary changes must leave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DisruptionPolicy {
    /// Replicas that must stay ready through rollouts, maintenance, evictions and rebalancing. None: as many as wanted,
    /// less one where a rollout finds no room for a second engine.
    pub min_available: Option<u32>,
}

/// How the number of replicas follows the load. A target of 0 is not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Autoscaling {
    /// Fewest replicas; 0 together with `idle_to_zero_s` allows none.
    pub min: u32,
    /// Most replicas.
    pub max: u32,
    /// Requests that may wait per replica, in engines and in proxies.
    pub target_waiting: u32,
    /// Requests that a replica shall work on.
    pub target_running: u32,
    /// Mean time to the first token, in milliseconds.
    pub target_ttft_ms: u32,
    /// For how long the load must call for more before there are more.
    pub up_window_s: u32,
    /// For how long the load must call for fewer before there are fewer.
    pub down_window_s: u32,
    /// Fewer are called for only below this share of the targets, in percent: what keeps it from swinging.
    pub down_percent: u32,
    /// Nothing to do for this long ends the last replica; 0: never. Needs `min` 0.
    pub idle_to_zero_s: u32,
}

impl Default for Autoscaling {
    fn default() -> Self {
        Self {
            min: 1,
            max: 1,
            target_waiting: 4,
            target_running: 0,
            target_ttft_ms: 0,
            up_window_s: 30,
            down_window_s: 300,
            down_percent: 50,
            idle_to_zero_s: 0,
        }
    }
}

/// What a node is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It runs engines.
    #[default]
    Worker,
    /// It never does.
    ControlOnly,
    /// It never does, and its zone is no zone to spread over.
    Arbitration,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Worker, Self::ControlOnly, Self::Arbitration];

    /// As written in JSON and in a node's label "role".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::ControlOnly => "control-only",
            Self::Arbitration => "arbitration",
        }
    }

    /// From its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// A node in a zone of this name is an arbitration node, whatever else is said.
pub const ARBITRATION_ZONE: &str = "reserved-arbitration";

/// `/node-policies/{node_id}`: an operator's word on a node. On no lease: it outlives the node's absence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodePolicy {
    /// The node.
    pub node_id: String,
    /// It gets no new replicas.
    pub cordoned: bool,
    /// It gets none, and those that are there move away.
    pub maintenance: bool,
    /// Why, for other operators; may be empty.
    pub reason: String,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Labels beside the agent's own, and before them where both have one.
    pub labels: BTreeMap<String, String>,
    /// None: what the agent's label "role" says.
    pub role: Option<Role>,
    /// Deployed models that it shall have on its disks, whether it runs them or not.
    pub prefetch: BTreeSet<String>,
}

impl NodePolicy {
    /// Nothing is said any more.
    pub fn is_empty(&self) -> bool {
        *self == Self { node_id: self.node_id.clone(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_toleration_covers_by_key_value_and_effect() {
        let taint = Taint { key: "spot".into(), value: "yes".into(), effect: TaintEffect::NoSchedule };
        let toleration = |key: &str, value: Option<&str>, effect| Toleration {
            key: key.into(),
            value: value.map(str::to_owned),
            effect,
        };
        assert!(toleration("", None, None).covers(&taint));
        assert!(toleration("spot", None, None).covers(&taint));
        assert!(toleration("spot", Some("yes"), Some(TaintEffect::NoSchedule)).covers(&taint));
        assert!(!toleration("spot", Some("no"), None).covers(&taint));
        assert!(!toleration("spot", None, Some(TaintEffect::NoExecute)).covers(&taint));
        assert!(!toleration("other", None, None).covers(&taint));
        assert_eq!(taint.to_string(), "spot=yes:no_schedule");
    }

    #[test]
    fn what_is_left_out_reads_as_its_default() {
        let policy: Policy = serde_json::from_str(r#"{"autoscaling":{"max":4}}"#).expect("valid");
        assert_eq!(policy.autoscaling, Some(Autoscaling { max: 4, ..Autoscaling::default() }));
        assert_eq!(policy.rollout, RolloutPolicy::default());
        assert!(serde_json::from_str::<Policy>("{}").expect("valid").is_default());
    }
}
