//! The machine, case by case and at random.

use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules {
    consecutive_failures: 3,
    base_ejection_ms: 1_000,
    max_ejection_ms: 8_000,
    trials: 3,
    probe_successes: 2,
    silence_is_examined: true,
};

fn failed(failure: Failure) -> Event {
    Event::Failed { failure, trial: false }
}

fn trial(failure: Failure) -> Event {
    Event::Failed { failure, trial: true }
}

/// Feeds events at one moment; the last change.
fn feed(machine: &mut Machine, now_ms: u64, events: &[Event]) -> Option<Transition> {
    events.iter().fold(None, |_, event| machine.on(*event, now_ms, &RULES))
}

fn ejected(failure: Failure, now_ms: u64) -> Machine {
    let mut machine = Machine::default();
    feed(&mut machine, now_ms, &[failed(failure); 3]);
    assert_eq!(machine.phase(now_ms), Phase::Ejected);
    machine
}

fn until(machine: &Machine) -> u64 {
    machine.out().expect("out").until_ms
}

#[test]
fn three_failures_in_a_row_eject_and_an_answer_between_does_not() {
    let mut machine = Machine::default();
    feed(&mut machine, 10, &[failed(Failure::Answer), failed(Failure::Answer)]);
    assert_eq!(machine.phase(10), Phase::Suspect);
    feed(&mut machine, 10, &[Event::Began, failed(Failure::Answer), failed(Failure::Answer)]);
    assert_eq!(machine.phase(10), Phase::Suspect);
    let change = machine.on(failed(Failure::Answer), 14, &RULES);
    assert_eq!(change, Some(Transition::Ejected { reason: Reason::ConsecutiveFailures, for_ms: 1_000 }));
    assert_eq!((machine.phase(1_013), machine.phase(1_014)), (Phase::Ejected, Phase::HalfOpen));
}

/// vLLM's router (vime PR #350) was told of ends alone: generations of minutes tripped it on healthy engines.
#[test]
fn stray_failures_among_long_generations_that_all_begin_eject_nobody() {
    let mut machine = Machine::default();
    for minute in 0..100 {
        feed(&mut machine, minute * 60_000, &[Event::Began, Event::Began, failed(Failure::Answer)]);
    }
    assert!(machine.out().is_none());
}

#[test]
fn answers_that_all_begin_and_break_eject() {
    let mut machine = Machine::default();
    let broken = [Event::Began, failed(Failure::Break)];
    feed(&mut machine, 0, &[broken, broken].concat());
    assert_eq!(machine.phase(0), Phase::Suspect);
    feed(&mut machine, 0, &broken);
    assert_eq!(machine.phase(0), Phase::Ejected);
    let mut machine = Machine::default();
    for _ in 0..9 {
        feed(&mut machine, 0, &[&broken[..], &[Event::Began, Event::Finished]].concat());
    }
    assert!(machine.is_clean(), "every second one comes whole: for the success rate to judge");
}

/// smg #2163: push-back counted as a failure took healthy engines out.
#[test]
fn a_full_engine_and_a_stale_connection_are_no_events() {
    assert_eq!(Failure::of(UpstreamFailure::Busy), None);
    assert_eq!(Failure::of(UpstreamFailure::StaleConnection), None);
    let heard: Vec<_> = UpstreamFailure::ALL.into_iter().filter_map(Failure::of).collect();
    assert_eq!(heard.len(), UpstreamFailure::ALL.len() - 2);
}

#[test]
fn a_timeout_fails_nobody_where_silence_is_examined() {
    let mut machine = Machine::default();
    feed(&mut machine, 0, &[failed(Failure::Silence); 9]);
    assert!(machine.is_clean());
    let rules = Rules { silence_is_examined: false, ..RULES };
    let changes = (0..3).filter_map(|_| machine.on(failed(Failure::Silence), 0, &rules)).count();
    assert_eq!(changes, 1);
    assert_eq!(machine.phase(0), Phase::Ejected);
}

#[test]
fn a_failed_connection_and_failed_probes_count_together() {
    let mut machine = Machine::default();
    feed(&mut machine, 0, &[failed(Failure::Unreached), Event::ProbeFailed]);
    let change = machine.on(Event::ProbeFailed, 1, &RULES);
    assert_eq!(change, Some(Transition::Ejected { reason: Reason::Probe, for_ms: 1_000 }));
    let mut machine = Machine::default();
    feed(&mut machine, 0, &[Event::ProbeFailed, Event::ProbeFailed, Event::Began, Event::ProbeFailed]);
    assert_eq!(machine.phase(0), Phase::Suspect, "what serves is alive, whatever its probes say");
}

