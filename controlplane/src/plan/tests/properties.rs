//! What holds whatever happens: random fleets, random histories.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::world::World;
use crate::{
    model::{
        Deployment, EngineState, NodePolicy, Phase, Policy,
        policy::{Resources, Taint, TaintEffect},
    },
    plan::Action,
};

#[derive(Debug, Clone)]
enum Happening {
    Deploy { model: u8, replicas: u32, gpus: u32, version: u8 },
    Delete { model: u8 },
    Ready,
    ReadyOne { model: u8, ordinal: u8 },
    End,
    Lose { node: u8 },
    Return { node: u8 },
    Fault { node: u8, gpu: u8 },
    Mend,
    Wait { seconds: u8 },
    Node { node: u8, gpus: u8 },
    Cordon { node: u8, maintenance: bool },
    Uncordon { node: u8 },
    Taint { node: u8, effect: TaintEffect },
    Policy { model: u8, surge: u32, unavailable: u32, min_available: Option<u32>, paused: bool },
    Share { model: u8, gib: u64 },
    Drain { model: u8, ordinal: u8 },
    Fail { model: u8, ordinal: u8 },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0..3_u8, 0..6_u32, 1..3_u32, 0..3_u8)
            .prop_map(|(model, replicas, gpus, version)| Happening::Deploy { model, replicas, gpus, version }),
        1 => (0..3_u8).prop_map(|model| Happening::Delete { model }),
        3 => Just(Happening::Ready),
        3 => (0..3_u8, 0..8_u8).prop_map(|(model, ordinal)| Happening::ReadyOne { model, ordinal }),
        3 => Just(Happening::End),
        1 => (0..4_u8).prop_map(|node| Happening::Lose { node }),
        1 => (0..4_u8).prop_map(|node| Happening::Return { node }),
        1 => (0..4_u8, 0..4_u8).prop_map(|(node, gpu)| Happening::Fault { node, gpu }),
        1 => Just(Happening::Mend),
        2 => (0..40_u8).prop_map(|seconds| Happening::Wait { seconds }),
        1 => (0..4_u8, 0..5_u8).prop_map(|(node, gpus)| Happening::Node { node, gpus }),
        1 => (0..4_u8, any::<bool>())
            .prop_map(|(node, maintenance)| Happening::Cordon { node, maintenance }),
        2 => (0..4_u8).prop_map(|node| Happening::Uncordon { node }),
        1 => (0..4_u8, prop_oneof![
            Just(TaintEffect::PreferNoSchedule), Just(TaintEffect::NoSchedule), Just(TaintEffect::NoExecute),
        ]).prop_map(|(node, effect)| Happening::Taint { node, effect }),
        2 => (0..3_u8, 0..3_u32, 0..3_u32, proptest::option::of(0..4_u32), any::<bool>()).prop_map(
            |(model, surge, unavailable, min_available, paused)| {
                let unavailable = if surge == 0 { unavailable.max(1) } else { unavailable };
                Happening::Policy { model, surge, unavailable, min_available, paused }
            }
        ),
        1 => (0..3_u8, 10..50_u64).prop_map(|(model, gib)| Happening::Share { model, gib }),
        1 => (0..3_u8, 0..8_u8).prop_map(|(model, ordinal)| Happening::Drain { model, ordinal }),
        1 => (0..3_u8, 0..8_u8).prop_map(|(model, ordinal)| Happening::Fail { model, ordinal }),
    ]
}

