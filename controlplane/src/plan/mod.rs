//! plan(): what should change, and what waits on what. No I/O, no clock, no memory between calls.
//!
//! It starts from the placements as they are and moves as little as it can: what is placed stays. The result is whole
//! new placements for the models that change, which the caller commits by compare-and-swap on what this plan read; so
//! it never has to be right about anything but its arguments.
//!
//! Invariants, each held by a property test: a plan of an achieved plan is empty; no GPU is given to two replicas; a
//! rollout never withdraws a ready replica while fewer than the wanted number would stay ready, unless there is no room
//! for a replacement, and then one at a time; more room never moves a replica.
//!
//! A replica ends in two steps: it is withdrawn (its phase becomes Leaving: the agent loses the assignment, proxies see
//! it draining, its GPUs stay taken), and forgotten once its engine is known to be gone. Absent: zones as a hard rule,
//! GPU memory, disruption budgets, autoscaling.

mod placement;
mod report;
mod rollout;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::model::{Deployment, EngineObserved, Gpu, Phase, Placement, desired};
use placement::Capacity;
use rollout::Step;

/// What the store holds.
#[derive(Debug, Default)]
pub struct Desired<'a> {
    /// By model.
    pub deployments: BTreeMap<&'a str, &'a Deployment>,
    /// By model.
    pub placements: BTreeMap<&'a str, &'a Placement>,
    /// The last generation given out.
    pub last_generation: u64,
}

/// What is seen of the fleet.
#[derive(Debug, Default)]
pub struct Observed<'a> {
    /// Every present node, and every absent one that a placement names.
    pub nodes: BTreeMap<&'a str, NodeSeen<'a>>,
    /// Generation of each registered endpoint, by replica.
    pub registered: BTreeMap<&'a str, u64>,
    /// Engines as reported, by replica.
    pub engines: BTreeMap<&'a str, &'a EngineObserved>,
    /// Withdrawn replicas whose engine is known to have ended.
    pub gone: BTreeSet<&'a str>,
}

/// A node.
#[derive(Debug, Clone, Copy)]
pub struct NodeSeen<'a> {
    /// None: present. Else since when it is lost.
    pub lost_since: Option<Instant>,
    /// Its zone.
    pub zone: &'a str,
    /// Its GPUs; empty when it is lost.
    pub gpus: &'a [Gpu],
}

/// Settings of the plan.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How long a node may be lost before its replicas are placed elsewhere.
    pub lost_grace: Duration,
}

/// One decision, for the log and the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A new replica got a place.
    Place {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
        /// Its generation.
        generation: u64,
    },
    /// A replica shall end.
    Withdraw {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
        /// Why.
        reason: String,
    },
    /// A withdrawn replica has ended; its GPUs are free.
    Forget {
        /// The replica.
        replica_id: String,
    },
}

/// What plan() decided.
#[derive(Debug, Default)]
pub struct Plan {
    /// New placements of the models that change; None: the placement has served its purpose.
    pub changes: BTreeMap<String, Option<Placement>>,
    /// Why, decision by decision.
    pub actions: Vec<Action>,
    /// What waits on what, in sentences, by model.
    pub report: BTreeMap<String, Vec<String>>,
    /// The last generation given out, now.
    pub last_generation: u64,
}

/// One model while it is planned.
struct Working<'a> {
    deployment: Option<&'a Deployment>,
    placement: Cow<'a, Placement>,
    changed: bool,
}

impl Working<'_> {
    fn edit(&mut self) -> &mut Placement {
        self.changed = true;
        self.placement.to_mut()
    }
}

/// Decides.
pub fn plan(desired: &Desired<'_>, observed: &Observed<'_>, rules: &Rules, now: Instant) -> Plan {
    let mut plan = Plan { last_generation: desired.last_generation, ..Plan::default() };
    let mut models = working(desired);
    // Everywhere first: what has ended makes room for others.
    for model in models.values_mut() {
        forget_ended(model, observed, rules, now, &mut plan.actions);
    }
    let mut capacity = Capacity::new(observed, models.values().map(|m| m.placement.as_ref()));
    for (name, mut model) in models {
        let mut step = Step::new(&mut model, observed, rules, now, &mut capacity);
        step.take(&mut plan.actions, &mut plan.last_generation);
        let sentences = report::sentences(&step.outcome(), observed, rules, now);
        if !sentences.is_empty() {
            plan.report.insert(name.to_owned(), sentences);
        }
        let spent = model.deployment.is_none() && model.placement.assignments.is_empty();
        if spent {
            plan.changes.insert(name.to_owned(), None);
        } else if model.changed {
            plan.changes.insert(name.to_owned(), Some(model.placement.into_owned()));
        }
    }
    plan
}

/// Every model that is wanted or still has a placement.
fn working<'a>(desired: &Desired<'a>) -> BTreeMap<&'a str, Working<'a>> {
    let mut slugs: BTreeSet<String> = desired.placements.values().map(|p| p.slug.clone()).collect();
    let mut models = BTreeMap::new();
    for (name, placement) in &desired.placements {
        let deployment = desired.deployments.get(name).copied();
        models.insert(*name, Working { deployment, placement: Cow::Borrowed(*placement), changed: false });
    }
    for (name, deployment) in &desired.deployments {
        if !models.contains_key(name) {
            let slug = free_slug(name, &slugs);
            slugs.insert(slug.clone());
            let placement =
                Placement { model: (*name).to_owned(), slug, next_ordinal: 0, assignments: Vec::new() };
            let model =
                Working { deployment: Some(*deployment), placement: Cow::Owned(placement), changed: false };
            models.insert(*name, model);
        }
    }
    models
}

/// "a/b" and "a-b" would give their replicas the same ids; the later one gets a number.
fn free_slug(model: &str, taken: &BTreeSet<String>) -> String {
    let plain = desired::slug(model);
    let numbered = (2_u64..).map(|n| format!("{plain}-v{n}"));
    std::iter::once(plain.clone()).chain(numbered).find(|slug| !taken.contains(slug)).unwrap_or(plain)
}

/// Removes withdrawn replicas whose engines have ended, or whose node has been lost for too long to wait for.
fn forget_ended(
    model: &mut Working<'_>,
    observed: &Observed<'_>,
    rules: &Rules,
    now: Instant,
    actions: &mut Vec<Action>,
) {
    let ended: BTreeSet<String> = model
        .placement
        .assignments
        .iter()
        .filter(|a| a.phase == Phase::Leaving && !observed.registered.contains_key(a.replica_id.as_str()))
        .filter(|a| {
            observed.gone.contains(a.replica_id.as_str()) || is_given_up(observed, &a.node_id, rules, now)
        })
        .map(|a| a.replica_id.clone())
        .collect();
    if !ended.is_empty() {
        model.edit().assignments.retain(|a| !ended.contains(&a.replica_id));
        actions.extend(ended.into_iter().map(|replica_id| Action::Forget { replica_id }));
    }
}

/// The node has been lost for longer than the grace.
fn is_given_up(observed: &Observed<'_>, node_id: &str, rules: &Rules, now: Instant) -> bool {
    let lost_since = observed.nodes.get(node_id).and_then(|node| node.lost_since);
    lost_since.is_some_and(|since| now.saturating_duration_since(since) >= rules.lost_grace)
}
