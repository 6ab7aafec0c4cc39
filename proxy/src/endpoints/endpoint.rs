//! One engine as the proxy sees it: who it is, and how it is doing.
//!
//! Identity is immutable and rebuilt with each snapshot. The live figures ride along behind an `Arc` as long as id,
//! address and generation stay the same, so that a swap loses neither a count nor an ejection, and a new process at an
//! old address starts clean.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    departure::{self, Departure, Leave},
    reported::{Measured, Reported, ReportedLoad},
};
use crate::{
    admission::saturation::{Busy, Learnt, Limits},
    error::UpstreamFailure,
    health::{
        Pulse, Rules, Transition, Vitals,
        progress::Signs,
        state::{Event, Failure},
    },
    routing::{affinity::HashKey, load},
    xds::state::Told,
};

/// One registered engine.
#[derive(Debug)]
pub struct Endpoint {
    /// The replica's id.
    pub id: Arc<str>,
    /// As registered, host:port.
    pub address: String,
    /// Of the assignment it registered with.
    pub generation: u64,
    /// Finishes what it has, takes nothing new.
    pub draining: bool,
    /// Where it runs; may be empty.
    pub zone: String,
    /// LoRA adapters it has loaded, by name.
    pub adapters: BTreeSet<String>,
    /// Of a full share of requests, 1 to 100.
    pub weight_percent: u32,
    /// Where it listens.
    pub resolved: SocketAddr,
    pub(super) live: Arc<Live>,
    /// What it was made from: the same again needs no work.
    pub(super) told: Arc<Told>,
}

/// What changes while an endpoint lives.
#[derive(Debug, Default)]
pub(super) struct Live {
    inflight: AtomicU32,
    /// What the engine says of its load.
    reported: Reported,
    /// What its answers have taught about how much it holds.
    learnt: Mutex<Learnt>,
    /// Requests sent to it so far: their numbers.
    sent: AtomicU64,
    /// Whether that is a limit: picks need not lock to see that there is none.
    limited: AtomicBool,
    /// When it last got a request while it had none.
    busy_since_ms: AtomicU64,
    vitals: Vitals,
    /// Its name in hashes.
    key: OnceLock<u64>,
    /// When a pick first saw it, in milliseconds; what came before nobody needs to know.
    first_seen_ms: OnceLock<u64>,
    /// What becomes of its streams.
    pub(super) departure: Departure,
    /// How long its streams go on once it has left the tables; 0: not known.
    drain_ms: AtomicU32,
}

impl Endpoint {
    /// An endpoint at a resolved address.
    pub(super) fn new(
        id: &str,
        address: &str,
        resolved: SocketAddr,
        generation: u64,
        live: Arc<Live>,
    ) -> Self {
        Self {
            id: id.into(),
            address: address.to_owned(),
            generation,
            draining: false,
            zone: String::new(),
            adapters: BTreeSet::new(),
            weight_percent: 100,
            resolved,
            live,
            told: Arc::default(),
        }
    }

    /// Requests under way, from pick to the end of the body.
    pub fn inflight(&self) -> u32 {
        self.live.inflight.load(Relaxed)
    }

    /// Its name in hashes: of the id and the generation, under the process's one key.
    pub fn key(&self, key: HashKey) -> u64 {
        *self.live.key.get_or_init(|| key.endpoint(&self.id, self.generation))
    }

