//! The whole proxy: a process under callgrind, with its engine and its clients outside of it.
//!
//! What one event or request more costs is what a window with twice as many costs more, divided by how many more they
//! were: starting, connecting and whatever else happens once is in both and drops out. Only the thread that serves requests
//! is counted: the others work by the clock, so they cost more the longer a window takes.
//!
//! A proxy under callgrind is some fifty times slower. So paced streams are paced slowly enough that each event is a read
//! of its own, and streams at full speed come as fast as the proxy can take them, with full buffers.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use super::{
    Options,
    pins::Counted,
    valgrind::{self, Dump},
};
use crate::{
    load,
    resume::Engine,
    updates::{Ads, Options as FleetOptions, Proxy},
};

/// From the client's last byte until the proxy is done with a request: its log line, its engine's connection.
const SETTLE: Duration = Duration::from_millis(300);
/// Between the tokens of a paced stream, in milliseconds. There is one stream: of several, events would come at one time or
/// not, for a whole run, as their first ones did, and share a turn of the runtime or not.
const TOKEN_MS: &str = "20";
/// The defaults, less what would happen by chance: one of several threads would take a connection, and probes come, and
/// endpoints count as slow, by the clock.
const SETTINGS: &[(&str, &str)] = &[
    ("PENSTOCK_PROXY__PUBLIC__THREADS", "1"),
    ("PENSTOCK_PROXY__HEALTH__PROBE_INTERVAL_MS", "0"),
    ("PENSTOCK_PROXY__HEALTH__LATENCY_FACTOR", "0"),
];

/// What one cell carries; twice in its second window.
struct Cell {
    name: &'static str,
    paced: bool,
    unary: bool,
    clients: u64,
    /// In the first window; in the second twice as many, where `more` says so.
    requests: u64,
    tokens: u64,
    prompt_bytes: usize,
    more: More,
    tolerance_percent: f64,
}

/// What there is twice as much of, and what it is that is counted.
enum More {
    Requests,
    Tokens,
}

const CELLS: &[Cell] = &[
    Cell {
        name: "process: unary request, 1 KB",
        paced: false,
        unary: true,
        clients: 1,
        requests: 300,
        tokens: 50,
        prompt_bytes: 1_000,
        more: More::Requests,
        tolerance_percent: 7.0,
    },
    Cell {
        name: "process: unary request, 64 KB",
        paced: false,
        unary: true,
        clients: 1,
        requests: 60,
        tokens: 50,
        prompt_bytes: 64 << 10,
        more: More::Requests,
        tolerance_percent: 7.0,
    },
    Cell {
        name: "process: unary request, 1 MB",
        paced: false,
        unary: true,
        clients: 1,
        requests: 15,
        tokens: 50,
        prompt_bytes: 1 << 20,
        more: More::Requests,
        tolerance_percent: 7.0,
    },
    Cell {
        name: "process: stream of 2 tokens",
        paced: false,
        unary: false,
        clients: 1,
        requests: 200,
        tokens: 2,
        prompt_bytes: 1_000,
        more: More::Requests,
        tolerance_percent: 5.0,
    },
    Cell {
        name: "process: unthrottled event",
        paced: false,
        unary: false,
        clients: 4,
        requests: 4,
        tokens: 5_000,
        prompt_bytes: 1_000,
        more: More::Tokens,
        tolerance_percent: 10.0,
    },
    Cell {
        name: "process: paced event",
        paced: true,
        unary: false,
        clients: 1,
        requests: 1,
        tokens: 300,
        prompt_bytes: 1_000,
        more: More::Tokens,
        tolerance_percent: 12.0,
    },
];

impl Cell {
    /// The work of the window that has this many times as much.
    fn window(&self, times: u64) -> (u64, u64) {
        match self.more {
            More::Requests => (self.requests * times, self.tokens),
            More::Tokens => (self.requests, self.tokens * times),
        }
    }

    /// How many more the second window has.
    const fn units(&self) -> u64 {
        match self.more {
            More::Requests => self.requests,
            More::Tokens => self.requests * self.tokens,
        }
    }
}

/// Counts each that is wanted.
pub(super) async fn count(options: &Options, folder: &Path) -> Result<Vec<Counted>, String> {
    let mut counted = Vec::new();
    for paced in [false, true] {
        let cells: Vec<&Cell> = CELLS.iter().filter(|c| c.paced == paced && options.wants(c.name)).collect();
        if cells.is_empty() {
            continue;
        }
        let mut tasks = JoinSet::new();
        let out = folder.join(if paced { "paced" } else { "fast" });
        let mut subject = Subject::start(options, paced, out, &mut tasks).await?;
        for cell in cells {
            let instructions = subject.count(cell, options).await?;
            let Cell { name, tolerance_percent, .. } = *cell;
            counted.push(Counted { name: name.into(), instructions, tolerance_percent });
        }
        subject.proxy.stop().await?;
    }
    Ok(counted)
}

