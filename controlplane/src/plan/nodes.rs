//! Whether a node is for a replica at all, whatever room it has.

use std::collections::BTreeMap;

use super::NodeSeen;
use crate::model::policy::{ARBITRATION_ZONE, PlacementPolicy, Role, Taint, TaintEffect};

/// Why a node does not take a replica; in the order in which it is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    ControlOnly,
    Arbitration,
    Maintenance,
    Cordoned,
    /// A label that it lacks, as `key=value`.
    Label(String),
    /// A taint that is not tolerated.
    Taint(String),
    /// The replica that asks failed there over and over.
    Failed,
    /// It has fewer usable GPUs than one replica needs.
    TooFewGpus,
    /// Not enough of its GPUs have the memory, even when they are empty.
    TooSmall,
    /// Others hold what it would take.
    Busy,
}

impl<'a> NodeSeen<'a> {
    /// What it is for.
    pub fn role(&self) -> Role {
        if self.zone == ARBITRATION_ZONE {
            return Role::Arbitration;
        }
        let said = self.policy.and_then(|policy| policy.role);
        said.or_else(|| Role::named(self.labels?.get("role")?)).unwrap_or_default()
    }

    /// A label; an operator's before the agent's.
    fn label(&self, node_id: &'a str, key: &str) -> Option<&'a str> {
        match key {
            "zone" => Some(self.zone),
            "region" => Some(self.region),
            "node_id" => Some(node_id),
            _ => {
                let of = |labels: &'a BTreeMap<String, String>| labels.get(key).map(String::as_str);
                self.policy.and_then(|p| of(&p.labels)).or_else(|| self.labels.and_then(of))
            }
        }
    }

    /// It is one of the nodes that a deployment spreads over: faults, cordons and taints, which come and go, do not
    /// change how many zones there are.
    pub(super) fn is_domain(&self, node_id: &'a str, policy: &PlacementPolicy) -> bool {
        self.role() == Role::Worker && self.missing_label(node_id, policy).is_none()
    }

    fn missing_label<'p>(
        &self,
        node_id: &'a str,
        policy: &'p PlacementPolicy,
    ) -> Option<(&'p String, &'p String)> {
        policy.node_selector.iter().find(|(key, value)| self.label(node_id, key) != Some(value))
    }

    fn taint(&self, policy: &PlacementPolicy, effects: &[TaintEffect]) -> Option<&'a Taint> {
        let tolerated = |taint: &Taint| policy.tolerations.iter().any(|t| t.covers(taint));
        let taints = self.policy.map(|p| p.taints.as_slice()).unwrap_or_default();
        taints.iter().find(|taint| effects.contains(&taint.effect) && !tolerated(taint))
    }

    /// Why it takes none, if that is so.
    pub(super) fn refuses(&self, node_id: &'a str, policy: &PlacementPolicy) -> Option<Refusal> {
        match self.role() {
            Role::Worker => {}
            Role::ControlOnly => return Some(Refusal::ControlOnly),
            Role::Arbitration => return Some(Refusal::Arbitration),
        }
        if self.policy.is_some_and(|p| p.maintenance) {
            return Some(Refusal::Maintenance);
        }
        if self.policy.is_some_and(|p| p.cordoned) {
            return Some(Refusal::Cordoned);
        }
        if let Some((key, value)) = self.missing_label(node_id, policy) {
            return Some(Refusal::Label(format!("{key}={value}")));
        }
        let taint = self.taint(policy, &[TaintEffect::NoSchedule, TaintEffect::NoExecute]);
        taint.map(|taint| Refusal::Taint(taint.to_string()))
    }

    /// It would rather take none.
    pub(super) fn is_reluctant(&self, policy: &PlacementPolicy) -> bool {
        self.taint(policy, &[TaintEffect::PreferNoSchedule]).is_some()
    }

    /// Why what runs on it has to go elsewhere, if it has to.
    pub(super) fn evicts(&self, policy: &PlacementPolicy) -> Option<&'static str> {
        if self.policy.is_some_and(|p| p.maintenance) {
            return Some("its node is in maintenance");
        }
        let taint = self.taint(policy, &[TaintEffect::NoExecute]);
        taint.map(|_| "its node has a no_execute taint that it does not tolerate")
    }
}
