//! One turn: a peer begins, carries a load, is measured, and ends.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{task::JoinSet, time::sleep};

use super::{
    cell::{Cell, Pace, Scale, Shape, Unit},
    configs::{API_KEY, Setting},
    loading::{self, Target},
    peer::Peer,
    plan::{Programs, plan},
    process::{Running, free_port},
    results::Sample,
    tls,
    tree::{Tree, Used},
};
use crate::{
    ask, load,
    resume::Engine,
    updates::{Ads, Options as FleetOptions},
};

/// How long a peer may take until the first request succeeds. Python's take long on a busy machine.
const READY: Duration = Duration::from_secs(240);

/// Beyond what a load should take, before it is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at the memory.
const LOOK: Duration = Duration::from_millis(500);

/// Between two scrapes of the metrics of Penstock with all on.
const SCRAPE: Duration = Duration::from_secs(1);

/// What all turns have in common.
pub(super) struct Stage<'a> {
    pub(super) programs: &'a Programs,
    pub(super) threads: u16,
    pub(super) open_files: u64,
    pub(super) scale: Scale,
}

/// The engines of a cell, at one pace.
pub(super) struct Engines {
    all: Vec<Engine>,
}

impl Engines {
    /// Starts so many, at the pace of `shape`.
    pub(super) async fn start(programs: &Programs, count: u16, shape: &Shape) -> Result<Self, String> {
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(Engine::start(&programs.engine_sim, &model(), &shape.engine_flags()).await?);
        }
        Ok(Self { all })
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.all.iter().map(|engine| engine.address).collect()
    }

    /// Tokens that they have given out since they began.
    async fn tokens(&self) -> Result<u64, String> {
        let mut sum = 0;
        for engine in &self.all {
            let state = ask::json(engine.address, "/sim/state").await?;
            let tokens = state["generated_tokens"].as_u64();
            sum += tokens.ok_or_else(|| format!("an engine does not tell its tokens: {state}"))?;
        }
        Ok(sum)
    }
}

/// The one model.
fn model() -> String {
    FleetOptions::pool(0)
}

/// A peer that serves.
struct Serving {
    running: Option<Running>,
    target: Target,
    /// Of Penstock: the xDS server that tells it of the engines, and whoever scrapes it.
    _tasks: JoinSet<()>,
    _folder: TempDir,
}

impl Stage<'_> {
    /// The load that a turn of `peer` carries.
    pub(super) fn shape(&self, cell: Cell, peer: Peer) -> Shape {
        cell.shape(peer, self.scale)
    }

    /// Measures `peer` in `cell`.
    ///
    /// # Errors
    /// Why there is nothing to show: it is not there, does not start, or does not end what it began.
    pub(super) async fn turn(&self, cell: Cell, peer: Peer, engines: &Engines) -> Result<Sample, String> {
        let shape = self.shape(cell, peer);
        let mut serving = self.serve(peer, engines, &shape).await?;
        serving.warm_up(&shape).await?;
        let measured = measure(cell.unit(), &shape, engines, &mut serving).await;
        if let Some(running) = serving.running.take() {
            running.stop().await;
        }
        measured
    }

    /// Starts `peer` in front of the engines.
    async fn serve(&self, peer: Peer, engines: &Engines, shape: &Shape) -> Result<Serving, String> {
        let addresses = engines.addresses();
        let folder = tempfile::tempdir().map_err(|e| format!("cannot make a folder: {e}"))?;
        let mut tasks = JoinSet::new();
        let target = |urls| Target { urls, model: model(), api_key: None };
        if peer == Peer::Direct {
            let urls = addresses.iter().map(|engine| format!("http://{engine}")).collect();
            return Ok(Serving { running: None, target: target(urls), _tasks: tasks, _folder: folder });
        }
        let program = self.programs.find(peer)?;
        if shape.tls_h2.is_some() {
            tls::write(folder.path())?;
        }
        let fleet = FleetOptions {
            endpoints: u32::try_from(addresses.len()).unwrap_or(1),
            pools: 1,
            ..FleetOptions::of(self.programs.proxy.clone())
        };
        let ads = Ads::start(&fleet, &addresses, &mut tasks).await?;
        let setting = Setting {
            folder: folder.path(),
            port: free_port()?,
            spare_port: free_port()?,
            engines: &addresses,
            model: &model(),
            threads: self.threads,
            open_files: self.open_files,
            tls: shape.tls_h2.is_some(),
        };
        let running = Running::start(&plan(peer, program, &setting, ads.address), folder.path())?;
        if peer.is_penstock() {
            ads.ready().await.map_err(|e| format!("{e}; its last words: {}", running.last_words()))?;
        }
        if peer == Peer::PenstockOn {
            tasks.spawn(scrape(SocketAddr::from(([127, 0, 0, 1], setting.spare_port))));
        }
        let scheme = if setting.tls { "https" } else { "http" };
        let mut target = target(vec![format!("{scheme}://127.0.0.1:{}", setting.port)]);
        target.api_key = (peer == Peer::PenstockOn).then(|| API_KEY.to_owned());
        Ok(Serving { running: Some(running), target, _tasks: tasks, _folder: folder })
    }
}

