//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

/// Measure how a proxy's CPU and memory grow with streams, endpoints, tenants and prompts, and fit a line to each
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-scale", version)]
pub struct Options {
    /// The proxy's binary
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// The engine simulator's binary
    #[arg(long, value_name = "FILE")]
    pub engine_sim: PathBuf,
    /// Numbers of streams that are open; none leaves them out. The proxy needs two open files for each
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "250,1000,2500,5000,9000")]
    pub streams: Vec<u32>,
    /// Events a second on all of these streams together
    #[arg(long, default_value_t = 10_000.0, value_parser = rate)]
    pub events_per_s: f64,
    /// Numbers of endpoints in the pool
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "10,100,1000,10000")]
    pub endpoints: Vec<u32>,
    /// Numbers of API keys, all of them in use
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "1,100,1000,10000")]
    pub tenants: Vec<u32>,
    /// Bytes of prompts
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "1000,16000,64000,256000,1000000,5000000")]
    pub prompts: Vec<u32>,
    /// Seconds that are measured of each
    #[arg(long, default_value_t = 6.0, value_parser = rate)]
    pub seconds: f64,
    /// Rounds, each with all of them, one after the other
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: u32,
    /// Also write the tables into this file, between its two marks
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| (0.5..=1e6).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a number from 0.5 to 1000000"))
}
