//! The cells: what load, at what pace of the engines, is put through each peer.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::peer::Peer;

/// What CPU time is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    /// A token that was streamed, each an event of its own.
    Event,
    /// A whole answer.
    Request,
    /// A stream that is open, and idle.
    Stream,
}

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cell {
    Unary,
    Unthrottled,
    Paced,
    Paced10k,
    Body64k,
    Body500k,
    Body1m,
    Body5m,
    Burst,
    Idle,
    TlsH2,
}

/// How engines give out tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// As fast as they are read.
    Full,
    /// So many a second on each stream.
    PerSecond(f64),
    /// So many milliseconds between two.
    Pause(f64),
}

/// The load of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    /// Streams, or connections that ask one thing after the other.
    pub(super) streams: u32,
    pub(super) unary: bool,
    /// Of each answer.
    pub(super) tokens: u32,
    /// Text in each prompt, beside a few dozen bytes.
    pub(super) prompt_bytes: usize,
    pub(super) pace: Pace,
    /// Most events that engines put into one write.
    pub(super) burst: u32,
    /// Time over which the streams are opened.
    pub(super) ramp_s: f64,
    /// How long new requests are begun; none: one for each stream.
    pub(super) duration_s: Option<f64>,
    /// When CPU time begins to be counted, from the start of the load, and for how long.
    pub(super) window_s: (f64, f64),
    /// TLS and HTTP/2 from the client to the gateway, so many streams on a connection.
    pub(super) tls_h2: Option<u32>,
}

/// After all streams are open, before the window.
const SETTLE_S: f64 = 0.5;

/// After the window, before the first stream may end.
const TAIL_S: f64 = 0.5;

/// How a run is made smaller or larger.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    /// Of the windows.
    pub(super) seconds: f64,
    /// Divides the streams.
    pub(super) divisor: u32,
    /// Most streams, for want of open files.
    pub(super) most_streams: u32,
}

/// The next whole number above; the largest there is for what is beyond, and for what is no number.
fn above(value: f64) -> u32 {
    let whole =
        Duration::try_from_secs_f64(value).map_or(u64::MAX, |whole| whole.as_secs().saturating_add(1));
    u32::try_from(whole).unwrap_or(u32::MAX)
}

impl Cell {
    pub(super) const ALL: [Self; 11] = [
        Self::Unary,
        Self::Unthrottled,
        Self::Paced,
        Self::Paced10k,
        Self::Body64k,
        Self::Body500k,
        Self::Body1m,
        Self::Body5m,
        Self::Burst,
        Self::Idle,
        Self::TlsH2,
    ];

    /// As the command line and the results call it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Unary => "unary",
            Self::Unthrottled => "unthrottled",
            Self::Paced => "paced",
            Self::Paced10k => "paced10k",
            Self::Body64k => "body64k",
            Self::Body500k => "body500k",
            Self::Body1m => "body1m",
            Self::Body5m => "body5m",
            Self::Burst => "burst",
            Self::Idle => "idle",
            Self::TlsH2 => "tlsh2",
        }
    }

    /// The cell called `name`.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cell| cell.name() == name)
    }

    pub(super) const fn unit(self) -> Unit {
        match self {
            Self::Unary | Self::Body64k | Self::Body500k | Self::Body1m | Self::Body5m => Unit::Request,
            Self::Idle => Unit::Stream,
            _ => Unit::Event,
        }
    }

    /// Whether memory per stream is worth a column: where many are open at once.
    pub(super) const fn shows_memory(self) -> bool {
        matches!(self, Self::Paced | Self::Paced10k | Self::Idle | Self::TlsH2)
    }

    /// The load that this cell puts through `peer`.
    pub(super) fn shape(self, peer: Peer, scale: Scale) -> Shape {
        let Scale { seconds, divisor, most_streams } = scale;
        let few = |count: u32| (count / divisor).clamp(1, most_streams);
        // What a slow peer cannot carry is no measurement of it: fewer streams, the same work for each event.
        let many = |count: u32| (count / divisor / peer.streams_divisor()).clamp(4, most_streams);
        let closed = |streams: u32, unary: bool, tokens: u32, prompt_bytes: usize| Shape {
            streams,
            unary,
            tokens,
            prompt_bytes,
            pace: Pace::Full,
            burst: 1,
            ramp_s: 0.05,
            duration_s: Some(SETTLE_S + seconds + TAIL_S),
            window_s: (SETTLE_S, seconds),
            tls_h2: None,
        };
        let paced = |streams: u32, rate: f64| {
            // Fifteen hundred a second: more are a test of something else.
            let ramp_s = f64::from(streams) / 1_500.0;
            let life_s = ramp_s + SETTLE_S + seconds + TAIL_S;
            Shape {
                tokens: above(life_s * rate).max(2),
                pace: Pace::PerSecond(rate),
                ramp_s,
                duration_s: None,
                window_s: (ramp_s + SETTLE_S, seconds),
                ..closed(streams, false, 0, 200)
            }
        };
        match self {
            Self::Unary => closed(few(64), true, 16, 700),
            Self::Unthrottled => closed(many(16).min(16), false, 1_000, 200),
            Self::Paced => paced(many(1_000), 40.0),
            Self::Paced10k => paced(many(10_000), 3.0),
            Self::Body64k => closed(few(16), true, 4, 64 << 10),
            Self::Body500k => closed(few(8), true, 4, 500 << 10),
            Self::Body1m => closed(few(8), true, 4, 1 << 20),
            Self::Body5m => closed(few(4), true, 4, 5 << 20),
            // Timers go by milliseconds: at 8,000 a second some eight are due each time, and go in one write.
            Self::Burst => Shape { burst: 8, ..paced(many(8).min(8), 8_000.0) },
            Self::Idle => {
                let open = paced(many(1_000), 1.0);
                let life_s = open.window_s.0 + seconds + TAIL_S;
                Shape { tokens: 2, pace: Pace::Pause(life_s * 1e3), ..open }
            }
            Self::TlsH2 => Shape { tls_h2: Some(20), ..paced(many(1_000), 20.0) },
        }
    }
}