/// A proxy whose instructions are counted, and its engine.
struct Subject {
    proxy: Proxy,
    /// Where its counts go.
    out: PathBuf,
    dumps: u32,
    /// The thread that serves requests.
    serving: u32,
    _engine: Engine,
    _ads: Ads,
}

impl Subject {
    async fn start(
        options: &Options,
        paced: bool,
        out: PathBuf,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, String> {
        let pace = if paced { format!("--sim-itl-ms={TOKEN_MS}") } else { "--sim-speed=0".to_owned() };
        let flags = [pace, "--sim-itl-growth-us=0".into(), "--sim-jitter-percent=0".into()];
        let fleet = FleetOptions { endpoints: 1, pools: 1, ..FleetOptions::of(options.proxy.clone()) };
        let engine = Engine::start(&options.engine_sim, &model(), &flags).await?;
        let ads = Ads::start(&fleet, &[engine.address], tasks).await?;
        let under = valgrind::runner(&out);
        let mut proxy = Proxy::start_under(&under, &options.proxy, ads.address, SETTINGS).await?;
        ads.ready().await?;
        proxy.wait_for_revision(1).await?;
        let mut subject = Self { proxy, out, dumps: 0, serving: 0, _engine: engine, _ads: ads };
        subject.warm_up().await?;
        Ok(subject)
    }

    /// What happens once, happens now; and the thread that serves is found.
    async fn warm_up(&mut self) -> Result<(), String> {
        for unary in [true, false] {
            self.dump().await?;
            load(self.proxy.public, &load_of(8, 64, 4, unary, 1_000)).await?;
        }
        // Nobody else has as much to do in so short a time.
        let dumps = self.dump().await?;
        self.serving = dumps.iter().max_by_key(|dump| dump.total).map_or(0, |dump| dump.thread);
        Ok(())
    }

    /// What was counted since the last time, thread by thread.
    async fn dump(&mut self) -> Result<Vec<Dump>, String> {
        sleep(SETTLE).await;
        self.dumps += 1;
        valgrind::dump(self.proxy.pid(), &self.out, self.dumps).await
    }

    /// What one window costs the thread that serves.
    async fn window(&mut self, cell: &Cell, times: u64) -> Result<Dump, String> {
        let (requests, tokens) = cell.window(times);
        let work = load_of(cell.clients, requests, tokens, cell.unary, cell.prompt_bytes);
        self.dump().await?;
        load(self.proxy.public, &work).await?;
        let dumps = self.dump().await?;
        let serving = dumps.into_iter().find(|dump| dump.thread == self.serving);
        serving.ok_or_else(|| "the thread that serves has ended".to_owned())
    }

    async fn count(&mut self, cell: &Cell, options: &Options) -> Result<u64, String> {
        // The cell's own buffers and tables come into being.
        self.window(cell, 1).await?;
        let once = [self.window(cell, 1).await?];
        let twice = [self.window(cell, 2).await?];
        options.keep(cell.name, &once, &twice, cell.units())?;
        let [[once], [twice]] = [once, twice];
        Ok(twice.total.saturating_sub(once.total) / cell.units().max(1))
    }
}

/// The one model.
fn model() -> String {
    FleetOptions::pool(0)
}

fn load_of(clients: u64, requests: u64, tokens: u64, unary: bool, prompt_bytes: usize) -> load::Options {
    load::Options {
        model: model(),
        streams: clients,
        requests,
        tokens,
        unary,
        prompt_bytes,
        connect_ramp_ms: 10 * clients,
        ..load::Options::default()
    }
}

/// Verified, as all load is.
async fn load(proxy: SocketAddr, work: &load::Options) -> Result<(), String> {
    let wanted = load::Options { url: format!("http://{proxy}"), ..work.clone() };
    let report = load::run(wanted).await.map_err(|e| e.to_string())?;
    if report.is_good() { Ok(()) } else { Err(format!("the load was not good\n{}", report.table())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_window_has_as_many_more_as_the_count_is_divided_by() {
        for cell in CELLS {
            let volume = |(requests, tokens): (u64, u64)| match cell.more {
                More::Requests => requests,
                More::Tokens => requests * tokens,
            };
            assert_eq!(volume(cell.window(2)) - volume(cell.window(1)), cell.units(), "{}", cell.name);
        }
    }
}
