//! An endpoint's live figures: atomics that requests and picks touch, and the state machine behind a lock.
//!
//! The lock is taken for an endpoint in doubt only: a success at a clean endpoint is a few atomic operations, a token relayed
//! is one load, and one store every 50 ms ([`Pulse`]). What picks need of the machine is copied out on each change.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
};

use tokio::time::Instant;

use super::{
    progress::Signs,
    state::{Event, Failure, Machine, Out, Phase, Rules, Transition},
    window::{FirstTokens, Window},
};

/// A newer sign of progress than this, in milliseconds, is not worth a store that other cores have to hear of.
const PROGRESS_STEP_MS: u64 = 50;

/// One endpoint's health and what it is judged by. Times are on the gateway's clock.
#[derive(Debug, Default)]
pub struct Vitals {
    machine: Mutex<Machine>,
    /// Copies for picks: twice the end of the ejection, plus one if the endpoint does not react; 0: not out.
    gate: AtomicU64,
    /// Whether the machine has anything to forget.
    suspect: AtomicBool,
    trials: AtomicU32,
    trials_allowed: AtomicU32,
    /// Successes and failures of late.
    pub window: Window,
    /// First-token times of late.
    pub first_tokens: FirstTokens,
    /// Streams whose answer flows and whose client reads.
    flowing: AtomicU32,
    progress_ms: AtomicU64,
    /// Whether a request has timed out since the last sign of progress.
    timed_out: AtomicBool,
    /// What the watch remembers of it.
    pub checks: Checks,
}

/// When an endpoint was last probed and examined, and whether it is being now.
#[derive(Debug, Default)]
pub struct Checks {
    /// When the next probe is due if nothing is wrong; 0: never looked at.
    pub probe_ms: AtomicU64,
    /// When the last probe ended.
    pub probed_ms: AtomicU64,
    /// When the last examination ended.
    pub examined_ms: AtomicU64,
    /// Probes under way.
    pub probing: AtomicU32,
    /// Those of them that have no connection yet.
    pub connecting: AtomicU32,
    /// When the last of them began.
    pub began_ms: AtomicU64,
    /// An examination is under way.
    pub examining: AtomicBool,
}

/// A reading of [`Vitals`] for people.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// Where it is.
    pub phase: Phase,
    /// The ejection, half-open included.
    pub out: Option<Out>,
    /// Milliseconds since the last sign of progress; `None`: there was none yet.
    pub progress_age_ms: Option<u64>,
}

impl Vitals {
    /// Whether it is ejected at `now_ms`. Half-open is not.
    pub fn is_ejected(&self, now_ms: u64) -> bool {
        now_ms < self.gate.load(Relaxed) >> 1
    }

    /// Whether it is ejected because it does not react at all.
    pub fn is_lost(&self, now_ms: u64) -> bool {
        let gate = self.gate.load(Relaxed);
        now_ms < gate >> 1 && gate & 1 == 1
    }

    /// Whether a pick may take it: admitted, or half-open with a trial to give.
    pub fn is_open(&self, now_ms: u64) -> bool {
        let gate = self.gate.load(Relaxed);
        gate == 0 || now_ms >= gate >> 1 && self.trials.load(Relaxed) < self.trials_allowed.load(Relaxed)
    }

    /// Takes a place for a request: `Ok` says whether it is a trial, `Err` that picks may not take it.
    pub(crate) fn admit(&self, now_ms: u64) -> Result<bool, ()> {
        let gate = self.gate.load(Relaxed);
        if gate == 0 {
            return Ok(false);
        }
        if now_ms < gate >> 1 {
            return Err(());
        }
        let allowed = self.trials_allowed.load(Relaxed);
        let taken = self.trials.fetch_update(Relaxed, Relaxed, |now| (now < allowed).then_some(now + 1));
        taken.map(|_| true).map_err(|_| ())
    }

    pub(crate) fn end_trial(&self) {
        self.trials.fetch_sub(1, Relaxed);
    }

    /// Whether anything speaks against it, an ejection or less.
    pub fn is_in_doubt(&self) -> bool {
        self.suspect.load(Relaxed) || self.timed_out.load(Relaxed)
    }

    /// The present phase. Free of locks for a clean endpoint.
    pub fn phase(&self, now_ms: u64) -> Phase {
        if self.suspect.load(Relaxed) { self.lock().phase(now_ms) } else { Phase::Admitted }
    }

    /// Phase, present ejection, and connections and probes in a row that failed, as the machine has them.
    pub(crate) fn machine(&self) -> Machine {
        if self.suspect.load(Relaxed) { *self.lock() } else { Machine::default() }
    }

