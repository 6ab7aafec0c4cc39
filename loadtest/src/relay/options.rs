//! The command line of the relay.

use std::net::SocketAddr;

use clap::Parser;

/// Copy bytes between clients and the engine with the fewest connections, and do nothing else
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-relay", version)]
pub struct Options {
    /// Where clients connect; port 0 finds a free one, which is printed
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// An engine; may be repeated
    #[arg(long = "engine", value_name = "HOST:PORT", required = true)]
    pub engines: Vec<SocketAddr>,
    /// Threads, each with a share of the connections
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1_024))]
    pub threads: u16,
    /// Size of the buffer for each direction of each connection
    #[arg(long, value_name = "KIB", default_value_t = 16, value_parser = kib)]
    pub buffer_kib: usize,
}

fn kib(text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|n| (1..=65_536).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a whole number from 1 to 65536"))
}
