use proptest::prelude::*;

use super::*;
use crate::{
    endpoints::{endpoint::tests::endpoint, reported::Measured},
    error::UpstreamFailure,
    health,
    upstream::retry::RetryBudget,
};

/// Ejects for a second: an engine that answers with errors, or one that does not react.
fn eject(endpoint: &Arc<Endpoint>, failure: UpstreamFailure) {
    let rules = health::Rules { consecutive_failures: 1, ..health::rules(&Default::default()) };
    assert!(endpoint.reserve(0).failed(failure, 0, &rules).is_some());
}

fn with(policy: Policy) -> PickRules {
    let config = RoutingConfig { policy, hash_key: "k".into(), ..RoutingConfig::default() };
    PickRules::new(&config, &QueueConfig::default(), 67, &mut fastrand::Rng::with_seed(1))
}

fn pick_from(
    pool: &Pool,
    tried: &[Arc<str>],
    now_ms: u64,
    chance: impl FnMut(usize) -> usize,
) -> Option<Ticket> {
    let with = with(Policy::LeastLoaded);
    pick(pool, tried, &Asked::default(), now_ms, (&with, &with.rules), chance).ok().map(|(ticket, _)| ticket)
}

fn pool(n: usize) -> Pool {
    Pool {
        endpoints: (0..n).map(|i| endpoint(&format!("e{i}"))).collect(),
        budget: Arc::new(RetryBudget::new(10, 10)),
        resumes: Arc::new(RetryBudget::of_time(10, 10)),
        queue: Arc::default(),
        memory: Arc::default(),
        source: Arc::default(),
    }
}

fn picked(ticket: &Option<Ticket>) -> Option<&str> {
    ticket.as_ref().map(|t| &*t.endpoint().id)
}

#[test]
fn the_least_loaded_wins_and_the_pick_counts_at_once() {
    let pool = pool(3);
    let _busy = (pool.endpoints[0].reserve(0), pool.endpoints[0].reserve(0), pool.endpoints[2].reserve(0));
    let ticket = pick_from(&pool, &[], 0, |_| 0);
    assert_eq!(picked(&ticket), Some("e1"));
    assert_eq!(pool.endpoints[1].inflight(), 1);
}

#[test]
fn tried_draining_and_ejected_endpoints_are_passed_over() {
    let pool = pool(3);
    eject(&pool.endpoints[0], UpstreamFailure::BeforeFirstByte);
    assert_eq!(picked(&pick_from(&pool, &["e1".into()], 10, |_| 0)), Some("e2"));
}

#[test]
fn with_everything_ejected_all_are_tried_rather_than_none() {
    let pool = pool(2);
    for endpoint in &pool.endpoints {
        eject(endpoint, UpstreamFailure::Connect);
    }
    assert!(pick_from(&pool, &[], 10, |_| 0).is_some());
    assert!(in_panic(&pool, 10, 100));
}

/// With three of four engines dead, picks in panic must not go to the dead ones: budgets could not repair that.
#[test]
fn in_panic_those_that_react_are_taken_and_the_dead_are_not() {
    let pool = pool(4);
    (0..3).for_each(|i| eject(&pool.endpoints[i], UpstreamFailure::Connect));
    assert!(in_panic(&pool, 10, 67) && !in_panic(&pool, 1_010, 67));
    for chance in 0..4 {
        assert_eq!(picked(&pick_from(&pool, &[], 10, |n| chance % n)), Some("e3"));
    }
    eject(&pool.endpoints[3], UpstreamFailure::BeforeFirstByte);
    assert_eq!(picked(&pick_from(&pool, &[], 10, |_| 0)), Some("e3"), "errors beat silence");
}

#[test]
fn a_half_open_endpoint_gets_one_request_and_the_rest_go_elsewhere() {
    let pool = pool(2);
    eject(&pool.endpoints[0], UpstreamFailure::BeforeFirstByte);
    let tickets: Vec<_> = (0..9).map(|_| pick_from(&pool, &[], 1_000, |_| 0)).collect();
    let trials = tickets.iter().filter(|ticket| picked(ticket) == Some("e0")).count();
    assert_eq!(trials, 1);
}

#[test]
fn nothing_is_left_once_all_are_tried() {
    let pool = pool(2);
    assert!(pick_from(&pool, &["e0".into(), "e1".into()], 0, |_| 0).is_none());
}

#[test]
fn only_endpoints_that_have_the_adapter_are_asked_for_it() {
    let mut pool = pool(3);
    let has = Arc::get_mut(&mut pool.endpoints[2]).expect("not shared");
    has.adapters.insert("sql".into());
    let with = with(Policy::LeastLoaded);
    let of = |name| {
        let asked = Asked { adapter: Some(name), ..Asked::default() };
        pick(&pool, &[], &asked, 0, (&with, &with.rules), |_| 0).ok().map(|(ticket, _)| ticket)
    };
    assert_eq!(picked(&of("sql")), Some("e2"));
    assert_eq!(picked(&of("other")), None);
}

