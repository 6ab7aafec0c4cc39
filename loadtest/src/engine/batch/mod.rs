//! Continuous batching as a model of time: who waits, who runs, and when each next token is due. Pure; microseconds come in.
//!
//! - **Admission** in order of arrival, while a slot (`max_num_seqs`) and KV blocks are free.
//! - **TTFT** = wait for a slot + wait for the prefill of those before + own uncached prompt tokens ÷ prefill rate + base.
//!   The prefill is one resource: prompts queue for it, so TTFT grows with the queue and with what is in it.
//! - **ITL** = (base + growth × running) × slow factor ± jitter. Each sequence has its own phase; a real engine releases
//!   a step for all at once, but then a test of one thousand streams would measure bursts rather than the proxy.
//! - **Preemption**: no KV block left for a token: the youngest running sequence gives its blocks back and waits at the
//!   head of the queue; its prompt and output are computed again.
//! - **Unthrottled**: after admission a sequence *free-runs*: it has no due times and the reader's pace is the limit.
//!
//! Absent: chunked prefill, speculative decoding, priorities.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use super::{
    kv::{Holding, KvCache},
    tokens,
};

/// Names a sequence; chosen by the caller, never reused.
pub type SeqId = u64;

/// A token is this late at most before the schedule moves on from now instead of catching up, in µs. A process that was
/// stopped does not pour out what it missed.
const CATCH_UP_US: u64 = 50_000;

/// The model's constants.
#[derive(Debug, Clone)]
pub struct BatchSettings {
    /// Sequences that run at once; at least 1.
    pub max_num_seqs: usize,
    /// Sequences that may wait; none = any number.
    pub max_queued: Option<usize>,
    /// Part of TTFT that does not depend on the prompt, µs.
    pub ttft_base_us: u64,
    /// Uncached prompt tokens computed per second by the whole engine; 0 = at once.
    pub prefill_tokens_per_s: u64,
    /// ITL of a sequence alone, µs.
    pub itl_base_us: u64,
    /// ITL added per running sequence, ns.
    pub itl_growth_ns: u64,
    /// ITL varies by up to this share either way, 0 to 100 percent.
    pub jitter_percent: u64,
    /// Seed of the jitter.
    pub jitter_seed: u64,
    /// No due times at all.
    pub unthrottled: bool,
}

/// What happened to a sequence in [`Batch::advance`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It left the queue.
    Admitted {
        /// Which sequence.
        id: SeqId,
        /// Prompt tokens found in the cache.
        cached_tokens: u64,
        /// Time in the queue, µs.
        waited_us: u64,
    },
    /// One more token may be given out.
    Token {
        /// Which sequence.
        id: SeqId,
    },
    /// Tokens may be given out as fast as they are taken.
    FreeRun {
        /// Which sequence.
        id: SeqId,
    },
}

/// A new sequence.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Its id.
    pub id: SeqId,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Hashes of the prompt's full blocks.
    pub blocks: Vec<u64>,
    /// ITL factor in percent; 100 = normal.
    pub slow_percent: u64,
}

/// The queue is full.
#[derive(Debug, PartialEq, Eq)]
pub struct QueueFull;

#[derive(Debug)]
struct Waiting {
    arrival: Arrival,
    since_us: u64,
    generated: u64,
}

#[derive(Debug)]
struct Running {
    arrival: Arrival,
    holding: Holding,
    generated: u64,
    /// Distinguishes this stay in the batch from one before a preemption.
    stay: u64,
}

/// The engine's queue and batch.
#[derive(Debug)]
pub struct Batch {
    settings: BatchSettings,
    kv: KvCache,
    waiting: VecDeque<Waiting>,
    running: HashMap<SeqId, Running>,
    /// (due, stay, id); entries whose stay is over are skipped.
    due: BinaryHeap<Reverse<(u64, u64, SeqId)>>,
    prefill_free_at_us: u64,
    /// The latest time seen.
    clock_us: u64,
    stays: u64,
    preemptions: u64,
}

impl Batch {
    /// An idle engine.
    pub fn new(settings: BatchSettings, kv: KvCache) -> Self {
        Self {
            settings,
            kv,
            waiting: VecDeque::new(),
            running: HashMap::new(),
            due: BinaryHeap::new(),
            prefill_free_at_us: 0,
            clock_us: 0,
            stays: 0,
            preemptions: 0,
        }
    }

    /// Queues the sequences of one request, all or none. They start with the next [`Batch::advance`].
    ///
    /// # Errors
    /// [`QueueFull`] if fewer places than sequences are free.
    pub fn submit(&mut self, now_us: u64, arrivals: Vec<Arrival>) -> Result<(), QueueFull> {
        if self.settings.max_queued.is_some_and(|max| self.waiting.len() + arrivals.len() > max) {
            return Err(QueueFull);
        }
        let queued = arrivals.into_iter().map(|arrival| Waiting { arrival, since_us: now_us, generated: 0 });
        self.waiting.extend(queued);
        Ok(())
    }

