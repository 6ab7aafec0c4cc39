//! Replicas that sleep: who may, who is woken, and who ends after all.
//!
//! A replica falls asleep in one case only: its model goes to zero, may go to zero, and may sleep, and the replica serves
//! and is as it should be. It ends when it is not as it should be any more (its spec changed, its node sends it away, its
//! engine ended), when the model may not sleep any more, or when another replica finds no place without its GPUs.

use super::{Action, Deployment, Member, Standing, Step};

/// How many may sleep beside `wanted` that do not: with all awake there would be no more than the model may have.
pub(super) fn most(wanted: usize, deployment: &Deployment) -> usize {
    let to_zero =
        deployment.policy.autoscaling.as_ref().filter(|auto| auto.min == 0 && auto.idle_to_zero_s > 0);
    match (to_zero, deployment.spec.warm.sleep) {
        (Some(auto), Some(_)) => usize::try_from(auto.max).unwrap_or(usize::MAX).saturating_sub(wanted),
        _ => 0,
    }
}

impl Step<'_, '_, '_, '_> {
    fn sleepers(&self) -> Vec<Member> {
        let members = self.members().into_iter();
        members.filter(|member| member.asleep && member.standing == Standing::Good).collect()
    }

    /// Sleepers serve before anything is placed. One on a node that is lost for the moment is not waited for.
    pub(super) fn wake(&mut self, wanted: usize, actions: &mut Vec<Action>) {
        let context = self.context;
        for member in self.sleepers() {
            if self.present() >= wanted {
                return;
            }
            let Some(a) = self.model.placement.assignments.get(member.at) else { continue };
            let here = context.observed.nodes.get(a.node_id.as_str()).is_some_and(|n| n.lost_since.is_none());
            if !here {
                continue;
            }
            if !self.caps.start() {
                self.held_back += 1;
                return;
            }
            let Some(a) = self.model.edit().assignments.get_mut(member.at) else { continue };
            a.asleep = false;
            let a = a.clone();
            self.capacity.note(&self.model.placement.model, &a);
            actions.push(Action::Wake { replica_id: a.replica_id, node_id: a.node_id });
        }
    }

    /// More sleepers than there may be: the newest go.
    pub(super) fn end_surplus_sleepers(
        &mut self,
        wanted: usize,
        deployment: &Deployment,
        actions: &mut Vec<Action>,
    ) {
        let kept = most(wanted, deployment);
        for member in self.sleepers().into_iter().skip(kept) {
            self.withdraw(member, "it sleeps, and fewer replicas are wanted", actions);
        }
    }

    /// Whether a replica that is not wanted sleeps instead of ending, or will: the caps may put it off.
    pub(super) fn put_to_sleep(
        &mut self,
        member: Member,
        deployment: &Deployment,
        actions: &mut Vec<Action>,
    ) -> bool {
        let may = self.sleepers().len() < most(0, deployment) && member.available;
        let as_wanted = |a: &crate::model::Assignment| a.spec == deployment.spec;
        if !may || !self.model.placement.assignments.get(member.at).is_some_and(as_wanted) {
            return false;
        }
        if !self.caps.stop() {
            self.held_back += 1;
            return true;
        }
        if let Some(a) = self.model.edit().assignments.get_mut(member.at) {
            a.asleep = true;
            let a = a.clone();
            self.capacity.note(&self.model.placement.model, &a);
            actions.push(Action::Sleep { replica_id: a.replica_id, node_id: a.node_id });
        }
        true
    }

    /// Sleepers of whatever model may end for replicas of this one that found no place.
    pub(super) fn say_lacking(&mut self, replicas: usize) {
        if let Some(wish) = &self.wish {
            self.capacity.lacks(&self.model.placement.model, wish, replicas);
        }
    }
}