    /// Everything for people.
    pub fn read(&self, now_ms: u64) -> Reading {
        let machine = self.machine();
        let progress_ms = self.progress_ms.load(Relaxed);
        Reading {
            phase: machine.phase(now_ms),
            out: machine.out(),
            progress_age_ms: (progress_ms > 0).then(|| now_ms.saturating_sub(progress_ms)),
        }
    }

    /// Takes note of an event.
    pub fn on(&self, event: Event, now_ms: u64, rules: &Rules) -> Option<Transition> {
        let forgives = matches!(event, Event::Began | Event::Finished | Event::ProbePassed | Event::Alive);
        if forgives && !self.suspect.load(Relaxed) {
            return None;
        }
        let mut machine = self.lock();
        let change = machine.on(event, now_ms, rules);
        let gate = machine.out().map_or(0, |out| {
            let lost = out.cure != super::state::Cure::Time;
            out.until_ms.max(1) << 1 | u64::from(lost)
        });
        self.gate.store(gate, Relaxed);
        self.trials_allowed.store(machine.trials_allowed(rules), Relaxed);
        self.suspect.store(!machine.is_clean(), Relaxed);
        if change.is_some() {
            // It is judged anew by what it does from now on.
            self.window.clear();
            self.first_tokens.clear();
        }
        change
    }

    /// An answer has begun; `took_ms` for a stream.
    pub(crate) fn began(&self, now_ms: u64, took_ms: Option<u64>, rules: &Rules) -> Option<Transition> {
        self.progressed(now_ms);
        self.window.record(now_ms, true);
        if let Some(took_ms) = took_ms {
            self.first_tokens.record(now_ms, took_ms);
        }
        self.on(Event::Began, now_ms, rules)
    }

    /// A request has failed.
    pub(crate) fn failed(
        &self,
        failure: Failure,
        trial: bool,
        now_ms: u64,
        rules: &Rules,
    ) -> Option<Transition> {
        if failure == Failure::Silence && rules.silence_is_examined {
            self.timed_out.store(true, Relaxed);
        } else {
            self.window.record(now_ms, false);
        }
        self.on(Event::Failed { failure, trial }, now_ms, rules)
    }

    /// Something came from the engine that only comes while it works.
    pub fn progressed(&self, now_ms: u64) {
        let last = self.progress_ms.load(Relaxed);
        if now_ms >= last.saturating_add(PROGRESS_STEP_MS) || last == 0 {
            self.progress_ms.store(now_ms.max(1), Relaxed);
            self.timed_out.store(false, Relaxed);
        }
    }

    /// When something last came; 0: never.
    pub fn progress_ms(&self) -> u64 {
        self.progress_ms.load(Relaxed)
    }