    /// Lets time pass until `now_us` and appends what happened.
    pub fn advance(&mut self, now_us: u64, events: &mut Vec<Event>) {
        self.clock_us = now_us;
        self.admit(now_us, events);
        while let Some(&Reverse((due_us, stay, id))) = self.due.peek() {
            if due_us > now_us {
                break;
            }
            self.due.pop();
            if self.running.get(&id).is_some_and(|running| running.stay == stay) && self.grow(id, 1) {
                events.push(Event::Token { id });
                let from_us = if now_us - due_us > CATCH_UP_US { now_us } else { due_us };
                self.schedule(id, from_us);
            }
        }
    }

    /// When something is due next; none = nothing until a submission or an end. A waiting sequence that cannot be
    /// admitted has no time of its own: an end makes room for it.
    pub fn next_due_us(&self) -> Option<u64> {
        self.due.peek().map(|&Reverse((due_us, ..))| due_us)
    }

    /// Counts `tokens` given out by a free-running sequence.
    pub fn gave(&mut self, id: SeqId, tokens: u64) {
        if self.running.contains_key(&id) {
            let alone = self.running.len() == 1;
            if let Some(running) = self.running.get_mut(&id) {
                running.generated += tokens;
                // A free-running sequence is never preempted: its tokens are out already.
                self.kv.grow(&mut running.holding, tokens, alone);
            }
        }
    }

    /// The sequence ended, however. `blocks` are the hashes of its full blocks, output included.
    pub fn finish(&mut self, id: SeqId, blocks: &[u64]) {
        match self.running.remove(&id) {
            Some(running) => self.kv.release(running.holding, blocks),
            None => self.waiting.retain(|w| w.arrival.id != id),
        }
    }

    /// Sequences running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences waiting.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// True if someone waits and could be admitted by [`Batch::advance`] now, as far as slots go.
    pub fn has_admissible(&self) -> bool {
        !self.waiting.is_empty() && self.running.len() < self.settings.max_num_seqs
    }

    /// Sequences preempted so far.
    pub const fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The block cache.
    pub const fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Forgets cached blocks nobody holds.
    pub fn reset_prefix_cache(&mut self) {
        self.kv.reset();
    }

    fn admit(&mut self, now_us: u64, events: &mut Vec<Event>) {
        while self.running.len() < self.settings.max_num_seqs {
            let Some(next) = self.waiting.front() else { return };
            let tokens = next.arrival.prompt_tokens + next.generated;
            let alone = self.running.is_empty();
            let Some(holding) = self.kv.allocate(tokens, &next.arrival.blocks, alone) else { return };
            let Some(Waiting { arrival, since_us, generated }) = self.waiting.pop_front() else { return };
            let cached_tokens = holding.cached_tokens;
            let id = arrival.id;
            self.stays += 1;
            let stay = self.stays;
            self.running.insert(id, Running { arrival, holding, generated, stay });
            events.push(Event::Admitted { id, cached_tokens, waited_us: now_us.saturating_sub(since_us) });
            if self.settings.unthrottled {
                events.push(Event::FreeRun { id });
                continue;
            }
            let prefill_us = ((tokens - cached_tokens) * 1_000_000)
                .checked_div(self.settings.prefill_tokens_per_s)
                .unwrap_or(0);
            self.prefill_free_at_us = self.prefill_free_at_us.max(now_us) + prefill_us;
            let first_us = self.prefill_free_at_us + self.settings.ttft_base_us;
            self.due.push(Reverse((first_us, stay, id)));
        }
    }

    fn schedule(&mut self, id: SeqId, from_us: u64) {
        let running_count = u64::try_from(self.running.len()).unwrap_or(u64::MAX);
        let Some(running) = self.running.get(&id) else { return };
        let settings = &self.settings;
        let itl_us = settings.itl_base_us + settings.itl_growth_ns.saturating_mul(running_count) / 1000;
        let itl_us = itl_us.saturating_mul(running.arrival.slow_percent) / 100;
        let span = itl_us.saturating_mul(settings.jitter_percent) / 100;
        let draw = tokens::finish(settings.jitter_seed ^ id.rotate_left(32) ^ running.generated);
        let itl_us = itl_us - span + draw % (2 * span + 1);
        // Never none: time would stand still with one token after the other.
        self.due.push(Reverse((from_us + itl_us.max(1), running.stay, id)));
    }

    /// Counts tokens of a running sequence, preempting the youngest while there is no room. False if that was itself.
    fn grow(&mut self, id: SeqId, tokens: u64) -> bool {
        loop {
            let alone = self.running.len() == 1;
            let Some(running) = self.running.get_mut(&id) else { return false };
            if self.kv.grow(&mut running.holding, tokens, alone) {
                running.generated += tokens;
                return true;
            }
            let Some(youngest) = self.running.values().max_by_key(|r| r.stay).map(|r| r.arrival.id) else {
                return false;
            };
            self.preempt(youngest);
        }
    }

    fn preempt(&mut self, id: SeqId) {
        if let Some(Running { arrival, holding, generated, .. }) = self.running.remove(&id) {
            self.preemptions += 1;
            self.kv.release(holding, &[]);
            self.waiting.push_front(Waiting { arrival, since_us: self.clock_us, generated });
        }
    }
}

#[cfg(test)]
mod tests;
