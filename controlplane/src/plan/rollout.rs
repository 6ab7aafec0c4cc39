//! One model's next step: how many replicas it should have, which go, which come.
//!
//! A changed spec rolls out with a surge of one: a replacement is placed beside the old replicas, and when it is ready
//! one old replica is withdrawn. Where there is no room for that, one old replica makes room for its own replacement,
//! and the next one follows only when that replacement is ready. Replicas that serve nobody (not ready) are replaced
//! without ceremony, so that a fix for a broken spec is not held up by the broken replicas.

use std::time::Instant;

use super::{
    Action, Observed, Rules, Working, is_given_up,
    placement::{Capacity, Shortage, Spread},
};
use crate::model::{Assignment, Deployment, Phase, Placement};

/// One pass over one model.
pub(super) struct Step<'w, 'd, 'o, 'c> {
    model: &'w mut Working<'d>,
    observed: &'o Observed<'o>,
    rules: &'o Rules,
    now: Instant,
    capacity: &'w mut Capacity<'c>,
    /// Counted when the first replica is placed.
    spread: Option<Spread>,
    /// Positions of replicas that go without waiting for their engines.
    given_up: Vec<usize>,
    unplaced: u64,
    shortage: Option<Shortage>,
    surge_blocked: bool,
}

/// What the report needs to know of a pass.
pub(super) struct Outcome<'a> {
    pub(super) deployment: Option<&'a Deployment>,
    pub(super) placement: &'a Placement,
    /// Wanted replicas that found no place, and why.
    pub(super) unplaced: u64,
    pub(super) shortage: Option<Shortage>,
    /// A rollout has no room for a surge.
    pub(super) surge_blocked: bool,
}

/// Where an active replica stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// As wanted.
    Good,
    /// Its spec is not the wanted one any more, or one of its GPUs is not usable.
    Outdated,
    /// Its node has been lost for longer than the grace.
    Lost,
}

/// An active replica.
#[derive(Debug, Clone, Copy)]
struct Member {
    /// Its position in the placement.
    at: usize,
    generation: u64,
    standing: Standing,
    /// Its engine is registered.
    ready: bool,
}

impl<'w, 'd, 'o, 'c> Step<'w, 'd, 'o, 'c> {
    pub(super) fn new(
        model: &'w mut Working<'d>,
        observed: &'o Observed<'o>,
        rules: &'o Rules,
        now: Instant,
        capacity: &'w mut Capacity<'c>,
    ) -> Self {
        Self {
            model,
            observed,
            rules,
            now,
            capacity,
            spread: None,
            given_up: Vec::new(),
            unplaced: 0,
            shortage: None,
            surge_blocked: false,
        }
    }

