//! From turns to figures: medians, spread, and ratios of turns that were neighbours in time.

use std::collections::BTreeMap;

use super::{
    cell::{Cell, Unit},
    peer::Peer,
    results::{Merged, Sample, Turn},
};

/// The middle, the smallest and the largest of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// None of none. What is no number is left out.
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = figures.into_iter().filter(|figure| figure.is_finite()).collect();
        all.sort_by(f64::total_cmp);
        let (least, most) = (*all.first()?, *all.last()?);
        let (below, above) = (all.get((all.len() - 1) / 2)?, all.get(all.len() / 2)?);
        Some(Self { median: (below + above) / 2.0, least, most })
    }
}

/// What a peer did in a cell.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Summary {
    pub(super) turns: usize,
    pub(super) streams: u32,
    /// CPU time of a unit, µs.
    pub(super) cpu_us: Option<Spread>,
    /// That, of Penstock's and of the relay's in the same rounds.
    pub(super) of_penstock: Option<f64>,
    pub(super) of_relay: Option<f64>,
    pub(super) per_s: Option<Spread>,
    /// Less than was wanted of them, in the worst round: how many came, and how many should have.
    pub(super) behind: Option<(f64, f64)>,
    pub(super) p50_us: Option<Spread>,
    pub(super) p99_us: Option<Spread>,
    /// Beyond those without a gateway in the same rounds.
    pub(super) added_p50_us: Option<Spread>,
    pub(super) added_p99_us: Option<Spread>,
    /// Memory of a stream, KiB, and of all processes at most, MiB.
    pub(super) stream_kib: Option<Spread>,
    pub(super) peak_mib: Option<Spread>,
    pub(super) good: u64,
    pub(super) failed: u64,
    /// The failure that was seen most often, and what the first of them said.
    pub(super) failure: Option<(String, String)>,
    /// Why it has no figures, or not in all rounds.
    pub(super) why_not: Option<String>,
}

/// Engines vary their pace by some percent; with less than this share of the events something could not carry the load.
const KEPT_PACE: f64 = 0.95;

/// A round of a part.
type Key = (usize, u32);

/// CPU time of a unit, µs.
fn cpu_us(sample: &Sample) -> f64 {
    sample.cpu_s * 1e6 / sample.units
}

/// The samples of a peer in a cell, by round.
fn samples(merged: &Merged, cell: Cell, peer: Peer) -> BTreeMap<Key, (&Turn, &Sample)> {
    let turns = merged.turns(cell.name()).filter(|(_, turn)| turn.peer == peer.name());
    turns.filter_map(|(part, turn)| Some(((part, turn.round), (turn, turn.sample.as_ref()?)))).collect()
}

