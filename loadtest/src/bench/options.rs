//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

use super::{cell::Cell, peer::Peer};

/// Put the same load through Penstock and its peers by turns, and compare what each costs
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench", version)]
pub struct Options {
    /// Penstock's proxy [default: penstock-proxy beside this program]
    #[arg(long, value_name = "FILE")]
    pub proxy: Option<PathBuf>,
    /// The raw TCP relay [default: penstock-relay beside this program]
    #[arg(long, value_name = "FILE")]
    pub relay: Option<PathBuf>,
    /// The engine simulator [default: penstock-engine-sim beside this program]
    #[arg(long, value_name = "FILE")]
    pub engine_sim: Option<PathBuf>,
    /// Where scripts/bench_peers.sh has put the other gateways
    #[arg(long, value_name = "DIR")]
    pub peers_dir: Option<PathBuf>,
    /// Kinds of load, by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAMES", value_parser = cell)]
    cells: Vec<Cell>,
    /// Who is compared, by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAMES", value_parser = peer)]
    peers: Vec<Peer>,
    /// How often each peer has its turn in each cell
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: u32,
    /// Seconds for which CPU time is counted in each turn
    #[arg(long, default_value_t = 2.5, value_parser = seconds)]
    pub seconds: f64,
    /// Threads, or workers, of each peer; 0: one for each core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1_024))]
    pub threads: u16,
    /// Engines
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub engines: u16,
    /// See that all works: one round of a second, a twentieth of the streams
    #[arg(long)]
    pub quick: bool,
    /// Write everything that was measured to this file, as JSON
    #[arg(long, value_name = "FILE", conflicts_with = "from", overrides_with = "json")]
    pub json: Option<PathBuf>,
    /// Put the tables into this Markdown file, between its marks
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Measure nothing: take what earlier runs have written with --json, all of them together
    #[arg(long, value_name = "FILES", num_args = 1..)]
    pub from: Vec<PathBuf>,
}

impl Options {
    /// The cells to run, in the order in which they are listed.
    pub(super) fn cells(&self) -> Vec<Cell> {
        chosen(&Cell::ALL, &self.cells)
    }

    /// The peers that take turns, in the order of the tables.
    pub(super) fn peers(&self) -> Vec<Peer> {
        chosen(&Peer::ALL, &self.peers)
    }
}

fn chosen<T: Copy + PartialEq>(all: &[T], named: &[T]) -> Vec<T> {
    all.iter().copied().filter(|one| named.is_empty() || named.contains(one)).collect()
}

fn cell(name: &str) -> Result<Cell, String> {
    Cell::named(name).ok_or_else(|| no_such("cell", name, Cell::ALL.map(Cell::name).as_slice()))
}

fn peer(name: &str) -> Result<Peer, String> {
    Peer::named(name).ok_or_else(|| no_such("peer", name, Peer::ALL.map(Peer::name).as_slice()))
}

fn no_such(what: &str, name: &str, all: &[&str]) -> String {
    format!("there is no {what} `{name}`: there are {}", all.join(", "))
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| (0.5..=600.0).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a number from 0.5 to 600"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::try_parse_from([&["bench"], arguments].concat()).map_err(|e| e.to_string())
    }

    #[test]
    fn all_unless_some_are_named_and_always_in_the_same_order() {
        let options = parse(&[]).unwrap();
        assert_eq!((options.cells().len(), options.peers().len()), (Cell::ALL.len(), Peer::ALL.len()));
        let options = parse(&["--cells", "paced,unary", "--peers", "nginx,penstock"]).unwrap();
        assert_eq!(options.cells(), [Cell::Unary, Cell::Paced]);
        assert_eq!(options.peers(), [Peer::Penstock, Peer::Nginx]);
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_right_ones() {
        assert!(parse(&["--cells", "x"]).unwrap_err().contains("there is no cell `x`: there are unary, "));
        assert!(parse(&["--peers", "caddy"]).unwrap_err().contains("there are direct, relay, penstock"));
        assert!(parse(&["--seconds", "0"]).unwrap_err().contains("0.5 to 600"));
    }
}