fn happen(world: &mut World, happening: &Happening) {
    match happening {
        Happening::Deploy { model, replicas, gpus, version } => {
            world.deploy(&format!("m{model}"), *replicas, *gpus, &format!("v{version}"));
        }
        Happening::Delete { model } => drop(world.deployments.remove(&format!("m{model}"))),
        Happening::Ready => world.ready_all(),
        Happening::ReadyOne { model, ordinal } => world.ready(&format!("m{model}-{ordinal}")),
        Happening::End => world.end_leaving(),
        Happening::Lose { node } => world.lose(&format!("n{node}")),
        Happening::Return { node } => {
            if let Some(node) = world.nodes.get_mut(&format!("n{node}")) {
                node.lost_since = None;
            }
        }
        Happening::Fault { node, gpu } => {
            let node = world.nodes.get_mut(&format!("n{node}"));
            if let Some(gpu) = node.and_then(|node| node.gpus.get_mut(usize::from(*gpu))) {
                gpu.fault = "broken".into();
            }
        }
        Happening::Mend => {
            world.nodes.values_mut().flat_map(|n| &mut n.gpus).for_each(|gpu| gpu.fault.clear());
        }
        Happening::Wait { seconds } => world.pass_time(u64::from(*seconds)),
        Happening::Cordon { node, maintenance } => {
            if let Some(node) = world.nodes.get_mut(&format!("n{node}")) {
                (node.policy.cordoned, node.policy.maintenance) = (!maintenance, *maintenance);
            }
        }
        Happening::Uncordon { node } => {
            if let Some(node) = world.nodes.get_mut(&format!("n{node}")) {
                node.policy = NodePolicy::default();
            }
        }
        Happening::Taint { node, effect } => {
            if let Some(node) = world.nodes.get_mut(&format!("n{node}")) {
                node.policy.taints = vec![Taint { key: "t".into(), value: String::new(), effect: *effect }];
            }
        }
        Happening::Policy { model, surge, unavailable, min_available, paused } => {
            if let Some(deployment) = world.deployments.get_mut(&format!("m{model}")) {
                let rollout = &mut deployment.policy.rollout;
                (rollout.max_surge, rollout.max_unavailable) = (*surge, *unavailable);
                rollout.paused = *paused;
                deployment.policy.disruption.min_available = *min_available;
            }
        }
        Happening::Share { model, gib } => {
            let model = format!("m{model}");
            if world.deployments.contains_key(&model) {
                world.ask_memory(&model, *gib, true);
            }
        }
        Happening::Drain { model, ordinal } => {
            let id = format!("m{model}-{ordinal}");
            if world.registered.contains_key(&id) {
                world.drained.insert(id);
            }
        }
        Happening::Fail { model, ordinal } => {
            let id = format!("m{model}-{ordinal}");
            if world.placements.values().any(|p| p.find(&id).is_some()) {
                world.report(&id, EngineState::Failed, 5, "it does not start");
            }
        }
        Happening::Node { node, gpus } => {
            let name = format!("n{node}");
            if !world.nodes.contains_key(&name) {
                world.add_node(&name, &format!("z{}", node % 2), usize::from(*gpus));
            }
        }
    }
}

/// No GPU has two replicas, unless both share it and it has the memory; ids and generations are unique; every replica
/// has the GPUs of its spec.
fn check_placements(world: &World) -> Result<(), TestCaseError> {
    let (mut ids, mut generations) = (BTreeSet::new(), BTreeSet::new());
    let mut gpus: BTreeMap<(&str, &str), Vec<&Resources>> = BTreeMap::new();
    for a in world.placements.values().flat_map(|p| &p.assignments) {
        prop_assert!(ids.insert(&a.replica_id), "{} is placed twice", a.replica_id);
        prop_assert!(generations.insert(a.generation));
        let own: BTreeSet<_> = a.gpu_uuids.iter().collect();
        prop_assert_eq!(own.len(), a.spec.gpus_per_replica as usize);
        for gpu in &a.gpu_uuids {
            gpus.entry((&a.node_id, gpu)).or_default().push(&a.spec.resources);
        }
    }
    for ((_, gpu), held) in gpus {
        let sum: u64 = held.iter().map(|r| r.gpu_memory_bytes).sum();
        let all_share = held.iter().all(|r| r.share_gpu);
        prop_assert!(held.len() == 1 || all_share, "{gpu} has two replicas");
        prop_assert!(sum <= 80 << 30, "{gpu} has no {sum} bytes");
    }
    Ok(())
}

/// A node takes a new replica only if it may.
fn check_place(world: &World, node_id: &str) -> Result<(), TestCaseError> {
    let node = &world.nodes[node_id];
    prop_assert!(node.lost_since.is_none() && !node.policy.cordoned && !node.policy.maintenance);
    prop_assert!(node.policy.taints.iter().all(|t| t.effect == TaintEffect::PreferNoSchedule));
    Ok(())
}

