//! An engine with continuous batching, chunked prefill and a prefix cache, step by step.
//!
//! A step takes one token of every running request that is past its prompt, fills what is left of the token budget with
//! prompt, and lasts `step + decoding · per sequence + prompt tokens / prefill rate`. A prompt's cached beginning costs
//! nothing. Blocks enter the cache when the prompt is computed and when the answer is done; the least recently used leave.

use std::collections::{HashMap, VecDeque};

use serde::Serialize;

use super::BLOCK_TOKENS;

/// An engine's figures. The default is near an 8-billion-parameter model on one H100.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Model {
    /// Prompt tokens computed a second.
    pub prefill_tokens_per_s: u32,
    /// Microseconds of a step with nothing in it.
    pub step_us: u32,
    /// Microseconds that each decoding request adds.
    pub sequence_us: u32,
    /// Requests that run at one time.
    pub max_batch: usize,
    /// Tokens of a step.
    pub step_tokens: u32,
    /// Tokens that the prefix cache holds.
    pub cache_tokens: u32,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            prefill_tokens_per_s: 20_000,
            step_us: 8_000,
            sequence_us: 100,
            max_batch: 256,
            step_tokens: 2_048,
            cache_tokens: 400_000,
        }
    }
}

impl Model {
    /// The same at half the speed.
    #[must_use]
    pub fn slow(self) -> Self {
        Self {
            prefill_tokens_per_s: self.prefill_tokens_per_s / 2,
            step_us: self.step_us.saturating_mul(2),
            sequence_us: self.sequence_us.saturating_mul(2),
            ..self
        }
    }
}

/// What an engine is asked to do.
#[derive(Debug, Clone)]
pub struct Job {
    /// The caller's name for it.
    pub id: usize,
    /// Hashes of the prompt's blocks, each of all that stands before it too.
    pub prompt: Vec<u64>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens to make; at least 1.
    pub output_tokens: u32,
    /// Hashes of the blocks of prompt and answer together.
    pub whole: Vec<u64>,
}

#[derive(Debug)]
struct Running {
    job: Job,
    prefill_left: u32,
    output_left: u32,
    /// Tokens of it in the present step.
    chunk: u32,
}

/// What happened in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happened {
    /// The prompt was looked up in the cache: that many of its tokens were there.
    Cached(usize, u32),
    /// Its first token.
    First(usize),
    /// Its last.
    Finished(usize),
}

/// One engine.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    cache: Cache,
    stepping: bool,
}

impl Engine {
    /// Idle, with nothing cached.
    pub fn new(model: Model) -> Self {
        let blocks = usize::try_from(model.cache_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX);
        Self {
            model,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: Cache::new(blocks),
            stepping: false,
        }
    }

