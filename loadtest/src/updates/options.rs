//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

/// Measure what table updates cost the streams of one proxy
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-updates", version)]
pub struct Options {
    /// The proxy's binary
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// Endpoints in all
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub endpoints: u32,
    /// Pools they are spread over, each with a model of its own
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub pools: u32,
    /// Endpoints that change each minute
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub updates_per_minute: u32,
    /// Milliseconds for which updates are gathered into one push, as xds.push_coalesce_ms of the control plane; 0: each is
    /// a push
    #[arg(long, default_value_t = 20)]
    pub coalesce_ms: u64,
    /// Streams that are open
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub streams: u32,
    /// Events a second on each stream
    #[arg(long, default_value_t = 4.0)]
    pub events_per_s: f64,
    /// Pairs of windows, one without and one with updates
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: u32,
    /// Seconds of a window
    #[arg(long, default_value_t = 10.0)]
    pub window_s: f64,
}

impl Options {
    /// The name of a pool, of its model, and of its table.
    pub(crate) fn pool(index: u32) -> String {
        format!("model-{index}")
    }

    /// The defaults, with this proxy.
    pub(crate) fn of(proxy: PathBuf) -> Self {
        let argv: [std::ffi::OsString; 3] = ["bench".into(), "--proxy".into(), proxy.into()];
        Self::parse_from(argv)
    }
}
