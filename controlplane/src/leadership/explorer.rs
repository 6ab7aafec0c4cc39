//! Every interleaving of up to three candidates, by exhaustive search over the very [`Machine`] that runs in production.
//!
//! The world is a store with leases, one election key and a log of accepted writes; candidates whose requests and
//! answers may be slow, lost, or taken up by the store long after the candidate gave up on them; and time, which passes
//! whenever it likes, so that a candidate that does nothing for a while is a paused one. Leases may end late, never early.
//! Times are small numbers, the search is breadth-first up to a horizon, and states that differ only in the candidates'
//! names are one.
//!
//! What is checked in each state: terms in the log never fall; at most one candidate believes that it may write (clocks
//! being equal); and from there on, if messages arrive, somebody leads within a few lease times. That the search can find
//! faults is checked as well: without the fence, and with a store whose leases are shorter than it says, it finds one.

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use super::machine::{Answer, Ask, Machine, Rules, State};

const RULES: Rules = Rules { ttl_ms: 3, margin_ms: 1, retry_ms: 1 };

#[derive(Debug, Clone, Copy)]
struct Setup {
    candidates: usize,
    horizon: u64,
    /// Leases that may be granted in all, and so elections that may be held.
    leases: u64,
    /// Requests and answers that may be lost or delayed, in all.
    faults: u64,
    /// Writes that may be begun, in all; two show a wrong order.
    writes: u64,
    /// The store compares the term of each write.
    fenced: bool,
    /// How long the store's leases really last.
    ttl: u64,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq)]
struct Candidate {
    machine: Machine,
    /// Asked, when, and the store's answer, which is on its way.
    pending: Option<(Ask, u64, Answer)>,
    /// Given up on, but still on its way to the store.
    late: Option<Ask>,
    /// A write on its way, with its term.
    write: Option<u64>,
}

#[derive(Debug, Clone, Hash)]
struct World {
    now: u64,
    revision: u64,
    granted: u64,
    faults: u64,
    writes: u64,
    /// Lease and when it may end.
    leases: Vec<(u64, u64)>,
    /// Lease and term.
    key: Option<(u64, u64)>,
    /// Term of the last accepted write.
    written: u64,
    candidates: Vec<Candidate>,
}

/// What may happen next; the numbers are candidates, or a lease's place.
#[derive(Debug, Clone, Copy)]
enum Step {
    Tick,
    Expire(usize),
    /// It asks, and the store does what is asked: a request that is merely slow was asked later, as far as the store can
    /// tell, and the candidate counts its lease from earlier, which is the safe side.
    Ask(usize),
    Hear(usize),
    /// The answer is lost.
    Lose(usize),
    /// The candidate asks, and gives up while the request is still on its way.
    GiveUp(usize),
    Late(usize),
    BeginWrite(usize),
    EndWrite(usize),
}

impl World {
    fn new(setup: &Setup) -> Self {
        let candidate =
            Candidate { machine: Machine::new(RULES, true), pending: None, late: None, write: None };
        Self {
            now: 0,
            revision: 1,
            granted: 0,
            faults: 0,
            writes: 0,
            leases: Vec::new(),
            key: None,
            written: 0,
            candidates: vec![candidate; setup.candidates],
        }
    }

    /// One number for states that are the same but for names.
    fn fingerprint(&self) -> u64 {
        let hash = |value: &dyn Fn(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            value(&mut hasher);
            hasher.finish()
        };
        let mut each: Vec<u64> = self.candidates.iter().map(|c| hash(&|h| c.hash(h))).collect();
        each.sort_unstable();
        hash(&|h| {
            (
                self.now,
                self.revision,
                self.granted,
                self.faults,
                self.writes,
                &self.leases,
                self.key,
                self.written,
                &each,
            )
                .hash(h);
        })
    }

