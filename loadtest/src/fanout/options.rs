//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

/// Measure what it costs a control plane to tell many proxies of changes in a large fleet
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-fanout", version)]
pub struct Options {
    /// The control plane's binary
    #[arg(long, value_name = "FILE")]
    pub controlplane: PathBuf,
    /// Endpoints in all
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    pub endpoints: u32,
    /// Pools they are spread over, each a deployment
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pools: u32,
    /// Nodes they stand on, each with an agent
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub nodes: u32,
    /// Proxies that subscribe
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub subscribers: u32,
    /// Endpoints that begin or end to drain each minute
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub updates_per_minute: u32,
    /// Seconds for which they do
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
}

impl Options {
    /// The name of a pool and of its model.
    pub(super) fn pool(index: u32) -> String {
        format!("model-{index}")
    }

    /// Replicas of a pool; together they are all endpoints.
    pub(super) fn replicas(&self, index: u32) -> u32 {
        self.endpoints / self.pools + u32::from(index < self.endpoints % self.pools)
    }
}
