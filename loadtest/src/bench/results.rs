//! What was measured, as it is kept: every turn of every peer.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::machine::Machine;

/// One invocation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Results {
    pub(super) machine: Machine,
    /// The command line, without paths.
    pub(super) flags: String,
    /// Of each peer.
    pub(super) versions: BTreeMap<String, String>,
    pub(super) threads: u16,
    pub(super) engines: u16,
    pub(super) turns: Vec<Turn>,
}

/// One turn of one peer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Turn {
    pub(super) cell: String,
    pub(super) peer: String,
    pub(super) round: u32,
    pub(super) streams: u32,
    /// Events a second, if engines were to keep a pace.
    pub(super) wanted_per_s: Option<f64>,
    /// None: it did not come to it.
    pub(super) sample: Option<Sample>,
    /// Why it did not.
    pub(super) why_not: Option<String>,
}

/// What was measured in a turn.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// Of the window.
    pub(super) seconds: f64,
    /// CPU time of the peer's processes in it.
    pub(super) cpu_s: f64,
    /// Events, or answers, in it.
    pub(super) units: f64,
    /// Memory before the load, and the most there was under it.
    pub(super) memory_before: u64,
    pub(super) memory_peak: u64,
    /// Of the whole load, the window and what was around it.
    pub(super) good: u64,
    pub(super) failed: u64,
    /// Each kind of failure: how many, and what the first said.
    pub(super) failures: BTreeMap<String, (u64, String)>,
    /// What clients waited for: an event from its writing on, or a whole answer from its request on.
    pub(super) latency: Option<Latency>,
}

/// In microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

impl Latency {
    /// That of several generators that had equal shares of one load: for shares alike, the quantiles of all are near the mean
    /// of theirs.
    pub(super) fn mean(all: &[Self]) -> Option<Self> {
        let count = all.len() as f64;
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / count;
        (!all.is_empty()).then(|| Self { p50_us: mean(|l| l.p50_us), p99_us: mean(|l| l.p99_us) })
    }
}

impl Results {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Writes a file, and the folders above it.
    pub(super) fn write(&self, path: &Path) -> Result<(), String> {
        let failed = |e: std::io::Error| format!("{}: {e}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let text = serde_json::to_string_pretty(self).map_err(|e| e.to_string())?;
        std::fs::write(path, text + "\n").map_err(failed)
    }
}

/// Several invocations as one. A cell that more than one has is taken from the last that has it for each peer, so that
/// figures that are compared are of one run wherever a run had them all.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Merged {
    /// Those of which something is left.
    pub(super) parts: Vec<Results>,
}

impl Merged {
    pub(super) fn of(all: Vec<Results>) -> Self {
        let mut parts: Vec<Results> = Vec::new();
        for results in all {
            let newer: BTreeSet<(String, String)> =
                results.turns.iter().map(|turn| (turn.cell.clone(), turn.peer.clone())).collect();
            for part in &mut parts {
                part.turns.retain(|turn| !newer.contains(&(turn.cell.clone(), turn.peer.clone())));
            }
            parts.push(results);
        }
        parts.retain(|part| !part.turns.is_empty());
        Self { parts }
    }

    /// Turns of `cell`, each with the number of its part: those of one part and round were neighbours in time.
    pub(super) fn turns<'a>(&'a self, cell: &'a str) -> impl Iterator<Item = (usize, &'a Turn)> {
        let numbered = self.parts.iter().enumerate();
        numbered.flat_map(move |(part, results)| {
            results.turns.iter().filter(move |turn| turn.cell == cell).map(move |turn| (part, turn))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(flags: &str, turns: &[(&str, &str, u32)]) -> Results {
        let turn = |(cell, peer, streams): &(&str, &str, u32)| Turn {
            cell: (*cell).into(),
            peer: (*peer).into(),
            streams: *streams,
            ..Turn::default()
        };
        Results { flags: flags.into(), turns: turns.iter().map(turn).collect(), ..Results::default() }
    }

    #[test]
    fn what_was_measured_again_replaces_what_was_measured_before() {
        let first = results("first", &[("paced", "nginx", 1), ("paced", "envoy", 1), ("unary", "nginx", 1)]);
        let second = results("second", &[("paced", "nginx", 2), ("paced", "nginx", 3)]);
        let merged = Merged::of(vec![first.clone(), second]);
        let seen = |cell: &str| {
            let mut all: Vec<_> =
                merged.turns(cell).map(|(part, turn)| (part, turn.peer.clone(), turn.streams)).collect();
            all.sort();
            all
        };
        assert_eq!(seen("paced"), [(0, "envoy".into(), 1), (1, "nginx".into(), 2), (1, "nginx".into(), 3)]);
        assert_eq!(seen("unary"), [(0, "nginx".into(), 1)]);
        let again = Merged::of(vec![first.clone(), first]);
        assert_eq!(again.parts.len(), 1);
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.json");
        let mut results = results("--quick", &[("paced", "nginx", 1)]);
        results.turns[0].sample = Some(Sample {
            cpu_s: 0.25,
            failures: [("cut".to_owned(), (1, "x".to_owned()))].into(),
            latency: Some(Latency { p50_us: 1.5, p99_us: 2.5 }),
            ..Sample::default()
        });
        results.write(&path).unwrap();
        assert_eq!(Results::read(&path).unwrap(), results);
        std::fs::write(&path, "{}").unwrap();
        assert!(Results::read(&path).unwrap_err().contains("b.json: missing field"));
        assert!(Results::read(&folder.path().join("c")).unwrap_err().contains("No such file"));
    }

    #[test]
    fn shares_of_one_load_have_the_mean_latency() {
        let latency = |p50_us, p99_us| Latency { p50_us, p99_us };
        assert_eq!(Latency::mean(&[latency(1.0, 10.0), latency(3.0, 30.0)]), Some(latency(2.0, 20.0)));
        assert_eq!(Latency::mean(&[]), None);
    }
}