    fn steps(&self, setup: &Setup) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.now < setup.horizon {
            steps.push(Step::Tick);
        }
        for (place, (_, end)) in self.leases.iter().enumerate() {
            if self.now >= *end {
                steps.push(Step::Expire(place));
            }
        }
        let may_fail = self.faults < setup.faults;
        for (n, candidate) in self.candidates.iter().enumerate() {
            match candidate.pending {
                None => match candidate.machine.ask(self.now, self.key.is_none()) {
                    Ask::Wait(_) => {}
                    Ask::Grant if self.granted >= setup.leases => {}
                    ask => {
                        steps.push(Step::Ask(n));
                        // A grant that nobody hears of is a lost one.
                        if may_fail && candidate.late.is_none() && ask != Ask::Grant {
                            steps.push(Step::GiveUp(n));
                        }
                    }
                },
                Some(_) => {
                    steps.push(Step::Hear(n));
                    if may_fail {
                        steps.push(Step::Lose(n));
                    }
                }
            }
            if candidate.late.is_some() {
                steps.push(Step::Late(n));
            }
            match candidate.write {
                None if self.writes < setup.writes && candidate.machine.writing(self.now).is_some() => {
                    steps.push(Step::BeginWrite(n));
                }
                None => {}
                Some(_) => steps.push(Step::EndWrite(n)),
            }
        }
        steps
    }

    fn end_lease(&mut self, lease: u64) -> bool {
        let before = self.leases.len();
        self.leases.retain(|(id, _)| *id != lease);
        if self.key.is_some_and(|(on, _)| on == lease) {
            (self.key, self.revision) = (None, self.revision + 1);
        }
        self.leases.len() < before
    }

    /// The store's part.
    fn perform(&mut self, ask: Ask, setup: &Setup) -> Answer {
        let lives = |world: &Self, lease| world.leases.iter().any(|(id, _)| *id == lease);
        match ask {
            Ask::Grant => {
                self.granted += 1;
                self.leases.push((self.granted, self.now + setup.ttl));
                Answer::Granted(self.granted)
            }
            Ask::Campaign(lease) if !lives(self, lease) => Answer::Gone,
            Ask::Campaign(lease) => match self.key {
                None => {
                    self.revision += 1;
                    self.key = Some((lease, self.revision));
                    Answer::Elected(self.revision)
                }
                Some((on, term)) if on == lease => Answer::Elected(term),
                Some(_) => Answer::Beaten,
            },
            Ask::Renew(lease) => match self.leases.iter_mut().find(|(id, _)| *id == lease) {
                Some((_, end)) => {
                    *end = self.now + setup.ttl;
                    Answer::Done
                }
                None => Answer::Gone,
            },
            Ask::Revoke(lease) => {
                if self.end_lease(lease) {
                    Answer::Done
                } else {
                    Answer::Gone
                }
            }
            Ask::Wait(_) => Answer::Failed,
        }
    }

    /// Takes a step; an error is a violated promise.
    fn take(&mut self, step: Step, setup: &Setup) -> Result<(), String> {
        let (now, vacant) = (self.now, self.key.is_none());
        match step {
            Step::Tick => self.now += 1,
            Step::Expire(place) => {
                self.end_lease(self.leases[place].0);
            }
            Step::Ask(n) => {
                let ask = self.candidates[n].machine.ask(now, vacant);
                let answer = self.perform(ask, setup);
                self.candidates[n].pending = Some((ask, now, answer));
            }
            Step::Hear(n) | Step::Lose(n) => {
                let candidate = &mut self.candidates[n];
                let Some((ask, sent, answer)) = candidate.pending.take() else { return Ok(()) };
                let lost = matches!(step, Step::Lose(_));
                self.faults += u64::from(lost);
                candidate.machine.hear(ask, if lost { Answer::Failed } else { answer }, sent, now);
            }
            Step::GiveUp(n) => {
                self.faults += 1;
                let candidate = &mut self.candidates[n];
                let ask = candidate.machine.ask(now, vacant);
                candidate.machine.hear(ask, Answer::Failed, now, now);
                candidate.late = Some(ask);
            }
            Step::Late(n) => {
                if let Some(ask) = self.candidates[n].late.take() {
                    self.perform(ask, setup);
                }
            }
            Step::BeginWrite(n) => {
                self.writes += 1;
                let candidate = &mut self.candidates[n];
                candidate.write = candidate.machine.writing(now);
            }
            Step::EndWrite(n) => {
                let Some(term) = self.candidates[n].write.take() else { return Ok(()) };
                if setup.fenced && self.key.is_none_or(|(_, present)| present != term) {
                    self.candidates[n].machine.fenced(term, now);
                } else if term < self.written {
                    return Err(format!("term {term} wrote after term {}", self.written));
                } else {
                    self.written = term;
                }
            }
        }
        let writers = self.candidates.iter().filter(|c| c.machine.writing(self.now).is_some()).count();
        if writers > 1 { Err(format!("{writers} candidates may write at {}", self.now)) } else { Ok(()) }
    }

    /// From here on messages arrive and nobody sleeps: somebody leads, and can write, soon.
    fn settles(mut self, setup: &Setup) -> bool {
        let fair = Setup { leases: u64::MAX, horizon: u64::MAX, ..*setup };
        for _ in 0..4 * setup.ttl {
            for _ in 0..8 {
                for n in 0..self.candidates.len() {
                    for step in [Step::Late(n), Step::Ask(n), Step::Hear(n)] {
                        let idle = self.candidates[n].pending.is_none();
                        let waits = matches!(
                            self.candidates[n].machine.ask(self.now, self.key.is_none()),
                            Ask::Wait(_)
                        );
                        if matches!(step, Step::Ask(_)) && (!idle || waits) {
                            continue;
                        }
                        drop(self.take(step, &fair));
                    }
                }
            }
            self.now += 1;
            let now = self.now;
            let ended: Vec<u64> =
                self.leases.iter().filter(|(_, end)| now >= *end).map(|(id, _)| *id).collect();
            for lease in ended {
                self.end_lease(lease);
            }
        }
        let leads = |c: &Candidate| matches!(c.machine.state(), State::Leading { .. });
        self.candidates.iter().any(|c| leads(c) && c.machine.writing(self.now).is_some())
    }
}

