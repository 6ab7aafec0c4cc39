//! A fleet in memory that does what plans say: what agents, engines and operators would do, on command.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::super::{Action, Desired, NodeSeen, Observed, Plan, Rules, plan};
use crate::model::{
    Deployment, EngineObserved, EngineSpec, EngineState, Gpu, Phase, Placement, RegisteredEndpoint,
};

pub(super) const GRACE: Duration = Duration::from_secs(30);

pub(super) struct World {
    pub(super) deployments: BTreeMap<String, Deployment>,
    pub(super) placements: BTreeMap<String, Placement>,
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) registered: BTreeMap<String, RegisteredEndpoint>,
    pub(super) engines: BTreeMap<String, EngineObserved>,
    pub(super) gone: BTreeSet<String>,
    last_generation: u64,
    now: Instant,
}

pub(super) struct Node {
    zone: String,
    pub(super) gpus: Vec<Gpu>,
    pub(super) lost_since: Option<Instant>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            deployments: BTreeMap::new(),
            placements: BTreeMap::new(),
            nodes: BTreeMap::new(),
            registered: BTreeMap::new(),
            engines: BTreeMap::new(),
            gone: BTreeSet::new(),
            last_generation: 0,
            now: Instant::now(),
        }
    }
}

impl World {
    pub(super) fn plan(&self) -> Plan {
        let desired = Desired {
            deployments: self.deployments.iter().map(|(k, v)| (k.as_str(), v)).collect(),
            placements: self.placements.iter().map(|(k, v)| (k.as_str(), v)).collect(),
            last_generation: self.last_generation,
        };
        let seen = |n: &'_ Node| n.lost_since;
        let observed = Observed {
            nodes: self
                .nodes
                .iter()
                .map(|(name, n)| {
                    let gpus: &[Gpu] = if seen(n).is_some() { &[] } else { &n.gpus };
                    (name.as_str(), NodeSeen { lost_since: n.lost_since, zone: &n.zone, gpus })
                })
                .collect(),
            registered: self.registered.iter().map(|(id, e)| (id.as_str(), e.generation)).collect(),
            engines: self.engines.iter().map(|(id, e)| (id.as_str(), e)).collect(),
            gone: self.gone.iter().map(String::as_str).collect(),
        };
        plan(&desired, &observed, &Rules { lost_grace: GRACE }, self.now)
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

    pub(super) fn add_node(&mut self, name: &str, zone: &str, gpus: usize) {
        let gpu = |n| Gpu {
            uuid: format!("{name}-g{n}"),
            name: String::new(),
            memory_total_mib: 0,
            fault: String::new(),
        };
        let node = Node { zone: zone.to_owned(), gpus: (0..gpus).map(gpu).collect(), lost_since: None };
        self.nodes.insert(name.to_owned(), node);
    }

    pub(super) fn deploy(&mut self, model: &str, replicas: u32, gpus_per_replica: u32, version: &str) {
        let spec = EngineSpec {
            engine: "sim".into(),
            model_path: version.into(),
            args: vec![],
            env: BTreeMap::new(),
            gpus_per_replica,
            lora: vec![],
        };
        let deployment = Deployment { model: model.into(), replicas, spec, created_unix_s: 0 };
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
        if a.phase == Phase::Leaving || self.nodes.get(&a.node_id).is_none_or(|n| n.lost_since.is_some()) {
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
        };
        self.registered.insert(id.to_owned(), endpoint);
    }

    pub(super) fn ready_all(&mut self) {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let ids: Vec<String> = all.map(|a| a.replica_id.clone()).collect();
        ids.iter().for_each(|id| self.ready(id));
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

    /// Runs one command of a script and says what came of it.
    pub(super) fn command(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{line:?}: {text:?} is no number"));
        match words.as_slice() {
            ["node", name, "zone", zone, "gpus", gpus] => self.add_node(name, zone, number(gpus) as usize),
            ["deploy", model, "replicas", replicas, "gpus", gpus, "version", version] => {
                self.deploy(model, number(replicas), number(gpus), version);
            }
            ["delete", model] => drop(self.deployments.remove(*model)),
            ["ready"] => self.ready_all(),
            ["ready", id] => self.ready(id),
            ["end"] => self.end_leaving(),
            ["lose", node] => self.lose(node),
            ["return", node] => self.nodes.get_mut(*node).unwrap().lost_since = None,
            ["fault", node, gpu] => {
                self.nodes.get_mut(*node).unwrap().gpus[number(gpu) as usize].fault = "XID 79".into()
            }
            ["wait", seconds] => self.pass_time(u64::from(number(seconds))),
            ["report", id, state, reason @ ..] => self.report(id, state, &reason.join(" ")),
            ["plan"] => return self.planned(),
            _ => panic!("no such command: {line:?}"),
        }
        String::new()
    }

    fn report(&mut self, id: &str, state: &str, reason: &str) {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let generation = all.into_iter().find(|a| a.replica_id == id).unwrap().generation;
        let state = [EngineState::Loading, EngineState::Failed, EngineState::Ready]
            .into_iter()
            .find(|s| s.as_str() == state)
            .unwrap();
        let engine = EngineObserved {
            generation,
            state,
            address: String::new(),
            pid: 0,
            restarts: 0,
            reason: reason.to_owned(),
            running: 0,
            waiting: 0,
            kv_used_ratio: 0.0,
        };
        self.engines.insert(id.to_owned(), engine);
    }

    fn planned(&mut self) -> String {
        let plan = self.plan();
        let mut out = String::new();
        for action in &plan.actions {
            out.push_str(&match action {
                Action::Place { replica_id, node_id, generation } => {
                    format!("place {replica_id} on {node_id}, generation {generation}\n")
                }
                Action::Withdraw { replica_id, node_id, reason } => {
                    format!("withdraw {replica_id} from {node_id}: {reason}\n")
                }
                Action::Forget { replica_id } => format!("forget {replica_id}\n"),
            });
        }
        for (model, sentences) in &plan.report {
            sentences.iter().for_each(|sentence| out.push_str(&format!("  {model}: {sentence}\n")));
        }
        self.apply(plan);
        if out.is_empty() { "settled\n".into() } else { out }
    }
}
