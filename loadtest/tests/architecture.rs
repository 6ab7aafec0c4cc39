//! The shape of the tree, checked by reading it: which crate may use which, what a pure core may touch, how long a file
//! may be, where metric names live, and that every file says what it is.
//!
//! The rules are the tables at the top. A failure lists each offence with its file and line, and ends with what to do.
//! Test code (`#[cfg(test)]`, `tests.rs`, `*_tests.rs`, `tests/`, `benches/`) is exempt from purity and metric names.

#![allow(clippy::unwrap_used, reason = "a file that cannot be read is a failed test")]

#[path = "architecture/source.rs"]
mod source;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use source::{PathUse, Source};

/// One crate of the workspace and which of the others it may use.
struct Crate {
    folder: &'static str,
    /// In its library and binaries.
    uses: &'static [&'static str],
    /// In its tests as well.
    tests_use: &'static [&'static str],
}

const CRATES: [Crate; 7] = [
    Crate { folder: "proto", uses: &[], tests_use: &[] },
    Crate { folder: "config", uses: &[], tests_use: &[] },
    Crate { folder: "proxy", uses: &["proto", "config"], tests_use: &[] },
    Crate { folder: "controlplane", uses: &["proto", "config"], tests_use: &[] },
    Crate { folder: "agent", uses: &["proto", "config"], tests_use: &[] },
    Crate { folder: "loadtest", uses: &["proto", "config"], tests_use: &["proxy", "controlplane", "agent"] },
    Crate {
        folder: "cli",
        uses: &["proto", "config", "proxy", "controlplane", "agent", "loadtest"],
        tests_use: &[],
    },
];

/// Files, or folders with all they hold, that decide and do nothing else: no I/O, no clock, no dice of their own.
const PURE: &[&str] = &[
    "agent/src/assignment.rs",
    "agent/src/backoff.rs",
    "agent/src/engine/command.rs",
    "agent/src/engine/load.rs",
    "agent/src/engine/mod.rs",
    "agent/src/plan.rs",
    "cli/src/up/restart.rs",
    "controlplane/src/fleet/liveness.rs",
    "controlplane/src/model",
    "controlplane/src/plan",
    "controlplane/src/xds/session.rs",
    "controlplane/src/xds/snapshot.rs",
    "loadtest/src/engine/batch",
    "loadtest/src/engine/faults.rs",
    "loadtest/src/engine/generation.rs",
    "loadtest/src/engine/kv.rs",
    "loadtest/src/engine/render.rs",
    "loadtest/src/engine/request.rs",
    "loadtest/src/engine/template.rs",
    "loadtest/src/engine/tokens.rs",
    "loadtest/src/load/arrivals.rs",
    "loadtest/src/load/html.rs",
    "loadtest/src/load/http1.rs",
    "loadtest/src/load/lengths.rs",
    "loadtest/src/load/pattern.rs",
    "loadtest/src/load/prompts.rs",
    "loadtest/src/load/report.rs",
    "loadtest/src/load/shape.rs",
    "loadtest/src/load/sse.rs",
    "loadtest/src/load/stats.rs",
    "loadtest/src/load/trace.rs",
    "loadtest/src/load/verify.rs",
    "loadtest/src/scale/model.rs",
    "loadtest/src/scale/report.rs",
    "proxy/src/admission/auth.rs",
    "proxy/src/error.rs",
    "proxy/src/health/peers.rs",
    "proxy/src/health/progress.rs",
    "proxy/src/health/state.rs",
    "proxy/src/health/window.rs",
    "proxy/src/openai",
    "proxy/src/routing",
    "proxy/src/simulator",
    "proxy/src/upstream/retry.rs",
    "proxy/src/xds/state",
];

/// Crates that do I/O or run tasks. An entry that ends in `_` stands for all that start with it.
const IMPURE_CRATES: &[&str] = &[
    "axum",
    "hyper",
    "hyper_util",
    "nix",
    "pingora_",
    "rand",
    "redb",
    "reqwest",
    "tokio",
    "tokio_",
    "tonic",
];

/// Ends of paths that do I/O, read a clock, or roll dice nobody handed over.
const IMPURE_PATHS: &[&str] = &[
    ".elapsed",
    "Instant::now",
    "Rng::new",
    "SystemTime::now",
    "TcpListener",
    "TcpStream",
    "UdpSocket",
    "Uuid::new_v4",
    "Uuid::now_v7",
];

/// Modules of `std` that a pure core has no business in.
const IMPURE_STD: &[&str] = &["env", "fs", "process", "thread"];

