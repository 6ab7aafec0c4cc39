//! What does it cost a proxy to be ready to continue its streams, if they never fail?
//!
//! Every window is a proxy of its own, a process that begins empty: one with `resume.enabled = false`, one with the
//! defaults, one that also takes the token ids out again (`resume.strip_token_ids`). They take turns, round by round, in
//! front of the same engines (simulators, processes too) and under the same load, every token of which is verified
//! ([`crate::load`]).
//!
//! Measured: the proxy's CPU time from the first request to the last byte, divided by the events that it relayed, at a
//! pace that many streams have in common and at full speed; and the most memory that it had while all paced streams were
//! open, less what it had before, divided by the streams.

mod engines;
mod options;
mod report;

use std::{
    ffi::OsString,
    io::Write,
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::{task::JoinSet, time::sleep};

pub(crate) use self::engines::Engine;
pub use self::options::Options;
use self::report::{Figures, Window};
use crate::{
    load,
    updates::{Ads, Options as FleetOptions, Proxy},
};

/// Engines of each kind.
const ENGINES: u32 = 2;
/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Events of a stream beside its tokens: the role, the usage, `[DONE]`.
const OTHER_EVENTS: u64 = 3;
/// Tokens of a whole answer.
const ANSWER_TOKENS: u64 = 100;

/// How a proxy is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Off,
    On,
    Stripped,
    /// Whole answers, asked for as they are.
    Whole,
    /// Whole answers, put together out of streams.
    Assembled,
}

impl Kind {
    /// Those that carry streams.
    const STREAMS: [Self; 3] = [Self::Off, Self::On, Self::Stripped];
    /// Those that carry whole answers.
    const ANSWERS: [Self; 2] = [Self::Whole, Self::Assembled];

    /// What it is called in the tables.
    const fn name(self) -> &'static str {
        match self {
            Self::Off => "resume off",
            Self::On => "resume on",
            Self::Stripped => "resume on, ids taken out",
            Self::Whole => "asked for as they are",
            Self::Assembled => "asked for as streams",
        }
    }

    const fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Off => &[("PENSTOCK_PROXY__RESUME__ENABLED", "false")],
            Self::On | Self::Whole => &[],
            Self::Assembled => &[("PENSTOCK_PROXY__RESUME__UNARY", "stream")],
            Self::Stripped => &[("PENSTOCK_PROXY__RESUME__STRIP_TOKEN_IDS", "true")],
        }
    }
}

/// What one window carries.
#[derive(Debug, Clone, Copy)]
struct Work {
    clients: u64,
    requests: u64,
    /// Of each answer.
    tokens: u64,
    unary: bool,
}

impl Work {
    fn streams(count: u32, tokens: u32) -> Self {
        let count = u64::from(count);
        Self { clients: count, requests: count, tokens: tokens.into(), unary: false }
    }

    fn answers(clients: u32, count: u32) -> Self {
        Self { clients: clients.into(), requests: count.into(), tokens: ANSWER_TOKENS, unary: true }
    }

    /// Events, or answers: what the CPU time is divided by.
    const fn units(self) -> u64 {
        if self.unary { self.requests } else { self.requests * (self.tokens + OTHER_EVENTS) }
    }
}

/// Runs the command line `argv`, program name first: 0 done, 1 something broke, 2 usage.
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
        Ok(figures) => (figures.text(&options), 0),
        Err(e) => (format!("penstock-bench-resume: {e}\n"), 1),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    ExitCode::from(if printed { code } else { 1 })
}

/// Lets windows of all kinds take turns, and gives the figures.
async fn run(options: &Options) -> Result<Figures, String> {
    let pause_ms = 1000.0 / options.events_per_s;
    let paced =
        engines(options, &[format!("--sim-itl-ms={pause_ms}"), "--sim-itl-growth-us=0".into()]).await?;
    let fast = engines(options, &["--sim-speed=0".into()]).await?;
    let mut figures = Figures::default();
    for round in 1..=options.rounds {
        for kind in Kind::STREAMS {
            let work = Work::streams(options.streams, options.tokens);
            let window = window(options, kind, &paced, work).await?;
            say(&format!("round {round}, {}, paced: {}", kind.name(), window.text()));
            figures.add(kind, true, window);
            let work = Work::streams(options.fast_streams, options.fast_tokens);
            let window = self::window(options, kind, &fast, work).await?;
            say(&format!("round {round}, {}, at full speed: {}", kind.name(), window.text()));
            figures.add(kind, false, window);
        }
        for kind in Kind::ANSWERS {
            let work = Work::answers(options.fast_streams, options.answers);
            let window = window(options, kind, &fast, work).await?;
            say(&format!("round {round}, whole answers, {}: {}", kind.name(), window.text()));
            figures.add(kind, false, window);
        }
    }
    Ok(figures)
}

async fn engines(options: &Options, flags: &[String]) -> Result<Vec<Engine>, String> {
    let mut all = Vec::new();
    for _ in 0..ENGINES {
        all.push(Engine::start(&options.engine_sim, &model(), flags).await?);
    }
    Ok(all)
}

/// The fleet as the proxy is told it.
fn fleet(options: &Options) -> FleetOptions {
    FleetOptions { endpoints: ENGINES, pools: 1, ..FleetOptions::of(options.proxy.clone()) }
}

/// The one model.
fn model() -> String {
    FleetOptions::pool(0)
}

/// One window: a proxy begins, carries that many streams to their ends, and ends.
async fn window(options: &Options, kind: Kind, engines: &[Engine], work: Work) -> Result<Window, String> {
    let mut tasks = JoinSet::new();
    let addresses: Vec<SocketAddr> = engines.iter().map(|engine| engine.address).collect();
    let ads = Ads::start(&fleet(options), &addresses, &mut tasks).await?;
    let mut proxy = Proxy::start(&options.proxy, ads.address, kind.settings()).await?;
    ads.ready().await?;
    proxy.wait_for_revision(1).await?;
    // What a first request brings along is not a stream's.
    load(proxy.public, Work { clients: 1, requests: 1, tokens: 2, ..work }, 0).await?;
    let (idle, cpu, began) = (proxy.memory()?, proxy.cpu()?, Instant::now());
    let mut most = idle;
    let loading = load(proxy.public, work, options.prompt_bytes);
    tokio::pin!(loading);
    loop {
        tokio::select! {
            done = &mut loading => {
                done?;
                break;
            }
            () = sleep(LOOK) => most = most.max(proxy.memory()?),
        }
    }
    let took = began.elapsed();
    let cpu = proxy.cpu()?.saturating_sub(cpu);
    proxy.stop().await?;
    Ok(Window {
        took,
        cpu,
        events: work.units(),
        streams: work.clients,
        memory_bytes: most.saturating_sub(idle),
    })
}

/// Verified streams or answers, one after the other on each connection.
async fn load(proxy: SocketAddr, work: Work, prompt_bytes: usize) -> Result<(), String> {
    let wanted = load::Options {
        url: format!("http://{proxy}"),
        model: model(),
        streams: work.clients,
        requests: work.requests,
        tokens: work.tokens,
        unary: work.unary,
        prompt_bytes,
        // A thousand a second.
        connect_ramp_ms: work.clients,
        ..load::Options::default()
    };
    let report = load::run(wanted).await.map_err(|e| e.to_string())?;
    if report.is_good() { Ok(()) } else { Err(format!("the load was not good\n{}", report.table())) }
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
