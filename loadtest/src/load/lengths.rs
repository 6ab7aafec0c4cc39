//! How long prompts, answers, sessions and pauses are. Pure: the dice come in.

use std::{f64::consts::TAU, str::FromStr};

/// Longest length that is drawn: what a wide distribution has beyond it is cut to it.
pub const MAX_LENGTH: u64 = 64 << 20;

/// A distribution of whole numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Always this.
    Constant(u64),
    /// From the one to the other, both included.
    Uniform(u64, u64),
    /// Normal, cut off at 0.
    Normal {
        /// The middle.
        mean: f64,
        /// Standard deviation.
        deviation: f64,
    },
    /// Its logarithm is normal: many short ones, few very long ones.
    LogNormal {
        /// Half are below.
        median: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
    },
    /// One of those in `--trace`, each as likely.
    Trace,
}

impl Lengths {
    /// Draws one; of `empirical` for [`Lengths::Trace`].
    pub fn draw(self, rng: &mut fastrand::Rng, empirical: &[u64]) -> u64 {
        let length = match self {
            Self::Constant(length) => length,
            Self::Uniform(from, to) => rng.u64(from..=to),
            Self::Normal { mean, deviation } => whole((mean + deviation * normal(rng)).round()),
            Self::LogNormal { median, sigma } => whole((median * (sigma * normal(rng)).exp()).round()),
            Self::Trace => rng.choice(empirical).copied().unwrap_or_default(),
        };
        length.min(MAX_LENGTH)
    }
}

/// A draw of the standard normal distribution, by Box and Muller.
fn normal(rng: &mut fastrand::Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    radius * (TAU * rng.f64()).cos()
}

/// The whole part; 0 for what is below.
pub(crate) fn whole(number: f64) -> u64 {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`as` saturates: that is meant"
    )]
    let whole = number as u64;
    whole
}

/// Numbers with commas between them, each from 0 to 1e9.
pub(super) fn numbers(text: &str) -> Result<Vec<f64>, String> {
    let number = |part: &str| {
        let number = part.trim().parse::<f64>().ok().filter(|n| n.is_finite() && (0.0..=1e9).contains(n));
        number.ok_or_else(|| format!("`{part}` is not a number from 0 to 1000000000"))
    };
    if text.is_empty() { Ok(Vec::new()) } else { text.split(',').map(number).collect() }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(length) = text.parse::<u64>() {
            return Ok(Self::Constant(length.min(MAX_LENGTH)));
        }
        let (kind, list) = text.split_once(':').unwrap_or((text, ""));
        match (kind, numbers(list)?.as_slice()) {
            ("constant", &[length]) => Ok(Self::Constant(whole(length))),
            ("uniform", &[from, to]) if from <= to => Ok(Self::Uniform(whole(from), whole(to))),
            ("normal", &[mean, deviation]) => Ok(Self::Normal { mean, deviation }),
            ("lognormal", &[median, sigma]) => Ok(Self::LogNormal { median, sigma }),
            ("trace", []) => Ok(Self::Trace),
            _ => Err(format!(
                "`{text}` is none of N, uniform:FROM,TO, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA, trace"
            )),
        }
    }
}

/// Which of several things is taken.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Choice {
    /// Each as often.
    #[default]
    Uniform,
    /// The n-th as often as 1 ÷ n to this power.
    Zipf(f64),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, list) = text.split_once(':').unwrap_or((text, ""));
        match (kind, numbers(list)?.as_slice()) {
            ("uniform", []) => Ok(Self::Uniform),
            ("zipf", &[power]) => Ok(Self::Zipf(power)),
            _ => Err(format!("`{text}` is neither uniform nor zipf:POWER")),
        }
    }
}

/// A [`Choice`] among so many.
#[derive(Debug, Clone)]
pub struct Chooser {
    /// The share of those up to each one.
    cumulative: Vec<f64>,
}