#[test]
fn good_probes_bring_back_what_could_not_be_reached() {
    let mut machine = ejected(Failure::Unreached, 0);
    machine.on(Event::ProbePassed, 100, &RULES);
    assert_eq!(machine.phase(100), Phase::Ejected);
    machine.on(Event::ProbePassed, 200, &RULES);
    assert_eq!(machine.phase(200), Phase::HalfOpen);
}

#[test]
fn good_probes_prove_nothing_for_one_that_answers_with_errors_or_hangs() {
    let mut failing = ejected(Failure::Answer, 0);
    let mut hung = Machine::default();
    hung.on(Event::Hung, 0, &RULES);
    for machine in [&mut failing, &mut hung] {
        feed(machine, 10, &[Event::ProbePassed; 9]);
        assert_eq!(machine.phase(10), Phase::Ejected);
    }
    hung.on(Event::Alive, 20, &RULES);
    assert_eq!(hung.phase(20), Phase::HalfOpen, "a token does");
    failing.on(Event::Alive, 20, &RULES);
    assert_eq!(failing.phase(20), Phase::Ejected);
}

/// A client's request sent there to find out would wait for minutes.
#[test]
fn a_hang_lasts_until_a_token_comes_and_no_trial_is_made_before() {
    let mut machine = Machine::default();
    let change = machine.on(Event::Hung, 0, &RULES);
    assert_eq!(change, Some(Transition::Ejected { reason: Reason::Hang, for_ms: RULES.max_ejection_ms }));
    for now in (0..100_000).step_by(5_000) {
        machine.on(Event::Hung, now, &RULES);
        assert_eq!(machine.phase(now + 5_000), Phase::Ejected);
    }
}

#[test]
fn failing_probes_hold_it_out_but_never_beyond_the_longest_ejection() {
    let mut machine = ejected(Failure::Unreached, 0);
    let mut now = 0;
    while machine.phase(now) == Phase::Ejected {
        assert!(now <= RULES.max_ejection_ms);
        machine.on(Event::ProbeFailed, now, &RULES);
        now += 250;
    }
    assert_eq!(now, RULES.max_ejection_ms, "then it is tried");
}

#[test]
fn on_trial_an_answer_more_each_time_until_it_is_back() {
    let mut machine = ejected(Failure::Answer, 0);
    let now = until(&machine);
    for (allowed, change) in [(1, None), (2, None), (3, Some(Transition::Returned))] {
        assert_eq!(machine.trials_allowed(&RULES), allowed);
        assert_eq!(machine.on(Event::Began, now, &RULES), change);
    }
    assert!(machine.is_clean());
}

#[test]
fn a_failed_trial_ejects_for_twice_as_long() {
    let mut machine = ejected(Failure::Answer, 0);
    let mut lengths = vec![];
    for _ in 0..5 {
        let now = until(&machine);
        assert!(machine.on(trial(Failure::Answer), now, &RULES).is_some());
        lengths.push(until(&machine) - now);
    }
    assert_eq!(lengths, [2_000, 4_000, 8_000, 8_000, 8_000]);
}

#[test]
fn one_that_passes_its_trials_by_luck_is_out_for_longer_the_next_time() {
    let mut machine = ejected(Failure::Answer, 0);
    let back = until(&machine);
    feed(&mut machine, back, &[Event::Began; 3]);
    feed(&mut machine, back + 100, &[Event::Outlier(Reason::SuccessRate)]);
    assert_eq!(until(&machine), back + 100 + 2_000);
    let back = until(&machine);
    feed(&mut machine, back, &[Event::Began; 3]);
    let much_later = back + RULES.max_ejection_ms;
    feed(&mut machine, much_later, &[Event::Outlier(Reason::SuccessRate)]);
    assert_eq!(until(&machine), much_later + 1_000, "forgotten");
}

#[test]
fn late_failures_of_requests_sent_before_do_not_lengthen_an_ejection() {
    let mut machine = ejected(Failure::Unreached, 5);
    let before = machine;
    feed(&mut machine, 6, &[failed(Failure::Unreached), failed(Failure::Answer), trial(Failure::Break)]);
    assert_eq!(machine, before);
    let now = until(&machine);
    feed(&mut machine, now, &[failed(Failure::Unreached), failed(Failure::Answer)]);
    assert_eq!(machine.phase(now), Phase::HalfOpen, "nor do they fail a trial");
}

