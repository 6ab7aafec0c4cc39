//! `penstock simulate`: routing policies side by side on a simulated fleet. The work is done by
//! [`penstock_proxy::simulator`]; here are its flags and its table.

use clap::{Args, ValueEnum};
use penstock_config::proxy::Policy;
use penstock_proxy::{
    routing::affinity::LoadBound,
    simulator::{self, Arrivals, Outcome, Scenario, engine::Model},
};
use serde_json::json;

use crate::{api::ApiError, args::Format, output};

/// `penstock simulate`. The defaults are those of [`Scenario`].
#[derive(Debug, Clone, Args)]
pub(crate) struct SimulateArgs {
    /// Policy to simulate, repeatable [default: all]
    #[arg(long = "policy", value_name = "NAME", value_parser = policy)]
    policies: Vec<Policy>,
    /// Engines, all alike
    #[arg(long, value_name = "N", default_value_t = Scenario::default().engines)]
    engines: usize,
    /// Of these, that many at half the speed
    #[arg(long, value_name = "N", default_value_t = Scenario::default().slow_engines)]
    slow_engines: usize,
    /// Proxies that know nothing of each other; a request comes in through any of them
    #[arg(long, value_name = "N", default_value_t = Scenario::default().proxies)]
    proxies: usize,
    /// All turns of a session come in through one proxy, as over a kept connection
    #[arg(long)]
    sticky_clients: bool,
    /// Requests a second, on average
    #[arg(long, value_name = "R", default_value_t = Scenario::default().rate)]
    rate: f64,
    /// Simulated time in which requests arrive, in seconds; the first tenth is not counted
    #[arg(long, value_name = "N", default_value_t = Scenario::default().seconds)]
    seconds: u32,
    /// How sessions arrive
    #[arg(long, value_name = "HOW", default_value = "poisson")]
    arrivals: Pattern,
    /// Age of the oldest engine report that a pick meets, in milliseconds: 10 to 30000
    #[arg(long, value_name = "MS", default_value_t = Scenario::default().staleness_ms)]
    staleness_ms: u64,
    /// Age at which a report is not believed any more, in milliseconds; 0: a proxy looks at its own requests alone
    #[arg(long, value_name = "MS", default_value_t = Scenario::default().stale_bound_ms)]
    stale_bound_ms: u64,
    /// Different system prompts that sessions begin with
    #[arg(long, value_name = "N", default_value_t = Scenario::default().prefixes)]
    prefixes: u32,
    /// Tokens of a system prompt
    #[arg(long, value_name = "N", default_value_t = Scenario::default().prefix_tokens)]
    prefix_tokens: u32,
    /// Turns of a session, on average
    #[arg(long, value_name = "N", default_value_t = Scenario::default().turns)]
    turns: f64,
    /// Tokens that a user says in a turn, on average
    #[arg(long, value_name = "N", default_value_t = Scenario::default().turn_tokens)]
    turn_tokens: f64,
    /// Tokens of an answer, on average
    #[arg(long, value_name = "N", default_value_t = Scenario::default().output_tokens)]
    output_tokens: f64,
    /// Time between an answer and the session's next turn, on average, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = Scenario::default().think_ms)]
    think_ms: f64,
    /// Prompt tokens that an engine computes a second
    #[arg(long, value_name = "N", default_value_t = Model::default().prefill_tokens_per_s)]
    prefill_tokens_per_s: u32,
    /// Requests that an engine runs at one time
    #[arg(long, value_name = "N", default_value_t = Model::default().max_batch)]
    max_batch: usize,
    /// Tokens that an engine's prefix cache holds
    #[arg(long, value_name = "N", default_value_t = Model::default().cache_tokens)]
    cache_tokens: u32,
    /// As routing.load_bound_percent of the proxy
    #[arg(long, value_name = "N", default_value_t = Scenario::default().bound.percent)]
    load_bound_percent: u32,
    /// As routing.load_bound_floor of the proxy
    #[arg(long, value_name = "N", default_value_t = Scenario::default().bound.floor)]
    load_bound_floor: u32,
    /// As routing.prefix_entries of the proxy
    #[arg(long, value_name = "N", default_value_t = Scenario::default().prefix_entries)]
    prefix_entries: usize,
    /// Of all dice: the same seed gives the same figures
    #[arg(long, value_name = "N", default_value_t = Scenario::default().seed)]
    seed: u64,
    /// How to print: a table for people, or JSON with the scenario
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    /// Evenly, at random
    Poisson,
    /// Of every ten seconds, three at two and a half times the average rate
    Bursty,
}

