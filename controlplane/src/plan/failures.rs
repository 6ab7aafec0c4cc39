//! Engines that fail over and over: on which nodes they did, and when a spec is to blame rather than a node.
//!
//! An agent gives an engine up after so many failures in a row, or starts that never got ready; then its replica is placed
//! elsewhere, and the node is noted in the model's placement, so that neither it nor another replica of the model goes back
//! there soon, whoever leads by then. Notes belong to one spec: another one is tried everywhere. A note is dropped after
//! `reconcile.avoid_node_s` (`memory.rs` counts, and a new leader counts anew), but not while an engine still fails there.
//!
//! A spec that fails on `hold_after_nodes` nodes and is ready on none is *held*: moving it on would take every node's GPUs
//! away from somebody for nothing. What is placed of it stays where it is, where its agent tries it now and then; no more of
//! it is placed; replicas of the former spec keep serving. It ends with the first of its engines that gets ready, or with
//! another spec.

use std::collections::BTreeSet;

use super::{Context, Working};
use crate::model::{Assignment, Failures, Phase};

/// Nodes that are noted for one model; the oldest go.
const MOST_NODES: usize = 256;

/// Brings the notes of a model up to date.
pub(super) fn note(name: &str, model: &mut Working<'_>, context: Context<'_>) {
    let Some(deployment) = model.deployment else { return };
    let known = model.placement.failures.as_ref();
    let of_this_spec = known.filter(|known| known.spec == deployment.spec);
    let present: BTreeSet<&str> =
        of_spec(model).filter(|a| context.fails(a)).map(|a| a.node_id.as_str()).collect();
    let is_held = is_held(model, context);
    let forgiven = context.observed.forgiven.get(name);
    let stays = |node: &&String| {
        is_held || present.contains(node.as_str()) || forgiven.is_none_or(|nodes| !nodes.contains(*node))
    };
    let before = of_this_spec.map(|known| known.nodes.as_slice()).unwrap_or_default();
    let mut nodes: Vec<String> = before.iter().filter(stays).cloned().collect();
    let new: Vec<String> =
        present.iter().filter(|node| !nodes.iter().any(|n| n == *node)).map(|n| (*n).to_owned()).collect();
    nodes.extend(new);
    nodes.drain(..nodes.len().saturating_sub(MOST_NODES));
    let now = (!nodes.is_empty()).then(|| Failures { spec: deployment.spec.clone(), nodes });
    if model.placement.failures != now {
        model.edit().failures = now;
    }
}

/// Whether the wanted spec is to blame: noted on enough nodes, and ready nowhere.
pub(super) fn is_held(model: &Working<'_>, context: Context<'_>) -> bool {
    let limit = usize::try_from(context.rules.hold_after_nodes).unwrap_or(usize::MAX);
    let noted = model.placement.failures.as_ref().filter(|noted| {
        let is_wanted = model.deployment.is_some_and(|deployment| deployment.spec == noted.spec);
        limit > 0 && is_wanted && noted.nodes.len() >= limit
    });
    noted.is_some() && !of_spec(model).any(|a| context.is_ready(a))
}

/// Active replicas of the wanted spec.
fn of_spec<'m>(model: &'m Working<'_>) -> impl Iterator<Item = &'m Assignment> {
    let spec = model.deployment.map(|deployment| &deployment.spec);
    let active = model.placement.assignments.iter().filter(|a| a.phase == Phase::Active);
    active.filter(move |a| Some(&a.spec) == spec)
}

impl Context<'_> {
    /// Its engine is not ready, and has failed so often that it should be tried elsewhere.
    pub(super) fn fails(&self, a: &Assignment) -> bool {
        !self.is_given_up(&a.node_id) && !self.is_ready(a) && self.keeps_failing(a)
    }

    fn keeps_failing(&self, a: &Assignment) -> bool {
        let limit = self.rules.replace_after_restarts;
        let engine =
            self.observed.engines.get(a.replica_id.as_str()).filter(|e| e.generation == a.generation);
        // Agents of before they counted failures tell restarts only.
        limit > 0 && engine.is_some_and(|e| e.gave_up.is_some() || e.failures.unwrap_or(e.restarts) >= limit)
    }
}
