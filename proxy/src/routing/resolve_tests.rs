use proptest::prelude::*;

use super::*;

fn target(pool: &str, weight: u32) -> Arc<Target> {
    Arc::new(Target { pool: pool.into(), served_model: pool.into(), weight, adapter: None })
}

fn route(model: &str, targets: &[(&str, u32)], fallbacks: &[&str]) -> (String, Arc<Route>) {
    let route = Route {
        model: model.into(),
        targets: targets.iter().map(|(pool, weight)| target(pool, *weight)).collect(),
        fallbacks: fallbacks.iter().map(|name| (*name).into()).collect(),
        parent: String::new(),
        created_unix_s: 0,
    };
    (model.into(), Arc::new(route))
}

fn key() -> HashKey {
    HashKey::from_secret("a fixed one")
}

fn pools(routes: &BTreeMap<String, Arc<Route>>, model: &str, draw: u64) -> Vec<String> {
    let steps = resolve(routes, model, key(), draw).expect("a route");
    steps.iter().map(|step| step.target.pool.to_string()).collect()
}

fn first(routes: &BTreeMap<String, Arc<Route>>, draw: u64) -> String {
    pools(routes, "m", draw).swap_remove(0)
}

fn split(weights: &[(&str, u32)]) -> BTreeMap<String, Arc<Route>> {
    BTreeMap::from([route("m", weights, &[])])
}

#[test]
fn a_name_that_nobody_has_leads_nowhere() {
    assert_eq!(resolve(&BTreeMap::new(), "m", key(), 1), None);
}

#[test]
fn fallbacks_come_in_order_each_with_its_own_and_no_name_twice() {
    let routes = BTreeMap::from([
        route("m", &[("m", 1)], &["b", "gone", "c"]),
        route("b", &[("b", 1)], &["d", "m"]),
        route("c", &[("c", 1)], &["b"]),
        route("d", &[("d", 1)], &["d"]),
    ]);
    assert_eq!(pools(&routes, "m", 9), ["m", "b", "d", "c"]);
    let steps = resolve(&routes, "m", key(), 9).expect("a route");
    assert_eq!(steps.iter().map(|step| step.fallback).collect::<Vec<_>>(), [false, true, true, true]);
}

#[test]
fn depth_is_bounded() {
    let name = |n: usize| format!("m{n}");
    let chain = (0..20).map(|n| route(&name(n), &[(&name(n), 1)], &[&name(n + 1)])).collect();
    assert_eq!(pools(&chain, "m0", 1), ["m0", "m1", "m2", "m3", "m4"]);
}

#[test]
fn a_target_without_weight_gets_nothing_unless_nobody_has_any() {
    for draw in 0..200 {
        assert_eq!(pools(&split(&[("a", 0), ("b", 5)]), "m", draw), ["b"]);
    }
    let both = split(&[("a", 0), ("b", 0)]);
    let firsts: std::collections::BTreeSet<String> = (0..200).map(|draw| first(&both, draw)).collect();
    assert_eq!(firsts.len(), 2, "both share what there is");
    assert!(resolve(&split(&[]), "m", key(), 1).expect("a route").is_empty());
}

#[test]
fn shares_follow_the_weights() {
    let routes = split(&[("a", 90), ("b", 10)]);
    let mut rng = fastrand::Rng::with_seed(7);
    let b = (0..20_000).filter(|_| first(&routes, rng.u64(..)) == "b").count();
    assert!((1_800..2_200).contains(&b), "{b} of 20000, 2000 expected");
}

#[test]
fn a_change_of_weights_moves_only_the_sessions_that_it_must() {
    let (before, after) = (split(&[("a", 90), ("b", 10)]), split(&[("a", 80), ("b", 20)]));
    let mut rng = fastrand::Rng::with_seed(8);
    let mut moved = 0;
    for _ in 0..10_000 {
        let draw = rng.u64(..);
        let (was, is) = (first(&before, draw), first(&after, draw));
        assert!(was == is || is == "b", "nobody moves against the change");
        moved += usize::from(was != is);
    }
    assert!((850..1_150).contains(&moved), "{moved} of 10000, 1000 expected");
}

#[test]
fn a_target_that_goes_takes_only_its_own_sessions_with_it() {
    let (before, after) = (split(&[("a", 50), ("b", 30), ("c", 20)]), split(&[("a", 50), ("b", 30)]));
    for draw in 0..2_000 {
        let (was, is) = (pools(&before, "m", draw), first(&after, draw));
        let expected = was.iter().find(|pool| *pool != "c").expect("one is left");
        assert_eq!(*expected, is, "the next in line takes over");
    }
}

proptest! {
    #[test]
    fn whatever_the_tables_say_a_plan_is_bounded_and_names_no_place_twice(
        edges in prop::collection::vec((0usize..12, prop::collection::vec(0usize..12, 0..6), prop::collection::vec((0usize..12, 0u32..9), 0..5)), 0..12),
        draw in any::<u64>(),
    ) {
        let name = |n: &usize| format!("m{n}");
        let routes: BTreeMap<_, _> = edges.iter().map(|(model, fallbacks, targets)| {
            let targets: Vec<_> = targets.iter().map(|(pool, weight)| (name(pool), *weight)).collect();
            let targets: Vec<_> = targets.iter().map(|(pool, weight)| (pool.as_str(), *weight)).collect();
            let fallbacks: Vec<_> = fallbacks.iter().map(name).collect();
            let fallbacks: Vec<_> = fallbacks.iter().map(String::as_str).collect();
            route(&name(model), &targets, &fallbacks)
        }).collect();
        for model in routes.keys() {
            let once = pools(&routes, model, draw);
            prop_assert!(once.len() <= MAX_STEPS);
            let distinct: std::collections::BTreeSet<_> = once.iter().collect();
            prop_assert_eq!(distinct.len(), once.len());
            prop_assert_eq!(&pools(&routes, model, draw), &once, "the same draw, the same plan");
        }
    }
}