impl Shape {
    /// The engines' flags.
    pub(super) fn engine_flags(&self) -> Vec<String> {
        // Where latency is of interest. Not in all: a gateway that knows events by their form would meet none of it.
        let stamp = if matches!(self.pace, Pace::PerSecond(_)) { 10 } else { 0 };
        let pause_ms = match self.pace {
            Pace::Full => return vec!["--sim-speed=0".into(), format!("--sim-burst={}", self.burst)],
            Pace::PerSecond(rate) => 1e3 / rate,
            Pace::Pause(ms) => ms,
        };
        vec![
            format!("--sim-itl-ms={pause_ms}"),
            "--sim-itl-growth-us=0".into(),
            // Only where it cannot end a stream before its window does.
            format!("--sim-jitter-percent={}", if self.tokens > 2 { 10 } else { 0 }),
            format!("--sim-burst={}", self.burst),
            format!("--sim-stamp={stamp}"),
        ]
    }

    /// Events a second, if engines are to keep a pace.
    pub(super) fn wanted_per_s(&self) -> Option<f64> {
        match self.pace {
            Pace::PerSecond(rate) => Some(rate * f64::from(self.streams)),
            Pace::Full | Pace::Pause(_) => None,
        }
    }

    /// Seconds from the start that the generator leaves out of its times.
    pub(super) fn warmup_s(&self) -> f64 {
        self.window_s.0.min(self.duration_s.map_or(f64::MAX, |duration_s| duration_s / 2.0))
    }

    /// Seconds that the load takes if all goes well.
    pub(super) fn expected_s(&self) -> f64 {
        self.window_s.0 + self.window_s.1 + TAIL_S + self.ramp_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Scale = Scale { seconds: 5.0, divisor: 1, most_streams: 100_000 };

    #[test]
    fn names_are_found_again() {
        for cell in Cell::ALL {
            assert_eq!(Cell::named(cell.name()), Some(cell));
        }
        assert_eq!(Cell::named("x"), None);
    }

    #[test]
    fn the_next_whole_number() {
        assert_eq!([above(0.0), above(1.5), above(1e12), above(-1.0)], [1, 2, u32::MAX, u32::MAX]);
    }

    #[test]
    fn streams_outlive_the_window_in_which_they_are_counted() {
        for cell in Cell::ALL {
            for seconds in [1.0, 5.0] {
                let shape = cell.shape(Peer::Nginx, Scale { seconds, ..WHOLE });
                let end = shape.window_s.0 + shape.window_s.1;
                let life = match (shape.pace, shape.duration_s) {
                    (_, Some(duration)) => duration,
                    (Pace::PerSecond(rate), None) => f64::from(shape.tokens) / rate,
                    (Pace::Pause(ms), None) => ms / 1e3,
                    (Pace::Full, None) => 0.0,
                };
                assert!(life > end && shape.window_s.0 > shape.ramp_s, "{}: {shape:?}", cell.name());
                assert!(shape.expected_s() >= end);
            }
        }
    }

    #[test]
    fn the_figures_of_the_issue() {
        let paced = Cell::Paced.shape(Peer::Nginx, WHOLE);
        assert_eq!((paced.streams, paced.pace, paced.tokens), (1_000, Pace::PerSecond(40.0), 267));
        assert_eq!(
            (paced.engine_flags()[0].as_str(), paced.wanted_per_s()),
            ("--sim-itl-ms=25", Some(40_000.0))
        );
        assert_eq!(Cell::Paced10k.shape(Peer::Envoy, WHOLE).streams, 10_000);
        assert_eq!(Cell::Paced10k.shape(Peer::Envoy, Scale { most_streams: 9_700, ..WHOLE }).streams, 9_700);
        assert_eq!(Cell::Paced.shape(Peer::Litellm, WHOLE).streams, 50);
        assert_eq!(Cell::Unary.shape(Peer::Litellm, WHOLE).streams, 64);
        assert_eq!(Cell::Body1m.shape(Peer::Nginx, WHOLE).prompt_bytes, 1_048_576);
        assert_eq!(Cell::Burst.shape(Peer::Nginx, WHOLE).engine_flags()[3], "--sim-burst=8");
        assert_eq!(Cell::Unary.shape(Peer::Nginx, WHOLE).engine_flags(), ["--sim-speed=0", "--sim-burst=1"]);
    }
}
