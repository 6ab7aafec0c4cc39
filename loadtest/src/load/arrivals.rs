//! When requests arrive. Pure: a rate and a seed make the same times on every run.
//!
//! In the closed loop the next request waits for the one before, so a slow server is asked less and looks better than it is.
//! In the open loop the times are laid down beforehand, whatever the server does.

use std::str::FromStr;

use super::trace::Trace;

/// Nanoseconds of a second.
pub(super) const SECOND_NS: f64 = 1e9;

/// How requests, or sessions of several turns, arrive.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Arrivals {
    /// Closed loop: each of the streams asks again when its answer is there.
    #[default]
    Closed,
    /// So many a second, evenly.
    Constant(f64),
    /// So many a second on average, each independent of the others.
    Poisson(f64),
    /// So many a second on average, always `size` at once; the groups as in [`Arrivals::Poisson`].
    Batch {
        /// Arrivals a second.
        rate: f64,
        /// Of a group.
        size: u64,
    },
    /// As in [`Arrivals::Poisson`] for a while, then none for a while.
    OnOff {
        /// Arrivals a second while there are any.
        rate: f64,
        /// How long there are, s.
        on_s: f64,
        /// How long there are none, s.
        off_s: f64,
    },
    /// At the times of `--trace`.
    Trace,
}

impl Arrivals {
    /// Whether each request waits for one before it.
    #[must_use]
    pub fn is_closed(self) -> bool {
        self == Self::Closed
    }
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, numbers) = text.split_once(':').unwrap_or((text, ""));
        let numbers = super::lengths::numbers(numbers)?;
        let positive = |n: &f64| *n > 0.0;
        match (kind, numbers.as_slice()) {
            ("closed", []) => Ok(Self::Closed),
            ("trace", []) => Ok(Self::Trace),
            (_, list) if !list.iter().all(positive) => Err(format!("`{text}`: every number must be above 0")),
            ("constant", &[rate]) => Ok(Self::Constant(rate)),
            ("poisson", &[rate]) => Ok(Self::Poisson(rate)),
            ("batch", &[rate, size]) if size.fract() == 0.0 => {
                // A whole number of at most 1e9: `numbers` says so.
                Ok(Self::Batch { rate, size: super::lengths::whole(size) })
            }
            ("onoff", &[rate, on_s, off_s]) => Ok(Self::OnOff { rate, on_s, off_s }),
            _ => Err(format!(
                "`{text}` is none of closed, constant:RATE, poisson:RATE, batch:RATE,SIZE, onoff:RATE,ON_S,OFF_S, trace"
            )),
        }
    }
}

/// One arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Its number, from 0.
    pub number: u64,
    /// When, after the start of the run.
    pub at_ns: u64,
}

/// The arrivals, in order of time; endless but for a trace and the closed loop, which has none.
#[derive(Debug, Clone)]
pub struct Times<'a> {
    arrivals: Arrivals,
    trace: &'a Trace,
    rng: fastrand::Rng,
    number: u64,
    /// Of the last one, s; without the pauses of [`Arrivals::OnOff`].
    at_s: f64,
}

impl<'a> Times<'a> {
    /// From the start of the run on.
    #[must_use]
    pub fn new(arrivals: Arrivals, trace: &'a Trace, seed: u64) -> Self {
        Self { arrivals, trace, rng: fastrand::Rng::with_seed(seed), number: 0, at_s: 0.0 }
    }

    /// A pause between independent arrivals, s.
    fn exponential(&mut self, rate: f64) -> f64 {
        // 1 - [0, 1) is never 0.
        -(1.0 - self.rng.f64()).ln() / rate
    }
}

