//! The command line.

use std::path::PathBuf;

use clap::Parser;

use super::{profile, valgrind::Dump};

/// Count the instructions of Penstock's hot path under callgrind and compare them with what they were
#[derive(Debug, Clone, Parser)]
#[command(name = "penstock-bench-instructions", version)]
pub struct Options {
    /// The proxy's binary
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// The engine simulator's binary
    #[arg(long, value_name = "FILE")]
    pub engine_sim: PathBuf,
    /// The binary with the parts of the hot path: the proxy's bench "instructions"
    #[arg(long, value_name = "FILE")]
    pub parts: PathBuf,
    /// What they were
    #[arg(long, value_name = "FILE")]
    pub pins: PathBuf,
    /// Write what they are now to that file
    #[arg(long)]
    pub pin: bool,
    /// Only what has one of these in its name; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// How often each is counted, with --pin at least three times; the middle is taken, and the spread shown
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Write there, for each, which functions the instructions are spent in
    #[arg(long, value_name = "FOLDER")]
    pub keep: Option<PathBuf>,
}

impl Options {
    /// Whether that is to be counted.
    pub(super) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }

    /// Writes which functions `twice`, less `once`, was spent in, if that is wanted.
    pub(super) fn keep(&self, name: &str, once: &[Dump], twice: &[Dump], units: u64) -> Result<(), String> {
        let Some(folder) = &self.keep else { return Ok(()) };
        let file = folder.join(format!("{}.txt", file_name(name)));
        let texts = |dumps: &[Dump]| dumps.iter().map(Dump::text).collect::<Result<Vec<_>, _>>();
        let text = profile::text(name, &texts(once)?, &texts(twice)?, units);
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&file, text))
            .map_err(|e| format!("{}: {e}", file.display()))
    }
}

/// A count's name without what is awkward in a file's.
fn file_name(name: &str) -> String {
    let mut file: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    while file.contains("--") {
        file = file.replace("--", "-");
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_chosen_by_a_part_of_their_names() {
        let options = |only: &[&str]| {
            let files = ["--proxy=p", "--engine-sim=e", "--parts=x", "--pins=y"];
            Options::parse_from(["count"].iter().chain(&files).chain(only))
        };
        assert!(options(&[]).wants("pick"));
        let some = options(&["--only=scan", "--only", "event"]);
        assert!(some.wants("request: scan") && some.wants("paced event") && !some.wants("pick"));
    }

    #[test]
    fn a_name_becomes_a_files() {
        assert_eq!(file_name("process: unary request, 1 KB"), "process-unary-request-1-KB");
    }
}
