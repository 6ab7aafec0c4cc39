//! The task that looks after all endpoints: ten times a second it starts the probes and examinations that are due, and twice
//! a second it compares each pool's members. A check is a task of its own with a deadline, so that no endpoint's silence
//! delays another's check.
//!
//! Nothing is kept here of an endpoint: when it was last probed is among its [`Vitals`](super::Vitals), which go when the
//! tables drop it, so checks follow the tables by themselves. At most [`MOST_CHECKS`] run at a time; those that are due longest go
//! first. A look at ten thousand endpoints is ten thousand times a few atomic loads.
//!
//! # When a probe is due
//!
//! - Not while traffic proves the endpoint alive, and its last probe did not fail.
//! - For an idle one every `probe_interval`, a tenth less or more, so that proxies and endpoints do not fall into step.
//! - Five times as often while requests wait at an endpoint that has been silent for half a second, and while one is out because
//!   it could not be reached.
//! - A tenth of a second after a failure, until it is ejected or a success clears it.
//! - A quarter of a second after one that has no connection yet, beside it, up to `MOST_PROBES`. A kernel accepts connections
//!   however busy its process is, so this is the way to tell packets that vanish from an engine that is slow: with the default
//!   settings an endpoint that drops all packets is out a second and a half after the first question. One that has accepted
//!   the connection is given the time for its answer, one probe after the other. Not while this process itself is late.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use tokio::{
    task::JoinSet,
    time::{Duration, Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    peers::{self, Standing},
    probe::{Probed, Prober},
    progress::{self, Patience, Signs, Verdict},
    report,
    state::{Cure, Event, Machine, Phase},
};
use crate::{
    endpoints::{Endpoint, Pool, Snapshot},
    gateway::Gateway,
};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// Time between two looks from which on it is this process that is slow: its own connections take long then, and more of them
/// would make it worse.
const LATE: Duration = Duration::from_millis(300);

/// Looks for each that compares, and closes connections that nobody uses.
const COMPARE_EVERY: u64 = 5;

/// Time between the probes of an endpoint that has just failed, in milliseconds.
const RETRY_MS: u64 = 100;

/// Silence with requests under way after which an endpoint is probed, in milliseconds.
const SILENT_MS: u64 = 500;

/// Time for a connection after which another is tried beside it, in milliseconds.
const STAGGER_MS: u64 = 250;

/// Probes of one endpoint at a time.
const MOST_PROBES: u32 = 3;

/// Probes and examinations under way at one time.
pub const MOST_CHECKS: usize = 256;

/// Watches until told to stop; every check it has begun ends with it.
pub async fn run(gateway: Arc<Gateway>, stop: CancellationToken) {
    let watch = Arc::new(Watch::new(gateway));
    let mut checks = JoinSet::new();
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = 0u64;
    let mut last = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_ended) = checks.join_next() => {}
            _ = looks.tick() => {
                let snapshot = Arc::clone(&watch.gateway.table.load());
                if looked.is_multiple_of(COMPARE_EVERY) {
                    let now_ms = watch.gateway.now_ms();
                    snapshot.pools.values().for_each(|pool| watch.compare(pool, now_ms));
                    watch.gateway.sweep_connections();
                }
                let late = last.elapsed() >= LATE;
                last = Instant::now();
                check(&watch, &snapshot, late, &mut checks);
                looked += 1;
            }
        }
    }
    checks.shutdown().await;
}

struct Watch {
    gateway: Arc<Gateway>,
    prober: Prober,
    compare: peers::Rules,
    enough: u32,
    patience: Patience,
    interval_ms: u64,
}

/// A check that is due, of an endpoint whose pool is served under this name.
struct Due {
    since_ms: u64,
    endpoint: Arc<Endpoint>,
    kind: Kind,
}

enum Kind {
    Probe,
    /// With the name by which the engine knows its model.
    Examine(Arc<str>),
}

impl Watch {
    fn new(gateway: Arc<Gateway>) -> Self {
        let config = &gateway.config().health;
        Self {
            prober: Prober::new(config, &gateway.config().upstream),
            compare: peers::Rules {
                floor_rate: f64::from(config.success_rate_percent) / 100.0,
                stdev_factor: f64::from(config.success_rate_stdev_percent) / 100.0,
                latency_factor: config.latency_factor.into(),
                latency_floor_ms: config.latency_floor_ms,
            },
            enough: config.success_rate_requests,
            patience: Patience { flowing_ms: config.hang_ms, waiting_ms: config.hang_waiting_ms },
            interval_ms: config.probe_interval_ms,
            gateway,
        }
    }

    fn tell(&self, endpoint: &Endpoint, event: Event, detail: &str) {
        let change = endpoint.vitals().on(event, self.gateway.now_ms(), self.gateway.health_rules());
        report(&self.gateway.metrics, endpoint, change, detail);
    }

