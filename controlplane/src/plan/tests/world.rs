//! A fleet in memory that does what plans say: what agents, engines and operators would do, on command.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::super::{Demand, Desired, Load, NodeSeen, Observed, Plan, Rules, memory::Memory, plan};
use crate::model::{
    Deployment, EngineObserved, EngineSpec, EngineState, Gpu, NodePolicy, Phase, Placement, Policy,
    RegisteredEndpoint, policy::Resources, warm::Sleep,
};

pub(super) const GRACE: Duration = Duration::from_secs(30);
/// How long nodes are avoided where engines failed.
const AVOID: Duration = Duration::from_secs(600);
const GIB: u64 = 1 << 30;

pub(super) struct World {
    pub(super) deployments: BTreeMap<String, Deployment>,
    pub(super) placements: BTreeMap<String, Placement>,
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) registered: BTreeMap<String, RegisteredEndpoint>,
    pub(super) drained: BTreeSet<String>,
    pub(super) engines: BTreeMap<String, EngineObserved>,
    pub(super) gone: BTreeSet<String>,
    pub(super) loads: BTreeMap<String, Load>,
    pub(super) demands: BTreeMap<String, Demand>,
    pub(super) rules: Rules,
    pub(super) view_age: Duration,
    /// None: the rebalancer is off.
    pub(super) rebalance: Option<Duration>,
    pub(super) now: Instant,
    memory: Memory,
    last_generation: u64,
}

#[derive(Default)]
pub(super) struct Node {
    pub(super) zone: String,
    pub(super) gpus: Vec<Gpu>,
    pub(super) lost_since: Option<Instant>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) policy: NodePolicy,
    /// In use on each GPU, by whomever.
    pub(super) used_mib: BTreeMap<String, u64>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            deployments: BTreeMap::new(),
            placements: BTreeMap::new(),
            nodes: BTreeMap::new(),
            registered: BTreeMap::new(),
            drained: BTreeSet::new(),
            engines: BTreeMap::new(),
            gone: BTreeSet::new(),
            loads: BTreeMap::new(),
            demands: BTreeMap::new(),
            rules: Rules {
                lost_grace: GRACE,
                replace_after_restarts: 5,
                hold_after_nodes: 3,
                max_starts: 1_000,
                max_stops: 1_000,
                max_view_age: Duration::from_secs(60),
            },
            view_age: Duration::ZERO,
            rebalance: None,
            now: Instant::now(),
            memory: Memory::default(),
            last_generation: 0,
        }
    }
}

impl World {
    /// One plan, with the memory that reconcile would keep.
    pub(super) fn plan(&mut self) -> Plan {
        let now = self.now;
        let mut observed = Observed { view_age: self.view_age, ..Observed::default() };
        for (name, deployment) in &self.deployments {
            let placement = self.placements.get(name);
            let registered = &self.registered;
            let is_ready =
                |id: &str, generation| registered.get(id).map(|e| e.generation) == Some(generation);
            let ready = placement.iter().flat_map(|p| &p.assignments).filter(|a| a.phase == Phase::Active);
            let ready = ready.filter(|a| is_ready(&a.replica_id, a.generation)).count();
            let ready = u32::try_from(ready).unwrap();
            let said = self.loads.get(name).copied().unwrap_or_default();
            let load = Load { reporting: ready - said.silent.min(ready), ..said };
            let demand = self.demands.get(name).copied();
            let seen = self.memory.model(deployment, placement, is_ready, &load, demand, now);
            observed.models.insert(name, seen);
            if let Some(placement) = placement {
                let fails = |node: &str| {
                    let here = placement
                        .assignments
                        .iter()
                        .filter(|a| a.node_id == node && a.phase == Phase::Active);
                    here.into_iter().any(|a| !is_ready(&a.replica_id, a.generation))
                };
                observed.forgiven.insert(name, self.memory.forgiven(placement, fails, AVOID, now));
            }
        }
        let present = self.nodes.iter().filter(|(_, n)| n.lost_since.is_none());
        let present = present.map(|(name, n)| (name.as_str(), n.zone.as_str()));
        let lost = self.nodes.iter().filter(|(_, n)| n.lost_since.is_some());
        let lost: BTreeSet<&str> = lost.map(|(name, _)| name.as_str()).collect();
        let zones = self.memory.zones(present, &lost);
        observed.rebalance = self.rebalance.filter(|every| self.memory.rebalance_due(*every, now));
        let desired = Desired {
            deployments: self.deployments.iter().map(|(k, v)| (k.as_str(), v)).collect(),
            placements: self.placements.iter().map(|(k, v)| (k.as_str(), v)).collect(),
            last_generation: self.last_generation,
        };
        for (name, n) in &self.nodes {
            let here = n.lost_since.is_none();
            let node = NodeSeen {
                lost_since: n.lost_since,
                zone: if here { &n.zone } else { zones.get(name).map_or("", String::as_str) },
                region: "",
                labels: Some(&n.labels),
                policy: Some(&n.policy),
                gpus: if here { &n.gpus } else { &[] },
                used_mib: n.used_mib.iter().map(|(uuid, used)| (uuid.as_str(), *used)).collect(),
            };
            observed.nodes.insert(name, node);
        }
        observed.registered = self.registered.iter().map(|(id, e)| (id.as_str(), e.generation)).collect();
        observed.drained = self.drained.iter().map(String::as_str).collect();
        observed.engines = self.engines.iter().map(|(id, e)| (id.as_str(), e)).collect();
        observed.gone = self.gone.iter().map(String::as_str).collect();
        let plan = plan(&desired, &observed, &self.rules, now);
        drop((desired, observed));
        self.memory.planned(&plan, now);
        plan
    }

