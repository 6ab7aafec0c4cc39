//! Engines' log files: each engine writes to its own directly, so that it outlives the agent.
//!
//! A pipe through the agent would end the engine with the agent, and a renamed file would be written on for ever. So a log
//! that has grown too large is copied aside, and what was copied is cut off its *front* (`fallocate` with
//! `COLLAPSE_RANGE`: ext4, XFS), which an engine that appends does not notice; no line is lost, be it written at that very
//! moment. What is cut ends with a block of the file system, so the first line of the present file may have begun in the
//! one before. File systems that cannot do it (overlay on others, tmpfs, Btrfs) get the file copied and emptied; what is
//! written between the two is lost there.
//!
//! Offsets are counted from where this agent first saw the file, whatever has been cut off since.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::fcntl::{FallocateFlags, fallocate};

/// Begins the line that begins a life.
const HEADLINE: &str = "# penstock starts ";
/// What is read of an end to find out why.
const LIFE_BYTES: u64 = 256 << 10;
/// Most that is given back of what was written.
const LAST_BYTES: u64 = 4 << 20;
/// Longest line that is quoted, in characters.
const LINE_CHARS: usize = 300;

/// Opens the log for the output of a new life of the replica's engine, and notes what is executed.
pub(crate) fn open(path: &Path, replica_id: &str, command: &str) -> io::Result<File> {
    let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.seek(SeekFrom::Start(length - 1))?;
        file.read_exact(&mut last)?;
    }
    // An engine may die in the middle of a line.
    let newline = if last == [b'\n'] { "" } else { "\n" };
    writeln!(file, "{newline}{HEADLINE}{replica_id}: {command}")?;
    Ok(file)
}

/// The file beside `path` that holds what was put aside: the last time (1), or the `age`th last.
pub(crate) fn previous(path: &Path, age: u32) -> PathBuf {
    match age {
        0 | 1 => path.with_extension("previous.log"),
        _ => path.with_extension(format!("previous-{age}.log")),
    }
}

/// The lines of the present life, or of the end of it; blank ones left out, long ones cut; oldest first.
pub(crate) fn life(path: &Path) -> Vec<String> {
    let text = read_end(path, LIFE_BYTES).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let from = headlines(&text).last().map_or(0, |(_, end)| *end);
    let clean =
        |line: &str| line.trim().chars().filter(|c| !c.is_control()).take(LINE_CHARS).collect::<String>();
    text.get(from..).unwrap_or_default().lines().map(clean).filter(|line| !line.is_empty()).collect()
}

/// The last `lines` of them.
pub(crate) fn tail(path: &Path, lines: usize) -> Vec<String> {
    let mut all = life(path);
    all.split_off(all.len().saturating_sub(lines))
}

/// Where headlines begin and end.
fn headlines(text: &str) -> Vec<(usize, usize)> {
    let starts = text.match_indices(HEADLINE).map(|(at, _)| at);
    let begins_a_line = |at: &usize| *at == 0 || text.as_bytes().get(at - 1) == Some(&b'\n');
    let whole = |at: usize| {
        let end =
            text.get(at..).and_then(|rest| rest.find('\n')).map_or(text.len(), |length| at + length + 1);
        (at, end)
    };
    starts.filter(begins_a_line).map(whole).collect()
}

fn read_end(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Puts logs aside, and reads them while it may.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    /// How much was cut off each file's front. Held while a file is cut, and while it is read.
    cuts: Mutex<BTreeMap<PathBuf, Arc<Mutex<u64>>>>,
}

impl Logs {
    fn cut(&self, path: &Path) -> Arc<Mutex<u64>> {
        lock(&self.cuts).entry(path.to_owned()).or_default().clone()
    }

