//! What a deployment was before: its revisions, the differences between them, and the way back.
//!
//! A revision is a spec and a policy. The number of replicas, and whether a rollout is paused, are not part of it: a
//! scale-up makes no revision, and a rollback to last week's spec does not bring back last week's size. A rollback is a
//! change like any other: it makes a new revision, and rolls out like one. The oldest are forgotten past [`KEPT`].

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Deployment, EngineSpec, Policy};

/// Revisions that are kept of a deployment.
pub const KEPT: usize = 20;

/// One state of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Counts up from 1 over the deployment's life.
    pub number: u64,
    /// Unix seconds at which it was put.
    pub unix_s: i64,
    /// The revision that a rollback took it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolled_back_to: Option<u64>,
    /// How engines are started.
    pub spec: EngineSpec,
    /// How they are placed, rolled out, protected and scaled.
    #[serde(default)]
    pub policy: Policy,
}

/// `/revisions/{model}`: oldest first; the last one is the present one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// The model.
    pub model: String,
    /// Never more than [`KEPT`].
    pub revisions: Vec<Revision>,
}

/// One field that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Its path: "rollout.max_surge".
    pub field: String,
    /// None: it was not there.
    pub before: Option<Value>,
    /// None: it is not there any more.
    pub after: Option<Value>,
}

fn policy_of(deployment: &Deployment) -> Policy {
    let mut policy = deployment.policy.clone();
    policy.rollout.paused = false;
    policy
}

impl History {
    /// The history with `deployment` as its last revision; None: it is that already.
    pub fn with(&self, deployment: &Deployment, rolled_back_to: Option<u64>, unix_s: i64) -> Option<Self> {
        let (spec, policy) = (deployment.spec.clone(), policy_of(deployment));
        let last = self.revisions.last();
        if last.is_some_and(|last| last.spec == spec && last.policy == policy) {
            return None;
        }
        let number = last.map_or(1, |last| last.number + 1);
        let mut revisions = self.revisions.clone();
        revisions.push(Revision { number, unix_s, rolled_back_to, spec, policy });
        let surplus = revisions.len().saturating_sub(KEPT);
        revisions.drain(..surplus);
        Some(Self { model: deployment.model.clone(), revisions })
    }

    /// The revision with a number.
    pub fn find(&self, number: u64) -> Result<&Revision, String> {
        self.revisions.iter().find(|revision| revision.number == number).ok_or_else(|| {
            match (self.revisions.first(), self.revisions.last()) {
                (Some(first), Some(last)) => {
                    format!("there is no revision {number}: kept are {} to {}", first.number, last.number)
                }
                _ => "it has no revisions: they are kept from its next change on".into(),
            }
        })
    }

    /// The one before the present one.
    pub fn previous(&self) -> Result<&Revision, String> {
        let before = self.revisions.len().checked_sub(2).and_then(|at| self.revisions.get(at));
        before.ok_or_else(|| "there is no earlier revision to go back to".into())
    }
}

/// `deployment` as it was at `revision`, at its present size and pause.
pub fn rolled_back(deployment: &Deployment, revision: &Revision) -> Deployment {
    let mut policy = revision.policy.clone();
    policy.rollout.paused = deployment.policy.rollout.paused;
    Deployment { spec: revision.spec.clone(), policy, ..deployment.clone() }
}

/// Every field that differs between two revisions, by path.
pub fn differences(before: &Revision, after: &Revision) -> Vec<Difference> {
    let value = |r: &Revision| {
        let mut spec = serde_json::to_value(&r.spec).unwrap_or_default();
        let policy = serde_json::to_value(&r.policy).unwrap_or_default();
        if let (Value::Object(spec), Value::Object(policy)) = (&mut spec, policy) {
            spec.extend(policy);
        }
        spec
    };
    json_differences(&value(before), &value(after))
}

/// Every field that differs between two objects, by path.
pub fn json_differences(before: &Value, after: &Value) -> Vec<Difference> {
    let mut out = Vec::new();
    compare("", Some(before), Some(after), &mut out);
    out.sort_by(|a: &Difference, b| a.field.cmp(&b.field));
    out
}

fn compare(path: &str, before: Option<&Value>, after: Option<&Value>, out: &mut Vec<Difference>) {
    if before == after {
        return;
    }
    let (Some(Value::Object(old)), Some(Value::Object(new))) = (before, after) else {
        let given = |value: Option<&Value>| value.filter(|v| !v.is_null()).cloned();
        let (before, after) = (given(before), given(after));
        if before != after {
            out.push(Difference { field: path.to_owned(), before, after });
        }
        return;
    };
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    for key in new.keys().chain(gone) {
        let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        compare(&inner, old.get(key), new.get(key), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::policy::Resources;

    fn deployment(version: &str) -> Deployment {
        let spec = EngineSpec {
            engine: "sim".into(),
            model_path: version.into(),
            args: vec![],
            env: Default::default(),
            gpus_per_replica: 1,
            resources: Resources::default(),
            lora: vec![],
            warm: Default::default(),
            options: Default::default(),
        };
        Deployment { model: "m".into(), replicas: 3, spec, created_unix_s: 1, policy: Policy::default() }
    }

    #[test]
    fn a_change_makes_a_revision_and_a_scale_or_a_pause_does_not() {
        let first = History::default().with(&deployment("v1"), None, 10).expect("the first");
        let mut same = deployment("v1");
        (same.replicas, same.policy.rollout.paused) = (50, true);
        assert_eq!(first.with(&same, None, 11), None);
        let second = first.with(&deployment("v2"), None, 12).expect("changed");
        let numbers: Vec<u64> = second.revisions.iter().map(|r| r.number).collect();
        assert_eq!(numbers, [1, 2]);
        let back =
            rolled_back(&Deployment { replicas: 7, ..deployment("v2") }, second.previous().expect("v1"));
        assert_eq!((back.spec.model_path.as_str(), back.replicas), ("v1", 7));
        let third = second.with(&back, Some(1), 13).expect("a change");
        assert_eq!(third.revisions.last().map(|r| (r.number, r.rolled_back_to)), Some((3, Some(1))));
    }

    #[test]
    fn only_so_many_are_kept_and_a_missing_one_is_told() {
        let mut history = History::default();
        assert!(history.previous().is_err() && history.find(1).is_err());
        for n in 0..50 {
            history = history.with(&deployment(&format!("v{n}")), None, n).expect("changed");
        }
        assert_eq!(history.revisions.len(), KEPT);
        assert_eq!(history.find(3).expect_err("forgotten"), "there is no revision 3: kept are 31 to 50");
        assert_eq!(history.find(31).expect("kept").spec.model_path, "v30");
    }

    #[test]
    fn differences_are_told_by_their_paths() {
        let mut other = deployment("v2");
        other.policy.rollout.max_surge = 3;
        other.spec.env.insert("A".into(), "1".into());
        let history = History::default().with(&deployment("v1"), None, 1).expect("first");
        let history = history.with(&other, None, 2).expect("second");
        let told = differences(&history.revisions[0], &history.revisions[1]);
        let fields: Vec<&str> = told.iter().map(|d| d.field.as_str()).collect();
        assert_eq!(fields, ["env.A", "model_path", "rollout.max_surge"]);
        assert_eq!((told[0].before.clone(), told[2].after.clone()), (None, Some(Value::from(3))));
        assert!(differences(&history.revisions[0], &history.revisions[0]).is_empty());
    }
}
