//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

/// Measure what the readiness to continue streams costs a proxy whose streams never fail
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-resume", version)]
pub struct Options {
    /// The proxy's binary
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// The engine simulator's binary
    #[arg(long, value_name = "FILE")]
    pub engine_sim: PathBuf,
    /// Paced windows: streams that are open
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub streams: u32,
    /// Paced windows: tokens a second on each stream, each of them an event
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    pub events_per_s: f64,
    /// Paced windows: tokens of each stream; with the rate, how long a window is
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub tokens: u32,
    /// Windows at full speed: streams that are open
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub fast_streams: u32,
    /// Windows at full speed: tokens of each stream
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..=10_000_000))]
    pub fast_tokens: u32,
    /// Windows of whole answers: answers of 100 tokens, by as many clients as there are streams at full speed
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub answers: u32,
    /// Bytes of text in each prompt
    #[arg(long, default_value_t = 2_000)]
    pub prompt_bytes: usize,
    /// Rounds, each with windows of every kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: u32,
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| (0.01..=10_000.0).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a number from 0.01 to 10000"))
}