fn measured(load: u32, at_ms: u64) -> Measured {
    Measured { running: load, waiting: 0, kv_used_permille: 0, at_ms }
}

#[test]
fn a_fresh_report_turns_a_pick_and_an_old_one_does_not() {
    let pool = pool(2);
    let _own = pool.endpoints[1].reserve(0);
    pool.endpoints[0].take_report(measured(9, 0), 0);
    let other = |n| n - 1;
    assert_eq!(picked(&pick_from(&pool, &[], 10, other)), Some("e1"), "nine of others at e0");
    assert_eq!(picked(&pick_from(&pool, &[], 1_000, other)), Some("e0"), "nobody knows any more");
}

/// vLLM's gauges can stay up after a mass abort (its issue 29928): fresh reports of load that is not there. And where
/// the way that reports come is broken, they are old. Neither may stop dispatch.
#[test]
fn reports_that_are_wrong_or_stale_never_stop_dispatch() {
    for age in [0, 500, 1_000_000] {
        let pool = pool(3);
        for endpoint in &pool.endpoints {
            endpoint.take_report(measured(u32::MAX, 0), 0);
        }
        let held: Vec<_> = (0..300).map_while(|n| pick_from(&pool, &[], age, |of| n % of)).collect();
        assert_eq!(held.len(), 300, "aged {age} ms");
        assert!(pool.endpoints.iter().all(|e| e.inflight() > 50), "and nobody is shunned for ever");
    }
    // A queue that is not there either: each engine still gets a request at a time.
    let pool = pool(3);
    for endpoint in &pool.endpoints {
        endpoint.take_report(Measured { waiting: 50, ..measured(16, 0) }, 0);
    }
    for n in 0..300 {
        let ticket = pick_from(&pool, &[], 1, |of| n % of);
        assert!(ticket.is_some(), "request {n}");
    }
}

#[test]
fn a_pool_is_saturated_once_each_endpoint_has_refused_and_until_one_has_room() {
    let pool = pool(2);
    let with = with(Policy::LeastLoaded);
    let pick = |now| pick(&pool, &[], &Asked::default(), now, (&with, &with.rules), |_| 0);
    let held: Vec<_> = pool.endpoints.iter().map(|endpoint| endpoint.reserve(1_000)).collect();
    pool.endpoints.iter().for_each(|endpoint| {
        for _ in 0..saturation::ROW {
            endpoint.reserve(1_000).refused(1_000, &with.limits);
        }
    });
    assert_eq!(pick(1_000).err(), Some(Unpicked::Saturated));
    drop(held);
    assert!(pick(1_000).is_ok());
}

#[test]
fn a_young_endpoint_takes_its_share_by_degrees() {
    let pool = pool(2);
    let age = |endpoint: usize, now: u64| pool.endpoints[endpoint].age_ms(now);
    assert_eq!((age(0, 5), age(0, 60_005)), (0, 60_000), "its life begins at the first pick that sees it");
    let _busy: Vec<_> = (0..3).map(|_| pool.endpoints[0].reserve(0)).collect();
    assert_eq!(
        picked(&pick_from(&pool, &[], 60_005, |_| 0)),
        Some("e0"),
        "three here against a newcomer's tenth"
    );
    assert_eq!(picked(&pick_from(&pool, &[], 120_005, |_| 0)), Some("e1"));
}

#[test]
fn a_model_may_have_its_own_policy_and_prompts_are_hashed_only_for_one_that_asks() {
    let mut with = with(Policy::LeastLoaded);
    assert!(with.chain().is_none());
    with.by_model.insert("m".into(), Policy::PrefixAffinity);
    assert_eq!(with.of("m").policy, Policy::PrefixAffinity);
    assert_eq!(with.of("other").policy, Policy::LeastLoaded);
    assert!(with.chain().is_some());
}

#[test]
fn what_a_pick_looked_at_is_told_in_bounds_and_as_it_was() {
    let mut pool = pool(40);
    Arc::get_mut(&mut pool.endpoints[0]).expect("not shared").draining = true;
    eject(&pool.endpoints[2], UpstreamFailure::BeforeFirstByte);
    let _busy: Vec<_> = pool.endpoints[5..].iter().map(|endpoint| endpoint.reserve(0)).collect();
    let (with, mut seen) = (with(Policy::LeastLoaded), considered::Considered::default());
    let rules = (&with, &with.rules);
    let picked = pick_seen(&pool, &["e1".into()], &Asked::default(), 10, rules, |_| 1, Some(&mut seen));
    let (ticket, _) = picked.expect("some are left");
    assert_eq!((seen.endpoints, seen.candidates, seen.panic), (40, 37, false));
    assert_eq!(seen.out, [("draining", 1), ("tried", 1), ("ejected", 1)]);
    assert_eq!(seen.shown.len(), considered::SHOWN);
    assert_eq!(
        (&*seen.shown[0].id, seen.shown[0].local),
        (&*ticket.endpoint().id, 0),
        "the chosen one, before its pick"
    );
    assert_eq!((&*seen.shown[1].id, seen.shown[2].load), ("e4", 1), "then by load");
    for endpoint in pool.endpoints.iter().filter(|endpoint| !endpoint.is_ejected(10)) {
        eject(endpoint, UpstreamFailure::BeforeFirstByte);
    }
    let picked = pick_seen(&pool, &[], &Asked::default(), 10, rules, |_| 1, Some(&mut seen));
    assert!(picked.is_ok() && seen.panic && seen.shown[0].health == "ejected");
    assert_eq!(seen.out, [("draining", 1)]);
}