impl Iterator for Times<'_> {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        let number = self.number;
        let at_s = match self.arrivals {
            Arrivals::Closed => return None,
            Arrivals::Trace => {
                let entry = self.trace.entries.get(usize::try_from(number).ok()?)?;
                self.number += 1;
                return Some(Arrival { number, at_ns: entry.at_ns });
            }
            Arrivals::Constant(rate) => number as f64 / rate,
            Arrivals::Poisson(rate) => {
                self.at_s += self.exponential(rate);
                self.at_s
            }
            Arrivals::Batch { rate, size } => {
                if number.is_multiple_of(size) {
                    self.at_s += self.exponential(rate / size as f64);
                }
                self.at_s
            }
            Arrivals::OnOff { rate, on_s, off_s } => {
                self.at_s += self.exponential(rate);
                self.at_s + (self.at_s / on_s).floor() * off_s
            }
        };
        self.number += 1;
        Some(Arrival { number, at_ns: super::lengths::whole(at_s * SECOND_NS) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn times(spec: &str, seed: u64) -> Vec<f64> {
        let trace = Trace::default();
        let times = Times::new(spec.parse().unwrap(), &trace, seed);
        times.take(20_000).map(|arrival| arrival.at_ns as f64 / SECOND_NS).collect()
    }

    #[test]
    fn every_process_has_the_rate_that_it_was_given() {
        for (spec, wanted) in [
            ("constant:100", 100.0),
            ("poisson:100", 100.0),
            ("batch:100,10", 100.0),
            ("onoff:200,2,2", 100.0),
        ] {
            let times = times(spec, 7);
            let rate = times.len() as f64 / times.last().unwrap();
            assert!((rate / wanted - 1.0).abs() < 0.1, "{spec}: {rate}");
        }
    }

    #[test]
    fn pauses_of_poisson_vary_as_they_should() {
        let times = times("poisson:100", 3);
        let pauses: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = pauses.iter().sum::<f64>() / pauses.len() as f64;
        let variance = pauses.iter().map(|pause| (pause - mean).powi(2)).sum::<f64>() / pauses.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn bursts_are_bursts() {
        let batch = times("batch:100,10", 1);
        assert!(batch.chunks(10).all(|group| group.iter().all(|at| *at == group[0])));
        let onoff = times("onoff:100,1,3", 1);
        assert!(onoff.iter().all(|at| at % 4.0 <= 1.000_001));
    }

    #[test]
    fn a_trace_is_followed() {
        let trace = Trace::parse("{\"at_s\":0.5}\n{\"at_s\":2}\n").unwrap();
        let times: Vec<Arrival> = Times::new(Arrivals::Trace, &trace, 0).collect();
        let wanted = [500_000_000, 2_000_000_000];
        assert_eq!(times.iter().map(|arrival| arrival.at_ns).collect::<Vec<_>>(), wanted);
        assert_eq!(Times::new(Arrivals::Closed, &trace, 0).next(), None);
    }

    #[test]
    fn specifications() {
        let parse = |text: &str| text.parse::<Arrivals>();
        assert_eq!(parse("closed"), Ok(Arrivals::Closed));
        assert_eq!(parse("batch:5,2"), Ok(Arrivals::Batch { rate: 5.0, size: 2 }));
        assert_eq!(parse("onoff:5,1,0.5"), Ok(Arrivals::OnOff { rate: 5.0, on_s: 1.0, off_s: 0.5 }));
        for wrong in
            ["", "poisson", "poisson:0", "poisson:-1", "poisson:x", "batch:1", "batch:1,0.5", "trace:x"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn times_never_go_back(rate in 0.1f64..1e5, seed: u64, kind in 0..4) {
            let arrivals = match kind {
                0 => Arrivals::Constant(rate),
                1 => Arrivals::Poisson(rate),
                2 => Arrivals::Batch { rate, size: 3 },
                _ => Arrivals::OnOff { rate, on_s: 0.3, off_s: 0.7 },
            };
            let trace = Trace::default();
            let times: Vec<Arrival> = Times::new(arrivals, &trace, seed).take(200).collect();
            prop_assert!(times.windows(2).all(|pair| pair[0].at_ns <= pair[1].at_ns));
            prop_assert!((0..200).eq(times.iter().map(|arrival| arrival.number)));
        }
    }
}
