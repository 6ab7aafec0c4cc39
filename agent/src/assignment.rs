//! What the control plane wants of this node, as plain values: checked once when they arrive, stored as JSON.
//!
//! Invariants of a [`Desired`]: every replica id occurs once and is not empty. Absent here: whether an engine *can* be
//! started; that is found out where it is tried, so that the operator gets the reason at the engine and not in a log.

use std::collections::{BTreeMap, BTreeSet};

use penstock_proto::{Version, engine::EngineOptions, v1};
use serde::{Deserialize, Serialize};

use crate::warm::WarmSpec;

/// One engine that this node should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Assignment {
    /// The deployment's model, as the control plane names it.
    pub(crate) model: String,
    /// The replica's id, unique in the fleet.
    pub(crate) replica_id: String,
    /// Changes when this assignment changes, and only then.
    pub(crate) generation: u64,
    /// What to run.
    pub(crate) spec: EngineSpec,
    /// The GPUs it may use.
    pub(crate) gpu_uuids: Vec<String>,
    /// It shall sleep.
    #[serde(default)]
    pub(crate) asleep: bool,
}

impl Assignment {
    /// Whether both are for one engine, whatever it shall do: serve or sleep.
    pub(crate) fn same_engine(&self, other: &Self) -> bool {
        let key = |a: &Self| (a.generation, a.replica_id.clone(), a.model.clone());
        key(self) == key(other) && self.spec == other.spec && self.gpu_uuids == other.gpu_uuids
    }
}

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EngineSpec {
    /// Name of a program in the agent's `[engines]` table.
    pub(crate) engine: String,
    /// Positional argument of `serve`.
    pub(crate) model_path: String,
    /// The name under which clients ask for it.
    pub(crate) served_model_name: String,
    /// Further arguments of `serve`.
    pub(crate) args: Vec<String>,
    /// Environment; wins over the program's.
    pub(crate) env: BTreeMap<String, String>,
    /// LoRA adapters to load, as (name, path).
    #[serde(default)]
    pub(crate) lora: Vec<(String, String)>,
    /// How it may be started other than from nothing.
    #[serde(default)]
    pub(crate) warm: WarmSpec,
    /// The typed fields. Not written where none is set, so that records of agents of before read as they were.
    #[serde(default, skip_serializing_if = "EngineOptions::is_default")]
    pub(crate) options: EngineOptions,
}

/// Everything this node should run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Desired {
    /// Orders one set against another; an older one never replaces a newer one.
    pub(crate) version: Version,
    /// By replica id, each once.
    pub(crate) assignments: Vec<Assignment>,
}

impl Desired {
    /// The checked form of a message, with a sentence for each assignment that had to be left out.
    pub(crate) fn from_message(message: v1::Assignments) -> (Self, Vec<String>) {
        let version = Version { term: message.term, revision: message.revision };
        let mut seen = BTreeSet::new();
        let mut assignments = Vec::new();
        let mut left_out = Vec::new();
        for assignment in message.assignments.into_iter().map(Assignment::from) {
            if assignment.replica_id.is_empty() {
                left_out.push(format!("an assignment of model {:?} has no replica_id", assignment.model));
            } else if !seen.insert(assignment.replica_id.clone()) {
                left_out.push(format!("replica {} is assigned twice", assignment.replica_id));
            } else {
                assignments.push(assignment);
            }
        }
        assignments.sort_by(|a, b| a.replica_id.cmp(&b.replica_id));
        (Self { version, assignments }, left_out)
    }

    /// The assignment of a replica.
    pub(crate) fn get(&self, replica_id: &str) -> Option<&Assignment> {
        self.assignments.iter().find(|a| a.replica_id == replica_id)
    }
}

impl From<v1::Assignment> for Assignment {
    fn from(message: v1::Assignment) -> Self {
        Self {
            model: message.model,
            replica_id: message.replica_id,
            generation: message.generation,
            spec: message.spec.unwrap_or_default().into(),
            gpu_uuids: message.gpu_uuids,
            asleep: message.asleep,
        }
    }
}

impl From<v1::EngineSpec> for EngineSpec {
    fn from(spec: v1::EngineSpec) -> Self {
        let warm = WarmSpec::of(&spec);
        Self {
            engine: spec.engine,
            model_path: spec.model_path,
            served_model_name: spec.served_model_name,
            args: spec.args,
            env: spec.env.into_iter().collect(),
            lora: spec.lora.into_iter().map(|adapter| (adapter.name, adapter.path)).collect(),
            options: spec.options.map(EngineOptions::from).unwrap_or_default(),
            warm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(ids: &[&str]) -> v1::Assignments {
        let assignments =
            ids.iter().map(|id| v1::Assignment { replica_id: (*id).into(), ..Default::default() }).collect();
        v1::Assignments { term: 2, revision: 7, assignments }
    }

    #[test]
    fn a_replica_is_taken_once_and_needs_an_id() {
        let (desired, left_out) = Desired::from_message(message(&["b", "", "a", "b"]));
        assert_eq!(desired.assignments.iter().map(|a| a.replica_id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(desired.version, Version { term: 2, revision: 7 });
        assert_eq!(left_out.len(), 2, "{left_out:?}");
        assert!(desired.get("a").is_some() && desired.get("c").is_none());
    }

    #[test]
    fn a_spec_of_an_earlier_agent_reads_as_the_same_assignment() {
        let stored = r#"{"engine":"vllm","model_path":"p","served_model_name":"m","args":["--x"],"env":{}}"#;
        let spec: EngineSpec = serde_json::from_str(stored).unwrap();
        let told = v1::EngineSpec {
            engine: "vllm".into(),
            model_path: "p".into(),
            served_model_name: "m".into(),
            args: vec!["--x".into()],
            ..Default::default()
        };
        let told = Assignment::from(v1::Assignment { spec: Some(told), ..Default::default() });
        assert_eq!(spec, told.spec, "an engine is not restarted because a field was added");
    }

    #[test]
    fn what_is_stored_comes_back_equal() {
        let (desired, _) = Desired::from_message(message(&["x"]));
        let text = serde_json::to_string(&desired).unwrap();
        assert_eq!(serde_json::from_str::<Desired>(&text).unwrap(), desired);
    }
}
