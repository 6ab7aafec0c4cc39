//! What does Penstock cost beside its peers, and beside the least that a proxy can cost?
//!
//! Every peer fronts the same engines (simulators, processes too) with the same balancing and carries the same load, every
//! token of which is verified ([`crate::load`]). They take turns, A B C A B C, so that whatever else the machine does is shared
//! among them; each turn is a process that begins empty. Beside the gateways two have turns that are none: [`crate::relay`],
//! which copies bytes, is the floor, and nobody at all (`direct`) is what latencies are counted from.
//!
//! Counted in a window in which nothing begins or ends: the CPU time of the peer's process and all below it, divided by the
//! events (or answers) that the engines gave out meanwhile; the memory that it has at most, less what it had before. A
//! peer that is not installed, does not start, or fails requests is in the tables with the reason.
//!
//! `cell` says what is loaded, `peer` and `plan` who and how they are started, `configs` how they are set; `turn` measures one,
//! `results` keeps what came out, `figures` and `tables` add it up, `document` puts it into a page. All but `turn`, `process`,
//! `loading` and this file decide and do nothing else.

mod cell;
mod configs;
mod document;
mod figures;
mod loading;
mod machine;
mod options;
mod peer;
mod plan;
mod process;
mod results;
mod tables;
mod tls;
mod tree;
mod turn;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Instant, SystemTime},
};

use clap::Parser;

pub use self::options::Options;
use self::{
    cell::{Cell, Scale},
    machine::Machine,
    peer::Peer,
    plan::Programs,
    results::{Merged, Results, Sample, Turn},
    turn::{Engines, Stage},
};
use crate::limits::raise_open_files;

/// Open files that a peer needs beside two for each stream.
const SPARE_FILES: u64 = 500;

/// Runs the command line `argv`, program name first: 0 done, 1 something broke, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let options = match Options::try_parse_from(&argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let made = if options.from.is_empty() { measure(&options, &argv) } else { read(&options.from) };
    let ended = made.and_then(|merged| {
        let text = tables::markdown(&merged);
        if let Some(path) = &options.write {
            document::fill(path, &text)?;
        }
        std::io::stdout().lock().write_all(text.as_bytes()).map_err(|e| e.to_string())
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("penstock-bench: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// What earlier runs have written.
fn read(paths: &[PathBuf]) -> Result<Merged, String> {
    let all: Result<Vec<Results>, String> = paths.iter().map(|path| Results::read(path)).collect();
    Ok(Merged::of(all?))
}

fn measure(options: &Options, argv: &[OsString]) -> Result<Merged, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))?;
    let flags = flags(argv.iter().skip(1).map(|word| word.to_string_lossy().into_owned()));
    let results = runtime.block_on(async {
        let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
            .map_err(|e| e.to_string())?;
        let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .map_err(|e| e.to_string())?;
        // Left where it is, a run ends its processes.
        tokio::select! {
            results = run(options, flags) => results,
            _ = interrupted.recv() => Err("interrupted".to_owned()),
            _ = terminated.recv() => Err("terminated".to_owned()),
        }
    })?;
    Ok(Merged::of(vec![results]))
}

/// The command line as it is told beside the figures: without what names a place on this machine.
fn flags(words: impl Iterator<Item = String>) -> String {
    let mut told: Vec<String> = Vec::new();
    let mut skip = false;
    for word in words {
        let places = ["--proxy", "--relay", "--engine-sim", "--peers-dir", "--json", "--write"];
        let name = word.split('=').next().unwrap_or_default();
        if std::mem::take(&mut skip) {
        } else if places.contains(&name) {
            skip = !word.contains('=');
        } else {
            told.push(word);
        }
    }
    told.join(" ")
}

/// Lets all peers take turns in each cell. What was measured so far is in the file of `--json` after each cell.
async fn run(options: &Options, flags: String) -> Result<Results, String> {
    let open_files = raise_open_files();
    let programs = programs(options)?;
    let machine = Machine::look(SystemTime::now(), open_files);
    let cores = u16::try_from(machine.cores).unwrap_or(u16::MAX).max(1);
    let threads = if options.threads == 0 { cores } else { options.threads };
    let scale = Scale {
        seconds: if options.quick { 1.0 } else { options.seconds },
        divisor: if options.quick { 20 } else { 1 },
        most_streams: u32::try_from(open_files.saturating_sub(SPARE_FILES) / 2).unwrap_or(u32::MAX).max(16),
    };
    let rounds = if options.quick { 1 } else { options.rounds };
    let stage = Stage { programs: &programs, threads, open_files, scale };
    let peers = options.peers();
    let versions = versions(&programs, &peers);
    let mut results =
        Results { machine, flags, versions, threads, engines: options.engines, turns: Vec::new() };
    let began = Instant::now();
    for cell in options.cells() {
        turns(&stage, cell, &peers, rounds, options.engines, &mut results.turns).await?;
        if let Some(path) = &options.json {
            results.write(path)?;
        }
    }
    say(&format!("took {:.0} s", began.elapsed().as_secs_f64()));
    Ok(results)
}