    /// Does what a plan says, as reconcile would commit it.
    pub(super) fn apply(&mut self, plan: Plan) {
        self.last_generation = plan.last_generation;
        for (model, placement) in plan.changes {
            match placement {
                Some(placement) => self.placements.insert(model, placement),
                None => self.placements.remove(&model),
            };
        }
        let placed = self.placements.values().flat_map(|p| &p.assignments);
        let leaving = placed.filter(|a| a.phase == Phase::Leaving);
        let leaving: BTreeSet<&str> = leaving.map(|a| a.replica_id.as_str()).collect();
        self.gone.retain(|id| leaving.contains(id.as_str()));
    }

    /// A node whose GPUs have 80 GiB.
    pub(super) fn add_node(&mut self, name: &str, zone: &str, gpus: usize) {
        let gpu = |n| Gpu {
            uuid: format!("{name}-g{n}"),
            name: String::new(),
            memory_total_mib: 80 * 1024,
            fault: String::new(),
            degraded: false,
            numa_node: None,
            link_group: String::new(),
        };
        let node = Node { zone: zone.to_owned(), gpus: (0..gpus).map(gpu).collect(), ..Node::default() };
        self.nodes.insert(name.to_owned(), node);
    }

    pub(super) fn deploy(&mut self, model: &str, replicas: u32, gpus_per_replica: u32, version: &str) {
        let spec = EngineSpec {
            engine: "sim".into(),
            model_path: version.into(),
            args: vec![],
            env: BTreeMap::new(),
            gpus_per_replica,
            resources: Resources::default(),
            lora: vec![],
            warm: Default::default(),
            options: Default::default(),
        };
        let before = self.deployments.get(model);
        let policy = before.map_or_else(Policy::default, |before| before.policy.clone());
        let deployment = Deployment { model: model.into(), replicas, spec, created_unix_s: 0, policy };
        self.deployments.insert(model.to_owned(), deployment);
    }

    pub(super) fn lose(&mut self, node: &str) {
        let Some(lost) = self.nodes.get_mut(node) else { return };
        lost.lost_since.get_or_insert(self.now);
        self.registered.retain(|_, endpoint| endpoint.node_id != node);
    }