    /// Milliseconds since a pick first saw it, for slow start.
    pub fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(*self.live.first_seen_ms.get_or_init(|| now_ms))
    }

    /// How it is doing.
    pub fn vitals(&self) -> &Vitals {
        &self.live.vitals
    }

    /// What the engine last said of its load. Old words are given, too: `age_ms` decides what they are worth.
    pub fn reported(&self, now_ms: u64) -> Option<ReportedLoad> {
        self.live.reported.get(now_ms)
    }

    /// The same for the estimate of a pick.
    pub fn load_report(&self) -> Option<load::Report> {
        self.live.reported.report()
    }

    /// Takes a report of its load in.
    pub fn take_report(&self, measured: Measured, now_ms: u64) {
        self.live.reported.take(measured, now_ms, self.inflight());
    }

    /// Remembers what is under way, for reports to come.
    pub fn sample(&self, now_ms: u64) {
        self.live.reported.sample(now_ms, self.inflight());
    }

    /// Whether its health keeps it out of picks at `now_ms`.
    pub fn is_ejected(&self, now_ms: u64) -> bool {
        self.live.vitals.is_ejected(now_ms)
    }

    /// The limit that its busy answers have taught, if any; it may be forgotten by now.
    pub fn busy(&self) -> Option<Busy> {
        if self.live.limited.load(Relaxed) { self.live.learnt().busy() } else { None }
    }

    /// What becomes of its streams, if they do not end here.
    pub fn departure(&self) -> Option<departure::Shown> {
        self.live.departure.shown(Instant::now())
    }

    /// What is seen of its work.
    pub fn signs(&self, now_ms: u64) -> Signs {
        self.live.vitals.signs(now_ms, self.inflight(), self.live.busy_since_ms.load(Relaxed))
    }

    /// Counts a request in, if its health lets picks take it; the count ends with the ticket.
    pub fn try_reserve(self: &Arc<Self>, now_ms: u64) -> Option<Ticket> {
        let trial = self.live.vitals.admit(now_ms).ok()?;
        Some(self.ticket(trial, now_ms))
    }

    /// Counts a request in whatever its health; the count ends with the ticket.
    pub fn reserve(self: &Arc<Self>, now_ms: u64) -> Ticket {
        let trial = self.live.vitals.admit(now_ms).unwrap_or(false);
        self.ticket(trial, now_ms)
    }

    fn ticket(self: &Arc<Self>, trial: bool, now_ms: u64) -> Ticket {
        let before = self.live.inflight.fetch_add(1, Relaxed);
        if before == 0 {
            self.live.busy_since_ms.store(now_ms, Relaxed);
        }
        let load = before.saturating_add(1);
        let number = self.live.sent.fetch_add(1, Relaxed);
        Ticket { endpoint: Arc::clone(self), trial: AtomicBool::new(trial), sent_ms: now_ms, load, number }
    }
}

impl Live {
    /// Whether a new start would lose something that matters: doubts, or requests under way.
    pub(super) fn is_worth_keeping(&self) -> bool {
        self.inflight.load(Relaxed) > 0 || self.vitals.is_in_doubt()
    }

    /// How long its streams go on once it has left the tables, by what its entry said.
    pub(super) fn drain(&self) -> Option<Duration> {
        let ms = self.drain_ms.load(Relaxed);
        (ms > 0).then(|| Duration::from_millis(ms.into()))
    }

    /// What its entry says of that.
    pub(super) fn note_drain(&self, ms: Option<u32>) {
        self.drain_ms.store(ms.unwrap_or(0), Relaxed);
    }

    fn learnt(&self) -> MutexGuard<'_, Learnt> {
        // A poisoned lock holds plain numbers: they are as good as before.
        self.learnt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, lesson: impl FnOnce(&mut Learnt)) {
        let mut learnt = self.learnt();
        lesson(&mut learnt);
        self.limited.store(learnt.busy().is_some(), Relaxed);
    }
}

/// A request's place at an endpoint, held to the end of the body and given back on drop, however the request ends.
/// What the endpoint's health should know of the request is told to it.
#[derive(Debug)]
pub struct Ticket {
    endpoint: Arc<Endpoint>,
    /// Whether it holds one of a half-open endpoint's trials.
    trial: AtomicBool,
    sent_ms: u64,
    /// Our requests there when it was sent, this one counted.
    load: u32,
    /// Its number among all that were sent there.
    number: u64,
}

impl Ticket {
    /// Where the request goes.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Resolves when this request's stream should go on elsewhere; never, as long as its engine may keep it. To be made and
    /// pinned once for a stream: from the first poll on it stands in line, in the order in which streams began. When it has
    /// resolved and no other engine takes the stream, that may stay; to be told again it may call this anew.
    pub async fn leave(&self) -> Leave {
        self.endpoint.live.departure.turn().await
    }

    /// A good answer has begun: a stream's first event, or all of another's.
    pub fn began(&self, stream: bool, now_ms: u64, rules: &Rules) -> Option<Transition> {
        self.end_trial();
        let took_ms = stream.then(|| now_ms.saturating_sub(self.sent_ms));
        self.endpoint.live.vitals.began(now_ms, took_ms, rules)
    }