/// Every round of a cell.
async fn turns(
    stage: &Stage<'_>,
    cell: Cell,
    peers: &[Peer],
    rounds: u32,
    engines: u16,
    turns: &mut Vec<Turn>,
) -> Result<(), String> {
    let mut absent: BTreeMap<Peer, ()> = BTreeMap::new();
    for round in 1..=rounds {
        for peer in peers.iter().copied() {
            let (shape, started) = (stage.shape(cell, peer), Instant::now());
            let measured = match peer.takes_part(cell) {
                Err(None) => continue,
                // What it cannot, and what failed before, is said once.
                _ if absent.contains_key(&peer) || (round > 1 && peer.runs_once()) => continue,
                Err(Some(why)) => Err(why.to_owned()),
                Ok(()) => {
                    // As fresh as the peer, so that no turn finds what the one before has left.
                    let engines = Engines::start(stage.programs, engines, &shape).await?;
                    stage.turn(cell, peer, &engines).await
                }
            };
            say(&progress(cell, round, peer, &measured, started.elapsed().as_secs_f64()));
            if measured.is_err() {
                absent.insert(peer, ());
            }
            let (sample, why_not) = match measured {
                Ok(sample) => (Some(sample), None),
                Err(why) => (None, Some(why)),
            };
            let (cell, peer) = (cell.name().to_owned(), peer.name().to_owned());
            let (streams, wanted_per_s) = (shape.streams, shape.wanted_per_s());
            turns.push(Turn { cell, peer, round, streams, wanted_per_s, sample, why_not });
        }
    }
    Ok(())
}

/// One line about a turn.
fn progress(cell: Cell, round: u32, peer: Peer, measured: &Result<Sample, String>, took_s: f64) -> String {
    let figures = match measured {
        Err(why) => why.clone(),
        Ok(sample) => {
            let failed =
                if sample.failed > 0 { format!(", {} FAILED", sample.failed) } else { String::new() };
            format!(
                "{:.2} µs of CPU for each of {:.0} {:?}s, {:.0} a second, memory {:.1} to {:.1} MiB, {} good{failed}",
                sample.cpu_s * 1e6 / sample.units,
                sample.units,
                cell.unit(),
                sample.units / sample.seconds,
                sample.memory_before as f64 / f64::from(1 << 20),
                sample.memory_peak as f64 / f64::from(1 << 20),
                sample.good,
            )
        }
    };
    format!("{}, round {round}, {}: {figures} ({took_s:.1} s)", cell.name(), peer.name())
}

/// The programs that are named, or those beside this one.
fn programs(options: &Options) -> Result<Programs, String> {
    let own = std::env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let folder = own.parent().unwrap_or(Path::new("."));
    let named = |path: &Option<PathBuf>, name: &str| path.clone().unwrap_or_else(|| folder.join(name));
    let absolute = |path: PathBuf| std::path::absolute(&path).map_err(|e| format!("{}: {e}", path.display()));
    let engine_sim = absolute(named(&options.engine_sim, "penstock-engine-sim"))?;
    if !engine_sim.is_file() {
        return Err(format!("there is no {}: name it with --engine-sim", engine_sim.display()));
    }
    Ok(Programs {
        proxy: absolute(named(&options.proxy, "penstock-proxy"))?,
        relay: absolute(named(&options.relay, "penstock-relay"))?,
        engine_sim,
        peers: options.peers_dir.clone().map(absolute).transpose()?,
    })
}

/// What the peers say they are, or the installing script has noted.
fn versions(programs: &Programs, peers: &[Peer]) -> BTreeMap<String, String> {
    let version = |peer: Peer| {
        let program = programs.find(peer).ok()?;
        if peer.is_installed_on_demand() {
            return programs.noted_version(peer);
        }
        let said = Command::new(program).arg("--version").output().ok()?;
        String::from_utf8_lossy(&said.stdout).split_whitespace().last().map(str::to_owned)
    };
    let variants = [Peer::Direct, Peer::PenstockOn, Peer::PenstockOff];
    let all = peers.iter().filter(|peer| !variants.contains(peer));
    all.filter_map(|peer| Some((peer.name().to_owned(), version(*peer)?))).collect()
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_not_told() {
        let words = ["--proxy", "/a/b", "--cells", "paced", "--peers-dir=/c", "--rounds", "2", "--json", "x"];
        assert_eq!(flags(words.into_iter().map(str::to_owned)), "--cells paced --rounds 2");
    }
}
