//! News of engines' loads: from agents to proxies, in memory only.
//!
//! Loads are not state. They are not in the store, have no revision and no place in a snapshot; a proxy that connects gets what
//! is known, and after that what is new, once. What costs is what changed: [`Loads`] keeps measurements in the order in which
//! they came, so that a subscriber looks at those behind its mark and at nothing else. A slow subscriber is not queued for: it
//! gets the newest of each engine when it has answered the last response.
//!
//! A measurement travels as an age, since no two clocks need agree; each process adds the time that it held it. One that is as
//! before is passed on again only every [`REFRESH_BUSY`] or [`REFRESH_IDLE`], so that a proxy can tell an engine whose load stays
//! from one that nobody hears of any more. Nothing is withdrawn: what is told of an engine that has gone finds no endpoint.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_proto::{
    Version, v1,
    xds::{Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, ENGINE_LOAD_TYPE, Resource, load_name},
};
use prost::Message;

/// How often an unchanged load of an engine with requests is told again: well within the time for which proxies believe it.
pub const REFRESH_BUSY: Duration = Duration::from_millis(450);
/// The same for an engine without requests, of which an old report says as much as a new one.
pub const REFRESH_IDLE: Duration = Duration::from_secs(5);
/// Loads of one response; the rest goes into the next.
pub const MOST_AT_ONCE: usize = 10_000;
/// A difference in KV use below this, in thousandths, is none.
const KV_STEP: i32 = 10;
/// Longest reason of a NACK that is kept, in characters.
const MAX_REASON: usize = 1_000;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Figures {
    generation: u64,
    running: u32,
    waiting: u32,
    kv_used_ratio: f32,
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    figures: Figures,
    measured: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    sequence: u64,
    entries: HashMap<Arc<str>, Entry>,
    /// The same by the order in which they came.
    order: BTreeMap<u64, Arc<str>>,
}

/// The newest load of every engine that anything was heard of lately.
#[derive(Debug, Default)]
pub struct Loads {
    inner: Mutex<Inner>,
}

impl Loads {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a measurement in. Whether it is news.
    pub fn put(&self, pool: &str, replica_id: &str, load: &v1::EngineLoad, now: Instant) -> bool {
        let ratio = load.kv_used_ratio;
        let figures = Figures {
            generation: load.generation,
            running: load.running,
            waiting: load.waiting,
            kv_used_ratio: if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.0 },
        };
        let measured = now.checked_sub(Duration::from_millis(load.age_ms)).unwrap_or(now);
        let mut inner = self.lock();
        let name: Arc<str> = load_name(pool, replica_id).into();
        if let Some(entry) = inner.entries.get(&name) {
            let (before, since) = (entry.figures, measured.saturating_duration_since(entry.measured));
            let idle = figures.running == 0 && figures.waiting == 0;
            let refresh = if idle { REFRESH_IDLE } else { REFRESH_BUSY };
            if since.is_zero() || (!differs(before, figures) && since < refresh) {
                return false;
            }
            let old = entry.sequence;
            inner.order.remove(&old);
        }
        inner.sequence += 1;
        let sequence = inner.sequence;
        inner.order.insert(sequence, name.clone());
        inner.entries.insert(name, Entry { sequence, figures, measured });
        true
    }

    /// Forgets what is older than `most`: of engines that have gone, or whose agents have. Costs what it forgets.
    pub fn prune(&self, most: Duration, now: Instant) {
        let mut inner = self.lock();
        let Inner { entries, order, .. } = &mut *inner;
        // What came first is oldest, to within the time that measurements travel.
        while let Some(oldest) = order.first_entry() {
            if entries.get(oldest.get()).is_some_and(|e| now.saturating_duration_since(e.measured) < most) {
                return;
            }
            entries.remove(&oldest.remove());
        }
    }

    /// What came after the mark `after`, oldest first and at most `most`; and the mark behind the last of them.
    pub fn newer(&self, after: u64, most: usize, now: Instant) -> (u64, Vec<(String, v1::EngineLoad)>) {
        let inner = self.lock();
        let newer = inner.order.range(after.saturating_add(1)..).take(most);
        let mut mark = after;
        let loads = newer.filter_map(|(sequence, name)| {
            mark = *sequence;
            Some((name.to_string(), aged(inner.entries.get(name)?, now)))
        });
        let loads = loads.collect();
        (mark, loads)
    }

    /// The same as resources.
    fn since(&self, after: u64, most: usize, now: Instant) -> (u64, Vec<Resource>) {
        let inner = self.lock();
        let newer = inner.order.range(after.saturating_add(1)..).take(most);
        let mut mark = after;
        let resources = newer.filter_map(|(sequence, name)| {
            mark = *sequence;
            Some(on_wire(name, inner.entries.get(name)?, now))
        });
        let resources = resources.collect();
        (mark, resources)
    }
}

