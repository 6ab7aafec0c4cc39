//! The load generator: many concurrent requests, every token of each verified.
//!
//! A client knows from its request what the engine must say ([`crate::engine::generation`]) and compares as the bytes come; a
//! stream counts as good only if every token was right, the finish reason and the usage are right, it was one stream from its
//! first event to its last, and ended as it should; so a stream that a gateway continued on another engine must look like any
//! other. Pacing is the engine's.
//!
//! **Closed loop**: so many streams, each of which asks again when it was answered. **Open loop**: requests, or sessions of
//! several turns, arrive when they arrive ([`arrivals`]), whatever the server does. One for which there is no place waits, and
//! its times count from when it should have been sent: a server that stalls cannot hide it by being asked less (coordinated
//! omission). The times from when it was sent stand beside them. What cannot even wait is counted.
//!
//! **Cheap**, as it shares its processors with what it measures: a thread of its own for all streams, one read and one
//! comparison with the one right text for an event ([`sse`], `pattern`, `http1`), counts without locks, no timer for an event.
//! The engine simulator's `--sim-stamp` tells when an event was written, by the clock that all processes share: the one-way
//! latency is the difference.
//!
//! [`run`] and [`run_with`] are the library; the command is [`main`]. `lane` is a thread, `client` asks, `connection` reads and
//! writes, `answer` checks, `stats` counts, `report`, `html` and `progress` tell. Pure: [`arrivals`], [`lengths`], [`trace`],
//! `prompts`, `http1`, `pattern`, [`sse`], [`shape`], [`verify`], `stats`.

mod answer;
pub mod arrivals;
mod client;
mod connection;
mod html;
mod http1;
mod lane;
pub mod lengths;
mod options;
mod pattern;
mod progress;
mod prompts;
mod report;
pub mod shape;
pub mod sse;
mod stats;
mod target;
mod tls;
pub mod trace;
pub mod verify;