/// The one file, or folder, of a crate that names metrics.
const METRICS: &[(&str, &str)] = &[
    ("agent", "agent/src/metrics.rs"),
    ("controlplane", "controlplane/src/metrics.rs"),
    ("proxy", "proxy/src/telemetry/metrics/"),
];

/// Longest file, in lines. A longer one is split by its nouns, not by its length.
const MAX_LINES: usize = 500;

/// Longer files, each with the reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Starts of paths that exist on somebody's machine only. In two halves, so that this file does not hold them.
const MACHINE_PATHS: &[&str] =
    &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/Us", "ers/")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below `path`, as a path from the root of the repository, in order. Leaves out what is built or hidden.
fn files(path: &str) -> Vec<String> {
    let full = root().join(path);
    if full.is_file() {
        return vec![path.to_owned()];
    }
    let Ok(entries) = fs::read_dir(&full) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        let built = ["target", "node_modules", "__pycache__"].contains(&name.as_str());
        if built || (name.starts_with('.') && name != ".ci") {
            continue;
        }
        let below = if path.is_empty() { name } else { format!("{path}/{name}") };
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&below));
        } else {
            found.push(below);
        }
    }
    found.sort();
    found
}

fn rust_files(path: &str) -> Vec<String> {
    files(path).into_iter().filter(|f| f.ends_with(".rs")).collect()
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn is_test_file(file: &str) -> bool {
    let mut folders = file.split('/');
    let name = folders.next_back().unwrap_or_default();
    name == "tests.rs" || name.ends_with("_tests.rs") || folders.any(|f| f == "tests" || f == "benches")
}

fn refuse(offences: &[String], what_to_do: &str) {
    assert!(offences.is_empty(), "\n\n  {}\n\n{what_to_do}\n", offences.join("\n  "));
}

#[test]
fn manifests_keep_the_dependency_direction() {
    let mut offences = Vec::new();
    for krate in &CRATES {
        let file = format!("{}/Cargo.toml", krate.folder);
        let manifest: toml::Table = read(&file).parse().unwrap();
        let targets = manifest.get("target").and_then(toml::Value::as_table);
        let tables = std::iter::once(&manifest)
            .chain(targets.into_iter().flat_map(|t| t.values().filter_map(toml::Value::as_table)));
        for table in tables {
            for (section, in_tests) in
                [("dependencies", false), ("build-dependencies", false), ("dev-dependencies", true)]
            {
                let names = table.get(section).and_then(toml::Value::as_table);
                for name in names.into_iter().flat_map(|t| t.keys()).filter(|n| n.starts_with("penstock")) {
                    let other = name.strip_prefix("penstock-").unwrap_or("cli");
                    let allowed =
                        krate.uses.contains(&other) || (in_tests && krate.tests_use.contains(&other));
                    if !allowed {
                        offences.push(format!("{file}: {section} has {name}"));
                    }
                }
            }
        }
    }
    refuse(
        &offences,
        "The direction is cli -> {proxy, controlplane, agent, loadtest} -> {proto, config}; loadtest may use the three\n\
         processes in its tests. What two processes share is a message (proto/) or a setting (config/).",
    );
}

#[test]
fn sources_keep_the_dependency_direction() {
    let mut offences = Vec::new();
    for krate in &CRATES {
        for file in rust_files(krate.folder) {
            let own = krate.folder;
            for PathUse { line, segments } in Source::new(&read(&file)).paths() {
                let Some(other) = segments[0].strip_prefix("penstock_").filter(|_| segments.len() > 1) else {
                    continue;
                };
                let known = CRATES.iter().any(|c| c.folder == other);
                let in_tests = is_test_file(&file) && krate.tests_use.contains(&other);
                if known && other != own && !krate.uses.contains(&other) && !in_tests {
                    offences.push(format!("{file}:{line}: {own} uses {}", segments.join("::")));
                }
            }
        }
    }
    refuse(&offences, "See the table CRATES for what each crate may use.");
}

#[test]
fn every_crate_of_the_workspace_is_in_the_table() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    let mut members: Vec<_> = members.iter().filter_map(toml::Value::as_str).collect();
    let mut known: Vec<_> = CRATES.iter().map(|c| c.folder).collect();
    members.sort_unstable();
    known.sort_unstable();
    assert_eq!(members, known, "add the new crate to CRATES, with what it may use");
}

