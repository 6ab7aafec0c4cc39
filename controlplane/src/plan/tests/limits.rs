//! Caps, and what a plan costs.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::world::World;
use crate::{model::Phase, plan::Action};

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_fleet_gets_there_by_bounded_steps(
        nodes in proptest::collection::vec((0..3_u8, 1..9_usize), 1..10),
        models in proptest::collection::vec((0..12_u32, 1..3_u32, 0..12_u32), 1..6),
        starts in 1..6_usize,
        stops in 1..6_usize,
    ) {
        let mut world = World::default();
        for (n, (zone, gpus)) in nodes.iter().enumerate() {
            world.add_node(&format!("n{n}"), &format!("z{zone}"), *gpus);
        }
        world.rules.max_starts = starts;
        world.rules.max_stops = stops;
        // To one wish, then to another: more or fewer, and a new version of every second model.
        for round in 0..2 {
            for (n, (before, gpus, after)) in models.iter().enumerate() {
                let replicas = if round == 0 { *before } else { *after };
                let version = if round == 1 && n % 2 == 0 { "v2" } else { "v1" };
                world.deploy(&format!("m{n}"), replicas, *gpus, version);
            }
            let mut settled = 0;
            for _ in 0..200 {
                let plan = world.plan();
                let placed = plan.actions.iter().filter(|a| matches!(a, Action::Place { .. })).count();
                let ended = plan.actions.iter().filter(|a| matches!(a, Action::Withdraw { .. })).count();
                prop_assert!(placed <= starts && ended <= stops, "{placed} starts and {ended} stops");
                settled = if plan.actions.is_empty() { settled + 1 } else { 0 };
                world.apply(plan);
                world.ready_all();
                world.end_leaving();
            }
            prop_assert!(settled > 3, "it does not settle");
        }
        for (model, deployment) in &world.deployments {
            let all = world.placements.get(model).map(|p| p.assignments.as_slice()).unwrap_or_default();
            prop_assert!(all.len() <= deployment.replicas as usize);
            prop_assert!(all.iter().all(|a| a.phase == Phase::Active));
        }
    }
}

/// 1,000 nodes with 10 GPUs each, 100 models with 100 replicas each. Measured without optimisation on two busy cores:
/// see `docs/placement.md`. The bounds here are wide: they catch a cost that grows with the square, not a slow machine.
#[test]
fn ten_thousand_replicas_on_a_thousand_nodes_are_planned_in_time() {
    let mut world = World::default();
    for n in 0..1_000 {
        world.add_node(&format!("n{n:04}"), &format!("z{}", n % 3), 10);
    }
    for m in 0..100 {
        world.deploy(&format!("m{m:03}"), 100, 1, "v1");
    }
    (world.rules.max_starts, world.rules.max_stops) = (usize::MAX, usize::MAX);
    let measure = |world: &mut World, what: &str| -> usize {
        let started = Instant::now();
        let plan = world.plan();
        let (took, actions) = (started.elapsed(), plan.actions.len());
        println!("{what}: {actions} actions in {took:?}");
        assert!(took < Duration::from_secs(60), "{what} took {took:?}");
        world.apply(plan);
        actions
    };
    assert_eq!(measure(&mut world, "all replicas at once"), 10_000);
    world.ready_all_quickly();
    assert_eq!(measure(&mut world, "nothing to do"), 0);
    world.lose("n0000");
    world.pass_time(30);
    assert!(measure(&mut world, "a node lost, no room") == 0);
    world.add_node("spare", "z0", 10);
    assert!(measure(&mut world, "a node lost, room") >= 20);
    for m in 0..100 {
        world.deploy(&format!("m{m:03}"), 100, 1, "v2");
    }
    measure(&mut world, "a new version of everything");
}
