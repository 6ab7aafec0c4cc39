//! The shell around [`super::batch`]: real time, the core's lease, and the waking of streams.
//!
//! One task steps the batch for all streams; there is no timer per stream. A stream holds a [`Ticket`]: the credit that
//! the batch has granted it, in tokens. The task raises credits and wakes; the stream takes them at its own pace, so a
//! slow reader delays nobody. Dropping the ticket takes the sequence out of the batch, whatever happened to its stream.
//!
//! *Cost* per token: one heap operation, one atomic add, one wake of a task. Locks are held for no await and no I/O.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    batch::{Arrival, Batch, BatchSettings, Event, QueueFull, SeqId},
    core_process::Lease,
    kv::KvCache,
    metrics::Metrics,
};

/// Credit that means "without limit".
const UNLIMITED: u64 = u64::MAX;

/// The engine's batch in real time.
#[derive(Debug)]
pub(super) struct Scheduler {
    state: Mutex<State>,
    wake: Notify,
    /// What the core grants.
    lease: Arc<Lease>,
    paused: AtomicBool,
    started: Instant,
}

#[derive(Debug)]
struct State {
    batch: Batch,
    slots: HashMap<SeqId, Arc<Slot>>,
    next_id: SeqId,
    /// What the core said last, while it stands still and others change the batch.
    frozen: Option<Load>,
}

#[derive(Debug)]
struct Slot {
    credit: AtomicU64,
    /// Credit below which the stream need not be woken.
    wake_at: AtomicU64,
    cached_tokens: AtomicU64,
    waited_us: AtomicU64,
    waker: Arc<AtomicWaker>,
}

/// What runs now, for /metrics and /sim/state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Sequences running.
    pub(super) running: usize,
    /// Sequences waiting.
    pub(super) waiting: usize,
    /// Share of the KV blocks in use.
    pub(super) kv_used_ratio: f64,
    /// Sequences preempted since the start.
    pub(super) preemptions: u64,
    /// Prompt tokens looked up in the prefix cache since the start.
    pub(super) prefix_queries: u64,
    /// Those found.
    pub(super) prefix_hits: u64,
    /// KV blocks.
    pub(super) kv_blocks: usize,
}

/// A prompt to schedule.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    /// Its length.
    pub(super) tokens: u64,
    /// Hashes of its full blocks.
    pub(super) blocks: Vec<u64>,
}

