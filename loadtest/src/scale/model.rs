//! A line through what was measured, and what follows from it. Pure.

/// A line: what there is without any, and what each adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Line {
    pub(super) base: f64,
    pub(super) each: f64,
}

impl Line {
    /// The line with the least squares of *relative* errors: the points span orders of magnitude, and those of the largest
    /// would decide alone. None without two different places, or with values that are not above 0.
    pub(super) fn fit(points: &[(f64, f64)]) -> Option<Self> {
        if points.iter().any(|(x, y)| !(x.is_finite() && *y > 0.0 && y.is_finite())) {
            return None;
        }
        let sum = |of: fn(f64, f64) -> f64| points.iter().map(|(x, y)| of(*x, *y) / (y * y)).sum::<f64>();
        let (one, x, xx) = (sum(|_, _| 1.0), sum(|x, _| x), sum(|x, _| x * x));
        let (y, xy) = (sum(|_, y| y), sum(|x, y| x * y));
        let determinant = one * xx - x * x;
        if determinant <= one * xx * 1e-12 {
            return None;
        }
        let each = (one * xy - x * y) / determinant;
        Some(Self { base: (y - each * x) / one, each })
    }

    /// What it says of a place.
    pub(super) fn at(self, x: f64) -> f64 {
        self.base + self.each * x
    }

    /// How far a point is from it, as a share of what it says.
    pub(super) fn residual(self, x: f64, y: f64) -> f64 {
        y / self.at(x) - 1.0
    }
}

/// The median of values, the smallest and the largest.
pub(super) fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    [f64::midpoint(at(last / 2), at(last.div_ceil(2))), at(0), at(last)]
}

/// The lines that a fleet is computed from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lines {
    /// CPU of an event, µs, by open streams.
    pub(super) event: Line,
    /// Memory, bytes, by open streams.
    pub(super) stream_memory: Line,
    /// CPU of a request, µs, by endpoints.
    pub(super) request: Line,
    /// CPU without requests, share of a core, by endpoints.
    pub(super) idle: Line,
    /// Memory, bytes, by endpoints.
    pub(super) endpoint_memory: Line,
    /// CPU of a request, µs, by bytes of its prompt.
    pub(super) prompt: Line,
}

/// A fleet of proxies, and its load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fleet {
    pub(super) proxies: f64,
    /// In one pool, all known to each proxy.
    pub(super) endpoints: f64,
    pub(super) streams: f64,
    /// Events a second of each stream.
    pub(super) rate: f64,
    /// Tokens of each answer.
    pub(super) tokens: f64,
    /// Bytes of each prompt.
    pub(super) prompt_bytes: f64,
}

/// What one proxy of a fleet needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Need {
    /// Cores for events, for requests, and for knowing the endpoints.
    pub(super) cores: [f64; 3],
    /// Bytes, buffers of prompts excluded.
    pub(super) memory: f64,
}

impl Fleet {
    /// What each proxy needs if streams are spread evenly.
    pub(super) fn need(&self, lines: &Lines) -> Need {
        let streams = self.streams / self.proxies;
        let events = streams * self.rate;
        let requests = events / self.tokens;
        // A larger prompt adds what the line by prompts adds to it; a larger pool what that by endpoints does.
        let request = lines.request.at(self.endpoints) + lines.prompt.each * self.prompt_bytes;
        Need {
            cores: [
                events * lines.event.at(streams) / 1e6,
                requests * request / 1e6,
                lines.idle.at(self.endpoints).max(0.0),
            ],
            memory: lines.endpoint_memory.at(self.endpoints) + lines.stream_memory.each * streams,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_fleet_adds_up() {
        let line = |base, each| Line { base, each };
        let lines = Lines {
            event: line(8.0, 0.001),
            stream_memory: line(1e6, 50e3),
            request: line(40.0, 0.01),
            idle: line(0.01, 1e-5),
            endpoint_memory: line(20e6, 1e3),
            prompt: line(35.0, 0.001),
        };
        let fleet = Fleet {
            proxies: 10.0,
            endpoints: 1_000.0,
            streams: 10_000.0,
            rate: 40.0,
            tokens: 400.0,
            prompt_bytes: 10_000.0,
        };
        let need = fleet.need(&lines);
        // 40,000 events of 9 µs and 100 requests of 60 µs a second.
        let wanted = [0.36, 0.006, 0.02];
        assert!(
            need.cores.iter().zip(wanted).all(|(cores, wanted)| (cores - wanted).abs() < 1e-9),
            "{need:?}"
        );
        assert!((need.memory - 71e6).abs() < 1.0, "{need:?}");
    }

    #[test]
    fn what_is_no_line_has_none() {
        assert_eq!(Line::fit(&[]), None);
        assert_eq!(Line::fit(&[(1.0, 2.0)]), None);
        assert_eq!(Line::fit(&[(1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(Line::fit(&[(1.0, 2.0), (2.0, 0.0)]), None);
        assert_eq!(Line::fit(&[(1.0, 2.0), (2.0, f64::NAN)]), None);
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), [2.0, 1.0, 3.0]);
        assert_eq!(spread(vec![3.0, 1.0]), [2.0, 1.0, 3.0]);
        assert!(spread(Vec::new()).iter().all(|value| value.is_nan()));
    }

    #[test]
    fn small_values_count_as_much_as_large_ones() {
        // The large ones are ten percent off, one way and the other.
        let points = [(1.0, 101.0), (10.0, 110.0), (50_000.0, 45_100.0), (100_000.0, 110_100.0)];
        let line = Line::fit(&points).unwrap();
        assert!((line.base / 100.0 - 1.0).abs() < 0.15 && (line.each - 1.0).abs() < 0.15, "{line:?}");
    }

    proptest! {
        #[test]
        fn a_line_is_found_again(base in 1f64..1e3, each in 0f64..10.0) {
            let wanted = Line { base, each };
            let points: Vec<(f64, f64)> = [10.0, 100.0, 1e3, 1e4].map(|x| (x, wanted.at(x))).to_vec();
            let line = Line::fit(&points).unwrap();
            prop_assert!((line.base / base - 1.0).abs() < 1e-6 && (line.each - each).abs() < 1e-6 * base.max(1.0));
            prop_assert!(points.iter().all(|(x, y)| line.residual(*x, *y).abs() < 1e-6));
        }
    }
}