    fn compare(&self, pool: &Pool, now_ms: u64) {
        let admitted = |endpoint: &&Arc<Endpoint>| {
            !endpoint.draining && matches!(endpoint.vitals().phase(now_ms), Phase::Admitted | Phase::Suspect)
        };
        let members: Vec<&Arc<Endpoint>> = pool.endpoints.iter().filter(admitted).collect();
        let standings: Vec<Standing> = members
            .iter()
            .map(|endpoint| Standing {
                tally: endpoint.vitals().window.recent(now_ms, self.enough),
                first_tokens: endpoint.vitals().first_tokens.recent(now_ms).collect(),
                inflight: endpoint.inflight(),
            })
            .collect();
        for (at, reason) in peers::outliers(&standings, &self.compare) {
            let (Some(endpoint), Some(standing)) = (members.get(at), standings.get(at)) else { continue };
            let took: Vec<u64> = standing.first_tokens.iter().map(|sample| sample.took_ms).collect();
            let detail = format!("unlike its pool: {:?}, first tokens after {took:?} ms", standing.tally);
            self.tell(endpoint, Event::Outlier(reason), &detail);
        }
    }

    fn due(
        &self,
        endpoint: &Arc<Endpoint>,
        served_model: Option<&Arc<str>>,
        late: bool,
        now_ms: u64,
    ) -> Option<Due> {
        let (signs, machine) = (endpoint.signs(now_ms), endpoint.vitals().machine());
        let checks = &endpoint.vitals().checks;
        let due = |since_ms, kind| Some(Due { since_ms, endpoint: Arc::clone(endpoint), kind });
        if let Some(served_model) = served_model
            && !checks.examining.load(Relaxed)
            && examination_is_due(&signs, &machine, &self.patience, now_ms, checks.examined_ms.load(Relaxed))
        {
            return due(0, Kind::Examine(Arc::clone(served_model)));
        }
        if self.interval_ms == 0 {
            return None;
        }
        let under_way = UnderWay {
            probes: checks.probing.load(Relaxed),
            connecting: checks.connecting.load(Relaxed),
            began_ms: checks.began_ms.load(Relaxed),
        };
        if under_way.probes > 0 {
            let again = !late && under_way.asks_for_another(&machine, now_ms);
            return again.then(|| due(now_ms, Kind::Probe))?;
        }
        if checks.probe_ms.load(Relaxed) == 0 {
            // Seen for the first time: somewhere in the interval, not all at once.
            checks.probe_ms.store(now_ms + 1 + fastrand::u64(0..=self.interval_ms), Relaxed);
        }
        let times = ProbeTimes {
            regular_ms: checks.probe_ms.load(Relaxed),
            last_ms: checks.probed_ms.load(Relaxed),
            progress_ms: endpoint.vitals().progress_ms(),
            interval_ms: self.interval_ms,
        };
        let since_ms = probe_due(&times, &signs, &machine, now_ms);
        (since_ms <= now_ms).then(|| due(since_ms, Kind::Probe))?
    }

    async fn probe(&self, busy: &mut Busy) {
        let endpoint = Arc::clone(&busy.endpoint);
        let endpoint = &*endpoint;
        let probed = self.prober.health(endpoint, || busy.connected()).await;
        self.gateway.metrics.probes.with_label_values(&[probed.label()]).inc();
        let (event, detail) = match probed {
            Probed::Passed => (Event::ProbePassed, ""),
            Probed::Failed => (Event::ProbeFailed, "probe failed"),
            Probed::TimedOut => (Event::ProbeFailed, "probe not answered in time"),
        };
        self.tell(endpoint, event, detail);
        let (now_ms, checks) = (self.gateway.now_ms(), &endpoint.vitals().checks);
        checks.probed_ms.store(now_ms, Relaxed);
        let tenth = self.interval_ms / 10;
        checks.probe_ms.store(now_ms + self.interval_ms - tenth + fastrand::u64(0..=2 * tenth), Relaxed);
    }

    async fn examine(&self, endpoint: &Endpoint, served_model: &str) {
        let before_ms = endpoint.vitals().progress_ms();
        let before = self.prober.counters(endpoint).await;
        let canary = self.prober.token(endpoint, served_model).await;
        let after = match before {
            Some(_) => self.prober.counters(endpoint).await,
            None => None,
        };
        let verdict = match endpoint.vitals().progress_ms() {
            // While it was asked it has spoken to a client.
            now_ms if now_ms != before_ms => Verdict::Alive,
            _ => progress::verdict(canary, before.as_ref(), after.as_ref()),
        };
        self.gateway.metrics.hang_checks.with_label_values(&[verdict.label()]).inc();
        let now_ms = self.gateway.now_ms();
        match verdict {
            Verdict::Alive => {
                endpoint.vitals().progressed(now_ms);
                self.tell(endpoint, Event::Alive, "");
            }
            Verdict::Hung => {
                self.tell(endpoint, Event::Hung, "it takes requests, and makes no tokens");
            }
            Verdict::Unknown => {}
        }
        endpoint.vitals().checks.examined_ms.store(now_ms, Relaxed);
    }
}