fn policy(name: &str) -> Result<Policy, String> {
    Policy::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
        let names: Vec<_> = Policy::ALL.iter().map(|policy| policy.name()).collect();
        format!("accepted: {}", names.join(", "))
    })
}

impl SimulateArgs {
    fn scenario(&self) -> Scenario {
        Scenario {
            engines: self.engines,
            slow_engines: self.slow_engines,
            proxies: self.proxies,
            sticky_clients: self.sticky_clients,
            rate: self.rate,
            seconds: self.seconds,
            arrivals: match self.arrivals {
                Pattern::Poisson => Arrivals::Poisson,
                Pattern::Bursty => Arrivals::Bursty,
            },
            staleness_ms: self.staleness_ms,
            stale_bound_ms: self.stale_bound_ms,
            prefixes: self.prefixes,
            prefix_tokens: self.prefix_tokens,
            turns: self.turns,
            turn_tokens: self.turn_tokens,
            output_tokens: self.output_tokens,
            think_ms: self.think_ms,
            engine: Model {
                prefill_tokens_per_s: self.prefill_tokens_per_s,
                max_batch: self.max_batch,
                cache_tokens: self.cache_tokens,
                ..Model::default()
            },
            bound: LoadBound { percent: self.load_bound_percent, floor: self.load_bound_floor },
            prefix_entries: self.prefix_entries,
            seed: self.seed,
        }
    }
}

/// Simulates and prints.
pub(crate) fn run(args: &SimulateArgs) -> Result<(), ApiError> {
    let scenario = args.scenario();
    scenario.validate().map_err(ApiError::Usage)?;
    let policies = if args.policies.is_empty() { Policy::ALL.to_vec() } else { args.policies.clone() };
    let outcomes: Vec<_> =
        policies.into_iter().map(|policy| simulator::simulate(&scenario, policy)).collect();
    let json = json!({ "scenario": scenario, "outcomes": outcomes });
    output::show(args.output, &json, || table(&outcomes)).map_err(ApiError::Output)
}

fn table(outcomes: &[Outcome]) -> String {
    let header = [
        "POLICY",
        "REQUESTS",
        "TTFT P50",
        "TTFT P99",
        "LATENCY P50",
        "LATENCY P99",
        "HERD",
        "CACHED",
        "SPILLED",
        "UNFINISHED",
    ];
    let ms = |value: f64| format!("{value:.0} ms");
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let row = |outcome: &Outcome| {
        [
            outcome.policy.to_owned(),
            outcome.requests.to_string(),
            ms(outcome.ttft_p50_ms),
            ms(outcome.ttft_p99_ms),
            ms(outcome.latency_p50_ms),
            ms(outcome.latency_p99_ms),
            format!("{:.2}", outcome.herd),
            percent(outcome.cache_hits),
            percent(outcome.spilled),
            outcome.unfinished.to_string(),
        ]
    };
    output::table(header, outcomes.iter().map(row))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: SimulateArgs,
    }

    fn parsed(line: &str) -> Result<SimulateArgs, String> {
        let words = std::iter::once("simulate").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args).map_err(|e| e.to_string())
    }

    #[test]
    fn without_flags_it_is_the_default_scenario() {
        assert_eq!(parsed("").expect("no flags").scenario(), Scenario::default());
    }

    #[test]
    fn mistakes_say_what_is_accepted() {
        assert!(
            parsed("--policy fastest").expect_err("unknown").contains("accepted: least_loaded, power_of_two")
        );
        let error = run(&parsed("--staleness-ms 5").expect("a number")).expect_err("too fresh").to_string();
        assert!(error.contains("staleness-ms is 5; it must be 10 to 30000"), "{error}");
    }

    #[test]
    fn each_policy_is_a_row() {
        let scenario = Scenario { engines: 2, proxies: 1, rate: 4.0, seconds: 5, ..Scenario::default() };
        let outcomes = Policy::ALL.map(|policy| simulator::simulate(&scenario, policy));
        let text = table(&outcomes);
        assert!(text.starts_with("POLICY") && text.lines().count() == 6, "{text}");
        assert!(text.contains("session_affinity"), "{text}");
    }
}
