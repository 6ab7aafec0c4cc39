//! What do updates of the tables cost the streams that a proxy carries, and how soon are they in use?
//!
//! One proxy, a process of its own, is fed by a scripted xDS server (`ads`) with a large fleet whose addresses lead to a
//! few engines in this process (`engine`). Some thousand paced streams go through it (`stream`); each event carries
//! the time at which it was written, so that its delay is known when it is read. Then windows without and with updates
//! take turns, and the two are compared: same process, same streams, same minute.
//!
//! Measured: delay of events in both kinds of window; for each update the time from its making to the proxy's ACK and to
//! its being in use (as `/readyz` tells); the proxy's CPU and memory. Engines and clients share this machine with the
//! proxy, so absolute delays include their own scheduling; the difference between the windows is what counts.

mod ads;
mod engine;
mod options;
mod proxy;
mod report;
mod stream;

use std::{
    ffi::OsString,
    io::Write,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::{task::JoinSet, time::sleep};

pub use self::options::Options;
pub(crate) use self::{ads::Ads, proxy::Proxy, stream::histogram};
use self::{
    report::{Figures, Window},
    stream::Delays,
};

/// Between two windows, so that what one has begun is not counted in the other.
const SETTLE: Duration = Duration::from_millis(500);

/// Streams that are opened at a time.
const OPENING: u32 = 100;

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
        Ok(figures) => (figures.text(&options), if figures.is_good() { 0 } else { 1 }),
        Err(e) => (format!("penstock-bench-updates: {e}\n"), 1),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    ExitCode::from(if printed { code } else { 1 })
}

/// Sets everything up, lets the windows take turns, and gives the figures.
async fn run(options: &Options) -> Result<Figures, String> {
    let epoch = Instant::now();
    let mut tasks = JoinSet::new();
    let engines = engine::start(options, epoch, &mut tasks).await?;
    let ads = Ads::start(options, &engines, &mut tasks).await?;
    let mut proxy = Proxy::start(&options.proxy, ads.address, &[]).await?;
    ads.ready().await?;
    proxy.wait_for_revision(1).await?;
    say(&format!("{} endpoints in {} pools are in use", options.endpoints, options.pools));

    let delays = Arc::new(Delays::new(epoch));
    let mut streams = JoinSet::new();
    for index in 0..options.streams {
        // No more at a time than a listener's backlog takes.
        begun(&delays, &mut streams, index.saturating_sub(OPENING)).await?;
        streams.spawn(stream::run(proxy.public, index, options.clone(), Arc::clone(&delays)));
    }
    begun(&delays, &mut streams, options.streams).await?;
    say(&format!("{} streams are open", options.streams));
    sleep(Duration::from_secs(3)).await;

    let mut figures = Figures::default();
    let watching = proxy.watch(ads.log());
    for _ in 0..options.rounds {
        for updates in [false, true] {
            delays.begin();
            let (cpu, began) = (proxy.cpu()?, Instant::now());
            let length = Duration::from_secs_f64(options.window_s);
            let made = if updates { ads.update_for(length).await? } else { quiet(length).await };
            let window = Window {
                took: began.elapsed(),
                cpu: proxy.cpu()?.saturating_sub(cpu),
                updates: made,
                delays: delays.take(),
            };
            figures.add(updates, &window);
            sleep(SETTLE).await;
        }
    }
    ads.settle().await?;
    proxy.wait_for_revision(ads.revision()).await?;
    watching.abort();
    figures.converged = ads.log().convergence();
    figures.memory_bytes = proxy.memory()?;
    while let Some(ended) = streams.try_join_next() {
        figures.broken.push(match ended {
            Ok(Err(why)) => why,
            Ok(Ok(())) => "a stream ended early".into(),
            Err(e) => e.to_string(),
        });
    }
    proxy.stop().await?;
    Ok(figures)
}

/// Waits until that many streams have had an event.
async fn begun(
    delays: &Delays,
    streams: &mut JoinSet<Result<(), String>>,
    wanted: u32,
) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while delays.open() < wanted {
        if let Some(ended) = streams.try_join_next() {
            return Err(format!("a stream ended before the measurement: {ended:?}"));
        }
        if Instant::now() > deadline {
            return Err(format!("only {} of {wanted} streams have begun within 60 s", delays.open()));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn quiet(length: Duration) -> u64 {
    sleep(length).await;
    0
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