    /// Puts the log aside if it is larger than `limit` bytes; `kept` such files stay. Whether it did.
    pub(crate) fn rotate(&self, path: &Path, limit: u64, kept: u32) -> io::Result<bool> {
        let metadata = fs::metadata(path)?;
        let (length, block) = (metadata.len(), metadata.blksize().max(1));
        if length <= limit {
            return Ok(false);
        }
        // Something must stay: the kernel does not cut a file's end this way.
        let whole = (length - 1) / block * block;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if kept > 0 {
            let copy = path.with_extension("previous.new");
            io::copy(&mut (&file).take(whole), &mut File::create(&copy)?)?;
            for age in (2..=kept).rev() {
                match fs::rename(previous(path, age - 1), previous(path, age)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            fs::rename(copy, previous(path, 1))?;
        }
        let cut = self.cut(path);
        let mut cut = lock(&cut);
        let length = i64::try_from(whole).unwrap_or_default();
        let collapsed =
            whole > 0 && fallocate(&file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, length).is_ok();
        *cut += if collapsed { whole } else { empty(&file, path, whole, kept)? };
        Ok(true)
    }

    /// The last `lines` lines, those that were put aside included, and the offset at which they end. `before`: of the life
    /// before the present one, None if there is none.
    pub(crate) fn last(&self, path: &Path, lines: usize, before: bool) -> io::Result<(Option<Vec<u8>>, u64)> {
        let cut = self.cut(path);
        let cut = lock(&cut);
        let mut bytes = read_end(path, LAST_BYTES)?;
        let end = *cut + fs::metadata(path)?.len();
        let room = LAST_BYTES.saturating_sub(bytes.len() as u64);
        if room > 0 {
            let mut older = read_end(&previous(path, 1), room).unwrap_or_default();
            older.append(&mut bytes);
            bytes = older;
        }
        drop(cut);
        if before {
            let text = String::from_utf8_lossy(&bytes);
            let mut lives = headlines(&text).into_iter().rev();
            let Some((present, _)) = lives.next() else { return Ok((None, end)) };
            let from = lives.next().map_or(0, |(from, _)| from);
            let life = text.get(from..present).unwrap_or_default();
            return Ok(((!life.is_empty()).then(|| last_lines(life.as_bytes(), lines).to_vec()), end));
        }
        Ok((Some(last_lines(&bytes, lines).to_vec()), end))
    }

    /// What was written from offset `at` on, at most `most` bytes, and the offset after it. What was put aside meanwhile is
    /// skipped.
    pub(crate) fn read(&self, path: &Path, at: u64, most: u64) -> io::Result<(Vec<u8>, u64)> {
        let cut = self.cut(path);
        let cut = lock(&cut);
        let mut file = File::open(path)?;
        // Emptied by somebody else: everything there is new.
        let from = at.saturating_sub(*cut);
        let from = if from > file.metadata()?.len() { 0 } else { from };
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        let next = *cut + from + bytes.len() as u64;
        Ok((bytes, next))
    }
}

/// Where nothing can be cut off the front: what is left of the file is copied too, and the file is emptied. How much it held.
fn empty(mut file: &File, path: &Path, copied: u64, kept: u32) -> io::Result<u64> {
    let mut more = 0;
    if kept > 0 {
        let mut aside = OpenOptions::new().create(true).append(true).open(previous(path, 1))?;
        file.seek(SeekFrom::Start(copied))?;
        more = io::copy(&mut file, &mut aside)?;
    }
    file.set_len(0)?;
    Ok(copied + more)
}

fn last_lines(bytes: &[u8], lines: usize) -> &[u8] {
    let ended = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let breaks = ended.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    match breaks.map(|(at, _)| at + 1).nth(lines.saturating_sub(1)) {
        Some(from) if lines > 0 => bytes.get(from..).unwrap_or_default(),
        _ if lines == 0 => &[],
        _ => bytes,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: Option<Vec<u8>>) -> String {
        String::from_utf8(bytes.unwrap()).unwrap()
    }

    #[test]
    fn a_life_begins_with_its_headline_wherever_the_last_one_broke_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let mut file = open(&path, "a", "vllm serve").unwrap();
        assert_eq!(life(&path), Vec::<String>::new());
        write!(file, "old\nbroken off").unwrap();
        let mut file = open(&path, "a", "vllm serve").unwrap();
        writeln!(file, "one\n\n two \nthree: # penstock starts nothing\nfour \u{1b}[0m").unwrap();
        assert_eq!(life(&path), ["one", "two", "three: # penstock starts nothing", "four [0m"]);
        assert_eq!(life(&dir.path().join("none.log")), Vec::<String>::new());

        let logs = Logs::default();
        assert_eq!(
            text(logs.last(&path, 2, false).unwrap().0),
            "three: # penstock starts nothing\nfour \u{1b}[0m\n"
        );
        assert_eq!(
            text(logs.last(&path, 900, true).unwrap().0),
            "# penstock starts a: vllm serve\nold\nbroken off\n"
        );
        assert_eq!(text(logs.last(&path, 1, true).unwrap().0), "broken off\n");
    }

    #[test]
    fn there_is_no_life_before_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        open(&path, "a", "vllm serve").unwrap();
        assert_eq!(Logs::default().last(&path, 9, true).unwrap().0, None);
    }