#[test]
fn a_record_tells_what_was_reported_and_who_lacks_the_adapter() {
    let mut pool = pool(3);
    Arc::get_mut(&mut pool.endpoints[1]).expect("not shared").adapters.insert("law".into());
    let measured = Measured { running: 7, waiting: 2, kv_used_permille: 500, at_ms: 900 };
    pool.endpoints[1].take_report(measured, 1_000);
    let (with, mut seen) = (with(Policy::LeastLoaded), considered::Considered::default());
    let asked = Asked { adapter: Some("law"), ..Asked::default() };
    let picked = pick_seen(&pool, &[], &asked, 1_300, (&with, &with.rules), |_| 0, Some(&mut seen));
    assert!(picked.is_ok());
    assert_eq!((seen.candidates, &seen.out[..]), (1, &[("no_adapter", 2)][..]));
    let reported = seen.shown[0].reported.expect("a report");
    assert_eq!((reported.running, reported.waiting, reported.age_ms), (7, 2, 400));
    let nobody = considered::Considered::nobody(&pool.endpoints, &[], Some("medicine"), 1_300);
    assert_eq!(nobody.out, [("no_adapter", 3)]);
}

proptest! {
    #[test]
    fn no_policy_ever_picks_what_a_filter_took_out(
        states in prop::collection::vec(0u8..4, 1..12), session in prop::option::of(any::<u64>()),
        prefix in prop::collection::vec(1u64..9, 0..3), seed in any::<u64>(), times in 1usize..6,
    ) {
        let mut pool = pool(states.len());
        let mut tried: Vec<Arc<str>> = vec![];
        for (endpoint, state) in pool.endpoints.iter_mut().zip(&states) {
            match state {
                1 => Arc::get_mut(endpoint).expect("not shared").draining = true,
                2 => tried.push(Arc::clone(&endpoint.id)),
                3 => eject(endpoint, UpstreamFailure::BeforeFirstByte),
                _ => {}
            }
        }
        let mut rng = fastrand::Rng::with_seed(seed);
        let asked = Asked { session, prefix: &prefix, adapter: None };
        for policy in [Policy::LeastLoaded, Policy::PowerOfTwo, Policy::RoundRobin, Policy::PrefixAffinity, Policy::SessionAffinity] {
            let with = with(policy);
            for _ in 0..times {
                let ticket = pick(&pool, &tried, &asked, 10, (&with, &with.rules), |n| rng.usize(0..n));
                let Ok((ticket, _)) = ticket else {
                    prop_assert!(states.iter().all(|s| matches!(s, 1 | 2)));
                    continue;
                };
                let endpoint = ticket.endpoint();
                prop_assert!(!endpoint.draining && !tried.contains(&endpoint.id));
                let free = states.contains(&0);
                let out = states.iter().filter(|s| **s == 3).count() * 100;
                let panic = out > states.iter().filter(|s| **s != 1).count() * 67;
                prop_assert!(!endpoint.is_ejected(10) || panic || !free);
            }
        }
    }

    #[test]
    fn a_pick_is_never_busier_than_another_that_was_free_to_take(
        loads in prop::collection::vec(0usize..6, 1..12), seed in any::<u64>()
    ) {
        let pool = pool(loads.len());
        let mut held = vec![];
        for (endpoint, load) in pool.endpoints.iter().zip(&loads) {
            held.extend((0..*load).map(|_| endpoint.reserve(0)));
        }
        let mut rng = fastrand::Rng::with_seed(seed);
        let ticket = pick_from(&pool, &[], 0, |n| rng.usize(0..n)).expect("one is eligible");
        let least = loads.iter().min().copied().unwrap_or(0);
        prop_assert_eq!(ticket.endpoint().inflight() as usize, least + 1);
    }

    #[test]
    fn an_idle_pool_is_spread(seed in any::<u64>()) {
        let pool = pool(4);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut hits = [0usize; 4];
        for _ in 0..400 {
            let ticket = pick_from(&pool, &[], 0, |n| rng.usize(0..n)).expect("one is eligible");
            let index = pool.endpoints.iter().position(|e| e.id == ticket.endpoint().id).expect("known");
            hits[index] += 1;
        }
        prop_assert!(hits.iter().all(|&h| h > 40), "{:?}", hits);
    }
}
