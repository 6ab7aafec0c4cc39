//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// Count the instructions of Penstock's hot path under callgrind and compare them with what they were
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-instructions", version)]
pub struct Options {
    /// The proxy's binary
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// The engine simulator's binary
    #[arg(long, value_name = "FILE")]
    pub engine_sim: PathBuf,
    /// The binary with the parts of the hot path: the proxy's bench "instructions"
    #[arg(long, value_name = "FILE")]
    pub parts: PathBuf,
    /// What they were
    #[arg(long, value_name = "FILE")]
    pub pins: PathBuf,
    /// Write what they are now to that file
    #[arg(long)]
    pub pin: bool,
    /// Only what has one of these in its name; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// How often each is counted; the middle is taken, and the spread shown
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Keep callgrind's files there, for callgrind_annotate
    #[arg(long, value_name = "FOLDER")]
    pub keep: Option<PathBuf>,
}

impl Options {
    /// Whether that is to be counted.
    pub(super) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }
}