    /// What is seen of it, with `inflight` requests under way, the first of them since `busy_since_ms`.
    pub fn signs(&self, now_ms: u64, inflight: u32, busy_since_ms: u64) -> Signs {
        let timed_out = self.timed_out.load(Relaxed);
        // One that has timed out waited before those that wait now.
        let busy_since_ms = if timed_out { 0 } else { busy_since_ms };
        Signs {
            inflight,
            flowing: self.flowing.load(Relaxed),
            silent_ms: now_ms.saturating_sub(self.progress_ms().max(busy_since_ms)),
            timed_out,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Machine> {
        // A poisoned lock holds plain numbers: they are as good as before.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's hand on its endpoint's pulse, while its answer flows.
#[derive(Debug)]
pub struct Pulse<'a> {
    vitals: &'a Vitals,
    /// The gateway's clock began here.
    epoch: Instant,
}

impl<'a> Pulse<'a> {
    /// Counts a stream as flowing until it is dropped.
    pub(crate) fn new(vitals: &'a Vitals, epoch: Instant) -> Self {
        vitals.flowing.fetch_add(1, Relaxed);
        Self { vitals, epoch }
    }

    /// Bytes came at `at`.
    pub fn beat(&self, at: Instant) {
        let since = at.saturating_duration_since(self.epoch).as_millis();
        self.vitals.progressed(u64::try_from(since).unwrap_or(u64::MAX));
    }

    /// Waits for a write to the client. While it has to wait, the stream is not counted: nothing is read from the engine then,
    /// and its silence is none of the engine's doing. A write that can be done at once costs nothing more.
    pub async fn while_written<T>(&self, write: impl Future<Output = T>) -> T {
        let mut write = pin!(write);
        if let Poll::Ready(done) = futures_util::poll!(write.as_mut()) {
            return done;
        }
        let _stalled = Stalled::new(self);
        write.await
    }
}

impl Drop for Pulse<'_> {
    fn drop(&mut self) {
        self.vitals.flowing.fetch_sub(1, Relaxed);
    }
}

/// A stream that waits for its client.
struct Stalled<'a>(&'a Pulse<'a>);

impl<'a> Stalled<'a> {
    fn new(pulse: &'a Pulse<'a>) -> Self {
        pulse.vitals.flowing.fetch_sub(1, Relaxed);
        Self(pulse)
    }
}

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        // Silence begins now at the earliest.
        self.0.beat(Instant::now());
        self.0.vitals.flowing.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Reason;

    const RULES: Rules = Rules {
        consecutive_failures: 1,
        base_ejection_ms: 1_000,
        max_ejection_ms: 8_000,
        trials: 2,
        probe_successes: 1,
        silence_is_examined: true,
    };

    fn fails(vitals: &Vitals, failure: Failure, now_ms: u64) -> Option<Transition> {
        vitals.failed(failure, false, now_ms, &RULES)
    }

    #[test]
    fn picks_see_each_change() {
        let vitals = Vitals::default();
        assert!(vitals.is_open(0));
        fails(&vitals, Failure::Answer, 10);
        assert!(vitals.is_ejected(1_009) && !vitals.is_lost(1_009) && !vitals.is_open(1_009));
        assert!(!vitals.is_ejected(1_010) && vitals.is_open(1_010));
        assert_eq!(vitals.phase(1_010), Phase::HalfOpen);
    }

    #[test]
    fn an_endpoint_that_does_not_react_is_told_from_one_that_does_badly() {
        let vitals = Vitals::default();
        fails(&vitals, Failure::Unreached, 10);
        assert!(vitals.is_lost(10) && !vitals.is_lost(1_010));
    }

    #[test]
    fn trials_are_given_one_by_one_and_given_back() {
        let vitals = Vitals::default();
        fails(&vitals, Failure::Answer, 0);
        assert_eq!(vitals.admit(999), Err(()));
        assert_eq!(vitals.admit(1_000), Ok(true));
        assert_eq!(vitals.admit(1_000), Err(()), "one at first");
        vitals.end_trial();
        assert_eq!(vitals.began(1_001, None, &RULES), None);
        assert_eq!((vitals.admit(1_001), vitals.admit(1_001)), (Ok(true), Ok(true)), "then two");
        assert_eq!(vitals.admit(1_001), Err(()));
        assert_eq!(vitals.began(1_002, None, &RULES), Some(Transition::Returned));
        assert_eq!(vitals.admit(1_002), Ok(false));
    }

    #[test]
    fn a_timeout_is_a_question_and_the_next_byte_answers_it() {
        let vitals = Vitals::default();
        assert_eq!(fails(&vitals, Failure::Silence, 100), None);
        assert!(vitals.signs(100, 0, 0).timed_out && vitals.is_open(100));
        assert_eq!(vitals.window.recent(100, 1), None, "slow is not failed");
        vitals.progressed(200);
        assert!(!vitals.signs(200, 0, 0).timed_out);
    }

    #[test]
    fn silence_begins_with_the_last_byte_or_with_the_first_request() {
        let vitals = Vitals::default();
        vitals.progressed(1_000);
        assert_eq!(vitals.signs(5_000, 1, 4_000).silent_ms, 1_000, "it was idle before");
        vitals.progressed(4_500);
        assert_eq!(vitals.signs(5_000, 1, 4_000).silent_ms, 500);
    }

    #[test]
    fn an_ejection_wipes_what_led_to_it() {
        let vitals = Vitals::default();
        (0..9).for_each(|_| vitals.window.record(0, true));
        (0..9).for_each(|_| vitals.first_tokens.record(0, 5));
        vitals.on(Event::Outlier(Reason::Latency), 0, &RULES);
        assert_eq!(vitals.window.recent(0, 1), None);
        assert_eq!(vitals.first_tokens.recent(0).count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_stops_the_clock_of_its_stream_and_of_no_other() {
        let (vitals, epoch) = (Vitals::default(), Instant::now());
        let flowing = || vitals.signs(0, 2, 0).flowing;
        let (one, _two) = (Pulse::new(&vitals, epoch), Pulse::new(&vitals, epoch));
        assert_eq!(flowing(), 2);
        one.while_written(std::future::ready(())).await;
        assert_eq!(vitals.progress_ms(), 0, "nothing waited");
        let slow = one.while_written(tokio::time::sleep(std::time::Duration::from_secs(7)));
        let look = async {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            flowing()
        };
        assert_eq!(tokio::join!(slow, look).1, 1);
        assert_eq!((flowing(), vitals.progress_ms()), (2, 7_000));
        drop(one);
        assert_eq!(flowing(), 1);
    }
}
