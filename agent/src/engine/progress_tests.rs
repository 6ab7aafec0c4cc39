#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times of a few minutes")]

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits { canary: Duration::from_secs(15), wedge: Duration::from_secs(30) };
/// The loop looks and reads this often.
const STEP: Duration = Duration::from_millis(250);

fn busy(generated: f64) -> Figures {
    Figures {
        running: Some(3),
        waiting: Some(2),
        kv_used_ratio: Some(0.5),
        generated: Some(generated),
        ..Figures::default()
    }
}

fn idle() -> Figures {
    Figures { running: Some(0), waiting: Some(0), generated: Some(7.0), ..Figures::default() }
}

/// Plays an engine for `seconds`: `reading(t)` is what /metrics says t seconds in (None: no answer), `answers(t)` whether a
/// canary that was asked t seconds ago has been answered. What was decided when, in seconds.
fn play(
    seconds: u64,
    reading: impl Fn(f64) -> Option<Figures>,
    answers: impl Fn(f64) -> bool,
) -> Vec<(f64, Verdict)> {
    let start = Instant::now();
    let mut progress = Progress::new(LIMITS, start);
    let (mut out, mut asked) = (Vec::new(), None::<f64>);
    let mut now = start;
    while now < start + Duration::from_secs(seconds) {
        now += STEP;
        let t = (now - start).as_secs_f64();
        if let Some(figures) = reading(t) {
            progress.read(figures, now);
        }
        if asked.is_some_and(|at| answers(t - at)) {
            asked = None;
            progress.returned(true, now);
        }
        let verdict = progress.look(now);
        match &verdict {
            Verdict::Fine => continue,
            Verdict::Ask => asked = Some(t),
            Verdict::TakeBack => asked = None,
            Verdict::Wedged(_) => {}
        }
        let is_end = matches!(verdict, Verdict::Wedged(_));
        out.push((t, verdict));
        if is_end {
            break;
        }
    }
    out
}

fn wedged_at(decided: &[(f64, Verdict)]) -> Option<f64> {
    decided.iter().find(|(_, verdict)| matches!(verdict, Verdict::Wedged(_))).map(|(t, _)| *t)
}

#[test]
fn a_frozen_core_is_found_within_the_limit_busy_or_idle() {
    for figures in [busy(100.0), idle()] {
        let decided = play(120, |_| Some(figures), |_| false);
        assert_eq!(decided[0], (15.0, Verdict::Ask));
        assert_eq!(wedged_at(&decided), Some(30.0), "{decided:?}");
    }
    let decided = play(120, |_| Some(busy(1.0)), |_| false);
    let Some((_, Verdict::Wedged(reason))) = decided.last() else { panic!("{decided:?}") };
    assert_eq!(
        reason,
        "wedged: no progress for 30 s (3 running and 2 waiting as of 0 s ago), and a completion of one token has had no \
         answer for 15 s"
    );
}

#[test]
fn a_working_engine_is_never_asked() {
    assert_eq!(play(300, |t| Some(busy(t.floor())), |_| false), []);
}

#[test]
fn an_idle_one_is_asked_every_so_often_and_found_well() {
    let decided = play(120, |_| Some(idle()), |waited| waited >= 0.5);
    assert!(decided.iter().all(|(_, verdict)| *verdict == Verdict::Ask), "{decided:?}");
    assert!((6..=8).contains(&decided.len()), "{decided:?}");
}

#[test]
fn a_long_prefill_moves_its_kv_use_and_nothing_else() {
    let prefill = |t: f64| Figures { kv_used_ratio: Some((t / 1_000.0) as f32), ..busy(5.0) };
    assert_eq!(play(300, |t| Some(prefill(t)), |_| false), []);
    // Clients that leave a frozen engine free blocks, and run no more.
    let leaving = |t: f64| Figures {
        running: Some(100 - t as u32),
        kv_used_ratio: Some(1.0 - (t.floor() / 1_000.0) as f32),
        ..busy(5.0)
    };
    assert_eq!(wedged_at(&play(300, |t| Some(leaving(t)), |_| false)), Some(30.0));
}

#[test]
fn arrivals_at_a_frozen_engine_are_no_progress() {
    let arriving = |t: f64| Figures { waiting: Some(t as u32), running: Some(4), ..busy(5.0) };
    assert_eq!(wedged_at(&play(300, |t| Some(arriving(t)), |_| false)), Some(30.0));
}

#[test]
fn a_canary_at_the_end_of_a_long_queue_is_taken_back_when_something_moves() {
    // A step that takes twenty seconds, over and over.
    let decided = play(200, |t| Some(busy((t / 20.0).floor())), |_| false);
    assert_eq!(wedged_at(&decided), None);
    assert!(decided.iter().any(|(_, verdict)| *verdict == Verdict::TakeBack), "{decided:?}");
}

#[test]
fn readings_that_come_late_are_readings() {
    let late = |t: f64| (t % 5.0 < 0.25).then(|| busy(t.floor()));
    assert_eq!(play(300, late, |_| false), []);
}