impl Chooser {
    /// Among `count`.
    #[must_use]
    pub fn new(choice: Choice, count: u32) -> Self {
        let power = match choice {
            Choice::Uniform => 0.0,
            Choice::Zipf(power) => power,
        };
        let mut sum = 0.0;
        let cumulative = (1..=count).map(|n| {
            sum += f64::from(n).powf(-power);
            sum
        });
        Self { cumulative: cumulative.collect() }
    }

    /// Takes one, from 0; none if there is none.
    pub fn draw(&self, rng: &mut fastrand::Rng) -> Option<usize> {
        let at = rng.f64() * self.cumulative.last()?;
        Some(self.cumulative.partition_point(|sum| *sum <= at).min(self.cumulative.len() - 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draws(spec: &str) -> Vec<u64> {
        let (lengths, mut rng): (Lengths, _) = (spec.parse().unwrap(), fastrand::Rng::with_seed(1));
        (0..20_000).map(|_| lengths.draw(&mut rng, &[3, 5])).collect()
    }

    fn mean(values: &[u64]) -> f64 {
        values.iter().sum::<u64>() as f64 / values.len() as f64
    }

    #[test]
    fn each_has_its_middle_and_its_bounds() {
        assert!(draws("12").iter().all(|n| *n == 12));
        let uniform = draws("uniform:10,20");
        assert!(uniform.iter().all(|n| (10..=20).contains(n)) && (mean(&uniform) - 15.0).abs() < 0.2);
        assert!((mean(&draws("normal:1000,100")) - 1000.0).abs() < 5.0);
        let mut log = draws("lognormal:1000,1");
        log.sort_unstable();
        assert!((log[10_000] as f64 / 1000.0 - 1.0).abs() < 0.05, "median {}", log[10_000]);
        assert!(mean(&log) > 1500.0, "few are long");
        let traced = draws("trace");
        assert!(traced.iter().all(|n| [3, 5].contains(n)) && (mean(&traced) - 4.0).abs() < 0.1);
        assert_eq!(Lengths::Trace.draw(&mut fastrand::Rng::with_seed(0), &[]), 0);
    }

    #[test]
    fn specifications() {
        let parse = |text: &str| text.parse::<Lengths>();
        assert_eq!(parse("7"), Ok(Lengths::Constant(7)));
        assert_eq!(parse("uniform:1,2"), Ok(Lengths::Uniform(1, 2)));
        for wrong in ["", "x", "-1", "uniform:2,1", "uniform:1", "normal:1", "normal:1,-1", "trace:1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!("zipf:1.1".parse(), Ok(Choice::Zipf(1.1)));
        assert!("zipf".parse::<Choice>().is_err());
    }

    #[test]
    fn choices_have_their_shares() {
        let shares = |choice| {
            let (chooser, mut rng) = (Chooser::new(choice, 4), fastrand::Rng::with_seed(1));
            let mut counts = [0u32; 4];
            (0..24_000).for_each(|_| counts[chooser.draw(&mut rng).unwrap()] += 1);
            counts.map(|count| f64::from(count) / 24_000.0)
        };
        assert!(shares(Choice::Uniform).iter().all(|share| (share - 0.25).abs() < 0.02));
        // 1, 1/2, 1/3 and 1/4 of 25/12.
        let zipf = shares(Choice::Zipf(1.0));
        for (share, wanted) in zipf.iter().zip([0.48, 0.24, 0.16, 0.12]) {
            assert!((share - wanted).abs() < 0.02, "{zipf:?}");
        }
        assert_eq!(Chooser::new(Choice::Uniform, 0).draw(&mut fastrand::Rng::with_seed(1)), None);
    }

    proptest! {
        #[test]
        fn no_length_is_beyond_the_longest(mean in 0f64..1e9, spread in 0f64..1e9, seed: u64) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let all = [
                Lengths::Normal { mean, deviation: spread },
                Lengths::LogNormal { median: mean, sigma: spread },
                Lengths::Uniform(whole(mean), whole(mean) + whole(spread)),
            ];
            for lengths in all {
                prop_assert!(lengths.draw(&mut rng, &[]) <= MAX_LENGTH);
            }
        }
    }
}