fn differs(a: Figures, b: Figures) -> bool {
    #[allow(clippy::cast_possible_truncation, reason = "ratios, from 0 to 1")]
    let permille = |ratio: f32| (ratio * 1_000.0) as i32;
    let counts = |f: Figures| (f.generation, f.running, f.waiting);
    counts(a) != counts(b) || (permille(a.kv_used_ratio) - permille(b.kv_used_ratio)).abs() >= KV_STEP
}

fn aged(entry: &Entry, now: Instant) -> v1::EngineLoad {
    let Figures { generation, running, waiting, kv_used_ratio } = entry.figures;
    let age = now.saturating_duration_since(entry.measured).as_millis();
    let age_ms = u64::try_from(age).unwrap_or(u64::MAX);
    v1::EngineLoad { running, waiting, kv_used_ratio, age_ms, generation, ..Default::default() }
}

fn on_wire(name: &str, entry: &Entry, now: Instant) -> Resource {
    let load = aged(entry, now);
    Resource {
        name: name.to_owned(),
        version: entry.sequence.to_string(),
        resource: Some(Any { type_url: ENGINE_LOAD_TYPE.into(), value: load.encode_to_vec() }),
        ..Default::default()
    }
}

/// What one subscriber has been told and has answered. Its own lane: it neither waits for tables and routes nor holds them
/// up. Pure.
#[derive(Debug, Default)]
pub struct LoadSession {
    wanted: bool,
    mark: u64,
    last_nonce: u64,
    outstanding: Option<String>,
}

/// What an answer said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A subscription, or a word about an older response.
    Nothing,
    /// The last response was taken.
    Ack,
    /// It was not, or not all of it, and why. It is not sent again: newer measurements follow.
    Nack(String),
}

impl LoadSession {
    /// Whether a request is about loads.
    pub fn is_addressed(request: &DeltaDiscoveryRequest) -> bool {
        request.type_url == ENGINE_LOAD_TYPE
    }

    /// Whether something may be sent.
    pub fn is_due(&self) -> bool {
        self.wanted && self.outstanding.is_none()
    }

    /// Takes a request in. A subscriber gets all loads, whichever it names.
    pub fn hear(&mut self, request: DeltaDiscoveryRequest) -> Answer {
        self.wanted = true;
        let nonce = request.response_nonce;
        if nonce.is_empty() || self.outstanding.take_if(|outstanding| *outstanding == nonce).is_none() {
            return Answer::Nothing;
        }
        match request.error_detail {
            None => Answer::Ack,
            Some(error) => Answer::Nack(error.message.chars().take(MAX_REASON).collect()),
        }
    }

    /// The next response, if it may be sent and there is news.
    pub fn next(&mut self, loads: &Loads, term: u64, now: Instant) -> Option<DeltaDiscoveryResponse> {
        if !self.is_due() {
            return None;
        }
        let (mark, resources) = loads.since(self.mark, MOST_AT_ONCE, now);
        if resources.is_empty() {
            return None;
        }
        self.mark = mark;
        self.last_nonce += 1;
        let nonce = format!("load-{}", self.last_nonce);
        self.outstanding = Some(nonce.clone());
        Some(DeltaDiscoveryResponse {
            system_version_info: Version { term, revision: mark }.to_string(),
            type_url: ENGINE_LOAD_TYPE.into(),
            resources,
            nonce,
            ..Default::default()
        })
    }
}

#[cfg(test)]
#[path = "loads_tests.rs"]
mod tests;
