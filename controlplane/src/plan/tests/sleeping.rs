//! What holds of sleepers whatever happens: random fleets of models that may sleep.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{super::Load, world::World};
use crate::{
    model::{Phase, Policy},
    plan::{Action, Demand},
};

#[derive(Debug, Clone)]
enum Happening {
    Deploy { model: u8, sleepy: bool, gpus: u32, version: u8 },
    Delete { model: u8 },
    Ready,
    Rest,
    End,
    Ask { model: u8, queued: u32 },
    Busy { model: u8, waiting: u64 },
    Wait { seconds: u8 },
    Lose { node: u8 },
    Return { node: u8 },
    Maintain { node: u8, on: bool },
    Fail { model: u8, ordinal: u8 },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        3 => (0..3_u8, any::<bool>(), 1..3_u32, 0..2_u8)
            .prop_map(|(model, sleepy, gpus, version)| Happening::Deploy { model, sleepy, gpus, version }),
        1 => (0..3_u8).prop_map(|model| Happening::Delete { model }),
        4 => Just(Happening::Ready),
        4 => Just(Happening::Rest),
        3 => Just(Happening::End),
        3 => (0..3_u8, 0..3_u32).prop_map(|(model, queued)| Happening::Ask { model, queued }),
        3 => (0..3_u8, 0..30_u64).prop_map(|(model, waiting)| Happening::Busy { model, waiting }),
        6 => (0..80_u8).prop_map(|seconds| Happening::Wait { seconds }),
        1 => (0..2_u8).prop_map(|node| Happening::Lose { node }),
        2 => (0..2_u8).prop_map(|node| Happening::Return { node }),
        1 => (0..2_u8, any::<bool>()).prop_map(|(node, on)| Happening::Maintain { node, on }),
        1 => (0..3_u8, 0..6_u8).prop_map(|(model, ordinal)| Happening::Fail { model, ordinal }),
    ]
}

fn happen(world: &mut World, happening: &Happening) {
    let name = |model: &u8| format!("m{model}");
    match happening {
        Happening::Deploy { model, sleepy, gpus, version } => {
            let model = name(model);
            world.deploy(&model, 1, *gpus, &format!("v{version}"));
            world.may_sleep(&model, u32::from(*sleepy));
            let policy = r#"{"autoscaling":{"min":0,"max":3,"idle_to_zero_s":30,"up_window_s":10}}"#;
            let policy: Policy = serde_json::from_str(policy).unwrap();
            world.deployments.get_mut(&model).unwrap().policy = policy;
            world.loads.insert(model, Load::default());
        }
        Happening::Delete { model } => drop(world.deployments.remove(&name(model))),
        Happening::Ready => world.ready_all(),
        Happening::Rest => world.fall_asleep(),
        Happening::End => world.end_leaving(),
        Happening::Ask { model, queued: 0 } => drop(world.demands.remove(&name(model))),
        Happening::Ask { model, queued } => {
            world.demands.insert(name(model), Demand { queued: *queued, since: world.now });
        }
        Happening::Busy { model, waiting } => {
            world.loads.insert(name(model), Load { waiting: *waiting, ..Load::default() });
        }
        Happening::Wait { seconds } => world.pass_time(u64::from(*seconds)),
        Happening::Lose { node } => world.lose(&format!("n{node}")),
        Happening::Return { node } => world.nodes.get_mut(&format!("n{node}")).unwrap().lost_since = None,
        Happening::Maintain { node, on } => {
            world.nodes.get_mut(&format!("n{node}")).unwrap().policy.maintenance = *on;
        }
        Happening::Fail { model, ordinal } => {
            let id = format!("m{model}-{ordinal}");
            if world.placements.values().any(|p| p.find(&id).is_some()) {
                world.report(&id, crate::model::EngineState::Failed, 0, "it ended");
            }
        }
    }
}

/// No GPU is two replicas', asleep or not; who sleeps may, as it is.
fn check(world: &World) -> Result<(), TestCaseError> {
    let mut gpus: BTreeMap<(&str, &str), &str> = BTreeMap::new();
    for (model, placement) in &world.placements {
        let mut asleep = 0;
        for a in &placement.assignments {
            for gpu in &a.gpu_uuids {
                let other = gpus.insert((&a.node_id, gpu), &a.replica_id);
                prop_assert!(other.is_none(), "{gpu} has {} and {other:?}", a.replica_id);
            }
            if a.asleep {
                asleep += 1;
                prop_assert!(a.phase == Phase::Active);
                let deployment = world.deployments.get(model);
                prop_assert!(deployment.is_some_and(|d| d.spec == a.spec && d.spec.warm.sleep.is_some()));
            }
        }
        prop_assert!(asleep <= 3, "{asleep} of {model} sleep");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sleepers_hold_nobody_up_and_every_plan_settles(
        history in proptest::collection::vec(happening(), 1..80)
    ) {
        let mut world = World::default();
        for node in 0..2_u8 {
            world.add_node(&format!("n{node}"), "z", 2);
        }
        for event in &history {
            happen(&mut world, event);
            let asleep_before = |world: &World, id: &str| {
                world.placements.values().find_map(|p| p.find(id)).is_some_and(|a| a.asleep)
            };
            let plan = world.plan();
            for action in &plan.actions {
                match action {
                    Action::Wake { replica_id, .. } => prop_assert!(asleep_before(&world, replica_id)),
                    Action::Sleep { replica_id, .. } => {
                        prop_assert!(world.registered.contains_key(replica_id), "{replica_id} serves nobody");
                        prop_assert!(!asleep_before(&world, replica_id));
                    }
                    _ => {}
                }
            }
            world.apply(plan);
            check(&world)?;
            let again = world.plan();
            prop_assert!(again.actions.is_empty(), "{event:?}: not settled: {:?}", again.actions);
        }
        // Everybody asks for one replica, there is room for all that they may have, and nothing stands in the way.
        for node in world.nodes.values_mut() {
            node.lost_since = None;
            node.policy.maintenance = false;
        }
        world.add_node("n9", "z", 18);
        let names: Vec<String> = world.deployments.keys().cloned().collect();
        for name in &names {
            world.loads.insert(name.clone(), Load { running: 1, ..Load::default() });
            world.demands.insert(name.clone(), Demand { queued: 1, since: world.now });
        }
        world.engines.clear();
        for _ in 0..12 {
            let plan = world.plan();
            world.apply(plan);
            world.end_leaving();
            world.ready_all();
            world.pass_time(1);
        }
        for name in &names {
            let serving = world.placements.get(name).map_or(0, |p| {
                p.assignments.iter().filter(|a| !a.asleep && world.registered.contains_key(&a.replica_id)).count()
            });
            prop_assert!(serving >= 1, "{name} has nobody");
        }
    }
}
