//! The command line of the load generator.

use std::path::PathBuf;

use clap::Parser;

use super::{
    arrivals::Arrivals,
    lengths::{Choice, Lengths},
};

/// Send many verified requests to an OpenAI-compatible endpoint served by the engine simulator.
#[derive(Debug, Clone, Parser)]
#[command(version, about)]
pub struct Options {
    /// Where to send: http://HOST:PORT or https://HOST:PORT, a path in front of /v1 allowed
    #[arg(long, default_value = "http://127.0.0.1:8081")]
    pub url: String,
    /// Model to ask for
    #[arg(long, default_value = "sim-model")]
    pub model: String,
    /// API key to send
    #[arg(long, env = "PENSTOCK_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// File with API keys, one a line, which the streams share among them; in place of --api-key
    #[arg(long, value_name = "FILE", conflicts_with = "api_key")]
    pub api_keys: Option<PathBuf>,

    /// Closed loop: concurrent streams, each on a connection of its own unless --http2 says otherwise
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub streams: u64,
    /// When requests (sessions, with --turns) arrive: closed, constant:RATE, poisson:RATE, batch:RATE,SIZE, onoff:RATE,ON_S,OFF_S
    /// or trace; rates per second
    #[arg(long, default_value = "closed")]
    pub arrivals: Arrivals,
    /// File with times of arrival, and lengths if known: JSON lines or CSV of at_s, prompt_bytes, output_tokens
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Open loop: sessions under way at most; those that arrive meanwhile wait
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub max_in_flight: u64,
    /// Open loop: sessions that wait at most; those beyond are not sent, and counted
    #[arg(long, default_value_t = 100_000)]
    pub max_waiting: usize,
    /// Requests in all (open loop: sessions); 0 = as many as fit --duration, or one per stream, or the whole trace
    #[arg(long, default_value_t = 0)]
    pub requests: u64,
    /// Seconds in which new requests are started; 0 = no limit
    #[arg(long = "duration", default_value_t = 0.0, value_parser = seconds)]
    pub duration_s: f64,
    /// Seconds from the start that are left out of all times and rates
    #[arg(long = "warmup", default_value_t = 0.0, value_parser = seconds)]
    pub warmup_s: f64,
    /// Milliseconds over which the connections of the closed loop are opened
    #[arg(long = "connect-ramp", default_value_t = 1000)]
    pub connect_ramp_ms: u64,
    /// Seconds without a byte after which a request has failed
    #[arg(long = "idle-timeout", default_value_t = 60.0, value_parser = seconds)]
    pub idle_timeout_s: f64,

    /// Tokens of each answer
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,
    /// The same, varying: N, uniform:FROM,TO, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA, or trace
    #[arg(long, value_name = "LENGTHS")]
    pub output_length: Option<Lengths>,
    /// Bytes of text added to each prompt
    #[arg(long, default_value_t = 0)]
    pub prompt_bytes: usize,
    /// The same, varying
    #[arg(long, value_name = "LENGTHS")]
    pub prompt_length: Option<Lengths>,
    /// Different prefixes, one of which begins each session as its system message; 0 = none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub prefixes: u32,
    /// Bytes of each prefix
    #[arg(long, default_value_t = 1_000)]
    pub prefix_bytes: usize,
    /// Which prefix is taken: uniform or zipf:POWER
    #[arg(long, default_value = "uniform")]
    pub prefix_choice: Choice,
    /// Questions of each session, asked one after the other, each with all before it and their answers
    #[arg(long, default_value = "1", value_name = "LENGTHS")]
    pub turns: Lengths,
    /// Milliseconds between an answer and the next question of its session
    #[arg(long = "think", default_value = "0", value_name = "LENGTHS")]
    pub think_ms: Lengths,
    /// Makes the prompts, lengths and times of one run differ from those of another
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Ask for token ids, and check these too
    #[arg(long)]
    pub token_ids: bool,
    /// Ask for whole answers instead of streams
    #[arg(long)]
    pub unary: bool,