/// Reads Penstock's metrics until aborted, as a Prometheus would.
async fn scrape(private: SocketAddr) {
    loop {
        // Not there yet, or not any more.
        ask::get(private, "/metrics").await.map(drop).unwrap_or_default();
        sleep(SCRAPE).await;
    }
}

impl Serving {
    /// Waits until a verified request succeeds, and makes some more: what a first request brings along is not measured.
    async fn warm_up(&mut self, shape: &Shape) -> Result<(), String> {
        let deadline = Instant::now() + READY;
        let first = Shape { streams: 1, tokens: 2, unary: true, duration_s: None, ramp_s: 0.0, ..*shape };
        let first = Shape { prompt_bytes: 0, ..first };
        loop {
            let why = match run(&first, &self.target).await {
                Ok(()) => break,
                Err(why) => why,
            };
            if let Some(ended) = self.running.as_mut().and_then(Running::ended) {
                return Err(ended);
            }
            if Instant::now() > deadline {
                let last = self.running.as_ref().map(Running::last_words).unwrap_or_default();
                return Err(format!(
                    "it does not serve within {} s: {why}; its last words: {last}",
                    READY.as_secs()
                ));
            }
            sleep(Duration::from_millis(100)).await;
        }
        if matches!(shape.pace, Pace::Pause(_)) {
            // Engines that pause for seconds would for these, too.
            return Ok(());
        }
        // What fails here fails in the measurement too, and is counted there.
        run(&Shape { streams: 8, tokens: 8, ..first }, &self.target).await.or(Ok(()))
    }

    fn tree(&self) -> Option<Tree> {
        self.running.as_ref().map(|running| running.tree)
    }
}

/// A small load; an error if not all of it was right.
async fn run(shape: &Shape, target: &Target) -> Result<(), String> {
    for options in loading::options(shape, target) {
        let options = load::Options { idle_timeout_s: 10.0, ..options };
        let report = load::run(options).await.map_err(|e| e.to_string())?;
        if !report.is_good() {
            let first = report.failures.iter().next();
            return Err(
                first.map_or_else(String::new, |(kind, failure)| format!("{kind}: {}", failure.example))
            );
        }
    }
    Ok(())
}

/// CPU time and tokens so far.
struct Mark {
    at: Instant,
    cpu: Used,
    tokens: u64,
}

impl Mark {
    async fn now(tree: Option<Tree>, engines: &Engines) -> Result<Self, String> {
        let tokens = engines.tokens().await?;
        let cpu = tree.map_or(Ok(Used::default()), Tree::cpu)?;
        Ok(Self { at: Instant::now(), cpu, tokens })
    }
}

async fn measure(
    unit: Unit,
    shape: &Shape,
    engines: &Engines,
    serving: &mut Serving,
) -> Result<Sample, String> {
    let tree = serving.tree();
    let memory = || tree.map_or(Ok(0), Tree::memory);
    let memory_before = memory()?;
    let mut memory_peak = memory_before;
    let began = Instant::now();
    let mut loading = loading::start(shape, &serving.target);
    let from = Duration::from_secs_f64(shape.window_s.0);
    let length = Duration::from_secs_f64(shape.window_s.1);
    let (mut first, mut last) = (None::<Mark>, None::<Mark>);
    while last.is_none() {
        // From the first mark on, however late that is on a busy machine.
        let wanted = first.as_ref().map_or(from, |first| first.at.saturating_duration_since(began) + length);
        let left = wanted.saturating_sub(began.elapsed());
        if loading.ends_within(left.min(LOOK)).await? {
            break;
        }
        if began.elapsed() >= wanted {
            let mark = Mark::now(tree, engines).await?;
            if first.is_none() { first = Some(mark) } else { last = Some(mark) }
        }
        // Behind the marks: looking takes the peer no CPU time, but it takes some.
        memory_peak = memory_peak.max(memory()?);
    }
    let expected = Duration::from_secs_f64(shape.expected_s()).saturating_sub(began.elapsed());
    let ended = loading.end(expected + PATIENCE).await;
    if let Some(why) = serving.running.as_mut().and_then(Running::ended) {
        return Err(why);
    }
    let mut sample = Sample { memory_before, memory_peak, ..Sample::default() };
    loading::note(&mut sample, unit, &ended?);
    let failure = || {
        let (kind, (_, example)) = sample.failures.iter().next()?;
        Some(format!("{kind}: {example}"))
    };
    let early = || {
        format!("the load ended before the window did: {}", failure().unwrap_or_else(|| "in order".into()))
    };
    let (first, last) = first.zip(last).ok_or_else(early)?;
    let tokens = last.tokens.saturating_sub(first.tokens) as f64;
    sample.seconds = (last.at - first.at).as_secs_f64();
    sample.cpu_s = last.cpu.since(first.cpu).as_secs_f64();
    sample.units = match unit {
        Unit::Event => tokens,
        Unit::Request => tokens / f64::from(shape.tokens),
        Unit::Stream => f64::from(shape.streams),
    };
    Ok(sample)
}