#[test]
fn an_engine_that_cannot_be_read_has_four_times_as_long() {
    let mute: fn(f64) -> Option<Figures> = |_| None;
    let bare: fn(f64) -> Option<Figures> = |_| Some(Figures { running: Some(1), ..Figures::default() });
    for reading in [mute, bare] {
        let decided = play(300, reading, |_| false);
        assert_eq!(wedged_at(&decided), Some(120.0), "{decided:?}");
        // A minute in the queue, and answered.
        assert_eq!(wedged_at(&play(600, reading, |waited| waited > 60.0)), None);
    }
}

#[test]
fn a_gauge_that_is_stuck_is_no_wedge() {
    let decided = play(300, |_| Some(busy(5.0)), |waited| waited >= 1.0);
    assert_eq!(wedged_at(&decided), None, "{decided:?}");
}

#[test]
fn a_canary_that_fails_is_asked_again_and_the_time_runs_on() {
    let start = Instant::now();
    let mut progress = Progress::new(LIMITS, start);
    let at = |s: u64| start + Duration::from_secs(s);
    let mut asked = Vec::new();
    for s in 0..200 {
        progress.read(busy(1.0), at(s));
        match progress.look(at(s)) {
            Verdict::Ask => {
                asked.push(s);
                progress.returned(false, at(s));
            }
            Verdict::Wedged(_) => {
                assert_eq!((s, asked), (30, vec![15]));
                return;
            }
            other => assert_eq!(other, Verdict::Fine),
        }
    }
    panic!("never wedged");
}

#[test]
fn time_in_which_nobody_looked_does_not_count() {
    let start = Instant::now();
    let at = |s: u64| start + Duration::from_secs(s);
    let mut progress = Progress::new(LIMITS, start);
    for s in 1..=16 {
        progress.read(busy(1.0), at(s));
        let verdict = progress.look(at(s));
        assert_eq!(verdict == Verdict::Ask, s == 15);
    }
    // The agent stood still for an hour, with the canary out; it must have its time after that.
    progress.read(busy(1.0), at(3_616));
    assert_eq!(progress.look(at(3_616)), Verdict::Fine);
    progress.returned(true, at(3_617));
    assert_eq!(progress.look(at(3_617)), Verdict::Fine);
}

#[test]
fn a_counter_that_fell_is_another_cores() {
    let before = busy(1_000.0);
    assert!(busy(3.0).moved_since(&before));
    assert!(!busy(1_000.0).moved_since(&before));
    assert!(!Figures { ended: Some(2.0), ..busy(1_000.0) }.moved_since(&before), "not told before");
}

proptest! {
    #[test]
    fn what_moves_at_least_every_half_limit_is_never_wedged(
        // ms between two looks, whether a reading came with it, whether the canary fails
        steps in prop::collection::vec((1_u64..3_000, any::<bool>(), any::<bool>()), 1..400),
    ) {
        let mut now = Instant::now();
        let mut progress = Progress::new(LIMITS, now);
        let (mut moved, mut tokens) = (now, 0.0);
        progress.read(busy(tokens), now);
        for (ms, read, fails) in steps {
            now += Duration::from_millis(ms);
            if now - moved >= LIMITS.wedge / 2 - Duration::from_secs(3) {
                tokens += 1.0;
                moved = now;
                progress.read(busy(tokens), now);
            } else if read {
                progress.read(busy(tokens), now);
            }
            match progress.look(now) {
                Verdict::Wedged(reason) => prop_assert!(false, "{reason}"),
                Verdict::Ask if fails => progress.returned(false, now),
                _ => {}
            }
        }
    }

    #[test]
    fn what_never_moves_is_wedged_however_it_is_looked_at(
        steps in prop::collection::vec((1_u64..2_000, 0_u32..100), 400..500),
    ) {
        let mut now = Instant::now();
        let begin = now;
        let mut progress = Progress::new(LIMITS, now);
        for (ms, waiting) in steps {
            now += Duration::from_millis(ms);
            progress.read(Figures { waiting: Some(waiting), ..busy(9.0) }, now);
            if let Verdict::Wedged(_) = progress.look(now) {
                prop_assert!(now - begin >= LIMITS.wedge);
                prop_assert!(now - begin <= LIMITS.wedge + Duration::from_secs(4), "{:?}", now - begin);
                return Ok(());
            }
        }
        // The whole time may be short.
        prop_assert!(now - begin < LIMITS.wedge + Duration::from_secs(4));
    }

    #[test]
    fn a_canary_is_asked_no_more_often_than_its_period(
        steps in prop::collection::vec((1_u64..4_000, any::<bool>(), any::<bool>()), 1..300),
    ) {
        let mut now = Instant::now();
        let mut progress = Progress::new(LIMITS, now);
        let (mut last, mut tokens) = (None::<Instant>, 0.0);
        for (ms, moves, answers) in steps {
            // Gaps are not under test here: they stretch the time between two canaries.
            now += Duration::from_millis(ms).min(LONGEST_GAP);
            tokens += f64::from(u8::from(moves));
            progress.read(busy(tokens), now);
            match progress.look(now) {
                Verdict::Ask => {
                    prop_assert!(last.is_none_or(|last| now - last >= LIMITS.canary));
                    last = Some(now);
                    progress.returned(answers, now);
                }
                Verdict::Wedged(_) => return Ok(()),
                _ => {}
            }
        }
    }
}
