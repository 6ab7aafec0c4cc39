//! What the store holds, as JSON: deployments, placements, registered endpoints, nodes.
//!
//! Unknown fields are ignored on reading, so that an older control plane can read what a newer one wrote.

use std::collections::BTreeMap;

use penstock_proto::engine::EngineOptions;
use serde::{Deserialize, Serialize};

use super::{
    policy::{Policy, Resources},
    warm::WarmSpec,
};

/// How one engine is started. Part of a deployment, and copied into each assignment made from it, so that a rollout
/// can tell which replicas still run what was wanted before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// Names an entry of the agents' `[engines]` settings: "vllm" or "sim".
    pub engine: String,
    /// Model folder or id: the positional argument of `serve`.
    pub model_path: String,
    /// Further arguments of `serve`.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// GPUs that each replica gets, all on one node; at least 1.
    pub gpus_per_replica: u32,
    /// What each of them must offer.
    #[serde(default, skip_serializing_if = "Resources::is_default")]
    pub resources: Resources,
    /// LoRA adapters that each replica loads at its start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora: Vec<LoraAdapter>,
    /// The typed fields; beside the others in JSON.
    #[serde(flatten)]
    pub options: EngineOptions,
    /// Sleep, restore, prefetch.
    #[serde(default, skip_serializing_if = "WarmSpec::is_default")]
    pub warm: WarmSpec,
}

/// One LoRA adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoraAdapter {
    /// The name clients ask for.
    pub name: String,
    /// Its folder or id.
    pub path: String,
}

/// `/deployments/{model}`: what an operator wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// The name clients ask for.
    pub model: String,
    /// How many engines shall serve it; 0 is allowed.
    pub replicas: u32,
    /// How each is started.
    #[serde(flatten)]
    pub spec: EngineSpec,
    /// Unix seconds at which it was first put.
    pub created_unix_s: i64,
    /// How it is placed, rolled out, protected and scaled.
    #[serde(default, skip_serializing_if = "Policy::is_default")]
    pub policy: Policy,
}

/// Whether a replica belongs where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It shall run.
    Active,
    /// It shall end. Its agent no longer has the assignment, proxies are told to send nothing new, and its GPUs stay
    /// taken until its engine is known to be gone.
    Leaving,
}

/// One replica's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// `{slug}-{ordinal}`; unique in the fleet and never used again.
    pub replica_id: String,
    /// Unique in the fleet; larger than that of every assignment made before.
    pub generation: u64,
    /// The node that runs it.
    pub node_id: String,
    /// Its GPUs on that node.
    pub gpu_uuids: Vec<String>,
    /// What it runs.
    pub spec: EngineSpec,
    /// Whether it shall run.
    pub phase: Phase,
    /// The rebalancer wants it elsewhere: it goes once another is ready.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moving: bool,
    /// It shall sleep: its engine is not ended, its GPUs stay its own, and it serves nobody.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub asleep: bool,
}

/// `/placements/{model}`: the plan of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The model.
    pub model: String,
    /// The model's name as it appears in replica ids; no two placements share one.
    pub slug: String,
    /// The ordinal that the next new replica gets.
    pub next_ordinal: u64,
    /// Every replica that has a place, oldest first.
    pub assignments: Vec<Assignment>,
    /// How many replicas autoscaling wants; None: it has not spoken, or is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaled_to: Option<u32>,
    /// Where its engines failed over and over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<Failures>,
}

/// Nodes on which engines of one spec failed over and over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// The spec: of another one the nodes say nothing.
    pub spec: EngineSpec,
    /// In the order in which they were noted.
    pub nodes: Vec<String>,
}

impl Placement {
    /// The assignment of a replica.
    pub fn find(&self, replica_id: &str) -> Option<&Assignment> {
        self.assignments.iter().find(|a| a.replica_id == replica_id)
    }
}

/// `/endpoints/{model}/{replica_id}`, on its node's lease: an engine that has proven that it serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredEndpoint {
    /// The model.
    pub model: String,
    /// The replica.
    pub replica_id: String,
    /// The assignment's generation at registration.
    pub generation: u64,
    /// host:port of its HTTP server.
    pub address: String,
    /// Its process.
    pub pid: u32,
    /// The node it runs on.
    pub node_id: String,
    /// That node's zone.
    #[serde(default)]
    pub zone: String,
    /// LoRA adapters it has loaded, by name, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
    /// Of a full share of requests; None: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_percent: Option<u32>,
    /// How long its agent waits for its requests, once it is deregistered, until it is stopped; None: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_ms: Option<u32>,
}

/// A GPU as far as placement cares; live figures are not stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Unique on its node.
    pub uuid: String,
    /// Product name.
    #[serde(default)]
    pub name: String,
    /// Memory in MiB.
    #[serde(default)]
    pub memory_total_mib: u64,
    /// Empty: usable. Else why not.
    #[serde(default)]
    pub fault: String,
    /// Usable, and rather not used.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub degraded: bool,
    /// The NUMA node it hangs on, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// GPUs of one node with the same name here reach each other over a fast link; empty: not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link_group: String,
}

/// `/nodes/{node_id}`, on its own lease: a node that is present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub node_id: String,
    /// The agent's version.
    #[serde(default)]
    pub agent_version: String,
    /// Host under which its engines are reached.
    #[serde(default)]
    pub advertise_host: String,
    /// Where it stands; may be empty.
    #[serde(default)]
    pub zone: String,
    /// Where its zone lies; may be empty.
    #[serde(default)]
    pub region: String,
    /// Free-form labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its GPUs.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
}

/// `/drains/{model}/{replica_id}`: an operator's wish, until it is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The model.
    pub model: String,
    /// The replica.
    pub replica_id: String,
    /// Its streams are moved to others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub move_streams: bool,
}

/// `model` as it appears in replica ids: every character but ASCII letters and digits becomes '-'.
pub fn slug(model: &str) -> String {
    model.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_plain() {
        assert_eq!(slug("Qwen/Qwen2.5-7B"), "Qwen-Qwen2-5-7B");
    }

    #[test]
    fn a_deployment_is_flat_json_and_unknown_fields_are_ignored() {
        let text = r#"{"model":"m","replicas":2,"engine":"sim","model_path":"p","args":[],"env":{},
            "gpus_per_replica":1,"created_unix_s":5,"from_the_future":true}"#;
        let deployment: Deployment = serde_json::from_str(text).expect("valid");
        assert_eq!(deployment.spec.engine, "sim");
        let back = serde_json::to_value(&deployment).expect("serializes");
        assert_eq!(back["engine"], "sim");
        assert!(back.get("spec").is_none());
        assert_eq!(deployment.spec.options, EngineOptions::default(), "a record of before they existed");
        assert!(back.get("max_model_len").is_none() && back.get("options").is_none());
    }
}
