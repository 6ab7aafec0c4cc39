use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const PAUSE: Duration = Duration::from_millis(200);

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn moved_after(after: u64) -> Order {
    Order { move_after: Some(ms(after)), leave_after: None }
}

fn called(line: &mut Line<u32>, now: Instant) -> Vec<(u32, Leave)> {
    line.call(now, PAUSE)
}

#[test]
fn without_an_order_nobody_is_called() {
    let (mut line, now) = (Line::default(), Instant::now());
    line.join(1);
    assert!(!line.has_order() && called(&mut line, now + ms(1_000_000)).is_empty());
}

#[test]
fn the_first_goes_first_and_the_others_at_the_pace() {
    let (mut line, now) = (Line::default(), Instant::now());
    for who in 0..3 {
        line.join(who);
    }
    line.obey(moved_after(1_000), now);
    assert!(called(&mut line, now + ms(999)).is_empty(), "not yet");
    assert_eq!(called(&mut line, now + ms(1_000)), [(0, Leave::Moved)]);
    assert!(called(&mut line, now + ms(1_199)).is_empty());
    assert_eq!(called(&mut line, now + ms(1_200)), [(1, Leave::Moved)]);
    // One that came while the others leave goes behind them.
    line.join(9);
    assert_eq!(called(&mut line, now + ms(1_400)), [(2, Leave::Moved)]);
    assert_eq!(called(&mut line, now + ms(1_600)), [(9, Leave::Moved)]);
}

#[test]
fn one_that_ends_frees_its_turn_for_the_next() {
    let (mut line, now) = (Line::default(), Instant::now());
    let first = line.join(1);
    line.join(2);
    line.obey(moved_after(0), now);
    line.quit(first);
    assert_eq!(called(&mut line, now), [(2, Leave::Moved)]);
}

#[test]
fn the_same_order_again_does_not_start_the_time_anew_and_an_undrain_ends_it() {
    let (mut line, now) = (Line::default(), Instant::now());
    line.join(1);
    line.obey(moved_after(1_000), now);
    line.obey(moved_after(1_000), now + ms(900));
    // The engine has left the tables; when it is stopped counts from then on.
    line.obey(Order { leave_after: Some(ms(5_000)), ..moved_after(1_000) }, now + ms(950));
    assert_eq!(called(&mut line, now + ms(1_000)), [(1, Leave::Moved)]);
    line.join(2);
    line.obey(Order::default(), now + ms(1_001));
    assert!(!line.has_order() && called(&mut line, now + ms(9_000)).is_empty(), "it may stay");
    assert_eq!(line.waiting.len(), 1);
}

#[test]
fn fenced_all_go_at_once_and_so_does_who_comes_later() {
    let (mut line, now) = (Line::default(), Instant::now());
    for who in 0..100 {
        line.join(who);
    }
    line.obey(Order { move_after: Some(ms(0)), leave_after: Some(ms(300)) }, now);
    assert_eq!(called(&mut line, now).len(), 1);
    let all = called(&mut line, now + ms(300));
    assert!(all.len() == 99 && all.iter().all(|(_, leave)| *leave == Leave::Fenced));
    line.join(7);
    assert_eq!(called(&mut line, now + ms(301)), [(7, Leave::Fenced)]);
}

#[test]
fn turns_that_nobody_took_are_not_saved_up() {
    let (mut line, now) = (Line::default(), Instant::now());
    line.obey(moved_after(0), now);
    assert!(called(&mut line, now).is_empty());
    for who in 0..50 {
        line.join(who);
    }
    assert_eq!(line.call(now + ms(60_000), ms(10)).len(), 11, "what one late look may make up for");
}

#[test]
fn a_stop_is_told_before_it_comes() {
    let drain = |drain| Order::of_departing(None, Some(ms(drain))).leave_after;
    assert_eq!(drain(30_000), Some(ms(28_000)));
    assert_eq!(drain(2_000), Some(ms(1_500)));
    assert_eq!(Order::of_departing(None, None), Order::default(), "nobody knows");
    let fenced = v1::Departure { move_after_ms: None, fenced: true };
    assert_eq!(Order::of_departing(Some(&fenced), Some(ms(9))).leave_after, Some(Duration::ZERO));
}

/// What can happen to a line.
#[derive(Debug, Clone)]
enum Happening {
    Join,
    Quit(usize),
    Obey(Order),
    Look,
    Pass(u16),
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let after = || prop::option::of((0u64..2_000).prop_map(ms));
    let one = prop_oneof![
        6 => Just(Happening::Join),
        2 => (0usize..40).prop_map(Happening::Quit),
        1 => (after(), prop::option::weighted(0.1, (0u64..4_000).prop_map(ms)))
            .prop_map(|(move_after, leave_after)| Happening::Obey(Order { move_after, leave_after })),
        8 => Just(Happening::Look),
        6 => (0u16..400).prop_map(Happening::Pass),
    ];
    prop::collection::vec(one, 0..200)
}

proptest! {
    /// Nobody twice, nobody who has gone, in order, only under an order, and never faster than the pace.
    #[test]
    fn whatever_happens_turns_are_given_in_order_and_at_the_pace(all in happenings(), pause in 1u64..500) {
        let start = Instant::now();
        let (mut line, mut now, mut order) = (Line::default(), start, Order::default());
        let (mut here, mut next) = (BTreeSet::new(), 0u64);
        let (mut last, mut turns) = (0, Vec::new());
        for happening in all {
            match happening {
                Happening::Join => {
                    next += 1;
                    prop_assert_eq!(line.join(next), next);
                    here.insert(next);
                }
                Happening::Quit(nth) => {
                    if let Some(who) = here.iter().nth(nth).copied() {
                        line.quit(who);
                        here.remove(&who);
                    }
                }
                Happening::Obey(said) => {
                    order = said;
                    line.obey(said, now);
                }
                Happening::Pass(time) => now += ms(time.into()),
                Happening::Look => {
                    let before = here.len();
                    let called = line.call(now, ms(pause));
                    for (who, leave) in &called {
                        prop_assert!(here.remove(who), "{} is not here", who);
                        prop_assert!(*who > last);
                        last = *who;
                        match leave {
                            Leave::Moved => {
                                prop_assert!(order.move_after.is_some());
                                turns.push(now);
                            }
                            Leave::Fenced => prop_assert!(order.leave_after.is_some()),
                        }
                    }
                    if called.iter().any(|(_, leave)| *leave == Leave::Fenced) {
                        prop_assert_eq!(called.len(), before, "all of them");
                    }
                }
            }
        }
        for (first, since) in turns.iter().enumerate() {
            for (nth, until) in turns.iter().enumerate().skip(first) {
                let time = until.duration_since(*since) + LATE;
                let most = 1 + time.as_millis() / u128::from(pause);
                prop_assert!((nth - first) as u128 <= most, "{} turns in {time:?}", nth - first + 1);
            }
        }
        // Who is left gets a turn, if only there is an order that stands.
        line.obey(moved_after(0), now);
        let mut rest = Vec::new();
        for look in 1..=here.len() as u64 + 1 {
            rest.extend(line.call(now + ms(look * pause.max(100)), ms(pause)).into_iter().map(|(who, _)| who));
        }
        prop_assert_eq!(rest, here.into_iter().collect::<Vec<_>>());
    }
}
