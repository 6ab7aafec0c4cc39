//! Autoscaling under loads that swing, and under ones that do not.

use proptest::prelude::*;

use super::world::World;
use crate::{
    model::policy::Autoscaling,
    plan::{Action, Load},
};

const UP_S: u32 = 20;
const DOWN_S: u32 = 60;

fn world(max: u32, replicas: u32) -> World {
    let mut world = World::default();
    world.add_node("a", "z", 32);
    world.deploy("m", replicas, 1, "v1");
    world.deployments.get_mut("m").unwrap().policy.autoscaling = Some(Autoscaling {
        max,
        target_running: 8,
        up_window_s: UP_S,
        down_window_s: DOWN_S,
        ..Autoscaling::default()
    });
    world
}

/// One plan, carried out at once.
fn step(world: &mut World, running: u64, waiting: u64) -> Option<(u32, u32)> {
    world.loads.insert("m".into(), Load { running, waiting, ..Load::default() });
    let plan = world.plan();
    let scaled = plan.actions.iter().find_map(|action| match action {
        Action::Scale { from, to, .. } => Some((*from, *to)),
        _ => None,
    });
    world.apply(plan);
    world.ready_all();
    world.end_leaving();
    scaled
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_load_changes_the_number_only_so_often(
        loads in proptest::collection::vec((0..200_u64, 0..60_u64, 1..15_u64), 10..150),
        replicas in 1..6_u32,
    ) {
        let mut world = world(16, replicas);
        let (mut passed, mut ups, mut downs) = (0, 0, 0);
        for (running, waiting, seconds) in loads {
            if let Some((from, to)) = step(&mut world, running, waiting) {
                prop_assert!((1..=16).contains(&to) && from != to);
                if to > from {
                    ups += 1;
                    prop_assert!(to <= from * 2, "from {from} to {to}");
                } else {
                    downs += 1;
                }
            }
            world.pass_time(seconds);
            passed += seconds;
        }
        prop_assert!(ups <= passed / u64::from(UP_S) + 1, "{ups} steps up in {passed} s");
        prop_assert!(downs <= passed / u64::from(DOWN_S) + 1, "{downs} steps down in {passed} s");
    }

    #[test]
    fn a_steady_load_is_answered_once_and_for_all(running in 0..150_u64, waiting in 0..40_u64, replicas in 1..17_u32) {
        let mut world = world(16, replicas);
        for _ in 0..60 {
            step(&mut world, running, waiting);
            world.pass_time(10);
        }
        for _ in 0..60 {
            prop_assert_eq!(step(&mut world, running, waiting), None, "it swings under a steady load");
            world.pass_time(10);
        }
        let present = world.placements["m"].assignments.len() as u64;
        let needed = running.div_ceil(8).max(waiting.div_ceil(4)).clamp(1, 16);
        prop_assert!(present >= needed, "{present} for a load that needs {needed}");
        prop_assert!(present <= (needed * 2).max(1).max(u64::from(replicas.min(16)).min(needed * 2 + 1)));
    }

    #[test]
    fn a_swing_around_a_threshold_changes_nothing(low in 17..24_u64, high in 17..24_u64) {
        // Three replicas are right for 17 to 24 requests; between the thresholds nothing moves.
        let mut world = world(16, 3);
        for second in 0..300 {
            let running = if second % 2 == 0 { low } else { high };
            prop_assert_eq!(step(&mut world, running, 0), None);
            world.pass_time(1);
        }
    }
}

#[test]
fn a_load_that_swings_faster_than_the_window_changes_nothing() {
    let mut world = world(16, 4);
    for second in 0..600 {
        let running = if second % 10 < 5 { 120 } else { 20 };
        assert_eq!(step(&mut world, running, 0), None, "after {second} s");
        world.pass_time(1);
    }
}
