//! The rebalancer: after a zone was away, or was added, zones differ by more than `max_skew`; it moves one replica at a
//! time until they do not.
//!
//! Off unless the control plane's settings and the deployment both say so, and slow on purpose (one replica per interval,
//! a day by default): a fleet that is uneven serves, and each move costs a cold start. It moves nothing while anything
//! else is under way anywhere: a rollout, a start, a node that is lost. The measure is how far the fullest zone is
//! beyond `max_skew`; only replicas of a model where that is not zero are moved, out of its fullest zone into one that
//! stays emptier than that was. So the sum of squares of the zones' counts falls with each move, and it comes to an end.
//!
//! A move is make-before-break: the replica is marked, the model's next step places another one (a rollout of one), and
//! the marked one drains when that is ready. Where there is no room the mark is taken back.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, Context, Working, placement::Capacity, standing::Standing};
use crate::model::Phase;

/// Marks one replica, if one should move.
pub(super) fn mark_one(
    models: &mut BTreeMap<&str, Working<'_>>,
    capacity: &Capacity<'_>,
    context: Context<'_>,
) -> Option<Action> {
    if !is_quiet(models, context) {
        return None;
    }
    let mut worst: Option<(usize, &str, usize)> = None;
    for (name, model) in models.iter() {
        let Some(deployment) = model.deployment.filter(|d| d.policy.placement.rebalance) else { continue };
        let stay = model.placement.assignments.iter().map(|a| a.node_id.as_str());
        let noted = model.placement.failures.iter().flat_map(|failures| &failures.nodes);
        let failing: BTreeSet<&str> = noted.map(String::as_str).collect();
        let wish = capacity.wish(deployment, stay, &failing);
        let excess = wish.excess();
        if excess == 0 || worst.is_some_and(|(most, ..)| most >= excess) {
            continue;
        }
        // The newest that helps: the oldest have the warmest caches.
        let mut newest: Vec<_> = model.placement.assignments.iter().enumerate().collect();
        newest.sort_by_key(|(_, a)| u64::MAX - a.generation);
        let helps = newest.into_iter().find(|(_, a)| capacity.improves(&wish, &a.node_id));
        if let Some((at, _)) = helps {
            worst = Some((excess, name, at));
        }
    }
    let (_, name, at) = worst?;
    let name = name.to_owned();
    let assignment = models.get_mut(name.as_str())?.edit().assignments.get_mut(at)?;
    assignment.moving = true;
    Some(Action::Move {
        replica_id: assignment.replica_id.clone(),
        node_id: assignment.node_id.clone(),
        reason: "its zone has more replicas than the others".into(),
    })
}

/// Everything that is wanted is there and ready, and nothing leaves.
fn is_quiet(models: &BTreeMap<&str, Working<'_>>, context: Context<'_>) -> bool {
    models.values().all(|model| {
        let all_active = model.placement.assignments.iter().all(|a| a.phase == Phase::Active);
        let members = context.members(model);
        let good = members.iter().all(|m| m.available && m.standing == Standing::Good);
        let wanted = usize::try_from(model.wanted).unwrap_or(usize::MAX);
        all_active && good && members.len() == wanted
    })
}
