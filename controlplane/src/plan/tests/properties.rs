//! What holds whatever happens: random fleets, random histories.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::world::World;
use crate::{model::Phase, plan::Action};

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
        Happening::Node { node, gpus } => {
            let name = format!("n{node}");
            if !world.nodes.contains_key(&name) {
                world.add_node(&name, &format!("z{}", node % 2), usize::from(*gpus));
            }
        }
    }
}

/// No GPU has two replicas; ids and generations are unique; every replica has the GPUs of its spec.
fn check_placements(world: &World) -> Result<(), TestCaseError> {
    let (mut gpus, mut ids, mut generations) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for a in world.placements.values().flat_map(|p| &p.assignments) {
        prop_assert!(ids.insert(&a.replica_id), "{} is placed twice", a.replica_id);
        prop_assert!(generations.insert(a.generation));
        prop_assert_eq!(a.gpu_uuids.len(), a.spec.gpus_per_replica as usize);
        for gpu in &a.gpu_uuids {
            prop_assert!(gpus.insert((&a.node_id, gpu)), "{gpu} has two replicas");
        }
    }
    Ok(())
}

/// Ready and active replicas per model.
fn ready(world: &World) -> BTreeMap<String, usize> {
    let count = |p: &crate::model::Placement| {
        let ready = |a: &&crate::model::Assignment| {
            let registered = world.registered.get(&a.replica_id).map(|e| e.generation);
            a.phase == Phase::Active && registered == Some(a.generation)
        };
        p.assignments.iter().filter(ready).count()
    };
    world.placements.iter().map(|(model, p)| (model.clone(), count(p))).collect()
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
            let before = ready(&world);
            let plan = world.plan();
            let mut taken_from: BTreeMap<String, usize> = BTreeMap::new();
            for action in &plan.actions {
                match action {
                    Action::Place { replica_id, .. } => {
                        prop_assert!(used_ids.insert(replica_id.clone()), "{replica_id} was used before");
                    }
                    Action::Withdraw { replica_id, .. } if world.registered.contains_key(replica_id) => {
                        let model = &world.registered[replica_id].model;
                        *taken_from.entry(model.clone()).or_default() += 1;
                    }
                    Action::Withdraw { .. } | Action::Forget { .. } => {}
                }
            }
            // Availability: below what is wanted only one ready replica may go at a time, to make room.
            for (model, taken) in taken_from {
                let Some(deployment) = world.deployments.get(&model) else { continue };
                let left = before[&model] - taken;
                let enough = left >= deployment.replicas as usize;
                let last_step = taken == 1 && before[&model] <= deployment.replicas as usize;
                prop_assert!(enough || last_step, "{model}: {taken} of {} taken", before[&model]);
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
        world.nodes.values_mut().for_each(|node| node.lost_since = None);
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