#[test]
fn a_failed_probe_ends_the_trials_of_an_endpoint_without_punishing_it() {
    let mut machine = ejected(Failure::Answer, 0);
    let now = until(&machine);
    assert_eq!(machine.on(Event::ProbeFailed, now, &RULES), None);
    assert_eq!((machine.phase(now), until(&machine)), (Phase::Ejected, now + 1_000));
    feed(&mut machine, now + 1, &[Event::ProbePassed; 2]);
    assert_eq!(machine.phase(now + 1), Phase::HalfOpen);
}

#[test]
fn an_answer_from_one_that_was_thought_lost_is_heard() {
    let mut machine = ejected(Failure::Unreached, 0);
    machine.on(Event::Began, 10, &RULES);
    assert_eq!(machine.phase(10), Phase::HalfOpen);
    let mut machine = ejected(Failure::Answer, 0);
    machine.on(Event::Began, 10, &RULES);
    assert_eq!(machine.phase(10), Phase::Ejected, "one that fails often answers often too");
}

fn event() -> impl Strategy<Value = Event> {
    let failure =
        prop::sample::select(vec![Failure::Unreached, Failure::Answer, Failure::Break, Failure::Silence]);
    prop_oneof![
        3 => Just(Event::Began),
        2 => Just(Event::Finished),
        5 => (failure, any::<bool>()).prop_map(|(failure, trial)| Event::Failed { failure, trial }),
        2 => Just(Event::ProbePassed),
        3 => Just(Event::ProbeFailed),
        1 => Just(Event::Outlier(Reason::Latency)),
        1 => Just(Event::Hung),
        1 => Just(Event::Alive),
    ]
}

proptest! {
    #[test]
    fn an_ejection_never_outlasts_the_longest_and_is_tried_then(steps in prop::collection::vec((0u64..4_000, event()), 0..300)) {
        let (mut machine, mut now) = (Machine::default(), 0);
        for (passed, event) in steps {
            now += passed;
            machine.on(event, now, &RULES);
            if let Some(out) = machine.out() {
                prop_assert!(out.until_ms <= out.since_ms + RULES.max_ejection_ms);
                prop_assert!(out.since_ms <= now);
                prop_assert_eq!(machine.phase(out.since_ms + RULES.max_ejection_ms), Phase::HalfOpen);
            }
        }
    }

    #[test]
    fn from_wherever_it_is_good_answers_bring_it_back(steps in prop::collection::vec((0u64..4_000, event()), 0..100)) {
        let (mut machine, mut now) = (Machine::default(), 0);
        for (passed, event) in steps {
            now += passed;
            machine.on(event, now, &RULES);
        }
        now = now.max(machine.out().map_or(0, |out| out.until_ms));
        for _ in 0..RULES.trials {
            machine.on(Event::Began, now, &RULES);
        }
        machine.on(Event::Finished, now, &RULES);
        prop_assert!(machine.is_clean());
    }

    #[test]
    fn without_an_event_against_it_nobody_is_ejected(steps in prop::collection::vec((0u64..4_000, event()), 0..300)) {
        let (mut machine, mut now) = (Machine::default(), 0);
        for (passed, event) in steps {
            now += passed;
            let good = matches!(event, Event::Began | Event::Finished | Event::ProbePassed | Event::Alive);
            let before = machine.phase(now);
            machine.on(event, now, &RULES);
            if good && before != Phase::Ejected {
                prop_assert!(machine.phase(now) != Phase::Ejected);
            }
        }
    }

    #[test]
    fn a_change_is_told_exactly_when_it_happens(steps in prop::collection::vec((0u64..4_000, event()), 0..300)) {
        let (mut machine, mut now) = (Machine::default(), 0);
        for (passed, event) in steps {
            now += passed;
            let was_out = machine.out().is_some();
            let change = machine.on(event, now, &RULES);
            match change {
                Some(Transition::Returned) => prop_assert!(was_out && machine.out().is_none()),
                Some(Transition::Ejected { for_ms, .. }) => {
                    prop_assert_eq!(machine.out().map(|out| out.until_ms), Some(now + for_ms));
                }
                None => prop_assert_eq!(was_out, machine.out().is_some()),
            }
        }
    }
}
