//! An engine's log file: the engine writes to it directly, so that it outlives the agent.
//!
//! A pipe through the agent would end the engine with the agent. So the file is opened for appending, and when it has
//! grown too large it is copied aside and cut to nothing; the few lines written between the two are lost.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// How much of a log's end is looked at for its last lines.
const TAIL_BYTES: u64 = 16 << 10;
/// Longest line that is quoted, in characters.
const LINE_CHARS: usize = 300;

/// Opens the log for the engine's output, notes `headline` in it, and tells the offset at which this life's output begins.
pub(crate) fn open(path: &Path, headline: &str) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(file, "{headline}")?;
    let from = file.metadata()?.len();
    Ok((file, from))
}

/// The file beside `path` that holds what was put aside.
pub(crate) fn previous(path: &Path) -> PathBuf {
    path.with_extension("previous.log")
}

/// Puts the log aside if it is larger than `limit` bytes. Whether it did.
pub(crate) fn rotate(path: &Path, limit: u64) -> io::Result<bool> {
    if fs::metadata(path)?.len() <= limit {
        return Ok(false);
    }
    fs::copy(path, previous(path))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)?;
    Ok(true)
}

/// The last `lines` lines written since offset `from`, blank ones left out, long ones cut; oldest first.
pub(crate) fn tail(path: &Path, from: u64, lines: usize) -> Vec<String> {
    let text = read_end(path, from).unwrap_or_default();
    let mut last: Vec<String> = String::from_utf8_lossy(&text)
        .lines()
        .rev()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .take(lines)
        .map(|line| line.chars().filter(|c| !c.is_control()).take(LINE_CHARS).collect())
        .collect();
    last.reverse();
    last
}

fn read_end(path: &Path, from: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    // Put aside since: everything there is new.
    let from = if from > length { 0 } else { from };
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_of_this_life_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        fs::write(&path, "old\n").unwrap();
        let (mut file, from) = open(&path, "# start").unwrap();
        assert_eq!(tail(&path, from, 3), Vec::<String>::new());
        writeln!(file, "one\n\n two \nthree\nfour \u{1b}[0m").unwrap();
        assert_eq!(tail(&path, from, 3), ["two", "three", "four [0m"]);
        assert_eq!(tail(&dir.path().join("none.log"), 0, 3), Vec::<String>::new());
    }

    #[test]
    fn a_large_log_is_put_aside_while_the_engine_writes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let (mut file, from) = open(&path, "# start").unwrap();
        writeln!(file, "{}", "x".repeat(100)).unwrap();
        assert!(!rotate(&path, 1_000).unwrap());
        assert!(rotate(&path, 50).unwrap());
        writeln!(file, "after").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "after\n");
        assert_eq!(tail(&path, from, 3), ["after"]);
        assert!(fs::read_to_string(previous(&path)).unwrap().contains("xxx"));
    }
}