    #[test]
    fn a_small_log_stays_and_a_large_one_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (path, logs) = (dir.path().join("a.log"), Logs::default());
        let mut file = open(&path, "a", "x").unwrap();
        for round in 0..4 {
            writeln!(file, "{round} {}", "x".repeat(100)).unwrap();
            assert!(!logs.rotate(&path, 1_000, 2).unwrap());
            assert!(logs.rotate(&path, 50, 2).unwrap());
            writeln!(file, "after {round}").unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "after 3\n");
        let aside = |age| fs::read_to_string(previous(&path, age)).unwrap();
        assert!(aside(1).contains("3 xxx") && aside(2).contains("2 xxx"));
        assert!(!previous(&path, 3).exists(), "two are kept");
        assert!(text(logs.last(&path, 2, false).unwrap().0).starts_with("3 xxx"), "over both files");
    }

    /// Every line of a writer that never stops is found exactly once, whatever is put aside meanwhile.
    #[test]
    fn no_line_is_lost_or_doubled_while_an_engine_writes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (path, logs) = (dir.path().join("a.log"), Logs::default());
        let mut file = open(&path, "a", "x").unwrap();
        let probe = dir.path().join("probe");
        fs::write(&probe, vec![b'x'; 3 * 4_096]).unwrap();
        let probe = OpenOptions::new().write(true).open(probe).unwrap();
        if fallocate(&probe, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4_096).is_err() {
            println!("skipped: the file system of {} cannot cut a file's front", dir.path().display());
            return;
        }
        let count = 20_000;
        let writer = std::thread::spawn(move || (0..count).for_each(|n| writeln!(file, "line {n}").unwrap()));
        let (mut at, mut followed) = (0, Vec::new());
        while !writer.is_finished() {
            logs.rotate(&path, 20_000, 100).unwrap();
            let (mut bytes, next) = logs.read(&path, at, 1 << 20).unwrap();
            at = next;
            followed.append(&mut bytes);
        }
        writer.join().unwrap();
        let aside = (1..=100).rev().filter_map(|age| fs::read_to_string(previous(&path, age)).ok());
        let whole = aside.collect::<String>() + &fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = whole.lines().skip(1).collect();
        assert_eq!(lines.len(), count);
        assert!(lines.iter().enumerate().all(|(n, line)| *line == format!("line {n}")));
        assert!(previous(&path, 1).exists(), "something was put aside");
        assert!(!followed.is_empty());
    }

    #[test]
    fn last_lines_are_counted_from_the_end() {
        for (lines, expected) in [(0, ""), (1, "c"), (2, "b\nc"), (3, "a\nb\nc"), (9, "a\nb\nc")] {
            assert_eq!(last_lines(b"a\nb\nc", lines), expected.as_bytes(), "{lines}");
        }
        assert_eq!(last_lines(b"a\nb\n", 1), b"b\n");
        assert_eq!(last_lines(b"", 5), b"");
    }
}
