//! One model's next step: how many replicas it should have, which go, which come.
//!
//! A replica whose spec is not the wanted one any more, whose GPU broke, whose node sends it away, or that the
//! rebalancer wants elsewhere, is *old*: it serves until another has taken its place. Replacements come as far as
//! `max_surge` allows beyond the wanted number, and old ones go as far as `max_unavailable` and `min_available` allow.
//! Where a rollout finds no room for a surge, one old replica makes room for its own replacement, and the next one
//! follows only when that replacement is ready; an explicit `min_available` forbids that when it would be undercut.
//! Replicas that serve nobody (not ready) are replaced without ceremony, so that a fix for a broken spec is not held up
//! by the broken replicas.

mod asleep;

use std::collections::BTreeSet;

use super::{
    Action, Context, Working,
    explain::Shortage,
    placement::{Capacity, Wish},
    safety::Caps,
    standing::{Member, Standing, Why},
};
use crate::model::{Assignment, Deployment, Phase, Placement, policy::RolloutPolicy};

/// One pass over one model.
pub(super) struct Step<'w, 'd, 'o, 'c> {
    model: &'w mut Working<'d>,
    context: Context<'o>,
    capacity: &'w mut Capacity<'c>,
    caps: &'w mut Caps,
    /// Made when the first replica is placed.
    wish: Option<Wish<'d>>,
    /// Positions of replicas that go without waiting for their engines.
    given_up: Vec<usize>,
    unplaced: u64,
    shortage: Option<Shortage>,
    blocked: Option<Blocked>,
    held_back: usize,
}

/// Why a rollout goes no further at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Blocked {
    /// There is no room for a second one; one old replica after the other makes room.
    Room,
    /// The budget lets none go, and no other comes first: why there is no room for it, where one was looked for.
    Budget(Option<Shortage>),
}

/// What the report needs to know of a pass.
pub(super) struct Outcome<'a> {
    pub(super) deployment: Option<&'a Deployment>,
    pub(super) placement: &'a Placement,
    pub(super) wanted: u32,
    pub(super) members: Vec<Member>,
    /// Wanted replicas that found no place, and why.
    pub(super) unplaced: u64,
    pub(super) shortage: Option<&'a Shortage>,
    pub(super) blocked: Option<&'a Blocked>,
    /// Starts and stops that the caps put off.
    pub(super) held_back: usize,
    /// Its spec fails wherever it is placed.
    pub(super) is_held: bool,
    pub(super) scaling: Option<&'a str>,
    /// Replicas per zone, while they are further apart than was asked for.
    pub(super) uneven: Vec<(String, usize)>,
}

impl<'w, 'd, 'o, 'c> Step<'w, 'd, 'o, 'c> {
    pub(super) fn new(
        model: &'w mut Working<'d>,
        context: Context<'o>,
        capacity: &'w mut Capacity<'c>,
        caps: &'w mut Caps,
    ) -> Self {
        Self {
            model,
            context,
            capacity,
            caps,
            wish: None,
            given_up: Vec::new(),
            unplaced: 0,
            shortage: None,
            blocked: None,
            held_back: 0,
        }
    }

