//! Where one replica stands: as wanted, or why not.

use super::{Context, Working};
use crate::model::{Assignment, EngineState, Phase};

/// Where an active replica stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// As wanted.
    Good,
    /// Another shall take its place, and it serves until then.
    Old(Why),
    /// Its node has been lost for longer than the grace.
    Lost,
    /// Its engine does not get ready, however often it is started.
    Failing,
}

/// Why another shall take a replica's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Its spec is not the wanted one any more.
    Spec,
    /// One of its GPUs is not usable.
    Gpu,
    /// Its node sends it away.
    Evicted(&'static str),
    /// The rebalancer wants it elsewhere.
    Moving,
    /// It shall sleep, and has ended.
    Ended,
}

impl Why {
    pub(super) fn sentence(self) -> &'static str {
        match self {
            Self::Spec => "its deployment changed",
            Self::Gpu => "one of its GPUs is not usable",
            Self::Evicted(why) => why,
            Self::Moving => "it was moved to another zone",
            Self::Ended => "it should sleep, and its engine has ended",
        }
    }
}

/// An active replica.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    /// Its position in the placement.
    pub(super) at: usize,
    pub(super) generation: u64,
    pub(super) standing: Standing,
    /// Its engine is registered.
    pub(super) ready: bool,
    /// ... and takes requests.
    pub(super) available: bool,
    /// It shall sleep: neither ready nor available, whatever its engine still does.
    pub(super) asleep: bool,
}

impl Member {
    pub(super) fn why(&self) -> Option<Why> {
        match self.standing {
            Standing::Old(why) => Some(why),
            _ => None,
        }
    }
}

impl Context<'_> {
    /// The node has been lost for longer than the grace.
    pub(super) fn is_given_up(&self, node_id: &str) -> bool {
        let lost_since = self.observed.nodes.get(node_id).and_then(|node| node.lost_since);
        let lost_for = lost_since.map(|since| self.now.saturating_duration_since(since));
        lost_for.is_some_and(|lost| lost >= self.rules.lost_grace)
    }

    pub(super) fn is_ready(&self, a: &Assignment) -> bool {
        self.observed.registered.get(a.replica_id.as_str()) == Some(&a.generation)
    }

    /// The active replicas of a model, oldest first.
    pub(super) fn members(&self, model: &Working<'_>) -> Vec<Member> {
        let assignments = model.placement.assignments.iter().enumerate();
        let active = assignments.filter(|(_, a)| a.phase == Phase::Active);
        let member = |(at, a): (usize, &Assignment)| {
            let (asleep, ready) = (a.asleep, self.is_ready(a) && !a.asleep);
            let available = ready && !self.observed.drained.contains(a.replica_id.as_str());
            let standing = self.standing(model, a);
            Member { at, generation: a.generation, standing, ready, available, asleep }
        };
        active.map(member).collect()
    }

    fn standing(&self, model: &Working<'_>, a: &Assignment) -> Standing {
        if self.is_given_up(&a.node_id) {
            return Standing::Lost;
        }
        let Some(deployment) = model.deployment else { return Standing::Good };
        if self.has_bad_gpu(a) {
            return Standing::Old(Why::Gpu);
        }
        let node = self.observed.nodes.get(a.node_id.as_str());
        if let Some(why) = node.and_then(|node| node.evicts(&deployment.policy.placement)) {
            return Standing::Old(Why::Evicted(why));
        }
        if a.moving {
            return Standing::Old(Why::Moving);
        }
        if a.spec != deployment.spec && !deployment.policy.rollout.paused {
            return Standing::Old(Why::Spec);
        }
        if a.asleep {
            // A sleeper's failures are of the time before it slept.
            return if self.has_ended(a) { Standing::Old(Why::Ended) } else { Standing::Good };
        }
        // Where the spec is to blame, no other node is any better.
        if !model.is_held && self.fails(a) { Standing::Failing } else { Standing::Good }
    }

    fn has_ended(&self, a: &Assignment) -> bool {
        let engine = self.observed.engines.get(a.replica_id.as_str());
        let ended = [EngineState::Failed, EngineState::Stopped];
        engine.is_some_and(|e| e.generation == a.generation && ended.contains(&e.state))
    }

    fn has_bad_gpu(&self, assignment: &Assignment) -> bool {
        let Some(node) = self.observed.nodes.get(assignment.node_id.as_str()) else { return false };
        let usable = |uuid: &String| node.gpus.iter().any(|gpu| gpu.uuid == *uuid && gpu.fault.is_empty());
        node.lost_since.is_none() && !assignment.gpu_uuids.iter().all(usable)
    }
}
