//! How many instructions do an event and a request cost the proxy, and did that change?
//!
//! Times differ from run to run and from machine to machine; instructions in user space hardly do. They are counted by
//! callgrind, for the pure parts of the hot path (`parts`: the proxy's bench "instructions") and for the proxy as a
//! process (`process`), and compared with those of the past (`pins`, a file in the repository). What differs by more
//! than its tolerance fails, also when it is less: a gain is pinned, so that it is not lost unseen.
//!
//! All counts are marginal: what it costs to do twice as many, less what it costs to do them once, divided by how many they
//! were. So nothing that happens once is in them, and nothing has to be switched on and off around what is counted.
//!
//! Absent on purpose: the kernel's share, which callgrind does not see; `make bench` measures it with the rest.

mod options;
mod parts;
mod pins;
mod process;
mod profile;
mod report;
mod valgrind;

use std::{ffi::OsString, io::Write, path::Path, process::ExitCode};

use clap::Parser;
use tempfile::TempDir;
use tokio::process::Command;

pub use self::options::Options;
use self::{
    pins::{Counted, Pins, Setting, complaint},
    report::{middles, table},
};

/// The least number of runs of which a pin is the middle.
const PINNED_RUNS: u32 = 3;
/// How often a count that is too far from its pin is made again before that is believed.
const MORE_RUNS: u32 = 2;

/// Runs the command line `argv`, program name first: 0 as before, 1 not as before or not counted, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let ran = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))
        .and_then(|runtime| runtime.block_on(run(&options)));
    let (text, code) = match ran {
        Ok((text, None)) => (text, 0),
        Ok((text, Some(wrong))) => (format!("{text}\n{wrong}\n"), 1),
        Err(e) => (format!("penstock-bench-instructions: {e}\n"), 1),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    ExitCode::from(if printed { code } else { 1 })
}

/// Counts, compares or pins; the table, and what is wrong.
async fn run(options: &Options) -> Result<(String, Option<String>), String> {
    let before = read(&options.pins, options.pin)?;
    let setting = setting().await?;
    let some = !options.only.is_empty();
    let was = before.unwrap_or(Pins { setting: setting.clone(), counts: Vec::new() });
    let mut runs = Vec::new();
    for _ in 0..if options.pin { options.runs.max(PINNED_RUNS) } else { options.runs } {
        runs.push(count(options).await?);
    }
    let (mut counted, mut spreads) = middles(&runs);
    if counted.is_empty() {
        return Err(format!("nothing is called {:?}", options.only));
    }
    let doubtful = was.doubtful(&counted);
    if !options.pin && !doubtful.is_empty() {
        let again = Options { only: doubtful, ..options.clone() };
        for _ in 0..MORE_RUNS {
            runs.push(count(&again).await?);
        }
        (counted, spreads) = middles(&runs);
    }
    let compared = was.compare(&counted, some);
    let text = table(&compared, &spreads);
    if options.pin {
        let pinned = was.with(setting, &counted, some).text()?;
        std::fs::write(&options.pins, pinned).map_err(|e| format!("{}: {e}", options.pins.display()))?;
        return Ok((format!("{text}\n{} is written\n", options.pins.display()), None));
    }
    let wrong = complaint(&compared, &was.setting, &setting);
    Ok((text, wrong))
}

/// Counts all that is wanted, once.
async fn count(options: &Options) -> Result<Vec<Counted>, String> {
    let folder = TempDir::new().map_err(|e| format!("cannot make a folder: {e}"))?;
    let mut counted = parts::count(options, folder.path()).await?;
    counted.extend(process::count(options, folder.path()).await?);
    Ok(counted)
}

/// What was pinned. To pin for the first time there need be nothing.
fn read(file: &Path, may_be_new: bool) -> Result<Option<Pins>, String> {
    match std::fs::read_to_string(file) {
        Ok(text) => Pins::parse(&text).map(Some).map_err(|e| format!("{}: {e}", file.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && may_be_new => Ok(None),
        Err(e) => Err(format!("{}: {e}; `--pin` makes it", file.display())),
    }
}

/// What else decides a count.
async fn setting() -> Result<Setting, String> {
    let rustc = Command::new("rustc").arg("--version").output().await;
    let rustc = rustc.map_err(|e| format!("rustc --version: {e}"))?.stdout;
    let rustc = String::from_utf8_lossy(&rustc);
    Ok(Setting {
        rustc: rustc.split(' ').nth(1).unwrap_or("unknown").to_owned(),
        valgrind: valgrind::version().await?,
        machine: machine(),
    })
}

#[cfg(target_arch = "x86_64")]
fn machine() -> String {
    let avx2 = if std::arch::is_x86_feature_detected!("avx2") { "with" } else { "without" };
    format!("x86_64 {avx2} AVX2")
}

#[cfg(not(target_arch = "x86_64"))]
fn machine() -> String {
    std::env::consts::ARCH.to_owned()
}