    /// A good answer has come whole.
    pub fn finished(&self, now_ms: u64, rules: &Rules) -> Option<Transition> {
        self.endpoint.live.vitals.on(Event::Finished, now_ms, rules)
    }

    /// The attempt has failed.
    pub fn failed(&self, failure: UpstreamFailure, now_ms: u64, rules: &Rules) -> Option<Transition> {
        let trial = self.end_trial();
        let failure = Failure::of(failure)?;
        self.endpoint.live.vitals.failed(failure, trial, now_ms, rules)
    }

    /// The engine took it: it carries what it had when this one was sent, as far as that is still there.
    pub fn accepted(&self, now_ms: u64, limits: &Limits) {
        let load = self.load.min(self.endpoint.inflight());
        self.endpoint.live.learn(|learnt| learnt.accepted(load, now_ms, limits.busy_step_ms));
    }

    /// The engine answered "busy".
    pub fn refused(&self, now_ms: u64, limits: &Limits) {
        let held = self.endpoint.inflight().saturating_sub(1);
        self.endpoint.live.learn(|learnt| learnt.refused(self.number, held, now_ms, limits.busy_step_ms));
    }

    /// To be held while the answer flows. `epoch` is when the clock of all `now_ms` began.
    pub fn pulse(&self, epoch: Instant) -> Pulse<'_> {
        Pulse::new(&self.endpoint.live.vitals, epoch)
    }

    /// Gives the trial back; whether there was one.
    fn end_trial(&self) -> bool {
        let trial = self.trial.swap(false, Relaxed);
        if trial {
            self.endpoint.live.vitals.end_trial();
        }
        trial
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.end_trial();
        self.endpoint.live.inflight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An endpoint for tests of picks.
    pub(crate) fn endpoint(id: &str) -> Arc<Endpoint> {
        let resolved = SocketAddr::from(([127, 0, 0, 1], 9));
        Arc::new(Endpoint::new(id, "127.0.0.1:9", resolved, 1, Arc::default()))
    }

    #[test]
    fn a_ticket_counts_until_it_is_dropped() {
        let endpoint = endpoint("a");
        let (first, second) = (endpoint.reserve(0), endpoint.reserve(0));
        assert_eq!(endpoint.inflight(), 2);
        drop(first);
        assert_eq!(endpoint.inflight(), 1);
        drop(second);
        assert_eq!(endpoint.inflight(), 0);
    }

    #[test]
    fn a_trial_is_given_back_when_its_client_leaves() {
        let rules = Rules { consecutive_failures: 1, trials: 1, ..crate::health::rules(&Default::default()) };
        let endpoint = endpoint("a");
        assert!(endpoint.reserve(0).failed(UpstreamFailure::Connect, 0, &rules).is_some());
        assert!(endpoint.is_ejected(999) && endpoint.try_reserve(999).is_none());
        let trial = endpoint.try_reserve(1_000).expect("half-open");
        assert!(endpoint.try_reserve(1_000).is_none(), "one trial at a time");
        drop(endpoint.reserve(1_000)); // in panic: no trial, and none given back
        drop(trial);
        let trial = endpoint.try_reserve(1_000).expect("the place is free again");
        assert_eq!(trial.began(true, 1_001, &rules), Some(Transition::Returned));
        assert_eq!(endpoint.inflight(), 1, "the count lasts to the end of the answer");
    }

    /// smg #2163.
    #[test]
    fn a_busy_answer_never_counts_not_even_on_trial() {
        let rules = Rules { consecutive_failures: 1, ..crate::health::rules(&Default::default()) };
        let endpoint = endpoint("a");
        for _ in 0..1_000 {
            assert_eq!(endpoint.reserve(0).failed(UpstreamFailure::Busy, 0, &rules), None);
        }
        endpoint.reserve(0).failed(UpstreamFailure::Connect, 0, &rules);
        let trial = endpoint.try_reserve(1_000).expect("half-open");
        assert_eq!(trial.failed(UpstreamFailure::Busy, 1_000, &rules), None);
        assert!(!endpoint.is_ejected(1_000) && endpoint.try_reserve(1_000).is_some());
    }
}