    pub(super) fn outcome(&self) -> Outcome<'_> {
        Outcome {
            deployment: self.model.deployment,
            placement: &self.model.placement,
            unplaced: self.unplaced,
            shortage: self.shortage,
            surge_blocked: self.surge_blocked,
        }
    }

    /// Decides and applies.
    pub(super) fn take(&mut self, actions: &mut Vec<Action>, last_generation: &mut u64) {
        match self.model.deployment {
            None => {
                for member in self.members() {
                    self.withdraw(member, "its deployment was deleted", actions);
                }
            }
            Some(deployment) => {
                let wanted = usize::try_from(deployment.replicas).unwrap_or(usize::MAX);
                self.withdraw_useless(actions);
                self.scale_down(wanted, actions);
                self.retire_outdated(wanted, actions);
                self.fill(wanted, deployment, actions, last_generation);
                self.drop_replaced_lost(wanted, actions);
                self.advance_rollout(wanted, deployment, actions, last_generation);
            }
        }
        if !self.given_up.is_empty() {
            let given_up = std::mem::take(&mut self.given_up);
            let mut at = 0..;
            self.model.edit().assignments.retain(|_| at.next().is_none_or(|at| !given_up.contains(&at)));
        }
    }

    /// Outdated replicas that serve nobody.
    fn withdraw_useless(&mut self, actions: &mut Vec<Action>) {
        for member in self.standing_as(Standing::Outdated) {
            if !member.ready {
                self.withdraw(member, self.outdated_because(member), actions);
            }
        }
    }

    /// More good ones than wanted: those that are not ready go first, then the newest.
    fn scale_down(&mut self, wanted: usize, actions: &mut Vec<Action>) {
        let mut good = self.standing_as(Standing::Good);
        let surplus = good.len().saturating_sub(wanted);
        good.sort_by_key(|member| (member.ready, u64::MAX - member.generation));
        for member in good.into_iter().take(surplus) {
            self.withdraw(member, "fewer replicas are wanted", actions);
        }
    }

    /// Outdated ones that are not needed any more to keep the wanted number ready.
    fn retire_outdated(&mut self, wanted: usize, actions: &mut Vec<Action>) {
        let mut outdated = self.standing_as(Standing::Outdated);
        let good_ready = self.standing_as(Standing::Good).iter().filter(|member| member.ready).count();
        outdated.sort_by_key(|member| u64::MAX - member.generation);
        let spare = (good_ready + outdated.len()).saturating_sub(wanted);
        for member in outdated.into_iter().take(spare) {
            self.withdraw(member, self.outdated_because(member), actions);
        }
    }

    /// Places what is missing.
    fn fill(
        &mut self,
        wanted: usize,
        deployment: &Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) {
        let missing = wanted.saturating_sub(self.present());
        for placed in 0..missing {
            if let Err(shortage) = self.place(deployment, actions, last_generation) {
                // Those on lost nodes keep their names: they wait for their node or for room.
                let lost = self.standing_as(Standing::Lost).len();
                let nameless = (missing - placed).saturating_sub(lost);
                self.unplaced = u64::try_from(nameless).unwrap_or(u64::MAX);
                self.shortage = Some(shortage);
                return;
            }
        }
    }

    /// Lost ones whose replacement has a place, newest first.
    fn drop_replaced_lost(&mut self, wanted: usize, actions: &mut Vec<Action>) {
        let mut lost = self.standing_as(Standing::Lost);
        lost.sort_by_key(|member| u64::MAX - member.generation);
        let kept = wanted.saturating_sub(self.present());
        let replaced = lost.len().saturating_sub(kept);
        for member in lost.into_iter().take(replaced) {
            self.withdraw(member, "its node is lost", actions);
        }
    }

    /// The next replacement of a rollout, once the one before is ready.
    fn advance_rollout(
        &mut self,
        wanted: usize,
        deployment: &Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) {
        let outdated = self.standing_as(Standing::Outdated);
        let good = self.standing_as(Standing::Good);
        let in_flight = good.iter().any(|member| !member.ready);
        let Some(oldest) = outdated.first() else { return };
        if in_flight || good.len() + outdated.len() != wanted {
            return;
        }
        if self.place(deployment, actions, last_generation).is_ok() {
            return;
        }
        self.surge_blocked = true;
        let leaving = self.model.placement.assignments.iter().enumerate();
        let mut leaving = leaving.filter(|(at, a)| a.phase == Phase::Leaving && !self.given_up.contains(at));
        let makes_room = leaving.next().is_some();
        if !makes_room {
            self.withdraw(*oldest, self.outdated_because(*oldest), actions);
        }
    }

    fn place(
        &mut self,
        deployment: &Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) -> Result<(), Shortage> {
        let needed = usize::try_from(deployment.spec.gpus_per_replica).unwrap_or(usize::MAX);
        let spread = self.spread.get_or_insert_with(|| self.capacity.spread(&self.model.placement));
        let (node_id, gpu_uuids) = self.capacity.take(spread, needed)?;
        *last_generation += 1;
        let placement = self.model.edit();
        let replica_id = format!("{}-{}", placement.slug, placement.next_ordinal);
        placement.next_ordinal += 1;
        actions.push(Action::Place {
            replica_id: replica_id.clone(),
            node_id: node_id.clone(),
            generation: *last_generation,
        });
        placement.assignments.push(Assignment {
            replica_id,
            generation: *last_generation,
            node_id,
            gpu_uuids,
            spec: deployment.spec.clone(),
            phase: Phase::Active,
        });
        Ok(())
    }

    /// A replica on a node that was given up is not waited for: it goes at once.
    fn withdraw(&mut self, member: Member, reason: &str, actions: &mut Vec<Action>) {
        let (observed, rules, now) = (self.observed, self.rules, self.now);
        let Some(a) = self.model.edit().assignments.get_mut(member.at) else { return };
        a.phase = Phase::Leaving;
        let registered = observed.registered.contains_key(a.replica_id.as_str());
        if !registered && is_given_up(observed, &a.node_id, rules, now) {
            self.given_up.push(member.at);
        }
        actions.push(Action::Withdraw {
            replica_id: a.replica_id.clone(),
            node_id: a.node_id.clone(),
            reason: reason.to_owned(),
        });
    }

    /// Active replicas, oldest first.
    fn members(&self) -> Vec<Member> {
        let assignments = self.model.placement.assignments.iter().enumerate();
        let active = assignments.filter(|(_, a)| a.phase == Phase::Active);
        let member = |(at, a): (usize, &Assignment)| Member {
            at,
            generation: a.generation,
            standing: self.standing(a),
            ready: self.observed.registered.get(a.replica_id.as_str()) == Some(&a.generation),
        };
        active.map(member).collect()
    }

    fn standing_as(&self, standing: Standing) -> Vec<Member> {
        self.members().into_iter().filter(|member| member.standing == standing).collect()
    }

    /// Active replicas on nodes that were not given up.
    fn present(&self) -> usize {
        self.members().iter().filter(|member| member.standing != Standing::Lost).count()
    }

    fn standing(&self, assignment: &Assignment) -> Standing {
        if is_given_up(self.observed, &assignment.node_id, self.rules, self.now) {
            return Standing::Lost;
        }
        let as_wanted = self.model.deployment.is_some_and(|d| d.spec == assignment.spec);
        if as_wanted && !self.has_bad_gpu(assignment) { Standing::Good } else { Standing::Outdated }
    }

    fn has_bad_gpu(&self, assignment: &Assignment) -> bool {
        let Some(node) = self.observed.nodes.get(assignment.node_id.as_str()) else { return false };
        let usable = |uuid: &String| node.gpus.iter().any(|gpu| gpu.uuid == *uuid && gpu.fault.is_empty());
        node.lost_since.is_none() && !assignment.gpu_uuids.iter().all(usable)
    }

    fn outdated_because(&self, member: Member) -> &'static str {
        match self.model.placement.assignments.get(member.at) {
            Some(a) if self.has_bad_gpu(a) => "one of its GPUs is not usable",
            _ => "its deployment changed",
        }
    }
}
