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
    ["valgrind", "--tool=callgrind", "--quiet", "--vgdb-poll=200"]
        .into_iter()
        .map(OsString::from)
        .chain([to])
        .collect()
}

/// Runs a program to its end and has its instructions counted into `out`.
pub(super) async fn run(program: &Path, args: &[&str], out: &Path) -> Result<Dump, String> {
    let under = runner(out);
    let (valgrind, flags) = under.split_first().ok_or("no runner")?;
    let mut command = Command::new(valgrind);
    command.args(flags).arg(program).args(args).stdout(Stdio::null());
    call(command).await.map_err(|e| format!("{} {}: {e}", program.display(), args.join(" ")))?;
    Dump::read(out.to_owned())
}

/// Has the process `pid` write what it has counted since the last time. The file is the `number`th beside `out`.
pub(super) async fn dump(pid: u32, out: &Path, number: u32) -> Result<Dump, String> {
    let mut command = Command::new("vgdb");
    // 0: wait until it looks, do not trace it, which containers do not allow.
    command.arg(format!("--pid={pid}")).args(["--max-invoke-ms=0", "dump"]).stdout(Stdio::null());
    call(command).await.map_err(|e| format!("vgdb: {e}"))?;
    let mut file = out.as_os_str().to_owned();
    file.push(format!(".{number}"));
    Dump::read(file.into())
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

/// What callgrind has counted.
pub(super) struct Dump {
    /// Instructions.
    pub(super) total: u64,
    file: PathBuf,
}

impl Dump {
    fn read(file: PathBuf) -> Result<Self, String> {
        let text = text(&file)?;
        let total = total_of(&text).ok_or_else(|| format!("{}: no total", file.display()))?;
        Ok(Self { total, file })
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
    fn the_program_follows_where_its_count_goes() {
        let under = runner(Path::new("/x/out"));
        assert_eq!(under.first().and_then(|word| word.to_str()), Some("valgrind"));
        assert_eq!(under.last().and_then(|word| word.to_str()), Some("--callgrind-out-file=/x/out"));
    }
}