    pub(super) fn pass_time(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    /// An engine that is placed on a present node proves that it serves.
    pub(super) fn ready(&mut self, id: &str) {
        let all = self.placements.values().flat_map(|p| p.assignments.iter().map(move |a| (p, a)));
        let Some((placement, a)) = all.into_iter().find(|(_, a)| a.replica_id == id) else { return };
        if a.phase == Phase::Leaving
            || a.asleep
            || self.nodes.get(&a.node_id).is_none_or(|n| n.lost_since.is_some())
        {
            return;
        }
        let endpoint = RegisteredEndpoint {
            model: placement.model.clone(),
            replica_id: a.replica_id.clone(),
            generation: a.generation,
            address: "h:1".into(),
            pid: 1,
            node_id: a.node_id.clone(),
            zone: String::new(),
            adapters: vec![],
            weight_percent: None,
            drain_ms: None,
        };
        self.registered.insert(id.to_owned(), endpoint);
    }

    pub(super) fn ready_all(&mut self) {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let ids: Vec<String> = all.map(|a| a.replica_id.clone()).collect();
        ids.iter().for_each(|id| self.ready(id));
    }

    /// As [`World::ready_all`], for a fleet whose nodes are all present.
    pub(super) fn ready_all_quickly(&mut self) {
        for placement in self.placements.values() {
            for a in &placement.assignments {
                let endpoint = RegisteredEndpoint {
                    model: placement.model.clone(),
                    replica_id: a.replica_id.clone(),
                    generation: a.generation,
                    address: "h:1".into(),
                    pid: 1,
                    node_id: a.node_id.clone(),
                    zone: String::new(),
                    adapters: vec![],
                    weight_percent: None,
                    drain_ms: None,
                };
                self.registered.insert(a.replica_id.clone(), endpoint);
            }
        }
    }

    /// The model may sleep instead of ending, on this level.
    pub(super) fn may_sleep(&mut self, model: &str, level: u32) {
        let spec = &mut self.deployments.get_mut(model).unwrap().spec;
        spec.warm.sleep = (level > 0).then_some(Sleep { level });
    }

    /// Agents put every engine to sleep that shall: deregistered, and reported asleep.
    pub(super) fn fall_asleep(&mut self) {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let here = |node: &str| self.nodes.get(node).is_some_and(|n| n.lost_since.is_none());
        let asleep = all.filter(|a| a.asleep && a.phase == Phase::Active && here(&a.node_id));
        for id in asleep.map(|a| a.replica_id.clone()).collect::<Vec<_>>() {
            self.registered.remove(&id);
            self.report(&id, EngineState::Asleep, 0, "");
        }
    }

    /// Agents end every withdrawn engine: deregistered, stopped, no longer reported.
    pub(super) fn end_leaving(&mut self) {
        for a in self.placements.values().flat_map(|p| &p.assignments) {
            let present = self.nodes.get(&a.node_id).is_some_and(|n| n.lost_since.is_none());
            if a.phase == Phase::Leaving && present {
                self.registered.remove(&a.replica_id);
                self.gone.insert(a.replica_id.clone());
            }
        }
    }

    pub(super) fn report(&mut self, id: &str, state: EngineState, restarts: u32, reason: &str) {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let generation = all.into_iter().find(|a| a.replica_id == id).unwrap().generation;
        let engine = EngineObserved {
            generation,
            state,
            address: String::new(),
            pid: 0,
            restarts,
            failures: None,
            gave_up: None,
            reason: reason.to_owned(),
            last_exit: None,
            says_load: false,
            running: 0,
            waiting: 0,
            kv_used_ratio: 0.0,
            ttft: (0, 0),
            started: Default::default(),
            engine_version: String::new(),
            kv_events_address: String::new(),
            notes: vec![],
        };
        self.engines.insert(id.to_owned(), engine);
    }

    /// The replica's agent gives its engine up.
    pub(super) fn give_up(&mut self, id: &str, reason: &str) {
        self.report(id, EngineState::Failed, 1, reason);
        let engine = self.engines.get_mut(id).unwrap();
        (engine.failures, engine.gave_up) = (Some(1), Some(reason.to_owned()));
    }

    /// The memory that one replica of a model asks for on each GPU.
    pub(super) fn ask_memory(&mut self, model: &str, gib: u64, share_gpu: bool) {
        let deployment = self.deployments.get_mut(model).unwrap();
        deployment.spec.resources = Resources { gpu_memory_bytes: gib * GIB, share_gpu };
    }
}
