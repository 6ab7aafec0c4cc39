use proptest::prelude::*;

use super::*;

const ALL: [Policy; 5] = [
    Policy::LeastLoaded,
    Policy::PowerOfTwo,
    Policy::RoundRobin,
    Policy::PrefixAffinity,
    Policy::SessionAffinity,
];

fn rules(policy: Policy) -> Rules {
    Rules { policy, bound: LoadBound { percent: 150, floor: 4 }, zone_spill: 4, prefix_entries: 64 }
}

fn views(loads: &[u32]) -> Vec<View> {
    let key = |index: usize| (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    loads
        .iter()
        .enumerate()
        .map(|(index, load)| View { key: key(index), load: *load, own: *load, ..View::default() })
        .collect()
}

fn first(rules: &Rules, views: &[View], asked: &Asked<'_>, memory: &Memory) -> Option<(usize, How)> {
    choose(rules, views, asked, memory, &mut |_| 0)
}

#[test]
fn nobody_is_chosen_of_none() {
    for policy in ALL {
        let asked = Asked { session: Some(1), prefix: &[1], adapter: None };
        assert_eq!(first(&rules(policy), &[], &asked, &Memory::default()), None, "{policy:?}");
    }
}

#[test]
fn round_robin_takes_turns() {
    let memory = Memory::default();
    let turns =
        (0..6).map(|_| first(&rules(Policy::RoundRobin), &views(&[9, 0, 0]), &Asked::default(), &memory));
    assert_eq!(turns.map(|turn| turn.expect("one").0).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn power_of_two_takes_the_better_of_two_different_ones() {
    let views = views(&[5, 3, 1, 0]);
    let with = |mut dice: Vec<usize>| {
        choose(&rules(Policy::PowerOfTwo), &views, &Asked::default(), &Memory::default(), &mut |n| {
            dice.pop().unwrap_or_default() % n
        })
    };
    assert_eq!(with(vec![0, 0]), Some((1, How::Balanced)));
    assert_eq!(with(vec![1, 3]), Some((3, How::Balanced)), "index 3, and two further, 1: the better is 3");
    assert_eq!(with(vec![2, 0]), Some((3, How::Balanced)));
}

#[test]
fn a_request_stays_in_its_zone_until_home_is_busier_by_more_than_the_spill() {
    let chosen = |near: u32, far: u32| {
        let mut views = views(&[far, near]);
        views[0].near = false;
        first(&rules(Policy::LeastLoaded), &views, &Asked::default(), &Memory::default()).expect("one").0
    };
    assert_eq!(chosen(0, 0), 1);
    assert_eq!(chosen(4, 0), 1);
    assert_eq!(chosen(5, 0), 0);
    assert_eq!(chosen(10, 6), 1);
    let mut elsewhere = views(&[3, 2]);
    elsewhere.iter_mut().for_each(|view| view.near = false);
    let only = first(&rules(Policy::LeastLoaded), &elsewhere, &Asked::default(), &Memory::default());
    assert_eq!(only, Some((1, How::Balanced)), "with nobody at home the zone is no matter");
}

#[test]
fn a_young_endpoint_is_not_flooded() {
    let mut views = views(&[5, 0]);
    views[1].weight = FULL_WEIGHT / 10;
    let chosen = first(&rules(Policy::LeastLoaded), &views, &Asked::default(), &Memory::default());
    assert_eq!(chosen, Some((0, How::Balanced)));
}

#[test]
fn a_prompt_returns_to_who_has_its_prefix_until_that_one_is_too_busy() {
    let (rules, memory) = (rules(Policy::PrefixAffinity), Memory::default());
    let asked = Asked { prefix: &[11, 12], ..Asked::default() };
    assert_eq!(first(&rules, &views(&[1, 0, 1]), &asked, &memory), Some((1, How::Balanced)));
    assert_eq!(first(&rules, &views(&[0, 3, 0]), &asked, &memory), Some((1, How::Affine)));
    let longer = Asked { prefix: &[11, 12, 13], ..Asked::default() };
    assert_eq!(first(&rules, &views(&[0, 3, 0]), &longer, &memory), Some((1, How::Affine)));
    assert_eq!(first(&rules, &views(&[1, 9, 0]), &longer, &memory), Some((2, How::Spilled)));
    assert_eq!(
        first(&rules, &views(&[0, 3, 1]), &longer, &memory),
        Some((2, How::Affine)),
        "now both hold it"
    );
    let without = [views(&[0, 0, 0])[0]];
    assert_eq!(
        first(&rules, &without, &longer, &memory),
        Some((0, How::Balanced)),
        "holders that went are no holders"
    );
}

#[test]
fn a_session_stays_and_leaves_only_for_the_bound_or_a_loss() {
    let (rules, memory) = (rules(Policy::SessionAffinity), Memory::default());
    let asked = Asked { session: Some(0xfeed_beef), ..Asked::default() };
    let all = views(&[0, 0, 0, 0]);
    let (home, how) = first(&rules, &all, &asked, &memory).expect("one");
    assert_eq!(how, How::Affine);
    let mut busy = all.clone();
    busy[home].load = 3;
    assert_eq!(first(&rules, &busy, &asked, &memory), Some((home, How::Affine)));
    busy[home].load = 4;
    let (second, how) = first(&rules, &busy, &asked, &memory).expect("one");
    assert!(second != home && how == How::Spilled);
    let lost: Vec<_> = all.iter().copied().filter(|view| view.key != all[home].key).collect();
    let (third, how) = first(&rules, &lost, &asked, &memory).expect("one");
    assert_eq!(
        (lost[third].key, how),
        (all[second].key, How::Affine),
        "spilled or lost, it is the same next one"
    );
}

#[test]
fn of_ones_own_idlest_and_a_random_other_the_less_busy_by_the_reports_is_taken() {
    let mut views = views(&[0, 1, 2]);
    views[0].load = 9;
    let with = |other: usize| {
        let dice = &mut |n| if n == 3 { other } else { 0 };
        choose(&rules(Policy::LeastLoaded), &views, &Asked::default(), &Memory::default(), dice)
    };
    assert_eq!(with(0), Some((0, How::Balanced)), "against itself");
    assert_eq!(with(1), Some((1, How::Balanced)));
    assert_eq!(with(2), Some((2, How::Balanced)), "not the best of all: of those two");
}

proptest! {
    #[test]
    fn reports_choose_among_endpoints_and_never_leave_a_request_without_one(
        loads in prop::collection::vec((0u32..9, any::<u32>()), 1..20), seed in any::<u64>(),
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut views = views(&loads.iter().map(|(own, _)| *own).collect::<Vec<_>>());
        for (view, (own, foreign)) in views.iter_mut().zip(&loads) {
            view.load = own.saturating_add(*foreign);
        }
        for policy in ALL {
            let asked = Asked { session: Some(1), prefix: &[1], adapter: None };
            let chosen = choose(&rules(policy), &views, &asked, &Memory::default(), &mut |n| rng.usize(0..n));
            prop_assert!(chosen.is_some_and(|(index, _)| index < views.len()), "{policy:?}");
        }
    }

    #[test]
    fn least_loaded_is_never_busier_than_another(loads in prop::collection::vec(0u32..9, 1..20), seed in any::<u64>()) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let rules = rules(Policy::LeastLoaded);
        let chosen = choose(&rules, &views(&loads), &Asked::default(), &Memory::default(), &mut |n| rng.usize(0..n));
        prop_assert_eq!(loads[chosen.expect("one").0], *loads.iter().min().expect("one"));
    }

    #[test]
    fn whatever_is_chosen_is_one_of_the_candidates_and_affinity_keeps_the_bound(
        loads in prop::collection::vec(0u32..40, 1..20), seed in any::<u64>(),
        requests in prop::collection::vec((prop::option::of(any::<u64>()), prop::collection::vec(1u64..6, 0..4)), 1..30),
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        for policy in ALL {
            let (rules, memory) = (rules(policy), Memory::default());
            let mut views = views(&loads);
            for (session, prefix) in &requests {
                let asked = Asked { session: *session, prefix, adapter: None };
                let limit = rules.bound.limit(&views);
                let (index, how) = choose(&rules, &views, &asked, &memory, &mut |n| rng.usize(0..n)).expect("one");
                prop_assert!(index < views.len());
                views[index].load += 1;
                if how == How::Affine {
                    prop_assert!(u64::from(views[index].load) <= limit, "{policy:?} went over {limit}");
                }
            }
        }
    }
}