/// Starts what is due.
fn check(watch: &Arc<Watch>, snapshot: &Snapshot, late: bool, checks: &mut JoinSet<()>) {
    let now_ms = watch.gateway.now_ms();
    let names = served_models(snapshot);
    let mut due: Vec<Due> = Vec::new();
    for pool in snapshot.pools.values() {
        let served_model = names.get(&Arc::as_ptr(pool));
        due.extend(
            pool.endpoints.iter().filter_map(|endpoint| watch.due(endpoint, served_model, late, now_ms)),
        );
    }
    due.sort_unstable_by_key(|check| check.since_ms);
    due.truncate(MOST_CHECKS.saturating_sub(checks.len()));
    for Due { endpoint, kind, .. } in due {
        let watch = Arc::clone(watch);
        let mut busy = Busy::new(endpoint, matches!(kind, Kind::Probe), now_ms);
        checks.spawn(async move {
            match kind {
                Kind::Probe => watch.probe(&mut busy).await,
                Kind::Examine(served_model) => watch.examine(&busy.endpoint, &served_model).await,
            }
        });
    }
}

/// By which name the engines of each pool know their model.
fn served_models(snapshot: &Snapshot) -> HashMap<*const Pool, Arc<str>> {
    let mut names = HashMap::new();
    // An adapter's name is known only to the engines that have it.
    let targets = snapshot.routes.values().flat_map(|route| &route.targets).filter(|t| t.adapter.is_none());
    for target in targets {
        let Some(pool) = snapshot.pools.get(&*target.pool) else { continue };
        names.entry(Arc::as_ptr(pool)).or_insert_with(|| Arc::from(target.served_model.as_str()));
    }
    names
}

/// Marks an endpoint as being checked until it is dropped.
struct Busy {
    endpoint: Arc<Endpoint>,
    probe: bool,
    /// Counted among the probes that have no connection yet.
    connecting: bool,
}

impl Busy {
    fn new(endpoint: Arc<Endpoint>, probe: bool, now_ms: u64) -> Self {
        let checks = &endpoint.vitals().checks;
        if probe {
            checks.probing.fetch_add(1, Relaxed);
            checks.connecting.fetch_add(1, Relaxed);
            checks.began_ms.store(now_ms, Relaxed);
        } else {
            checks.examining.store(true, Relaxed);
        }
        Self { endpoint, probe, connecting: probe }
    }

    fn connected(&mut self) {
        if std::mem::take(&mut self.connecting) {
            self.endpoint.vitals().checks.connecting.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.connected();
        let checks = &self.endpoint.vitals().checks;
        if self.probe {
            checks.probing.fetch_sub(1, Relaxed);
        } else {
            checks.examining.store(false, Relaxed);
        }
    }
}

/// The probes of an endpoint that have no result yet.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    probes: u32,
    connecting: u32,
    /// The last of them.
    began_ms: u64,
}

impl UnderWay {
    /// Whether none has a connection, and the last has had its time for one. What is out already is in no hurry.
    fn asks_for_another(&self, machine: &Machine, now_ms: u64) -> bool {
        self.connecting == self.probes
            && self.probes < MOST_PROBES
            && now_ms >= self.began_ms.saturating_add(STAGGER_MS)
            && matches!(machine.phase(now_ms), Phase::Admitted | Phase::Suspect)
    }
}

/// Whether an engine is to be asked for a token: one in doubt, or one that is out until it makes some.
fn examination_is_due(
    signs: &Signs,
    machine: &Machine,
    patience: &Patience,
    now_ms: u64,
    examined_ms: u64,
) -> bool {
    if patience.flowing_ms == 0 {
        return false;
    }
    let rested = examined_ms == 0 || now_ms >= examined_ms.saturating_add(patience.flowing_ms);
    let out = machine.out().filter(|_| machine.phase(now_ms) == Phase::Ejected);
    rested
        && match out {
            Some(out) => out.cure == Cure::Token,
            None => progress::is_doubtful(signs, patience),
        }
}

/// What a probe's time depends on, besides the endpoint's state.
struct ProbeTimes {
    /// When it is due if nothing is wrong.
    regular_ms: u64,
    /// When the last one ended; 0: none has.
    last_ms: u64,
    /// When traffic last proved the endpoint alive.
    progress_ms: u64,
    interval_ms: u64,
}

/// When the next probe is due.
fn probe_due(times: &ProbeTimes, signs: &Signs, machine: &Machine, now_ms: u64) -> u64 {
    let after = |ms: u64| if times.last_ms == 0 { now_ms } else { times.last_ms.saturating_add(ms) };
    let often = times.interval_ms / 5;
    match machine.phase(now_ms) {
        Phase::Admitted | Phase::Suspect if machine.unreached() > 0 => after(RETRY_MS.min(often)),
        Phase::Ejected | Phase::HalfOpen if machine.out().is_some_and(|out| out.cure == Cure::Probe) => {
            after(often)
        }
        Phase::Admitted | Phase::Suspect if signs.inflight > 0 && signs.silent_ms >= SILENT_MS => {
            after(often)
        }
        Phase::Admitted | Phase::Suspect if times.progress_ms > 0 => {
            times.regular_ms.max(times.progress_ms.saturating_add(times.interval_ms))
        }
        _ => times.regular_ms,
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
