//! The load generator: many concurrent streams, every token of each verified.
//!
//! Closed loop: `streams` workers, each with one connection and one request at a time. A worker knows from its request
//! what the engine must say ([`crate::engine::generation`]) and compares as the bytes come; a stream counts as good only
//! if every token was right, the finish reason and the usage are right, it was one stream from its first event to its last,
//! and ended as it should; so a stream that a gateway continued on another engine must look like any other. Pacing is the
//! engine's. One thread: two thousand streams cost it less than they cost what they pass through.
//!
//! `client` talks, [`sse`], [`shape`] and [`verify`] are pure, `report` counts. Absent for now: open-loop arrivals, length
//! distributions, shared prefixes, turns.

mod client;
mod options;
mod report;
pub mod shape;
pub mod sse;
pub mod verify;

use std::{
    ffi::OsString,
    io::Write,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::task::JoinSet;

use self::{client::Worker, report::Stats};
pub use self::{
    options::{BadUrl, Options, Target},
    report::{ERROR_EVENT, Quantiles, Report},
};

/// Runs the command line `argv`, program name first: 0 all good, 1 something was wrong, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let json = options.json;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            say(&format!("cannot start the runtime: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let report = match runtime.block_on(run(options)) {
        Ok(report) => report,
        Err(e) => {
            say(&e.to_string());
            return ExitCode::from(2);
        }
    };
    let text = if json { report.json() + "\n" } else { report.table() };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    if printed && report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the load and reports.
///
/// # Errors
/// [`BadUrl`] if `--url` is not one; everything that goes wrong later is counted in the report.
pub async fn run(options: Options) -> Result<Report, BadUrl> {
    let target = Target::parse(&options.url)?;
    let options = Arc::new(options);
    let stats = Arc::new(Mutex::new(Stats::new()));
    let started = Instant::now();
    let deadline = (options.duration_s > 0.0).then(|| started + Duration::from_secs_f64(options.duration_s));
    let tickets = Arc::new(AtomicU64::new(options.requests_to_make()));
    let mut workers = JoinSet::new();
    for index in 0..options.streams {
        let delay = Duration::from_millis(options.connect_ramp_ms)
            / u32::try_from(options.streams).unwrap_or(u32::MAX)
            * u32::try_from(index).unwrap_or(u32::MAX);
        let (tickets, stats, options, target) =
            (tickets.clone(), stats.clone(), options.clone(), target.clone());
        workers.spawn(async move {
            tokio::time::sleep_until((started + delay).into()).await;
            let mut worker = Worker::new(target, options, index, stats);
            while deadline.is_none_or(|d| Instant::now() < d) && take(&tickets) {
                worker.request().await;
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        if ended.is_err() {
            stats.lock().unwrap_or_else(PoisonError::into_inner).fail("worker", "a worker panicked");
        }
    }
    let stats = stats.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Report::new(&options, &stats, started.elapsed()))
}

/// Takes one of the requests to make; false if none is left.
fn take(tickets: &AtomicU64) -> bool {
    tickets.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
