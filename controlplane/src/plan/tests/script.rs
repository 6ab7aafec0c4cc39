//! The language of the scripts in `tests/plan/*.txt`: one command a line, and what it brings about.

use std::time::Duration;

use super::{
    super::{Action, Demand, Load},
    world::World,
};
use crate::model::{
    EngineState, Policy,
    policy::{Role, Taint},
};

impl World {
    /// Runs one command of a script and says what came of it.
    pub(super) fn command(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{line:?}: {text:?} is no number"));
        match words.as_slice() {
            ["node", name, "zone", zone, "gpus", gpus] => self.add_node(name, zone, number(gpus) as usize),
            // A node whose GPUs are described one by one: GiB, NUMA node, link group.
            ["node", name, "zone", zone, "with", gpus @ ..] => {
                self.add_node(name, zone, gpus.len());
                for (gpu, said) in self.node(name).gpus.iter_mut().zip(gpus) {
                    let mut parts = said.split('/');
                    gpu.memory_total_mib = u64::from(number(parts.next().unwrap())) * 1024;
                    gpu.numa_node = parts.next().map(number);
                    gpu.link_group = parts.next().unwrap_or_default().to_owned();
                }
            }
            ["deploy", model, "replicas", replicas, "gpus", gpus, "version", version] => {
                self.deploy(model, number(replicas), number(gpus), version);
            }
            ["memory", model, gib, share @ ..] => {
                self.ask_memory(model, u64::from(number(gib)), share == ["shared"]);
            }
            // As in the body of a PUT.
            ["policy", model, ..] => {
                let json = line.splitn(3, ' ').nth(2).unwrap();
                let policy: Policy = serde_json::from_str(json).unwrap_or_else(|e| panic!("{line}: {e}"));
                self.deployments.get_mut(*model).unwrap().policy = policy;
            }
            ["delete", model] => drop(self.deployments.remove(*model)),
            ["ready"] => self.ready_all(),
            ["ready", id] => self.ready(id),
            ["sleep", model, "level", level] => self.may_sleep(model, number(level)),
            ["rest"] => self.fall_asleep(),
            ["end"] => self.end_leaving(),
            ["drain", id] => drop(self.drained.insert((*id).to_owned())),
            ["lose", node] => self.lose(node),
            ["return", node] => self.node(node).lost_since = None,
            ["cordon", node] => self.node(node).policy.cordoned = true,
            ["maintenance", node] => self.node(node).policy.maintenance = true,
            ["uncordon", node] => {
                let policy = &mut self.node(node).policy;
                (policy.cordoned, policy.maintenance) = (false, false);
            }
            ["role", node, role] => self.node(node).policy.role = Role::named(role),
            ["label", node, key, value] => {
                drop(self.node(node).labels.insert((*key).to_owned(), (*value).to_owned()));
            }
            ["taint", node, key, value, effect] => {
                let effect = serde_json::from_value(serde_json::json!(effect)).unwrap();
                let taint = Taint { key: (*key).to_owned(), value: (*value).to_owned(), effect };
                self.node(node).policy.taints.push(taint);
            }
            ["used", node, gpu, gib] => {
                let uuid = format!("{node}-g{gpu}");
                self.node(node).used_mib.insert(uuid, u64::from(number(gib)) * 1024);
            }
            ["fault", node, gpu] => self.node(node).gpus[number(gpu) as usize].fault = "XID 79".into(),
            ["load", model, "running", running, "waiting", waiting, rest @ ..] => {
                let (mut silent, mut ttft_ms) = (0, None);
                for pair in rest.chunks(2) {
                    match pair {
                        ["ttft", ms] => ttft_ms = Some(number(ms)),
                        ["silent", n] => silent = number(n),
                        _ => panic!("{line:?}"),
                    }
                }
                let (running, waiting) = (number(running).into(), number(waiting).into());
                self.loads.insert((*model).into(), Load { reporting: 0, silent, running, waiting, ttft_ms });
            }
            ["queued", model, "0"] => drop(self.demands.remove(*model)),
            ["queued", model, queued] => {
                let demand = Demand { queued: number(queued), since: self.now };
                self.demands.insert((*model).to_owned(), demand);
            }
            ["rebalance", "every", seconds] => {
                self.rebalance = Some(Duration::from_secs(number(seconds).into()));
            }
            ["caps", "starts", starts, "stops", stops] => {
                (self.rules.max_starts, self.rules.max_stops) =
                    (number(starts) as usize, number(stops) as usize);
            }
            ["view", "is", seconds, "old"] => self.view_age = Duration::from_secs(number(seconds).into()),
            ["wait", seconds] => self.pass_time(u64::from(number(seconds))),
            ["report", id, state, "restarts", restarts, reason @ ..] => {
                self.report(id, named(state), number(restarts), &reason.join(" "));
            }
            ["give-up", id, reason @ ..] => self.give_up(id, &reason.join(" ")),
            ["report", id, state, reason @ ..] => self.report(id, named(state), 0, &reason.join(" ")),
            ["gpus", id] => return self.gpus(id),
            ["plan"] => return self.planned(),
            _ => panic!("no such command: {line:?}"),
        }
        String::new()
    }

    fn node(&mut self, name: &str) -> &mut super::world::Node {
        self.nodes.get_mut(name).unwrap_or_else(|| panic!("there is no node {name}"))
    }

    fn gpus(&self, id: &str) -> String {
        let all = self.placements.values().flat_map(|p| &p.assignments);
        let a = all.into_iter().find(|a| a.replica_id == id).unwrap();
        format!("{}\n", a.gpu_uuids.join(" "))
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
                Action::Scale { model, from, to, reason } => {
                    format!("scale {model} from {from} to {to}: {reason}\n")
                }
                Action::Sleep { replica_id, node_id } => format!("sleep {replica_id} on {node_id}\n"),
                Action::Wake { replica_id, node_id } => format!("wake {replica_id} on {node_id}\n"),
                Action::Move { replica_id, node_id, reason } => {
                    format!("move {replica_id} away from {node_id}: {reason}\n")
                }
            });
        }
        for (model, sentences) in &plan.report {
            sentences.iter().for_each(|sentence| out.push_str(&format!("  {model}: {sentence}\n")));
        }
        self.apply(plan);
        if out.is_empty() { "settled\n".into() } else { out }
    }
}

fn named(state: &str) -> EngineState {
    let states = [EngineState::Loading, EngineState::Failed, EngineState::Ready];
    states.into_iter().find(|s| s.as_str() == state).unwrap()
}