impl Scheduler {
    /// An idle scheduler.
    pub(super) fn new(settings: BatchSettings, kv_blocks: usize, lease: Arc<Lease>) -> Self {
        let batch = Batch::new(settings, KvCache::new(kv_blocks));
        Self {
            state: Mutex::new(State { batch, slots: HashMap::new(), next_id: 1, frozen: None }),
            wake: Notify::new(),
            lease,
            paused: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    /// Queues one sequence per prompt. `waker` is woken whenever one of them may go on.
    ///
    /// # Errors
    /// [`QueueFull`]: none was queued.
    pub(super) fn submit(
        self: &Arc<Self>,
        prompts: impl Iterator<Item = Prompt>,
        slow_percent: u64,
        waker: &Arc<AtomicWaker>,
    ) -> Result<Vec<Ticket>, QueueFull> {
        let mut guard = self.lock();
        let state = &mut *guard;
        self.freeze(state);
        let first = state.next_id;
        let arrivals: Vec<Arrival> = prompts
            .zip(first..)
            .map(|(p, id)| Arrival { id, prompt_tokens: p.tokens, blocks: p.blocks, slow_percent })
            .collect();
        let ids: Vec<SeqId> = arrivals.iter().map(|a| a.id).collect();
        state.batch.submit(self.now_us(), arrivals)?;
        let mut tickets = Vec::with_capacity(ids.len());
        for id in ids {
            state.next_id = id + 1;
            let slot = Arc::new(Slot {
                credit: AtomicU64::new(0),
                wake_at: AtomicU64::new(1),
                cached_tokens: AtomicU64::new(0),
                waited_us: AtomicU64::new(0),
                waker: waker.clone(),
            });
            state.slots.insert(id, slot.clone());
            tickets.push(Ticket { scheduler: self.clone(), id, slot, blocks: Vec::new() });
        }
        drop(guard);
        self.lease.set_busy(true);
        self.wake.notify_one();
        Ok(tickets)
    }

    /// Steps the batch until `stop`.
    pub(super) async fn run(&self, metrics: &Metrics, stop: CancellationToken) {
        let mut events = Vec::new();
        loop {
            let due = if self.may_run() { self.step(metrics, &mut events) } else { None };
            // Held up by the lease or a pause: whoever ends that notifies.
            let timer = async {
                match due {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = timer => {}
                () = self.wake.notified() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// One step; the time until the next.
    fn step(&self, metrics: &Metrics, events: &mut Vec<Event>) -> Option<Duration> {
        let mut state = self.lock();
        state.frozen = None;
        let now_us = self.now_us();
        state.batch.advance(now_us, events);
        let mut tokens = 0;
        for event in events.drain(..) {
            match event {
                Event::Admitted { id, cached_tokens, waited_us } => {
                    if let Some(slot) = state.slots.get(&id) {
                        slot.cached_tokens.store(cached_tokens, Ordering::Relaxed);
                        slot.waited_us.store(waited_us, Ordering::Relaxed);
                    }
                }
                Event::Token { id } => {
                    if let Some(slot) = state.slots.get(&id) {
                        tokens += 1;
                        let credit = slot.credit.fetch_add(1, Ordering::Relaxed) + 1;
                        if credit >= slot.wake_at.load(Ordering::Relaxed) {
                            slot.waker.wake();
                        }
                    }
                }
                Event::FreeRun { id } => {
                    if let Some(slot) = state.slots.get(&id) {
                        slot.credit.store(UNLIMITED, Ordering::Relaxed);
                        slot.waker.wake();
                    }
                }
            }
        }
        if tokens > 0 {
            metrics.iteration_tokens.observe(f64::from(tokens));
        }
        state.batch.next_due_us().map(|due_us| Duration::from_micros(due_us.saturating_sub(now_us)))
    }

    /// True if tokens may be given out now.
    pub(super) fn may_run(&self) -> bool {
        !self.paused.load(Ordering::Relaxed) && self.lease.is_valid()
    }

    /// Stops or resumes all generation.
    pub(super) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
        self.resume();
    }

    /// Looks again: the lease was renewed, or a pause ended.
    pub(super) fn resume(&self) {
        self.lock().frozen = None;
        self.wake.notify_one();
        self.wake_all();
    }

    /// Wakes every stream, so that it looks at the state of the engine.
    pub(super) fn wake_all(&self) {
        for slot in self.lock().slots.values() {
            slot.waker.wake();
        }
    }

    /// Forgets cached blocks.
    pub(super) fn reset_prefix_cache(&self) {
        self.lock().batch.reset_prefix_cache();
    }

    /// What runs now, by the core's last word: while it stands still, requests come and go without its knowing.
    pub(super) fn load(&self) -> Load {
        let mut state = self.lock();
        if self.lease.is_valid() {
            state.frozen = None;
        }
        state.frozen.unwrap_or_else(|| Self::load_of(&state))
    }

    /// To be called before the batch is changed from outside.
    fn freeze(&self, state: &mut State) {
        if self.lease.is_lapsed() && state.frozen.is_none() {
            state.frozen = Some(Self::load_of(state));
        }
    }

    fn load_of(state: &State) -> Load {
        let kv = state.batch.kv();
        let (prefix_queries, prefix_hits) = kv.queries_and_hits();
        Load {
            running: state.batch.running(),
            waiting: state.batch.waiting(),
            kv_used_ratio: kv.used_ratio(),
            preemptions: state.batch.preemptions(),
            prefix_queries,
            prefix_hits,
            kv_blocks: kv.capacity(),
        }
    }

    fn finish(&self, id: SeqId, blocks: &[u64]) {
        let mut state = self.lock();
        self.freeze(&mut state);
        state.slots.remove(&id);
        state.batch.finish(id, blocks);
        let admissible = state.batch.has_admissible();
        let idle = state.slots.is_empty();
        drop(state);
        if idle {
            self.lease.set_busy(false);
        }
        if admissible {
            self.wake.notify_one();
        }
    }

    /// A panic elsewhere while holding the lock leaves counters that are still safe to read.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// One sequence's place in the batch; dropping it gives the place up.
#[derive(Debug)]
pub(super) struct Ticket {
    scheduler: Arc<Scheduler>,
    id: SeqId,
    slot: Arc<Slot>,
    /// Hashes of the sequence's full blocks, kept in the prefix cache after its end.
    pub(super) blocks: Vec<u64>,
}

impl Ticket {
    /// Tokens granted so far, as far as the engine may give them out now beyond `taken`.
    pub(super) fn has_more_than(&self, taken: u64) -> bool {
        let credit = self.slot.credit.load(Ordering::Relaxed);
        credit > taken && (credit != UNLIMITED || self.scheduler.may_run())
    }

    /// True if the sequence is not paced.
    pub(super) fn is_free_running(&self) -> bool {
        self.slot.credit.load(Ordering::Relaxed) == UNLIMITED
    }

    /// Do not wake the stream before it has `credit` tokens.
    pub(super) fn wake_at(&self, credit: u64) {
        self.slot.wake_at.store(credit, Ordering::Relaxed);
    }

    /// Accounts for tokens given out by a free-running sequence; paced ones are counted when granted.
    pub(super) fn gave(&self, tokens: u64) {
        if self.is_free_running() {
            self.scheduler.lock().batch.gave(self.id, tokens);
        }
    }

    /// Prompt tokens found in the prefix cache; 0 before admission.
    pub(super) fn cached_tokens(&self) -> u64 {
        self.slot.cached_tokens.load(Ordering::Relaxed)
    }

    /// Time spent in the queue; 0 before admission.
    pub(super) fn waited_us(&self) -> u64 {
        self.slot.waited_us.load(Ordering::Relaxed)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.scheduler.finish(self.id, &self.blocks);
    }
}
