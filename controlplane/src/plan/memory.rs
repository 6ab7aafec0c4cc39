//! Since when: the times that plan() needs and that no store holds.
//!
//! Plain state that is told what is, and keeps since when it is so; it decides nothing. A new leader starts with an empty
//! one: that postpones what waits for a time, and never hastens it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{
    ModelSeen, Plan,
    scale::{self, Demand, Load, Window},
};
use crate::model::{Deployment, EngineSpec, Phase, Placement};

/// See the module's text.
#[derive(Debug, Default)]
pub struct Memory {
    models: BTreeMap<String, Model>,
    zones: BTreeMap<String, String>,
    /// By model and node: when an engine was last seen to fail there, or first heard to have done so.
    failed: BTreeMap<String, BTreeMap<String, Instant>>,
    rebalanced: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Model {
    window: Window,
    /// The number of replicas that the window is about.
    present: u32,
    /// How far a rollout is, and since when it is no further.
    progress: (Progress, Instant),
}

/// Whatever changes in here is progress.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Progress {
    spec: EngineSpec,
    wanted: u32,
    /// Replicas of that spec that are ready.
    ready: usize,
}

impl Memory {
    /// Takes in how a model stands and says since when.
    pub fn model(
        &mut self,
        deployment: &Deployment,
        placement: Option<&Placement>,
        is_ready: impl Fn(&str, u64) -> bool,
        load: &Load,
        demand: Option<Demand>,
        now: Instant,
    ) -> ModelSeen {
        let present = scale::present(deployment, placement.and_then(|p| p.scaled_to));
        // Those that sleep are wanted by nobody, and are in nobody's way.
        let placed = || placement.iter().flat_map(|p| &p.assignments).filter(|a| !a.asleep);
        let active = placed().filter(|a| a.phase == Phase::Active);
        let ready = active.filter(|a| a.spec == deployment.spec && is_ready(&a.replica_id, a.generation));
        let progress = Progress { spec: deployment.spec.clone(), wanted: present, ready: ready.count() };
        let wanted = usize::try_from(present).unwrap_or(usize::MAX);
        // Paused is as wanted, whatever runs.
        let settled =
            deployment.policy.rollout.paused || (progress.ready == wanted && placed().count() == wanted);
        let fresh = Model { window: Window::default(), present, progress: (progress.clone(), now) };
        let model = self.models.entry(deployment.model.clone()).or_insert(fresh);
        if model.progress.0 != progress {
            model.progress = (progress, now);
        }
        if model.present != present {
            (model.window, model.present) = (Window::default(), present);
        }
        if let Some(auto) = &deployment.policy.autoscaling {
            let queued = demand.map_or(0, |d| d.queued);
            let called_for = scale::called_for(auto, load, queued, present);
            let window = &mut model.window;
            let since = |before: Option<(Instant, u32)>| before.map_or(now, |(since, _)| since);
            (window.above, window.below) = match called_for {
                Some(n) if n > present => {
                    let least = window.above.map_or(n, |(_, least)| least.min(n));
                    (Some((since(window.above), least)), None)
                }
                Some(n) if n < present => {
                    let most = window.below.map_or(n, |(_, most)| most.max(n));
                    (None, Some((since(window.below), most)))
                }
                _ => (None, None),
            };
            let known = load.silent == 0 && load.reporting >= present && present > 0;
            let idle = known && load.running == 0 && load.waiting == 0 && queued == 0;
            window.idle = idle.then(|| window.idle.unwrap_or(now));
        } else {
            model.window = Window::default();
        }
        ModelSeen { window: model.window, demand, unmoved_since: (!settled).then_some(model.progress.1) }
    }

    /// The nodes on which a model's engines failed more than `avoid` ago; `fails` says where one is not ready now.
    pub fn forgiven(
        &mut self,
        placement: &Placement,
        fails: impl Fn(&str) -> bool,
        avoid: Duration,
        now: Instant,
    ) -> BTreeSet<String> {
        let Some(noted) = &placement.failures else {
            self.failed.remove(&placement.model);
            return BTreeSet::new();
        };
        let seen = self.failed.entry(placement.model.clone()).or_default();
        seen.retain(|node, _| noted.nodes.contains(node));
        for node in &noted.nodes {
            let at = seen.entry(node.clone()).or_insert(now);
            if fails(node) {
                *at = now;
            }
        }
        let old = seen.iter().filter(|(_, at)| now.saturating_duration_since(**at) >= avoid);
        old.map(|(node, _)| node.clone()).collect()
    }

    /// Forgets models that are not deployed any more.
    pub fn retain(&mut self, deployed: impl Fn(&str) -> bool) {
        self.models.retain(|name, _| deployed(name));
        self.failed.retain(|name, _| deployed(name));
    }

    /// The zone in which each of the `lost` nodes was when it was `present` last, as far as this process has seen it.
    pub fn zones<'a>(
        &mut self,
        present: impl Iterator<Item = (&'a str, &'a str)>,
        lost: &BTreeSet<&str>,
    ) -> BTreeMap<String, String> {
        let mut seen = BTreeSet::new();
        for (node, zone) in present {
            seen.insert(node);
            if self.zones.get(node).is_none_or(|known| known != zone) {
                self.zones.insert(node.to_owned(), zone.to_owned());
            }
        }
        self.zones.retain(|node, _| seen.contains(node.as_str()) || lost.contains(node.as_str()));
        let known = self.zones.iter().filter(|(node, _)| lost.contains(node.as_str()));
        known.map(|(node, zone)| (node.clone(), zone.clone())).collect()
    }

    /// Whether the rebalancer, which moves one replica per `interval`, may move one now. The first time is one interval
    /// after this was asked first.
    pub fn rebalance_due(&mut self, interval: Duration, now: Instant) -> bool {
        let since = *self.rebalanced.get_or_insert(now);
        now.saturating_duration_since(since) >= interval
    }

    /// Takes in what was decided.
    pub fn planned(&mut self, plan: &Plan, now: Instant) {
        if plan.actions.iter().any(|action| matches!(action, super::Action::Move { .. })) {
            self.rebalanced = Some(now);
        }
    }
}