    pub(super) fn outcome(&self) -> Outcome<'_> {
        Outcome {
            deployment: self.model.deployment,
            placement: &self.model.placement,
            wanted: self.model.wanted,
            members: self.members(),
            unplaced: self.unplaced,
            shortage: self.shortage.as_ref(),
            blocked: self.blocked.as_ref(),
            held_back: self.held_back,
            is_held: self.model.is_held,
            scaling: self.model.scaling.as_deref(),
            uneven: self.uneven(),
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
            // Most models at most times: nothing to look for twice.
            Some(deployment) if self.is_settled(deployment) => {}
            Some(deployment) => {
                let wanted = usize::try_from(self.model.wanted).unwrap_or(usize::MAX);
                self.withdraw_useless(actions);
                self.wake(wanted, actions);
                self.end_surplus_sleepers(wanted, deployment, actions);
                self.scale_down(wanted, deployment, actions);
                self.retire_old(wanted, deployment, actions);
                self.fill(wanted, deployment, actions, last_generation);
                self.drop_replaced(wanted, actions);
                self.advance_rollout(wanted, deployment, actions, last_generation);
            }
        }
        if !self.given_up.is_empty() {
            let given_up = std::mem::take(&mut self.given_up);
            let mut at = 0..;
            self.model.edit().assignments.retain(|_| at.next().is_none_or(|at| !given_up.contains(&at)));
        }
    }

    /// As many as wanted, each as it should be.
    fn is_settled(&self, deployment: &Deployment) -> bool {
        let members = self.members();
        let wanted = usize::try_from(self.model.wanted).unwrap_or(usize::MAX);
        let asleep = members.iter().filter(|m| m.asleep).count();
        asleep <= asleep::most(wanted, deployment)
            && members.len() == wanted + asleep
            && members.iter().all(|m| (m.ready || m.asleep) && m.standing == Standing::Good)
    }

    /// Old replicas that serve nobody.
    fn withdraw_useless(&mut self, actions: &mut Vec<Action>) {
        for (member, why) in self.old() {
            if !member.ready {
                self.withdraw(member, why.sentence(), actions);
            }
        }
    }

    /// More good ones than wanted: those that are not ready go first, then the newest.
    fn scale_down(&mut self, wanted: usize, deployment: &Deployment, actions: &mut Vec<Action>) {
        let mut good = self.standing_as(Standing::Good);
        let surplus = good.len().saturating_sub(wanted);
        good.sort_by_key(|member| (member.ready, member.available, u64::MAX - member.generation));
        for member in good.into_iter().take(surplus) {
            if wanted == 0 && self.put_to_sleep(member, deployment, actions) {
                continue;
            }
            self.withdraw(member, "fewer replicas are wanted", actions);
        }
    }

    /// Old ones that are not needed any more: as many stay available as the rollout and the budget ask for.
    fn retire_old(&mut self, wanted: usize, deployment: &Deployment, actions: &mut Vec<Action>) {
        let floor = floor(wanted, deployment);
        let mut available = self.available();
        let mut old = self.old();
        old.sort_by_key(|(member, _)| (member.available, u64::MAX - member.generation));
        for (member, why) in old {
            let left = available - usize::from(member.available);
            if left >= floor && self.withdraw(member, why.sentence(), actions) {
                available = left;
            }
        }
    }

    /// Places what is missing.
    fn fill(
        &mut self,
        wanted: usize,
        deployment: &'d Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) {
        let missing = wanted.saturating_sub(self.present());
        if self.waits_for_the_held() {
            return;
        }
        for placed in 0..missing {
            if !self.caps.start() {
                self.held_back += missing - placed;
                return;
            }
            if let Err(shortage) = self.place(deployment, actions, last_generation) {
                // Those on lost nodes, and those that fail, keep their names: they wait for better or for room.
                let named =
                    self.standing_as(Standing::Lost).len() + self.standing_as(Standing::Failing).len();
                let nameless = (missing - placed).saturating_sub(named);
                self.unplaced = u64::try_from(nameless).unwrap_or(u64::MAX);
                self.shortage = Some(shortage);
                self.say_lacking(missing - placed);
                return;
            }
        }
    }

    /// Lost and failing ones whose replacement has a place, newest first.
    fn drop_replaced(&mut self, wanted: usize, actions: &mut Vec<Action>) {
        let mut gone = self.standing_as(Standing::Failing);
        gone.extend(self.standing_as(Standing::Lost));
        gone.sort_by_key(|member| (member.standing == Standing::Failing, u64::MAX - member.generation));
        let kept = wanted.saturating_sub(self.present());
        let replaced = gone.len().saturating_sub(kept);
        for member in gone.into_iter().take(replaced) {
            let reason = match member.standing {
                Standing::Failing => "its engine fails over and over there",
                _ => "its node is lost",
            };
            self.withdraw(member, reason, actions);
        }
    }

    /// The next replacements, as far as the surge allows.
    fn advance_rollout(
        &mut self,
        wanted: usize,
        deployment: &'d Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) {
        let RolloutPolicy { max_surge, max_unavailable, .. } = deployment.policy.rollout;
        let as_count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
        let (surge, unavailable) = (as_count(max_surge), as_count(max_unavailable));
        let good = self.standing_as(Standing::Good);
        let present = self.present();
        if self.old().is_empty() || present < wanted || self.waits_for_the_held() {
            return;
        }
        let starting = good.iter().filter(|member| !member.ready).count();
        let lacking = wanted.saturating_sub(good.len());
        let beyond = wanted.saturating_add(surge).saturating_sub(present);
        let at_once = surge.saturating_add(unavailable).max(1).saturating_sub(starting);
        for placed in 0..lacking.min(beyond).min(at_once) {
            if !self.caps.start() {
                self.held_back += 1;
                return;
            }
            if let Err(shortage) = self.place(deployment, actions, last_generation) {
                if placed == 0 {
                    self.without_room(wanted, starting, deployment, shortage, actions);
                }
                return;
            }
        }
        if surge == 0 && lacking > 0 && starting == 0 && self.leaving() == 0 {
            // Nothing may come before something goes, and nothing may go.
            self.blocked = Some(Blocked::Budget(None));
        }
    }

    /// No node takes a replacement: one old replica may make room for its own.
    fn without_room(
        &mut self,
        wanted: usize,
        starting: usize,
        deployment: &'d Deployment,
        shortage: Shortage,
        actions: &mut Vec<Action>,
    ) {
        let moving = self.model.placement.assignments.iter().any(|a| a.moving);
        if moving {
            self.model.edit().assignments.iter_mut().for_each(|a| a.moving = false);
        }
        let old = self.old();
        if old.is_empty() {
            return;
        }
        self.blocked = Some(Blocked::Room);
        if starting > 0 || self.leaving() > 0 || self.present() != wanted {
            return;
        }
        let explicit = deployment.policy.disruption.min_available.map(|n| min_available(n, wanted));
        let available = self.available();
        let goes = old.into_iter().find(|(member, why)| {
            let left = available - usize::from(member.available);
            match (why, explicit) {
                // A replica that makes room: for one that may come where it is.
                (Why::Spec, floor) => {
                    left >= floor.unwrap_or(wanted.saturating_sub(1)) && self.makes_room(*member)
                }
                // It has to go and makes no room: only with the operator's word that fewer will do.
                (Why::Gpu | Why::Evicted(_), Some(floor)) => left >= floor,
                (Why::Gpu | Why::Evicted(_), None) | (Why::Moving | Why::Ended, _) => false,
            }
        });
        match goes {
            Some((member, why)) => {
                self.withdraw(member, why.sentence(), actions);
            }
            None => {
                self.blocked = Some(Blocked::Budget(Some(shortage)));
                self.say_lacking(1);
            }
        }
    }

    fn makes_room(&self, member: Member) -> bool {
        let former = self.model.placement.assignments.get(member.at);
        former.zip(self.wish.as_ref()).is_some_and(|(a, wish)| self.capacity.fits_instead_of(wish, a))
    }

    fn place(
        &mut self,
        deployment: &'d Deployment,
        actions: &mut Vec<Action>,
        last_generation: &mut u64,
    ) -> Result<(), Shortage> {
        if self.wish.is_none() {
            self.wish = Some(self.wish(deployment));
        }
        let Some(wish) = self.wish.as_mut() else { return Ok(()) };
        let (node_id, gpu_uuids) = self.capacity.take(wish)?;
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
            moving: false,
            asleep: false,
        });
        Ok(())
    }

    /// What a new replica asks for; the spread counts those that will stay.
    fn wish(&self, deployment: &'d Deployment) -> Wish<'d> {
        let mut stay = Vec::new();
        let noted = self.model.placement.failures.iter().flat_map(|failures| &failures.nodes);
        let mut failing: BTreeSet<&str> = noted.map(String::as_str).collect();
        for member in self.members() {
            let Some(a) = self.model.placement.assignments.get(member.at) else { continue };
            match member.standing {
                Standing::Good => stay.push(a.node_id.as_str()),
                Standing::Failing => drop(failing.insert(a.node_id.as_str())),
                Standing::Old(_) | Standing::Lost => {}
            }
        }
        self.capacity.wish(deployment, stay.into_iter(), &failing)
    }

    /// Replicas per zone, if the operator cares and they are too far apart.
    fn uneven(&self) -> Vec<(String, usize)> {
        let Some(deployment) = self.model.deployment else { return Vec::new() };
        let policy = &deployment.policy.placement;
        if !policy.rebalance && policy.spread.min_domains == 0 {
            return Vec::new();
        }
        let wish = self.wish(deployment);
        if wish.excess() == 0 {
            return Vec::new();
        }
        self.capacity.zones(&wish).map(|(zone, count)| (zone.to_owned(), count)).collect()
    }

    /// False: the caps put it off. A replica on a node that was given up is not waited for: it goes at once.
    fn withdraw(&mut self, member: Member, reason: &str, actions: &mut Vec<Action>) -> bool {
        if !self.caps.stop() {
            self.held_back += 1;
            return false;
        }
        let context = self.context;
        let Some(a) = self.model.edit().assignments.get_mut(member.at) else { return false };
        (a.phase, a.moving, a.asleep) = (Phase::Leaving, false, false);
        let a = a.clone();
        self.capacity.note(&self.model.placement.model, &a);
        let registered = context.observed.registered.contains_key(a.replica_id.as_str());
        if !registered && context.is_given_up(&a.node_id) {
            self.given_up.push(member.at);
        }
        actions.push(Action::Withdraw {
            replica_id: a.replica_id.clone(),
            node_id: a.node_id.clone(),
            reason: reason.to_owned(),
        });
        true
    }

    fn members(&self) -> Vec<Member> {
        self.context.members(self.model)
    }

    fn standing_as(&self, standing: Standing) -> Vec<Member> {
        // Good sleepers are nobody's to count on.
        let counts =
            |member: &Member| member.standing == standing && !(member.asleep && standing == Standing::Good);
        self.members().into_iter().filter(counts).collect()
    }

    fn old(&self) -> Vec<(Member, Why)> {
        self.members().into_iter().filter_map(|member| Some((member, member.why()?))).collect()
    }

    /// The spec fails wherever it is placed: those replicas that are tried now and then will tell when it does not any more.
    fn waits_for_the_held(&self) -> bool {
        self.model.is_held && !self.standing_as(Standing::Good).is_empty()
    }

    /// Replicas that are or will be of use: neither given up nor failing.
    fn present(&self) -> usize {
        let useless = |m: &Member| m.asleep || matches!(m.standing, Standing::Lost | Standing::Failing);
        self.members().iter().filter(|member| !useless(member)).count()
    }

    fn available(&self) -> usize {
        self.members().iter().filter(|member| member.available).count()
    }

    fn leaving(&self) -> usize {
        let all = self.model.placement.assignments.iter().enumerate();
        all.filter(|(at, a)| a.phase == Phase::Leaving && !self.given_up.contains(at)).count()
    }
}

/// The fewest that must stay available while old replicas are replaced.
fn floor(wanted: usize, deployment: &Deployment) -> usize {
    let unavailable = usize::try_from(deployment.policy.rollout.max_unavailable).unwrap_or(usize::MAX);
    let explicit = deployment.policy.disruption.min_available.map_or(0, |n| min_available(n, wanted));
    wanted.saturating_sub(unavailable).max(explicit)
}

/// A budget protects what is wanted: it does not forbid to want fewer.
fn min_available(budget: u32, wanted: usize) -> usize {
    usize::try_from(budget).unwrap_or(usize::MAX).min(wanted)
}
