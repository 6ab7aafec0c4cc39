//! When checks are due, as plain functions of what is known.

use super::*;
use crate::health::{Rules, state::Failure};

const RULES: Rules = Rules {
    consecutive_failures: 3,
    base_ejection_ms: 1_000,
    max_ejection_ms: 30_000,
    trials: 3,
    probe_successes: 2,
    silence_is_examined: true,
};

const TIMES: ProbeTimes =
    ProbeTimes { regular_ms: 25_000, last_ms: 20_000, progress_ms: 0, interval_ms: 5_000 };

fn machine(events: &[Event], now_ms: u64) -> Machine {
    let mut machine = Machine::default();
    for event in events {
        machine.on(*event, now_ms, &RULES);
    }
    machine
}

const UNREACHED: Event = Event::Failed { failure: Failure::Unreached, trial: false };

#[test]
fn what_serves_is_not_probed_and_what_is_idle_is_at_its_regular_time() {
    let (idle, clean) = (Signs::default(), Machine::default());
    assert_eq!(probe_due(&TIMES, &idle, &clean, 21_000), 25_000);
    let serves = ProbeTimes { progress_ms: 24_900, ..TIMES };
    assert_eq!(probe_due(&serves, &idle, &clean, 25_000), 29_900);
}

#[test]
fn a_failure_brings_the_next_probe_at_once() {
    let suspect = machine(&[UNREACHED], 20_000);
    assert_eq!(probe_due(&TIMES, &Signs::default(), &suspect, 20_050), 20_100);
    let never_probed = ProbeTimes { last_ms: 0, ..TIMES };
    assert_eq!(probe_due(&never_probed, &Signs::default(), &suspect, 20_100), 20_100);
}

#[test]
fn requests_that_wait_in_silence_have_their_endpoint_probed() {
    let silent = Signs { inflight: 1, silent_ms: 500, ..Signs::default() };
    assert_eq!(probe_due(&TIMES, &silent, &Machine::default(), 20_500), 21_000);
    let quiet = Signs { silent_ms: 499, ..silent };
    assert_eq!(probe_due(&TIMES, &quiet, &Machine::default(), 20_500), 25_000);
}

#[test]
fn a_second_probe_goes_beside_the_first_only_where_no_connection_comes_about() {
    let under_way = UnderWay { probes: 1, connecting: 1, began_ms: 1_000 };
    let (clean, out) = (Machine::default(), machine(&[UNREACHED; 3], 1_000));
    assert!(!under_way.asks_for_another(&clean, 1_249) && under_way.asks_for_another(&clean, 1_250));
    assert!(!under_way.asks_for_another(&out, 1_250), "it is known to be gone");
    let slow = UnderWay { connecting: 0, ..under_way };
    assert!(!slow.asks_for_another(&clean, 9_000), "it has accepted: its answer may take its time");
    let one_of_two = UnderWay { probes: 2, connecting: 1, began_ms: 1_000 };
    assert!(!one_of_two.asks_for_another(&clean, 9_000), "one connection is enough of a sign");
    let enough = UnderWay { probes: MOST_PROBES, connecting: MOST_PROBES, began_ms: 1_000 };
    assert!(!enough.asks_for_another(&clean, 9_000));
}

#[test]
fn what_could_not_be_reached_is_looked_for_and_what_fails_is_left_to_its_time() {
    let lost = machine(&[UNREACHED; 3], 20_000);
    assert_eq!(probe_due(&TIMES, &Signs::default(), &lost, 20_100), 21_000);
    let failing = machine(&[Event::Failed { failure: Failure::Answer, trial: false }; 3], 20_000);
    assert_eq!(probe_due(&TIMES, &Signs::default(), &failing, 20_100), 25_000);
}

#[test]
fn an_engine_in_doubt_is_examined_and_then_left_alone_for_a_while() {
    let patience = Patience { flowing_ms: 5_000, waiting_ms: 30_000 };
    let stopped = Signs { inflight: 2, flowing: 2, silent_ms: 5_000, timed_out: false };
    let due = |signs: &Signs, machine: &Machine, now_ms, examined_ms| {
        examination_is_due(signs, machine, &patience, now_ms, examined_ms)
    };
    let clean = Machine::default();
    assert!(due(&stopped, &clean, 9_000, 0));
    assert!(!due(&stopped, &clean, 9_000, 4_001));
    assert!(due(&stopped, &clean, 9_000, 4_000));
    let hung = machine(&[Event::Hung], 9_000);
    assert!(due(&Signs::default(), &hung, 9_500, 1_000), "until a token comes");
    assert!(due(&Signs::default(), &hung, 10_000, 1_000), "longer than an ejection for errors");
    let half_open_ms = 9_000 + RULES.max_ejection_ms;
    assert!(!due(&Signs::default(), &hung, half_open_ms, 1_000), "half-open: trials tell");
    assert!(!due(&stopped, &machine(&[UNREACHED; 3], 9_000), 9_500, 0), "out for other reasons");
    assert!(!examination_is_due(&stopped, &clean, &Patience { flowing_ms: 0, waiting_ms: 1 }, 9_000, 0));
}