/// Sums up what `peer` did in `cell`; none if it had no turn.
pub(super) fn summary(merged: &Merged, cell: Cell, peer: Peer) -> Option<Summary> {
    let turns = merged.turns(cell.name()).filter(|(_, turn)| turn.peer == peer.name());
    let turns: Vec<&Turn> = turns.map(|(_, turn)| turn).collect();
    let streams = turns.last()?.streams;
    let own = samples(merged, cell, peer);
    let all = || own.values().map(|(_, sample)| *sample);
    let against = |other: Peer| {
        let others = samples(merged, cell, other);
        let ratio = |(key, (_, sample)): (&Key, &(&Turn, &Sample))| {
            others.get(key).map(|(_, other)| cpu_us(sample) / cpu_us(other))
        };
        Spread::of(own.iter().filter_map(ratio)).map(|ratios| ratios.median)
    };
    let direct = samples(merged, cell, Peer::Direct);
    let added = |of: fn(&Sample) -> Option<f64>| {
        let beyond =
            |(key, (_, sample)): (&Key, &(&Turn, &Sample))| Some(of(sample)? - of(direct.get(key)?.1)?);
        Spread::of(own.iter().filter_map(beyond)).filter(|_| peer != Peer::Direct)
    };
    let p50 = |sample: &Sample| sample.latency.map(|latency| latency.p50_us);
    let p99 = |sample: &Sample| sample.latency.map(|latency| latency.p99_us);
    let is_process = peer != Peer::Direct;
    let mut failures: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    for (kind, (count, example)) in all().flat_map(|sample| &sample.failures) {
        failures.entry(kind).or_insert((0, example)).0 += count;
    }
    let shares =
        own.values().filter_map(|(turn, sample)| Some((sample.units / sample.seconds, turn.wanted_per_s?)));
    let behind = shares.filter(|(came, wanted)| *came < wanted * KEPT_PACE);
    let worst = failures.into_iter().max_by_key(|(_, (count, _))| *count);
    Some(Summary {
        turns: own.len(),
        streams,
        cpu_us: Spread::of(all().map(cpu_us)).filter(|_| is_process && cell.unit() != Unit::Stream),
        of_penstock: against(Peer::Penstock).filter(|_| is_process && peer != Peer::Penstock),
        of_relay: against(Peer::Relay).filter(|_| is_process && peer != Peer::Relay),
        per_s: Spread::of(all().map(|sample| sample.units / sample.seconds)),
        behind: behind.min_by(|(a, _), (b, _)| a.total_cmp(b)),
        p50_us: Spread::of(all().filter_map(p50)),
        p99_us: Spread::of(all().filter_map(p99)),
        added_p50_us: added(p50),
        added_p99_us: added(p99),
        stream_kib: Spread::of(own.values().map(|(turn, sample)| {
            sample.memory_peak.saturating_sub(sample.memory_before) as f64 / f64::from(turn.streams) / 1_024.0
        }))
        .filter(|_| is_process),
        peak_mib: Spread::of(all().map(|sample| sample.memory_peak as f64 / f64::from(1 << 20)))
            .filter(|_| is_process),
        good: all().map(|sample| sample.good).sum(),
        failed: all().map(|sample| sample.failed).sum(),
        failure: worst.map(|(kind, (_, example))| (kind.to_owned(), example.to_owned())),
        why_not: turns.iter().find_map(|turn| turn.why_not.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::results::*, *};

    fn turn(peer: Peer, round: u32, cpu_s: f64, latency: (f64, f64)) -> Turn {
        let sample = Sample {
            seconds: 2.0,
            cpu_s,
            units: 1_000.0,
            memory_before: 1 << 20,
            memory_peak: 3 << 20,
            good: 10,
            failed: u64::from(round == 3),
            failures: if round == 3 {
                [("cut".to_owned(), (1, "x".to_owned()))].into()
            } else {
                BTreeMap::new()
            },
            latency: Some(Latency { p50_us: latency.0, p99_us: latency.1 }),
        };
        Turn {
            cell: "paced".into(),
            peer: peer.name().into(),
            round,
            streams: 64,
            wanted_per_s: Some(if round == 2 { 1_000.0 } else { 500.0 }),
            sample: Some(sample),
            why_not: None,
        }
    }

    #[test]
    fn the_middle_and_the_ends() {
        let spread =
            |figures: &[f64]| Spread::of(figures.iter().copied()).map(|s| (s.median, s.least, s.most));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[f64::NAN, f64::INFINITY]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), Some((2.5, 1.0, 4.0)));
    }

    #[test]
    fn ratios_are_of_neighbours_in_time() {
        // The machine was twice as slow in the second round, and the relay had no turn in the third.
        let turns = vec![
            turn(Peer::Direct, 1, 0.0, (10.0, 20.0)),
            turn(Peer::Relay, 1, 0.010, (20.0, 40.0)),
            turn(Peer::Penstock, 1, 0.015, (30.0, 60.0)),
            turn(Peer::Direct, 2, 0.0, (20.0, 40.0)),
            turn(Peer::Relay, 2, 0.020, (40.0, 80.0)),
            turn(Peer::Penstock, 2, 0.030, (50.0, 90.0)),
            turn(Peer::Penstock, 3, 0.030, (50.0, 90.0)),
        ];
        let merged = Merged::of(vec![Results { turns, ..Results::default() }]);
        let penstock = summary(&merged, Cell::Paced, Peer::Penstock).unwrap();
        assert_eq!(penstock.cpu_us, Some(Spread { median: 30.0, least: 15.0, most: 30.0 }));
        assert_eq!((penstock.of_penstock, penstock.of_relay), (None, Some(1.5)));
        assert_eq!(penstock.added_p50_us, Some(Spread { median: 25.0, least: 20.0, most: 30.0 }));
        assert_eq!((penstock.per_s.unwrap().median, penstock.behind), (500.0, Some((500.0, 1_000.0))));
        assert_eq!((penstock.stream_kib.unwrap().median, penstock.peak_mib.unwrap().median), (32.0, 3.0));
        assert_eq!((penstock.good, penstock.failed), (30, 1));
        assert_eq!(penstock.failure, Some(("cut".into(), "x".into())));
        let direct = summary(&merged, Cell::Paced, Peer::Direct).unwrap();
        assert_eq!((direct.cpu_us, direct.added_p50_us, direct.peak_mib), (None, None, None));
        assert_eq!(direct.p50_us.unwrap().median, 15.0);
        let relay = summary(&merged, Cell::Paced, Peer::Relay).unwrap();
        assert!((relay.of_penstock.unwrap() - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(summary(&merged, Cell::Paced, Peer::Nginx), None);
    }

    #[test]
    fn who_did_not_come_to_it_says_why() {
        let turn = Turn {
            why_not: Some("not installed: no apt-get".into()),
            ..turn(Peer::Nginx, 1, 1.0, (1.0, 1.0))
        };
        let turns = vec![Turn { sample: None, ..turn }];
        let merged = Merged::of(vec![Results { turns, ..Results::default() }]);
        let nginx = summary(&merged, Cell::Paced, Peer::Nginx).unwrap();
        assert_eq!((nginx.turns, nginx.cpu_us, nginx.behind), (0, None, None));
        assert_eq!(nginx.why_not.as_deref(), Some("not installed: no apt-get"));
    }
}
