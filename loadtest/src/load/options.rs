//! The command line of the load generator.

use clap::Parser;

/// Send many verified streams to an OpenAI-compatible endpoint served by the engine simulator.
#[derive(Debug, Clone, Parser)]
#[command(version, about)]
pub struct Options {
    /// Where to send: http://HOST:PORT, a path in front of /v1 allowed
    #[arg(long, default_value = "http://127.0.0.1:8081")]
    pub url: String,
    /// Model to ask for
    #[arg(long, default_value = "sim-model")]
    pub model: String,
    /// Concurrent streams, each on its own connection
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub streams: u64,
    /// Tokens of each answer
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,
    /// Requests in all; 0 = as many as fit --duration, or one per stream
    #[arg(long, default_value_t = 0)]
    pub requests: u64,
    /// Seconds in which new requests are started; 0 = no limit
    #[arg(long = "duration", default_value_t = 0.0, value_parser = seconds)]
    pub duration_s: f64,
    /// Milliseconds over which the connections are opened
    #[arg(long = "connect-ramp", default_value_t = 1000)]
    pub connect_ramp_ms: u64,
    /// Tokens per second that each stream should get; only printed beside what it got, as the engine sets the pace
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub rate: f64,
    /// Bytes of text added to each prompt
    #[arg(long, default_value_t = 0)]
    pub prompt_bytes: usize,
    /// Makes the prompts of one run differ from those of another
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Seconds without a byte after which a request has failed
    #[arg(long = "idle-timeout", default_value_t = 60.0, value_parser = seconds)]
    pub idle_timeout_s: f64,
    /// API key to send
    #[arg(long, env = "PENSTOCK_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Ask for token ids, and check these too
    #[arg(long)]
    pub token_ids: bool,
    /// Ask for whole answers instead of streams
    #[arg(long)]
    pub unary: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self::parse_from(["load"])
    }
}

impl Options {
    /// How many requests to make in all.
    pub(super) fn requests_to_make(&self) -> u64 {
        match self.requests {
            0 if self.duration_s > 0.0 => u64::MAX,
            0 => self.streams,
            n => n,
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| n.is_finite() && (0.0..=1e9).contains(n));
    number.ok_or_else(|| format!("`{text}` is not a number from 0 to 1000000000"))
}

/// `--url` is not usable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--url {url}: {why}; it must be http://HOST:PORT")]
pub struct BadUrl {
    url: String,
    why: String,
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// HOST:PORT, for the connection and the Host header.
    pub authority: String,
    /// Path in front of `/v1`.
    pub base: String,
}

impl Target {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`BadUrl`].
    pub fn parse(url: &str) -> Result<Self, BadUrl> {
        let bad = |why: &str| BadUrl { url: url.into(), why: why.into() };
        let uri: http::Uri = url.parse().map_err(|e: http::uri::InvalidUri| bad(&e.to_string()))?;
        if uri.scheme_str() != Some("http") {
            return Err(bad("only http is supported"));
        }
        let host = uri.host().ok_or_else(|| bad("no host"))?;
        let base = uri.path().trim_end_matches('/').trim_end_matches("/v1").to_string();
        Ok(Self { authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)), base })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let target = |url| Target::parse(url).map(|t| (t.authority, t.base));
        assert_eq!(target("http://h:1"), Ok(("h:1".into(), String::new())));
        assert_eq!(target("http://h/x/v1/"), Ok(("h:80".into(), "/x".into())));
        assert!(target("https://h").is_err());
        assert!(target("h:1").is_err());
    }

    #[test]
    fn requests_follow_from_duration_and_streams() {
        let options = Options { streams: 7, ..Options::default() };
        assert_eq!(options.requests_to_make(), 7);
        assert_eq!(Options { duration_s: 1.0, ..options.clone() }.requests_to_make(), u64::MAX);
        assert_eq!(Options { requests: 3, ..options }.requests_to_make(), 3);
    }
}
