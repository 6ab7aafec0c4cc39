//! The events of a simulation and their order.
//!
//! Each proxy knows what it sent itself and what reports told it, nothing else: no count is shared, as in a real fleet
//! where every proxy learns of the others only through the engines.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use penstock_config::proxy::Policy;

use super::{
    Scenario,
    engine::{Engine, Happened, Job},
    outcome::{Outcome, percentile, share},
    workload::{self, Session, scramble},
};
use crate::routing::{
    load::{self, History, Report},
    policy::{self, Asked, How, Memory, Rules, View},
};

/// How often the engines' loads are compared, in microseconds.
const SAMPLE_US: u64 = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A session's next turn.
    Turn(usize),
    /// The end of an engine's step.
    Stepped(usize),
    /// An engine's load is measured.
    Measure(usize),
    /// What was measured then reaches the proxies.
    Deliver { engine: usize, load: u32, measured_us: u64 },
    /// Loads are compared.
    Sample,
}

struct Proxy {
    local: Vec<u32>,
    history: Vec<History>,
    reports: Vec<Option<Report>>,
    memory: Memory,
}

struct Request {
    session: usize,
    proxy: usize,
    engine: usize,
    arrived_us: u64,
    next_after_us: Option<u64>,
    counted: bool,
}

struct Fleet<'a> {
    scenario: &'a Scenario,
    rules: Rules,
    now_us: u64,
    order: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    rng: fastrand::Rng,
    sessions: Vec<Option<Session>>,
    engines: Vec<Engine>,
    proxies: Vec<Proxy>,
    /// Under way, by number.
    requests: BTreeMap<usize, Request>,
    next_request: usize,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    ttft_ms: Vec<f64>,
    latency_ms: Vec<f64>,
    prompt_tokens: f64,
    cached_tokens: f64,
    herd: f64,
    samples: f64,
    picks: f64,
    spilled: f64,
}

/// Runs `scenario` under `policy`. Its figures depend on nothing but the two.
pub fn simulate(scenario: &Scenario, policy: Policy) -> Outcome {
    let arrivals = workload::arrivals(scenario);
    let proxy = || Proxy {
        local: vec![0; scenario.engines],
        history: vec![History::default(); scenario.engines],
        reports: vec![None; scenario.engines],
        memory: Memory::default(),
    };
    let mut fleet = Fleet {
        scenario,
        rules: Rules {
            policy,
            bound: scenario.bound,
            zone_spill: 0,
            prefix_entries: scenario.prefix_entries,
        },
        now_us: 0,
        order: 0,
        events: BinaryHeap::new(),
        rng: fastrand::Rng::with_seed(scramble(scenario.seed, 77)),
        sessions: arrivals.iter().map(|_| None).collect(),
        engines: (0..scenario.engines)
            .map(
                |engine| {
                    if engine < scenario.slow_engines { scenario.engine.slow() } else { scenario.engine }
                },
            )
            .map(Engine::new)
            .collect(),
        proxies: (0..scenario.proxies).map(|_| proxy()).collect(),
        requests: BTreeMap::new(),
        next_request: 0,
        counts: Counts::default(),
    };
    for (session, at) in arrivals.iter().enumerate() {
        fleet.at(*at, Event::Turn(session));
    }
    for engine in 0..scenario.engines {
        // Engines do not report in step.
        fleet.at(scramble(1, engine as u64) % fleet.report_us(), Event::Measure(engine));
    }
    fleet.at(SAMPLE_US, Event::Sample);
    fleet.run();
    fleet.outcome(policy)
}