/// Registered, for the present generation of an active assignment, and not drained.
fn is_available(world: &World, id: &str) -> bool {
    let find = |p: &crate::model::Placement| p.find(id).cloned();
    let assignment = world.placements.values().find_map(find);
    let registered = world.registered.get(id).map(|e| e.generation);
    !world.drained.contains(id)
        && assignment.is_some_and(|a| a.phase == Phase::Active && registered == Some(a.generation))
}

/// What voluntary changes must leave.
fn floor(deployment: &Deployment) -> usize {
    let Deployment { replicas, policy, .. } = deployment;
    let floor = match policy.disruption.min_available {
        Some(budget) => budget.min(*replicas),
        // A rollout without room takes one more.
        None => replicas.saturating_sub(policy.rollout.max_unavailable.max(1)),
    };
    floor as usize
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_is_safe_and_settles(
        history in proptest::collection::vec(happening(), 1..60)
    ) {
        let mut world = World::default();
        for node in 0..3_u8 {
            world.add_node(&format!("n{node}"), &format!("z{}", node % 2), 3);
        }
        let mut used_ids: BTreeSet<String> = BTreeSet::new();
        for event in &history {
            happen(&mut world, event);
            let plan = world.plan();
            let mut taken_from: BTreeMap<String, usize> = BTreeMap::new();
            for action in &plan.actions {
                match action {
                    Action::Place { replica_id, node_id, .. } => {
                        prop_assert!(used_ids.insert(replica_id.clone()), "{replica_id} was used before");
                        check_place(&world, node_id)?;
                    }
                    Action::Withdraw { replica_id, .. } if is_available(&world, replica_id) => {
                        let model = &world.registered[replica_id].model;
                        *taken_from.entry(model.clone()).or_default() += 1;
                    }
                    _ => {}
                }
            }
            for (model, taken) in taken_from {
                let Some(deployment) = world.deployments.get(&model) else { continue };
                let ids = world.placements[&model].assignments.iter().map(|a| &a.replica_id);
                let before = ids.filter(|id| is_available(&world, id)).count();
                let floor = floor(deployment);
                prop_assert!(before - taken >= floor, "{model}: {taken} of {before} taken, {floor} must stay");
            }
            world.apply(plan);
            check_placements(&world)?;
            let again = world.plan();
            prop_assert!(again.actions.is_empty(), "{event:?}: not settled: {:?}", again.actions);
            prop_assert!(again.changes.is_empty());
            if world.deployments.is_empty() && world.placements.is_empty() {
                used_ids.clear();
            }
            used_ids.retain(|id| {
                let model = id.rsplit_once('-').map_or("", |(model, _)| model);
                world.placements.contains_key(model) || world.deployments.contains_key(model)
            });
        }
    }

    #[test]
    fn a_fleet_with_room_ends_as_wanted(
        history in proptest::collection::vec(happening(), 1..30)
    ) {
        let mut world = World::default();
        for event in &history {
            happen(&mut world, event);
            let plan = world.plan();
            world.apply(plan);
        }
        happen(&mut world, &Happening::Mend);
        for node in world.nodes.values_mut() {
            (node.lost_since, node.policy) = (None, NodePolicy::default());
        }
        world.deployments.values_mut().for_each(|d| d.policy = Policy::default());
        world.engines.clear();
        for n in 0..4 {
            world.add_node(&format!("roomy{n}"), "z9", 16);
        }
        for _ in 0..60 {
            let plan = world.plan();
            world.apply(plan);
            world.ready_all();
            world.end_leaving();
        }
        for (model, deployment) in &world.deployments {
            let placement = world.placements.get(model);
            let assignments = placement.map(|p| p.assignments.as_slice()).unwrap_or_default();
            prop_assert_eq!(assignments.len(), deployment.replicas as usize, "{}", model);
            prop_assert!(assignments.iter().all(|a| a.phase == Phase::Active && a.spec == deployment.spec));
        }
        prop_assert!(world.placements.keys().all(|model| world.deployments.contains_key(model)));
        // Bounded movement: more room moves nothing.
        world.add_node("another", "z10", 16);
        prop_assert!(world.plan().actions.is_empty());
    }
}