    /// Requests running and waiting.
    pub fn load(&self) -> u32 {
        u32::try_from(self.running.len() + self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// Takes a request.
    pub fn submit(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// Begins a step unless one is under way or there is nothing to do: how long it lasts, in microseconds.
    pub fn begin(&mut self, happened: &mut Vec<Happened>) -> Option<u64> {
        if self.stepping {
            return None;
        }
        while self.running.len() < self.model.max_batch
            && let Some(job) = self.waiting.pop_front()
        {
            let known = self.cache.known(&job.prompt).saturating_mul(BLOCK_TOKENS);
            // The last token is always computed: its output is the first token of the answer.
            let cached = known.min(job.prompt_tokens.saturating_sub(1));
            happened.push(Happened::Cached(job.id, cached));
            self.running.push(Running {
                prefill_left: job.prompt_tokens.saturating_sub(cached).max(1),
                output_left: job.output_tokens.max(1),
                chunk: 0,
                job,
            });
        }
        if self.running.is_empty() {
            return None;
        }
        self.stepping = true;
        let (mut budget, mut decoding, mut prompt) = (self.model.step_tokens.max(1), 0u64, 0u64);
        for running in self.running.iter_mut().filter(|running| running.prefill_left == 0) {
            running.chunk = 1;
            budget = budget.saturating_sub(1);
            decoding += 1;
        }
        // A step full of answers still computes some prompt, or none would ever start.
        budget = budget.max(1);
        for running in self.running.iter_mut().filter(|running| running.prefill_left > 0) {
            running.chunk = running.prefill_left.min(budget);
            budget -= running.chunk;
            prompt += u64::from(running.chunk);
        }
        let prefill = prompt * 1_000_000 / u64::from(self.model.prefill_tokens_per_s.max(1));
        Some(u64::from(self.model.step_us) + decoding * u64::from(self.model.sequence_us) + prefill)
    }

    /// Ends the step under way.
    pub fn end(&mut self, happened: &mut Vec<Happened>) {
        self.stepping = false;
        let cache = &mut self.cache;
        self.running.retain_mut(|running| {
            if running.prefill_left > 0 {
                running.prefill_left -= running.chunk;
                if running.prefill_left > 0 {
                    return true;
                }
                cache.keep(&running.job.prompt);
                happened.push(Happened::First(running.job.id));
            }
            running.output_left -= 1;
            if running.output_left == 0 {
                cache.keep(&running.job.whole);
                happened.push(Happened::Finished(running.job.id));
            }
            running.output_left > 0
        });
    }
}

/// Least recently used blocks leave first.
#[derive(Debug)]
struct Cache {
    capacity: usize,
    used: HashMap<u64, u64>,
    /// Uses in their order; one that is not the block's last is void.
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Cache {
    fn new(capacity: usize) -> Self {
        Self { capacity, used: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// Blocks of `prompt` that are there, from its beginning on.
    fn known(&self, prompt: &[u64]) -> u32 {
        let known = prompt.iter().take_while(|block| self.used.contains_key(block)).count();
        u32::try_from(known).unwrap_or(u32::MAX)
    }

    fn keep(&mut self, blocks: &[u64]) {
        // The end first: it is to leave before the beginning, without which it is of no use.
        for block in blocks.iter().rev() {
            self.clock += 1;
            self.used.insert(*block, self.clock);
            self.order.push_back((*block, self.clock));
        }
        if self.order.len() > 2 * self.capacity + blocks.len() {
            self.order.retain(|(block, at)| self.used.get(block) == Some(at));
        }
        while self.used.len() > self.capacity {
            let Some((block, at)) = self.order.pop_front() else { return };
            if self.used.get(&block) == Some(&at) {
                self.used.remove(&block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: usize, blocks: u64, output_tokens: u32) -> Job {
        let prompt: Vec<u64> = (1..=blocks).collect();
        let tokens = u32::try_from(blocks).unwrap() * BLOCK_TOKENS;
        Job { id, whole: prompt.clone(), prompt, prompt_tokens: tokens, output_tokens }
    }

    /// Runs until idle: when each thing happened.
    fn run(engine: &mut Engine) -> Vec<(u64, Happened)> {
        let (mut now, mut log) = (0, vec![]);
        loop {
            let mut happened = vec![];
            let Some(lasts) = engine.begin(&mut happened) else { return log };
            log.extend(happened.drain(..).map(|what| (now, what)));
            now += lasts;
            engine.end(&mut happened);
            log.extend(happened.into_iter().map(|what| (now, what)));
        }
    }

    #[test]
    fn a_request_is_prefilled_then_decoded_a_token_a_step() {
        let mut engine = Engine::new(Model::default());
        engine.submit(job(7, 10, 3));
        // 1280 tokens at 20 000 a second, on a step of 8 ms; then two steps of 8.1 ms.
        let first = 8_000 + 64_000;
        assert_eq!(
            run(&mut engine),
            [
                (0, Happened::Cached(7, 0)),
                (first, Happened::First(7)),
                (first + 2 * 8_100, Happened::Finished(7)),
            ]
        );
        assert_eq!(engine.load(), 0);
    }

    #[test]
    fn what_was_computed_before_is_not_computed_again() {
        let mut engine = Engine::new(Model::default());
        engine.submit(job(1, 10, 1));
        run(&mut engine);
        engine.submit(job(2, 12, 1));
        let log = run(&mut engine);
        assert_eq!(log[0], (0, Happened::Cached(2, 1_280)));
        assert_eq!(log[1].0, 8_000 + 256 * 50);
    }

    #[test]
    fn a_small_cache_forgets_the_end_first() {
        let mut cache = Cache::new(3);
        cache.keep(&[1, 2, 3, 4]);
        assert_eq!(cache.known(&[1, 2, 3, 4]), 3);
        for _ in 0..100 {
            cache.keep(&[1, 9]);
        }
        assert_eq!(cache.known(&[1, 2, 3]), 2);
        assert!(cache.order.len() <= 2 * cache.capacity + 2, "uses do not pile up");
    }

    #[test]
    fn no_more_run_than_fit() {
        let mut engine = Engine::new(Model { max_batch: 2, ..Model::default() });
        (0..3).for_each(|id| engine.submit(job(id, 1, 2)));
        let mut happened = vec![];
        assert!(engine.begin(&mut happened).is_some());
        assert_eq!((engine.running.len(), engine.waiting.len(), engine.load()), (2, 1, 3));
        assert_eq!(engine.begin(&mut happened), None, "a step is under way");
    }
}