#[test]
fn pure_cores_do_no_io_and_have_no_clock_or_dice_of_their_own() {
    let mut offences = Vec::new();
    for core in PURE {
        let found = rust_files(core);
        if found.is_empty() {
            offences.push(format!("{core}: is in the table PURE and does not exist"));
        }
        for file in found.iter().filter(|f| !is_test_file(f)) {
            for path in Source::new(&read(file)).paths() {
                if is_impure(&path.segments) {
                    offences.push(format!("{file}:{}: {}", path.line, path.segments.join("::")));
                }
            }
        }
    }
    refuse(
        &offences,
        "These files decide; the file that acts on the decision does the I/O. Take the time (`now`), the dice\n\
         (`&mut fastrand::Rng`) and ids as arguments, and move what reads, writes, waits or spawns to the caller.",
    );
}

fn is_impure(segments: &[String]) -> bool {
    let first = segments[0].as_str();
    if segments.len() > 1 {
        let second = segments[1].as_str();
        let dice = first == "fastrand" && second.starts_with(|c: char| c.is_lowercase());
        if dice || (first == "std" && IMPURE_STD.contains(&second)) {
            return true;
        }
        if IMPURE_CRATES.iter().any(|c| first == *c || (c.ends_with('_') && first.starts_with(c))) {
            return true;
        }
    }
    let path = segments.join("::");
    IMPURE_PATHS.iter().any(|end| path == *end || path.ends_with(&format!("::{end}")))
}

#[test]
fn impurity_is_told_from_plain_types() {
    let impure = |path: &str| is_impure(&path.split("::").map(str::to_owned).collect::<Vec<_>>());
    for path in
        ["std::fs", "tokio::spawn", "pingora_core::x", "Instant::now", "fastrand::u32", "std::net::TcpStream"]
    {
        assert!(impure(path), "{path}");
    }
    for path in
        ["std::net::SocketAddr", "std::time::Instant", "fastrand::Rng", "process", "Rng::with_seed", "rand"]
    {
        assert!(!impure(path), "{path}");
    }
}

#[test]
fn metric_names_live_in_one_file_per_process() {
    let mut offences = Vec::new();
    for (krate, home) in METRICS {
        if !root().join(home).exists() {
            offences.push(format!("{home}: is in the table METRICS and does not exist"));
        }
        let prefix = format!("penstock_{krate}_");
        for file in rust_files(&format!("{krate}/src")) {
            if file.starts_with(home) || is_test_file(&file) {
                continue;
            }
            for (line, text) in Source::new(&read(&file)).strings {
                if text.starts_with(&prefix) {
                    offences.push(format!("{file}:{line}: {text:?} belongs in {home}"));
                }
            }
        }
    }
    refuse(
        &offences,
        "Dashboards break silently when names are scattered: declare the metric there, use its handle here.",
    );
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let lengths: BTreeMap<String, usize> =
        rust_files("").into_iter().map(|f| (f.clone(), read(&f).lines().count())).collect();
    let mut offences: Vec<_> = lengths
        .iter()
        .filter(|(file, lines)| **lines > MAX_LINES && !LONG_FILES.iter().any(|(long, _)| long == file))
        .map(|(file, lines)| format!("{file}: {lines} lines"))
        .collect();
    for (file, _) in LONG_FILES {
        if lengths.get(*file).is_none_or(|lines| *lines <= MAX_LINES) {
            offences.push(format!("{file}: needs no place in the table LONG_FILES any more"));
        }
    }
    refuse(
        &offences,
        "The limit is 500 lines, tests included. Split by noun; tests may go to a tests.rs beside the file.",
    );
}

#[test]
fn every_file_says_what_it_is() {
    // A tests.rs or foo_tests.rs is about the module it belongs to.
    let offences: Vec<_> = rust_files("")
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs") && !read(file).trim_start().starts_with("//!"))
        .collect();
    refuse(
        &offences,
        "Begin the file with //! lines: what it is, why this way, what always holds, what is absent.",
    );
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    const TEXT: [&str; 12] =
        [".rs", ".toml", ".md", ".sh", ".py", ".js", ".json", ".yaml", ".yml", ".proto", ".html", "/run"];
    let mut offences = Vec::new();
    for file in files("") {
        let named = ["Makefile", "Dockerfile"].iter().any(|n| file.ends_with(n));
        if !named && !TEXT.iter().any(|end| file.ends_with(end)) {
            continue;
        }
        for (number, line) in read(&file).lines().enumerate() {
            if let Some(path) = MACHINE_PATHS.iter().find(|p| line.contains(**p)) {
                offences.push(format!("{file}:{}: {path}", number + 1));
            }
        }
    }
    refuse(&offences, "Say the path from the root of the repository, or take it as an argument.");
}
