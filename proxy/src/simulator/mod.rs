//! A fleet in miniature, to compare routing policies: `penstock simulate`.
//!
//! Discrete events on a clock of microseconds: sessions of several turns arrive ([`workload`]), proxies that do not know of
//! each other pick by the very code that serves requests ([`crate::routing::policy::choose`]), engines prefill, decode and
//! cache prefixes ([`engine`]), and their reports reach the proxies late ([`fleet`]). [`outcome`] is what came of it.
//!
//! Same scenario, same seed, same figures, on every machine. Each policy gets the same sessions.
//!
//! What the model leaves out: the network, failures, retries, tokenisation, zones, preemption for want of KV memory. It
//! ranks policies; it does not predict a fleet's milliseconds.

pub mod engine;
pub mod fleet;
pub mod outcome;
pub mod workload;

use serde::Serialize;

pub use self::{fleet::simulate, outcome::Outcome, workload::Arrivals};
use crate::routing::affinity::LoadBound;

/// Tokens of a block: of the engines' caches, and of the proxies' prefix hashes.
pub const BLOCK_TOKENS: u32 = 128;

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scenario {
    /// Engines, all alike.
    pub engines: usize,
    /// Of these, that many run at half the speed.
    pub slow_engines: usize,
    /// Proxies; a request comes in through any of them.
    pub proxies: usize,
    /// Whether all turns of a session come in through one proxy, as over a kept connection.
    pub sticky_clients: bool,
    /// Requests a second, on average; each of a session's turns is one.
    pub rate: f64,
    /// Length of the arrivals, in simulated seconds. The first tenth is not counted.
    pub seconds: u32,
    /// How sessions arrive.
    pub arrivals: Arrivals,
    /// Age of the oldest report a proxy acts on, in milliseconds: reports are made every half of it and travel for the
    /// other half.
    pub staleness_ms: u64,
    /// Age at which a report is not believed any more, in milliseconds; 0: local counts alone.
    pub stale_bound_ms: u64,
    /// Different system prompts; the first is asked most (Zipf).
    pub prefixes: u32,
    /// Tokens of a system prompt.
    pub prefix_tokens: u32,
    /// Turns of a session, on average.
    pub turns: f64,
    /// Tokens that a user says in a turn, on average.
    pub turn_tokens: f64,
    /// Tokens of an answer, on average.
    pub output_tokens: f64,
    /// Time between an answer and the next turn, on average, in milliseconds.
    pub think_ms: f64,
    /// What the engines are.
    pub engine: engine::Model,
    /// Where affinity ends.
    pub bound: LoadBound,
    /// Entries of each proxy's prefix table.
    pub prefix_entries: usize,
    /// Of all dice.
    pub seed: u64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            engines: 8,
            slow_engines: 0,
            proxies: 4,
            sticky_clients: false,
            rate: 32.0,
            seconds: 300,
            arrivals: Arrivals::Poisson,
            staleness_ms: 500,
            stale_bound_ms: 5_000,
            prefixes: 32,
            prefix_tokens: 2_048,
            turns: 4.0,
            turn_tokens: 256.0,
            output_tokens: 256.0,
            think_ms: 5_000.0,
            engine: engine::Model::default(),
            bound: LoadBound { percent: 150, floor: 4 },
            prefix_entries: 65_536,
            seed: 1,
        }
    }
}

impl Scenario {
    /// Checks that it can be simulated, and in reasonable time.
    ///
    /// # Errors
    /// A sentence that names the figure and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        let whole = [
            ("engines", self.engines as u64, 1, 4_096),
            ("slow-engines", self.slow_engines as u64, 0, self.engines as u64),
            ("proxies", self.proxies as u64, 1, 256),
            ("seconds", u64::from(self.seconds), 1, 86_400),
            ("staleness-ms", self.staleness_ms, 10, 30_000),
            ("stale-bound-ms", self.stale_bound_ms, 0, 3_600_000),
            ("prefixes", u64::from(self.prefixes), 1, 1_000_000),
            ("prefix-tokens", u64::from(self.prefix_tokens), 0, 1_000_000),
            ("prefix-entries", self.prefix_entries as u64, 1, 1 << 26),
            ("load-bound-percent", u64::from(self.bound.percent), 100, 100_000),
        ];
        if let Some((name, value, least, most)) =
            whole.iter().find(|(_, v, least, most)| v < least || v > most)
        {
            return Err(format!("{name} is {value}; it must be {least} to {most}"));
        }
        let parts = [
            ("rate", self.rate, 0.001, 100_000.0),
            ("turns", self.turns, 1.0, 1_000.0),
            ("turn-tokens", self.turn_tokens, 1.0, 1_000_000.0),
            ("output-tokens", self.output_tokens, 1.0, 100_000.0),
            ("think-ms", self.think_ms, 0.0, 3_600_000.0),
        ];
        // Not a number is in no range.
        match parts.iter().find(|(_, v, least, most)| !(least..=most).contains(&v)) {
            Some((name, value, least, most)) => {
                Err(format!("{name} is {value}; it must be {least} to {most}"))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use penstock_config::proxy::Policy;

    use super::*;

    fn small() -> Scenario {
        Scenario { engines: 4, proxies: 2, rate: 12.0, seconds: 40, ..Scenario::default() }
    }

    #[test]
    fn a_seed_decides_everything() {
        for policy in Policy::ALL {
            assert_eq!(simulate(&small(), policy), simulate(&small(), policy), "{policy:?}");
        }
        let other = Scenario { seed: 2, ..small() };
        assert_ne!(simulate(&small(), Policy::LeastLoaded), simulate(&other, Policy::LeastLoaded));
    }

    #[test]
    fn every_request_is_answered_and_both_affinities_find_caches() {
        let outcomes = Policy::ALL.map(|policy| simulate(&small(), policy));
        for outcome in &outcomes {
            assert_eq!(outcome.unfinished, 0, "{outcome:?}");
            assert!(outcome.requests > 200, "{outcome:?}");
            assert!(
                outcome.ttft_p50_ms <= outcome.ttft_p99_ms && outcome.ttft_p99_ms <= outcome.latency_p99_ms
            );
        }
        let [least, _, turns, prefix, session] = &outcomes;
        assert!(
            prefix.cache_hits > least.cache_hits && session.cache_hits > turns.cache_hits,
            "{outcomes:?}"
        );
        assert!(least.herd < turns.herd, "{outcomes:?}");
    }

    #[test]
    fn what_cannot_be_simulated_is_named() {
        for (scenario, name) in [
            (Scenario { engines: 0, ..small() }, "engines is 0"),
            (Scenario { rate: f64::NAN, ..small() }, "rate is NaN"),
            (Scenario { staleness_ms: 5, ..small() }, "10 to 30000"),
        ] {
            let error = scenario.validate().expect_err(name);
            assert!(error.contains(name), "{error}");
        }
    }
}