impl Fleet<'_> {
    fn at(&mut self, time_us: u64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((time_us, self.order, event)));
    }

    fn report_us(&self) -> u64 {
        (self.scenario.staleness_ms * 1_000 / 2).max(1)
    }

    fn arrivals_end_us(&self) -> u64 {
        u64::from(self.scenario.seconds) * 1_000_000
    }

    fn run(&mut self) {
        let (end, give_up) = (self.arrivals_end_us(), self.arrivals_end_us() * 4);
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            self.now_us = now;
            if now > give_up || (now > end && self.requests.is_empty()) {
                return;
            }
            match event {
                Event::Turn(session) if now <= end => self.turn(session),
                Event::Turn(_) => {}
                Event::Stepped(engine) => self.stepped(engine),
                Event::Measure(engine) => {
                    let load = self.engines[engine].load();
                    let period = self.report_us();
                    self.at(now + period, Event::Deliver { engine, load, measured_us: now });
                    self.at(now + period, Event::Measure(engine));
                }
                Event::Deliver { engine, load, measured_us } => {
                    self.deliver(engine, load, measured_us / 1_000)
                }
                Event::Sample => {
                    if now <= end {
                        self.sample();
                        self.at(now + SAMPLE_US, Event::Sample);
                    }
                }
            }
        }
    }

    fn turn(&mut self, session: usize) {
        let talk = self.sessions[session].get_or_insert_with(|| Session::new(self.scenario, session as u64));
        let turn = talk.turn(self.scenario);
        let prompt = talk.blocks(turn.prompt_tokens);
        let whole = talk.blocks(turn.prompt_tokens.saturating_add(turn.output_tokens));
        let key = talk.key();
        let proxy = match self.scenario.sticky_clients {
            true => session % self.proxies.len(),
            false => self.rng.usize(0..self.proxies.len()),
        };
        let views: Vec<View> = (0..self.engines.len()).map(|engine| self.view(proxy, engine)).collect();
        let asked = Asked { session: Some(key), prefix: &prompt, adapter: None };
        let rng = &mut self.rng;
        let memory = &self.proxies[proxy].memory;
        let chosen = policy::choose(&self.rules, &views, &asked, memory, &mut |n| rng.usize(0..n));
        let Some((engine, how)) = chosen else { return };
        let counted = self.now_us >= self.arrivals_end_us() / 10;
        if counted {
            self.counts.picks += 1.0;
            self.counts.spilled += f64::from(u8::from(how == How::Spilled));
            self.counts.prompt_tokens += f64::from(turn.prompt_tokens);
        }
        let id = self.next_request;
        self.next_request += 1;
        let next_after_us = turn.next_after_us;
        let request = Request { session, proxy, engine, arrived_us: self.now_us, next_after_us, counted };
        self.requests.insert(id, request);
        self.under_way(proxy, engine, 1);
        let (prompt_tokens, output_tokens) = (turn.prompt_tokens, turn.output_tokens);
        self.engines[engine].submit(Job { id, prompt, prompt_tokens, output_tokens, whole });
        self.step(engine);
    }

    fn view(&self, proxy: usize, engine: usize) -> View {
        let (proxy, now_ms) = (&self.proxies[proxy], self.now_us / 1_000);
        let report = proxy.reports[engine].as_ref();
        let load = load::estimate(proxy.local[engine], report, now_ms, self.scenario.stale_bound_ms);
        View {
            key: scramble(self.scenario.seed, !(engine as u64)),
            load,
            own: proxy.local[engine],
            ..View::default()
        }
    }

    fn under_way(&mut self, proxy: usize, engine: usize, change: i32) {
        let spacing_ms = self.scenario.staleness_ms / 32;
        let now_ms = self.now_us / 1_000;
        let proxy = &mut self.proxies[proxy];
        proxy.local[engine] = proxy.local[engine].saturating_add_signed(change);
        proxy.history[engine].note(now_ms, proxy.local[engine], spacing_ms);
    }

    fn deliver(&mut self, engine: usize, load: u32, measured_ms: u64) {
        for proxy in &mut self.proxies {
            let own = proxy.history[engine].at(measured_ms);
            let report = Report { load, own, measured_ms };
            proxy.reports[engine] = Some(report.newer(proxy.reports[engine]));
        }
    }

    fn step(&mut self, engine: usize) {
        let mut happened = vec![];
        if let Some(lasts) = self.engines[engine].begin(&mut happened) {
            self.at(self.now_us + lasts, Event::Stepped(engine));
        }
        happened.into_iter().for_each(|what| self.note(what));
    }

    fn stepped(&mut self, engine: usize) {
        let mut happened = vec![];
        self.engines[engine].end(&mut happened);
        happened.into_iter().for_each(|what| self.note(what));
        self.step(engine);
    }

    fn note(&mut self, what: Happened) {
        let (Happened::Cached(id, _) | Happened::First(id) | Happened::Finished(id)) = what;
        let Some(request) = self.requests.get(&id) else { return };
        #[allow(clippy::cast_precision_loss, reason = "microseconds of a few hours")]
        let since_ms = (self.now_us - request.arrived_us) as f64 / 1_000.0;
        match what {
            Happened::Cached(_, tokens) if request.counted => self.counts.cached_tokens += f64::from(tokens),
            Happened::First(_) if request.counted => self.counts.ttft_ms.push(since_ms),
            Happened::Cached(..) | Happened::First(_) => {}
            Happened::Finished(_) => {
                if request.counted {
                    self.counts.latency_ms.push(since_ms);
                }
                let Some(request) = self.requests.remove(&id) else { return };
                self.under_way(request.proxy, request.engine, -1);
                match request.next_after_us {
                    Some(think) => self.at(self.now_us + think, Event::Turn(request.session)),
                    None => self.sessions[request.session] = None,
                }
            }
        }
    }

    fn sample(&mut self) {
        let loads = self.engines.iter().map(|engine| f64::from(engine.load()));
        #[allow(clippy::cast_precision_loss, reason = "a few thousand engines")]
        let mean = loads.clone().sum::<f64>() / self.engines.len() as f64;
        // Of nearly idle fleets the ratio says nothing.
        if mean >= 1.0 && self.now_us >= self.arrivals_end_us() / 10 {
            self.counts.herd += loads.fold(0.0, f64::max) / mean;
            self.counts.samples += 1.0;
        }
    }

    fn outcome(mut self, policy: Policy) -> Outcome {
        let counts = &mut self.counts;
        counts.ttft_ms.sort_by(f64::total_cmp);
        counts.latency_ms.sort_by(f64::total_cmp);
        Outcome {
            policy: policy.name(),
            requests: counts.latency_ms.len(),
            unfinished: self.requests.len(),
            ttft_p50_ms: percentile(&counts.ttft_ms, 50),
            ttft_p99_ms: percentile(&counts.ttft_ms, 99),
            latency_p50_ms: percentile(&counts.latency_ms, 50),
            latency_p99_ms: percentile(&counts.latency_ms, 99),
            herd: share(counts.herd, counts.samples),
            cache_hits: share(counts.cached_tokens, counts.prompt_tokens),
            spilled: share(counts.spilled, counts.picks),
        }
    }
}
