//! Callgrind, as it is called and as it answers.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// What goes in front of a program so that its instructions are counted into `out`. `--vgdb-poll` lets a process that
/// sleeps most of the time hear a [`dump`] soon, with no need to trace it; it adds nothing to the count.
pub(super) fn runner(out: &Path) -> Vec<OsString> {
    let mut to = OsString::from("--callgrind-out-file=");
    to.push(out);
    ["valgrind", "--tool=callgrind", "--quiet", "--separate-threads=yes", "--vgdb-poll=200"]
        .into_iter()
        .map(OsString::from)
        .chain([to])
        .collect()
}

/// Runs a program to its end and has its instructions counted into `out`.
pub(super) async fn run(program: &Path, args: &[&str], out: &Path) -> Result<Vec<Dump>, String> {
    let under = runner(out);
    let (valgrind, flags) = under.split_first().ok_or("no runner")?;
    let mut command = Command::new(valgrind);
    command.args(flags).arg(program).args(args).stdout(Stdio::null());
    call(command).await.map_err(|e| format!("{} {}: {e}", program.display(), args.join(" ")))?;
    dumps(out)
}

/// Has the process `pid` write what it has counted since the last time. The files are the `number`th beside `out`.
pub(super) async fn dump(pid: u32, out: &Path, number: u32) -> Result<Vec<Dump>, String> {
    let mut command = Command::new("vgdb");
    // 0: wait until it looks, do not trace it, which containers do not allow.
    command.arg(format!("--pid={pid}")).args(["--max-invoke-ms=0", "dump"]).stdout(Stdio::null());
    call(command).await.map_err(|e| format!("vgdb: {e}"))?;
    let mut file = out.as_os_str().to_owned();
    file.push(format!(".{number}"));
    dumps(Path::new(&file))
}

/// A file for each thread, in their order: `FILE-01`, `FILE-02`.
fn dumps(file: &Path) -> Result<Vec<Dump>, String> {
    let cannot = |e: std::io::Error| format!("{}: {e}", file.display());
    let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(format!("{}: not a file's path", file.display()));
    };
    let name = name.to_string_lossy().into_owned();
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if let Some(thread) = thread_of(&name, &path) {
            threads.push((thread, path));
        }
    }
    threads.sort_unstable();
    let dumps: Vec<Dump> =
        threads.into_iter().map(|(thread, path)| Dump::read(thread, path)).collect::<Result<_, _>>()?;
    if dumps.is_empty() {
        Err(format!("{}: callgrind has written nothing", file.display()))
    } else {
        Ok(dumps)
    }
}

/// The thread that a file of callgrind's is of.
fn thread_of(name: &str, path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix(name)?.strip_prefix('-')?.parse().ok()
}

/// What valgrind calls itself.
pub(super) async fn version() -> Result<String, String> {
    let mut command = Command::new("valgrind");
    command.arg("--version");
    let said = call(command).await.map_err(|e| format!("valgrind --version: {e}"))?;
    Ok(said.trim().trim_start_matches("valgrind-").to_owned())
}

async fn call(mut command: Command) -> Result<String, String> {
    let running = command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).output();
    let done = timeout(PATIENCE, running).await.map_err(|_| format!("not done after {PATIENCE:?}"))?;
    let done = done.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "valgrind is not installed: apt-get install valgrind".to_owned(),
        _ => e.to_string(),
    })?;
    if !done.status.success() {
        return Err(format!("{}\n{}", done.status, String::from_utf8_lossy(&done.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// What callgrind has counted of one thread.
pub(super) struct Dump {
    /// In the order of their beginnings, from 1.
    pub(super) thread: u32,
    /// Instructions.
    pub(super) total: u64,
    file: PathBuf,
}

impl Dump {
    fn read(thread: u32, file: PathBuf) -> Result<Self, String> {
        let text = text(&file)?;
        let total = total_of(&text).ok_or_else(|| format!("{}: no total", file.display()))?;
        Ok(Self { thread, total, file })
    }

    /// Function by function.
    pub(super) fn text(&self) -> Result<String, String> {
        text(&self.file)
    }
}

fn text(file: &Path) -> Result<String, String> {
    let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The sum over all functions, which a dump ends with.
fn total_of(dump: &str) -> Option<u64> {
    dump.lines().rev().find_map(|line| line.strip_prefix("totals: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_ends_with_its_total() {
        let dump =
            "# callgrind format\nversion: 1\nevents: Ir\nsummary: 5\n\nfn=(1) main\n0 17\n\ntotals: 17\n";
        assert_eq!(total_of(dump), Some(17));
        for broken in ["", "totals: ", "totals: x", "summary: 5"] {
            assert_eq!(total_of(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_file_is_of_the_thread_that_its_name_ends_in() {
        let of = |file: &str| thread_of("fast.3", Path::new(file));
        assert_eq!((of("/x/fast.3-01"), of("/x/fast.3-12")), (Some(1), Some(12)));
        for other in ["/x/fast.3", "/x/fast.31-01", "/x/fast.3-", "/x/fast.3-0x", "/x/paced.3-01", "/"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_program_follows_where_its_count_goes() {
        let under = runner(Path::new("/x/out"));
        assert_eq!(under.first().and_then(|word| word.to_str()), Some("valgrind"));
        assert_eq!(under.last().and_then(|word| word.to_str()), Some("--callgrind-out-file=/x/out"));
    }
}