/// Searches everything that is reachable. Returns how many states there are, or the way to the first fault.
fn explore(setup: &Setup, check_liveness: bool) -> Result<usize, String> {
    let start = World::new(setup);
    let mut seen = HashSet::from([start.fingerprint()]);
    let mut queue = VecDeque::from([start]);
    while let Some(world) = queue.pop_front() {
        if check_liveness && !world.clone().settles(setup) {
            return Err(format!("nobody ever leads from {world:?}"));
        }
        for step in world.steps(setup) {
            let mut next = world.clone();
            next.take(step, setup).map_err(|fault| format!("{fault}, after {step:?} in {world:?}"))?;
            if seen.insert(next.fingerprint()) {
                queue.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

const PAIR: Setup =
    Setup { candidates: 2, horizon: 3, leases: 2, faults: 1, writes: 2, fenced: true, ttl: 3 };

/// Deeper than by default, for a change of the machine: `PENSTOCK_EXPLORE=2` takes minutes.
fn deeper() -> u64 {
    std::env::var("PENSTOCK_EXPLORE").ok().and_then(|more| more.parse().ok()).unwrap_or(0)
}

#[test]
fn two_candidates_never_write_out_of_order() {
    for setup in [PAIR, Setup { faults: 0, horizon: 4, ..PAIR }] {
        let states = explore(&Setup { horizon: setup.horizon + deeper(), ..setup }, false).expect("no fault");
        assert!(states > 10_000, "{states} states are too few to mean anything");
    }
}

#[test]
fn from_wherever_two_candidates_are_somebody_leads_in_the_end() {
    let states = explore(&Setup { horizon: 2 + deeper(), ..PAIR }, true).expect("no fault");
    assert!(states > 1_000, "{states} states are too few to mean anything");
}

#[test]
fn three_candidates_never_write_out_of_order() {
    let states = explore(&Setup { candidates: 3, faults: 0, horizon: 3, ..PAIR }, false).expect("no fault");
    assert!(states > 10_000, "{states} states are too few to mean anything");
}

#[test]
fn without_the_fence_the_search_finds_a_stale_write() {
    let fault =
        explore(&Setup { fenced: false, horizon: 5, faults: 0, ..PAIR }, false).expect_err("a late write");
    assert!(fault.contains("wrote after"), "{fault}");
}

#[test]
fn with_leases_shorter_than_promised_the_search_finds_two_writers() {
    let fault = explore(&Setup { ttl: 1, horizon: 5, faults: 0, ..PAIR }, false).expect_err("two writers");
    assert!(fault.contains("may write at"), "{fault}");
}
