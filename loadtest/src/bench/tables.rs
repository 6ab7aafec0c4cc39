//! The figures as Markdown.

use super::{
    cell::{Cell, Unit},
    figures::{Spread, Summary, summary},
    peer::Peer,
    results::Merged,
};

/// Heading and explanation of a cell.
const fn about(cell: Cell) -> (&'static str, &'static str) {
    match cell {
        Cell::Unary => (
            "Whole answers, bodies of 1 KB",
            "64 connections ask one thing after the other; answers of 16 tokens. Both cores are full.",
        ),
        Cell::Unthrottled => (
            "Streams at full speed",
            "16 streams of 1,000 tokens after the other, each token a write of the engine as soon as the one before is out. \
             Both cores are full, so a slow gateway finds more events in each read: its cost for an event falls.",
        ),
        Cell::Paced => (
            "1,000 streams at 40 tokens a second",
            "Each event comes alone, as from engines in production: one read, one write.",
        ),
        Cell::Paced10k => ("10,000 streams at 3 tokens a second", "As before, with ten times the streams."),
        Cell::Body64k => ("Bodies of 64 KB", "Whole answers of 4 tokens, 16 connections."),
        Cell::Body500k => ("Bodies of 500 KB", "Whole answers of 4 tokens, 8 connections."),
        Cell::Body1m => ("Bodies of 1 MB", "Whole answers of 4 tokens, 8 connections."),
        Cell::Body5m => ("Bodies of 5 MB", "Whole answers of 4 tokens, 4 connections."),
        Cell::Burst => (
            "Bursts",
            "8 streams of 8,000 tokens a second, which engines write some eight at a time, as with speculative decoding.",
        ),
        Cell::Idle => (
            "Memory of idle streams",
            "1,000 streams that have had their first token and wait for the second.",
        ),
        Cell::TlsH2 => (
            "TLS and HTTP/2 from the client",
            "1,000 streams at 20 tokens a second, 20 on each connection; HTTP/1.1 without TLS to the engines.",
        ),
    }
}

/// Every cell of which there is something, and what it was measured with.
pub(super) fn markdown(merged: &Merged) -> String {
    let mut text = String::new();
    for part in &merged.parts {
        text += &format!(
            "- {}. {} engines, {} threads or workers each.",
            part.machine.text(),
            part.engines,
            part.threads
        );
        text += &format!(" `penstock-bench{}`\n", prefixed(&part.flags));
        let versions: Vec<String> =
            part.versions.iter().map(|(peer, version)| format!("{peer} {version}")).collect();
        if !versions.is_empty() {
            text += &format!("  Versions: {}.\n", versions.join(", "));
        }
    }
    for cell in Cell::ALL {
        if merged.turns(cell.name()).next().is_some() {
            text += &table(merged, cell);
        }
    }
    text
}

fn prefixed(flags: &str) -> String {
    if flags.is_empty() { String::new() } else { format!(" {flags}") }
}

/// One cell.
fn table(merged: &Merged, cell: Cell) -> String {
    let rows: Vec<(Peer, Summary)> =
        Peer::ALL.into_iter().filter_map(|peer| Some((peer, summary(merged, cell, peer)?))).collect();
    let (title, what) = about(cell);
    let streams = rows.iter().map(|(_, summary)| summary.streams).max().unwrap_or_default();
    let columns = columns(cell);
    let mut text = format!("\n#### {title} (`{}`)\n\n{what}\n\n| |", cell.name());
    for (head, _) in &columns {
        text += &format!(" {head} |");
    }
    text += "\n|---|";
    text += &"---|".repeat(columns.len());
    text.push('\n');
    let mut notes = Vec::new();
    for (peer, summary) in &rows {
        let mark = if summary.failed > 0 || summary.behind.is_some() { " (!)" } else { "" };
        text += &format!("| {}{mark} |", peer.title());
        for (_, of) in &columns {
            text += &format!(" {} |", of(summary));
        }
        text.push('\n');
        notes.extend(note(*peer, summary, streams));
    }
    if !notes.is_empty() {
        text += &format!("\n{}\n", notes.join("\n"));
    }
    text
}

type Column = (&'static str, fn(&Summary) -> String);

fn columns(cell: Cell) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    match cell.unit() {
        Unit::Event => columns.push(("CPU of an event, µs", |s| spread(s.cpu_us))),
        Unit::Request => columns.push(("CPU of a request, µs", |s| spread(s.cpu_us))),
        Unit::Stream => {}
    }
    if cell.unit() != Unit::Stream {
        columns.push(("× Penstock", |s| ratio(s.of_penstock)));
        columns.push(("× relay", |s| ratio(s.of_relay)));
        let head = if cell.unit() == Unit::Event { "events/s" } else { "requests/s" };
        columns.push((head, |s| middle(s.per_s)));
    }
    match cell {
        Cell::Idle | Cell::Unthrottled => {}
        Cell::TlsH2 => {
            columns.push(("p50, µs", |s| middle(s.p50_us)));
            columns.push(("p99, µs", |s| middle(s.p99_us)));
        }
        _ => {
            columns.push(("added p50, µs", |s| middle(s.added_p50_us)));
            columns.push(("added p99, µs", |s| middle(s.added_p99_us)));
        }
    }
    if cell.shows_memory() {
        columns.push(("memory of a stream, KiB", |s| spread(s.stream_kib)));
    }
    columns.push(("memory at most, MiB", |s| middle(s.peak_mib)));
    columns
}

/// What must be known beside the figures.
fn note(peer: Peer, summary: &Summary, streams: u32) -> Option<String> {
    let mut said = Vec::new();
    if let Some(why) = &summary.why_not {
        said.push(plain(why));
    }
    if summary.failed > 0 {
        let all = summary.good + summary.failed;
        let kind = summary.failure.as_ref();
        let kind =
            kind.map(|(kind, example)| format!(", most of them \"{}\": {}", plain(kind), plain(example)));
        said.push(format!("(!) {} of {all} requests failed{}", summary.failed, kind.unwrap_or_default()));
    }
    if let Some((came, wanted)) = summary.behind {
        said.push(format!(
            "(!) fell behind: {} of {} events a second; what it costs where it keeps the pace is not known from this",
            number(came),
            number(wanted)
        ));
    }
    if summary.turns > 0 && summary.streams < streams {
        said.push(format!("with {} streams instead of {streams}", summary.streams));
    }
    if summary.turns > 0 && peer.runs_once() {
        said.push("one round".into());
    }
    (!said.is_empty()).then(|| format!("- {}: {}.", peer.title(), said.join("; ")))
}

/// As one line that means nothing in Markdown.
fn plain(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(160).collect();
    text.replace('|', "/").replace('<', "(").replace('>', ")").trim_end_matches(['.', ' ']).to_owned()
}

/// The middle, and the ends where there are any.
fn spread(spread: Option<Spread>) -> String {
    match spread {
        Some(Spread { median, least, most }) if least < most => {
            format!("{} ({} to {})", number(median), number(least), number(most))
        }
        other => middle(other),
    }
}

fn middle(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "–".into(), |spread| number(spread.median))
}

fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "–".into(), |ratio| format!("{ratio:.2}"))
}

/// Three digits that count, thousands apart.
fn number(value: f64) -> String {
    let size = value.abs();
    if size < 10.0 {
        return format!("{value:.2}");
    }
    if size < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{size:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if value < 0.0 { format!("-{grouped}") } else { grouped }
}

#[cfg(test)]
#[path = "tables_tests.rs"]
mod tests;