use std::{
    ffi::OsString,
    io::Write,
    net::SocketAddr,
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clap::Parser;
use nix::sys::resource::{UsageWho, getrusage};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

pub use self::{
    answer::ERROR_EVENT,
    arrivals::Arrivals,
    options::Options,
    report::{Report, Window},
    stats::{Counts, Failed, Quantiles},
    target::{BadUrl, Target},
};
use self::{
    lane::Shared,
    prompts::Traffic,
    stats::{Span, Stats, ns},
    trace::{BadTrace, Trace},
};
use crate::{clock::now_ns, limits::raise_open_files};

/// Why a run cannot begin. All that goes wrong later is counted in the report.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// `--url`.
    #[error(transparent)]
    Url(#[from] BadUrl),
    /// The host of `--url` has no address.
    #[error("--url: {host}: {why}")]
    Host {
        /// Its name.
        host: String,
        /// What the resolver said.
        why: String,
    },
    /// `--trace` cannot be read.
    #[error("--trace {file}: {why}")]
    TraceFile {
        /// The file.
        file: String,
        /// Why not.
        why: std::io::Error,
    },
    /// `--trace` is wrong.
    #[error("--trace {file}: {why}")]
    Trace {
        /// The file.
        file: String,
        /// Where and why.
        why: BadTrace,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Options(String),
    /// A thread.
    #[error("{0}")]
    Thread(String),
}

/// A moment of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// What follows is measured.
    Began,
    /// Nothing that follows is.
    Ended,
}

/// All that the threads of a run have to know.
struct Plan {
    options: Options,
    target: Target,
    addresses: Vec<SocketAddr>,
    tls: Option<TlsConnector>,
    /// The values of `authorization`; at least one, which may be empty.
    keys: Vec<String>,
    /// The head of every request, up to the key.
    head: Vec<u8>,
    traffic: Traffic,
    start_ns: u64,
    /// Nothing is begun after it.
    deadline_ns: u64,
    span: Span,
}

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
    let (json, markdown, html) = (options.json, options.markdown, options.html.clone());
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            say(&format!("cannot start the runtime: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let report = match runtime.block_on(load(options, |_| (), progress::show)) {
        Ok(report) => report,
        Err(e) => {
            say(&e.to_string());
            return ExitCode::from(2);
        }
    };
    let text = match (json, markdown) {
        (true, _) => report.json() + "\n",
        (_, true) => report.markdown(),
        _ => report.table(),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    if let Some(path) = html
        && let Err(e) = std::fs::write(&path, html::page(&report))
    {
        say(&format!("--html {}: {e}", path.display()));
        return ExitCode::FAILURE;
    }
    if printed && report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the load and reports.
///
/// # Errors
/// [`LoadError`], if it cannot begin; everything that goes wrong later is counted in the report.
pub async fn run(options: Options) -> Result<Report, LoadError> {
    run_with(options, |_| ()).await
}

/// Runs the load and calls `at` when the measured part begins and ends, so that the caller can read what is used then.
///
/// # Errors
/// As [`run`].
pub async fn run_with(options: Options, at: impl FnMut(Mark)) -> Result<Report, LoadError> {
    load(options, at, |_, _| None).await
}

async fn load(
    options: Options,
    at: impl FnMut(Mark),
    show: impl FnOnce(&Options, &Arc<Shared>) -> Option<JoinSet<()>>,
) -> Result<Report, LoadError> {
    let plan = Arc::new(Plan::new(options).await?);
    raise_open_files();
    let shared = Arc::new(Shared::default());
    shared.tickets.store(plan.options.requests_to_make(), Ordering::Relaxed);
    let cpu_before = cpu_s();
    // Dropped with this future, it ends the threads.
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let mut threads = JoinSet::new();
    for thread in 0..plan.options.threads {
        let (plan, shared, stop) = (Arc::clone(&plan), Arc::clone(&shared), stop.clone());
        threads.spawn_blocking(move || lane::run(&plan, &shared, thread, &stop));
    }
    let _shown = show(&plan.options, &shared);
    let mut stats: Option<Stats> = None;
    marked(plan.span, at, async {
        while let Some(ended) = threads.join_next().await {
            let counted = ended.map_err(|_| LoadError::Thread("a thread panicked".into()))?;
            let counted = counted.map_err(LoadError::Thread)?;
            match &mut stats {
                None => stats = Some(counted),
                Some(stats) => stats.add(&counted),
            }
        }
        Ok::<(), LoadError>(())
    })
    .await?;
    let stats = stats.ok_or_else(|| LoadError::Thread("no thread ran".into()))?;
    Ok(Report::new(&plan, &stats, now_ns(), cpu_s() - cpu_before))
}

/// Waits for `work` and tells both ends of the measured part, each once.
async fn marked<T>(span: Span, mut at: impl FnMut(Mark), work: impl Future<Output = T>) -> T {
    let until = |at_ns: u64| tokio::time::sleep(Duration::from_nanos(at_ns.saturating_sub(now_ns())));
    let mut work = std::pin::pin!(work);
    for (mark, at_ns) in [(Mark::Began, span.from_ns), (Mark::Ended, span.to_ns)] {
        let ended = tokio::select! {
            ended = &mut work => Some(ended),
            () = until(at_ns) => None,
        };
        at(mark);
        if let Some(ended) = ended {
            if mark == Mark::Began {
                at(Mark::Ended);
            }
            return ended;
        }
    }
    work.await
}

impl Plan {
    async fn new(options: Options) -> Result<Self, LoadError> {
        if let Some(why) = options.contradiction() {
            return Err(LoadError::Options(why.into()));
        }
        let target = Target::parse(&options.url)?;
        let tls = if target.tls { Some(tls::connector(&options).map_err(LoadError::Options)?) } else { None };
        let failed = |why: String| LoadError::Host { host: target.authority.clone(), why };
        let found = tokio::net::lookup_host(&target.authority).await.map_err(|e| failed(e.to_string()))?;
        let addresses: Vec<SocketAddr> = found.collect();
        if addresses.is_empty() {
            return Err(failed("no address".into()));
        }
        let trace = match &options.trace {
            None => Trace::default(),
            Some(path) => {
                let file = path.display().to_string();
                let text = tokio::fs::read_to_string(path)
                    .await
                    .map_err(|why| LoadError::TraceFile { file: file.clone(), why })?;
                Trace::parse(&text).map_err(|why| LoadError::Trace { file, why })?
            }
        };
        let keys = keys(&options).await?;
        let head = format!(
            "POST {}/v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n",
            target.base, target.authority
        );
        let start_ns = now_ns();
        let after = |seconds: f64| start_ns.saturating_add(ns(Duration::from_secs_f64(seconds)));
        let deadline_ns = if options.duration_s > 0.0 { after(options.duration_s) } else { u64::MAX };
        Ok(Self {
            traffic: Traffic::new(&options, trace),
            span: Span { from_ns: after(options.warmup_s), to_ns: deadline_ns },
            head: head.into_bytes(),
            keys,
            target,
            addresses,
            tls,
            start_ns,
            deadline_ns,
            options,
        })
    }
}

/// What requests say in `authorization`, in turns; one that is empty if they say nothing.
async fn keys(options: &Options) -> Result<Vec<String>, LoadError> {
    let keys: Vec<String> = match &options.api_keys {
        None => options.api_key.iter().cloned().collect(),
        Some(path) => {
            let of = |why: &str| LoadError::Options(format!("--api-keys {}: {why}", path.display()));
            let text = tokio::fs::read_to_string(path).await.map_err(|e| of(&e.to_string()))?;
            let keys: Vec<String> = text.split_whitespace().map(String::from).collect();
            if keys.is_empty() { Err(of("it holds no key")) } else { Ok(keys) }?
        }
    };
    if keys.iter().any(|key| http::HeaderValue::from_str(key).is_err()) {
        return Err(LoadError::Options("an API key has characters that a header cannot have".into()));
    }
    let values: Vec<String> = keys.iter().map(|key| format!("Bearer {key}")).collect();
    Ok(if values.is_empty() { vec![String::new()] } else { values })
}

/// CPU time of this process so far, s.
fn cpu_s() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return 0.0 };
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
