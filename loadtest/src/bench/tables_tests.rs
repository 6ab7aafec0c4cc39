//! What the tables look like, and what stands beside figures that are not what they seem.

use super::{
    super::{machine::Machine, results::*},
    *,
};

fn turn(cell: Cell, peer: Peer, cpu_s: f64, latency: f64) -> Turn {
    let sample = Sample {
        seconds: 2.0,
        cpu_s,
        units: 80_000.0,
        memory_before: 10 << 20,
        memory_peak: 60 << 20,
        good: 1_000,
        latency: Some(Latency { p50_us: latency, p99_us: 2.0 * latency }),
        ..Sample::default()
    };
    Turn {
        cell: cell.name().into(),
        peer: peer.name().into(),
        round: 1,
        streams: 1_000,
        wanted_per_s: (cell == Cell::Paced).then_some(40_000.0),
        sample: Some(sample),
        why_not: None,
    }
}

fn page(turns: Vec<Turn>) -> String {
    let machine = Machine {
        date: "Sun, 22 Nov 2026 00:00:00 GMT".into(),
        cpu: "Some CPU".into(),
        cores: 2,
        memory_gib: 24.0,
        kernel: "6.1".into(),
        load_before: 0.1,
        open_files: 20_000,
    };
    let results = Results {
        machine,
        flags: "--rounds 1".into(),
        versions: [("nginx".to_owned(), "1.22.1".to_owned())].into(),
        threads: 2,
        engines: 4,
        turns,
    };
    markdown(&Merged::of(vec![results]))
}

#[test]
fn a_page() {
    let mut second = turn(Cell::Paced, Peer::Nginx, 0.8, 70.0);
    second.round = 2;
    let text = page(vec![
        turn(Cell::Paced, Peer::Direct, 0.0, 20.0),
        turn(Cell::Paced, Peer::Relay, 0.5, 60.0),
        turn(Cell::Paced, Peer::Penstock, 0.64, 80.0),
        turn(Cell::Paced, Peer::Nginx, 0.64, 90.0),
        second,
    ]);
    assert_eq!(
        text,
        "- Sun, 22 Nov 2026 00:00:00 GMT: 2 × Some CPU, 24 GiB, Linux 6.1, load average 0.10 before it began, 20000 open files \
allowed. 4 engines, 2 threads or workers each. `penstock-bench --rounds 1`
  Versions: nginx 1.22.1.

#### 1,000 streams at 40 tokens a second (`paced`)

Each event comes alone, as from engines in production: one read, one write.

| | CPU of an event, µs | × Penstock | × relay | events/s | added p50, µs | added p99, µs | memory of a stream, KiB | memory at most, MiB |
|---|---|---|---|---|---|---|---|---|
| no gateway | – | – | – | 40,000 | – | – | – | – |
| raw TCP relay | 6.25 | 0.78 | – | 40,000 | 40.0 | 80.0 | 51.2 | 60.0 |
| **Penstock** | 8.00 | – | 1.28 | 40,000 | 60.0 | 120 | 51.2 | 60.0 |
| nginx | 9.00 (8.00 to 10.0) | 1.00 | 1.28 | 40,000 | 70.0 | 140 | 51.2 | 60.0 |
"
    );
}

#[test]
fn failures_and_absence_are_told() {
    let mut failing = turn(Cell::Unary, Peer::Smg, 1.0, 1.0);
    if let Some(sample) = &mut failing.sample {
        sample.failed = 3;
        sample.failures = [("status 500".to_owned(), (3, "{\"a\": \"<b>|\"}\n".to_owned()))].into();
    }
    let absent = Turn {
        sample: None,
        why_not: Some("not installed: apt-get knows no nginx.".into()),
        ..turn(Cell::Unary, Peer::Nginx, 1.0, 1.0)
    };
    let few = Turn { streams: 50, ..turn(Cell::Unary, Peer::Litellm, 1.0, 1.0) };
    let text = page(vec![failing, absent, few]);
    assert!(text.contains("| SMG (!) | 12.5 |"), "{text}");
    assert!(
        text.contains(
            "- SMG: (!) 3 of 1003 requests failed, most of them \"status 500\": {\"a\": \"(b)/\"}.\n"
        )
    );
    assert!(text.contains("| nginx | – | – | – | – | – | – | – |\n"));
    assert!(text.contains("- nginx: not installed: apt-get knows no nginx.\n"));
    assert!(text.contains("- LiteLLM: with 50 streams instead of 1000; one round.\n"));
}

#[test]
fn whoever_falls_behind_is_marked() {
    let mut slow = turn(Cell::Paced, Peer::Smg, 1.0, 1.0);
    slow.sample.as_mut().unwrap().units = 60_000.0;
    let text = page(vec![slow]);
    assert!(text.contains("| SMG (!) | 16.7 |"), "{text}");
    assert!(text.contains("- SMG: (!) fell behind: 30,000 of 40,000 events a second; "), "{text}");
}

#[test]
fn three_digits_that_count() {
    let cases = [
        (0.0, "0.00"),
        (7.256, "7.26"),
        (38.04, "38.0"),
        (391.4, "391"),
        (15_390.0, "15,390"),
        (-1_234.0, "-1,234"),
        (1_000_000.0, "1,000,000"),
    ];
    for (value, text) in cases {
        assert_eq!(number(value), text);
    }
}
