//! Who asks what, and when: sessions that begin with one of a few system prompts and grow with every turn.
//!
//! A session's sizes come from dice of its own, made from the seed and its number: they are the same under every policy,
//! whatever happens in between.

use serde::Serialize;

use super::{BLOCK_TOKENS, Scenario};

/// How sessions arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// Evenly, at random.
    Poisson,
    /// Of every ten seconds, three at two and a half times the average rate.
    Bursty,
}

/// When sessions begin, in microseconds, in order.
pub fn arrivals(scenario: &Scenario) -> Vec<u64> {
    const PEAK: f64 = 2.5;
    let mut rng = fastrand::Rng::with_seed(scenario.seed);
    let sessions_per_s = scenario.rate / scenario.turns;
    let (mut at, mut times) = (0.0, vec![]);
    loop {
        // Thinning: candidates at the highest rate, each kept with the share that its moment's rate is of that.
        let (highest, share) = match scenario.arrivals {
            Arrivals::Poisson => (1.0, 1.0),
            Arrivals::Bursty if at % 10.0 < 3.0 => (PEAK, 1.0),
            Arrivals::Bursty => (PEAK, (10.0 - 3.0 * PEAK) / 7.0 / PEAK),
        };
        let keep = rng.f64() < share;
        if keep && at > 0.0 {
            times.push(micros(at * 1_000_000.0));
        }
        at += exponential(&mut rng, 1.0 / (sessions_per_s * highest));
        if at >= f64::from(scenario.seconds) {
            return times;
        }
    }
}

/// One conversation.
#[derive(Debug)]
pub struct Session {
    rng: fastrand::Rng,
    system: u64,
    system_blocks: usize,
    id: u64,
    tokens: u32,
    turns_left: u32,
}

/// One turn of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn {
    /// Tokens of everything said so far, this turn's question included.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Time from the end of the answer to the next turn, in microseconds; `None`: it was the last.
    pub next_after_us: Option<u64>,
}

impl Session {
    /// The session of number `id`.
    pub fn new(scenario: &Scenario, id: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(scramble(scenario.seed, id));
        let system = zipf(&mut rng, scenario.prefixes);
        let mut turns_left = 1;
        while rng.f64() > 1.0 / scenario.turns {
            turns_left += 1;
        }
        Self {
            system: scramble(u64::MAX, u64::from(system)),
            system_blocks: usize::try_from(scenario.prefix_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX),
            id: scramble(scenario.seed, id),
            tokens: scenario.prefix_tokens,
            turns_left,
            rng,
        }
    }

    /// Its name for session affinity.
    pub fn key(&self) -> u64 {
        self.id
    }

    /// The next turn.
    pub fn turn(&mut self, scenario: &Scenario) -> Turn {
        let asked = tokens(exponential(&mut self.rng, scenario.turn_tokens));
        let output_tokens = tokens(exponential(&mut self.rng, scenario.output_tokens));
        let prompt_tokens = self.tokens.saturating_add(asked);
        self.tokens = prompt_tokens.saturating_add(output_tokens);
        self.turns_left = self.turns_left.saturating_sub(1);
        let think = exponential(&mut self.rng, scenario.think_ms) * 1_000.0;
        let next_after_us = (self.turns_left > 0).then(|| micros(think));
        Turn { prompt_tokens, output_tokens, next_after_us }
    }

    /// Hashes of the whole blocks among its first `tokens`. Those of the system prompt are everybody's who has it.
    pub fn blocks(&self, tokens: u32) -> Vec<u64> {
        let whole = usize::try_from(tokens / BLOCK_TOKENS).unwrap_or(usize::MAX);
        let owner = |block: usize| if block < self.system_blocks { self.system } else { self.id };
        (0..whole).map(|block| scramble(owner(block), block as u64 + 1)).collect()
    }
}

fn exponential(rng: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

/// From 0 up to `n`, the k-th with a chance of about 1/k.
fn zipf(rng: &mut fastrand::Rng, n: u32) -> u32 {
    let total: f64 = (1..=n).map(|k| 1.0 / f64::from(k)).sum();
    let mut left = rng.f64() * total;
    (1..n)
        .find(|k| {
            left -= 1.0 / f64::from(*k);
            left < 0.0
        })
        .unwrap_or(n)
        - 1
}

/// At least one token; long tails are cut at 32 768.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn tokens(amount: f64) -> u32 {
    amount.clamp(1.0, 32_768.0) as u32
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and under a day or so"
)]
fn micros(amount: f64) -> u64 {
    amount.max(0.0) as u64
}

/// A number that looks random and is always the same.
pub fn scramble(a: u64, b: u64) -> u64 {
    let mut bits = a.wrapping_add(b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_come_at_the_rate_that_was_asked_for() {
        for arrivals in [Arrivals::Poisson, Arrivals::Bursty] {
            let scenario = Scenario { arrivals, seconds: 2_000, ..Scenario::default() };
            let times = super::arrivals(&scenario);
            assert!((15_000..17_000).contains(&times.len()), "{arrivals:?}: {} of 16000", times.len());
            assert!(times.is_sorted());
            let early = times.iter().filter(|at| **at % 10_000_000 < 3_000_000).count() * 100 / times.len();
            let expected = if arrivals == Arrivals::Bursty { 73..78 } else { 28..33 };
            assert!(expected.contains(&early), "{arrivals:?}: {early} % in the first three of ten seconds");
        }
    }

    #[test]
    fn a_turn_begins_as_the_one_before_ended_and_sessions_share_their_system_prompt() {
        let scenario = Scenario { prefixes: 1, ..Scenario::default() };
        let (mut one, other) = (Session::new(&scenario, 1), Session::new(&scenario, 2));
        let (first, second) = (one.turn(&scenario), one.turn(&scenario));
        assert!(second.prompt_tokens > first.prompt_tokens + first.output_tokens);
        let (short, long) = (one.blocks(first.prompt_tokens), one.blocks(second.prompt_tokens));
        assert_eq!(long[..short.len()], short);
        let alike = one.blocks(8_192).iter().zip(other.blocks(8_192)).take_while(|(a, b)| **a == *b).count();
        assert_eq!(alike, 16, "2048 tokens of 128");
    }

    #[test]
    fn the_first_system_prompt_is_asked_most() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut hits = [0; 4];
        (0..10_000).for_each(|_| hits[zipf(&mut rng, 4) as usize] += 1);
        assert!(hits.is_sorted_by(|a, b| a > b) && hits[0] > 4_500 && hits[3] > 1_000, "{hits:?}");
    }
}