    /// Speak HTTP/2: in clear without asking first, over TLS by ALPN
    #[arg(long)]
    pub http2: bool,
    /// HTTP/2: requests that share a connection
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub streams_per_connection: u64,
    /// https: certificates of the authorities to trust, PEM
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// https: trust any certificate
    #[arg(long)]
    pub insecure: bool,
    /// Threads that send; one is enough for tens of thousands of events a second
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=256))]
    pub threads: u64,

    /// Tokens per second that each stream should get; only printed beside what it got, as the engine sets the pace
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub rate: f64,
    /// Print JSON
    #[arg(long, conflicts_with = "markdown")]
    pub json: bool,
    /// Print Markdown
    #[arg(long)]
    pub markdown: bool,
    /// Also write an HTML report with plots, one file that needs no other
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Show no progress; it is shown only on a terminal anyway
    #[arg(long)]
    pub quiet: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self::parse_from(["load"])
    }
}

impl Options {
    /// How many requests to make in all, or sessions in the open loop.
    pub(super) fn requests_to_make(&self) -> u64 {
        match self.requests {
            0 if self.duration_s > 0.0 || !self.arrivals.is_closed() => u64::MAX,
            0 => self.streams,
            n => n,
        }
    }

    /// What contradicts itself, in words.
    pub(super) fn contradiction(&self) -> Option<&'static str> {
        let drawn = [self.output_length, self.prompt_length].contains(&Some(Lengths::Trace));
        let endless = !self.arrivals.is_closed() && self.arrivals != Arrivals::Trace;
        match () {
            () if (drawn || self.arrivals == Arrivals::Trace) && self.trace.is_none() => {
                Some("`trace` needs a file: --trace FILE")
            }
            () if [self.turns, self.think_ms].contains(&Lengths::Trace) => {
                Some("--turns and --think: a trace does not tell them")
            }
            () if endless && self.requests == 0 && self.duration_s == 0.0 => {
                Some("--arrivals: say when they end, with --requests or --duration")
            }
            () if self.duration_s > 0.0 && self.warmup_s >= self.duration_s => {
                Some("--warmup is not shorter than --duration: nothing would be measured")
            }
            () if self.streams_per_connection > 1 && !self.http2 => {
                Some("--streams-per-connection: only HTTP/2 has that, see --http2")
            }
            () => None,
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| n.is_finite() && (0.0..=1e9).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a number from 0 to 1000000000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_follow_from_duration_and_streams() {
        let options = Options { streams: 7, ..Options::default() };
        assert_eq!(options.requests_to_make(), 7);
        assert_eq!(Options { duration_s: 1.0, ..options.clone() }.requests_to_make(), u64::MAX);
        assert_eq!(Options { arrivals: Arrivals::Trace, ..options.clone() }.requests_to_make(), u64::MAX);
        assert_eq!(Options { requests: 3, ..options }.requests_to_make(), 3);
    }

    #[test]
    fn contradictions_are_told() {
        let said = |line: &str| {
            let options = Options::try_parse_from(line.split(' ')).unwrap();
            options.contradiction().unwrap_or_default()
        };
        for (line, why) in [
            ("load --arrivals poisson:5 --duration 3 --warmup 1", ""),
            ("load --warmup 3", ""),
            ("load --http2 --streams-per-connection 9", ""),
            ("load --arrivals trace --trace x", ""),
            ("load --arrivals trace", "--trace FILE"),
            ("load --prompt-length trace", "--trace FILE"),
            ("load --turns trace --trace x", "does not tell"),
            ("load --arrivals poisson:5", "when they end"),
            ("load --duration 3 --warmup 3", "nothing would be measured"),
            ("load --streams-per-connection 9", "--http2"),
        ] {
            assert!(
                said(line).contains(why) && said(line).is_empty() == why.is_empty(),
                "{line}: {}",
                said(line)
            );
        }
    }
}
