//! The one swap: everything routable, immutable, behind a single `ArcSwap`.
//!
//! A request loads one [`Snapshot`] per attempt and reads nothing else; an update builds the next snapshot beside it and
//! swaps. What an update carries over from the old snapshot is each surviving endpoint's live figures, each pool's
//! retry budget and what its routing policy remembers; [`super::gone`] carries over what an endpoint leaves behind.
//! Cost: a load is one atomic operation, no lock. An update of a pool goes through old and new endpoints side by side, a
//! comparison of ids and a shared pointer each; work is done for those that changed.

use std::{
    collections::{BTreeMap, HashMap},
    net::{SocketAddr, ToSocketAddrs},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use arc_swap::ArcSwap;
use penstock_config::proxy::{ResumeConfig, UpstreamConfig};
use penstock_proto::{Version, v1, xds::split_load_name};

use super::{
    departure::{Departures, Order},
    endpoint::Endpoint,
    gone,
    reported::Measured,
};
use crate::{
    admission::queue::WaitQueue,
    routing::policy::Memory,
    upstream::retry::RetryBudget,
    xds::state::{Table, Told, XdsState},
};

/// The endpoints that serve one model.
#[derive(Debug)]
pub struct Pool {
    /// In the order of their ids.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Shared by all requests to the pool, across snapshots.
    pub budget: Arc<RetryBudget>,
    /// Streams that may still go on elsewhere, across snapshots.
    pub resumes: Arc<RetryBudget>,
    /// Requests that wait for a place, across snapshots.
    pub queue: Arc<WaitQueue>,
    /// What its routing policy remembers, across snapshots.
    pub memory: Arc<Memory>,
    /// What it was made from: the same again needs no work.
    pub source: Arc<Table>,
}

impl Pool {
    /// Whether nobody serves it because nobody asked for it lately: a replica starts when somebody waits.
    pub fn is_asleep(&self) -> bool {
        self.source.wakes && self.endpoints.iter().all(|endpoint| endpoint.draining)
    }
}

/// One of those that serve a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The pool, by its name, which is its deployment's.
    pub pool: Arc<str>,
    /// The name the engines use.
    pub served_model: String,
    /// Share of the route's requests, as a part of the sum.
    pub weight: u32,
    /// Only endpoints that have this adapter can answer.
    pub adapter: Option<String>,
}

impl Target {
    /// Whether both ask the same engines for the same thing.
    pub fn same_place(&self, other: &Self) -> bool {
        self.pool == other.pool && self.served_model == other.served_model
    }
}

/// Where one client-visible model name leads.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// The name clients use.
    pub model: Arc<str>,
    /// Who serves it. Their pools are in the snapshot.
    pub targets: Vec<Arc<Target>>,
    /// Names to be tried when none of them can answer, in order.
    pub fallbacks: Vec<String>,
    /// Of an adapter: the model it extends; else empty.
    pub parent: String,
    /// Unix seconds, for /v1/models.
    pub created_unix_s: i64,
}

/// Everything routable at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Of the control plane's state it was made from.
    pub version: Version,
    /// Whether any state was ever applied; false only before the first.
    pub loaded: bool,
    /// When it was put in use; `None` before the first.
    pub applied: Option<Instant>,
    /// By client-visible name.
    pub routes: BTreeMap<String, Arc<Route>>,
    /// By pool name.
    pub pools: HashMap<String, Arc<Pool>>,
}

/// Holder of the present [`Snapshot`].
#[derive(Debug)]
pub struct EndpointTable {
    current: ArcSwap<Snapshot>,
    /// Serialises updates, and remembers those that left; requests never take it.
    updating: Mutex<gone::Memory>,
    upstream: UpstreamConfig,
    /// What a pool's streams may do: so many resumes a second, and so many at once.
    resumes: (u32, u32),
    departures: Departures,
}

impl EndpointTable {
    /// Nothing routable yet.
    pub fn new(upstream: UpstreamConfig, resume: &ResumeConfig) -> Self {
        Self {
            current: ArcSwap::default(),
            updating: Mutex::default(),
            upstream,
            resumes: (resume.per_second, resume.burst),
            departures: Departures::default(),
        }
    }

    /// The present snapshot. Cheap; hold it for one attempt, not for a whole stream.
    pub fn load(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// The endpoints that streams leave.
    pub fn departures(&self) -> &Departures {
        &self.departures
    }

    /// Swaps in what the control plane said. Endpoints whose host name cannot be resolved now are left out and logged;
    /// they return with the next update.
    pub fn apply(&self, state: &XdsState) {
        let mut gone = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.next_snapshot(&self.current.load(), state, &mut gone, Instant::now());
        self.current.store(Arc::new(next));
    }

    /// Models that sleep and are waited for, with the number of requests.
    pub fn wanted(&self, now_ms: u64) -> Vec<v1::Wanted> {
        let snapshot = self.load();
        let asleep = snapshot.pools.iter().filter(|(_, pool)| pool.is_asleep());
        let wanted = asleep.map(|(model, pool)| (model, pool.queue.wanted(now_ms)));
        let wanted = wanted.filter(|(_, queued)| *queued > 0);
        wanted.map(|(model, queued)| v1::Wanted { model: model.clone(), queued }).collect()
    }

    /// Takes news of an engine's load in. Whether the endpoint is known, with that generation: what is told of others is
    /// about engines that have gone or are not here yet.
    pub fn report(&self, name: &str, load: &v1::EngineLoad, now_ms: u64) -> bool {
        let snapshot = self.load();
        let found = split_load_name(name).and_then(|(pool, id)| {
            let endpoints = &snapshot.pools.get(pool)?.endpoints;
            let at = endpoints.binary_search_by(|endpoint| (*endpoint.id).cmp(id)).ok()?;
            endpoints.get(at).filter(|endpoint| endpoint.generation == load.generation)
        });
        let Some(endpoint) = found else { return false };
        let measured = Measured {
            running: load.running,
            waiting: load.waiting,
            kv_used_permille: permille(load.kv_used_ratio),
            at_ms: now_ms.saturating_sub(load.age_ms),
        };
        endpoint.take_report(measured, now_ms);
        true
    }

    /// Notes what is under way at every endpoint that has reports. To be called every [`super::reported::SAMPLE_MS`]; ten
    /// thousand endpoints take under a millisecond.
    pub fn sample(&self, now_ms: u64) {
        for endpoint in self.load().pools.values().flat_map(|pool| &pool.endpoints) {
            endpoint.sample(now_ms);
        }
    }

    fn next_snapshot(
        &self,
        old: &Snapshot,
        state: &XdsState,
        gone: &mut gone::Memory,
        now: Instant,
    ) -> Snapshot {
        for (name, pool) in old.pools.iter().filter(|(name, _)| !state.tables().contains_key(*name)) {
            pool.endpoints.iter().for_each(|endpoint| gone.left(name, endpoint, now));
        }
        gone.forget(now);
        let pools: HashMap<String, Arc<Pool>> = state
            .tables()
            .iter()
            .map(|(name, table)| (name.clone(), self.next_pool(old.pools.get(name), &table.value, gone, now)))
            .collect();
        let routes = state
            .routes()
            .iter()
            .map(|(name, route)| (name.clone(), next_route(old.routes.get(name), name, &route.value)))
            .collect();
        Snapshot { version: state.version(), loaded: true, applied: Some(now), routes, pools }
    }

    fn next_pool(
        &self,
        old: Option<&Arc<Pool>>,
        table: &Arc<Table>,
        gone: &mut gone::Memory,
        now: Instant,
    ) -> Arc<Pool> {
        let whole = |pool: &Pool| pool.endpoints.len() == pool.source.endpoints.len();
        if let Some(same) = old.filter(|pool| Arc::ptr_eq(&pool.source, table) && whole(pool)) {
            return Arc::clone(same);
        }
        let mut told: Vec<&Arc<Told>> = table.endpoints.iter().collect();
        // Nothing to do where they come in order, as they do.
        told.sort_by(|a, b| a.id.cmp(&b.id));
        let mut before = old.iter().flat_map(|pool| &pool.endpoints).peekable();
        let mut endpoints = Vec::with_capacity(told.len());
        for wire in told {
            while let Some(left) = before.next_if(|endpoint| *endpoint.id < *wire.id) {
                gone.left(&table.pool, left, now);
            }
            let known = before.next_if(|endpoint| *endpoint.id == *wire.id);
            match self.next_endpoint(known, wire, &table.pool, gone, now) {
                Some(endpoint) => endpoints.push(endpoint),
                None => known.into_iter().for_each(|left| gone.left(&table.pool, left, now)),
            }
        }
        before.for_each(|left| gone.left(&table.pool, left, now));
        self.see_off(old, table, gone, now);
        let budget = old.map_or_else(
            || Arc::new(RetryBudget::new(self.upstream.retry_percent, self.upstream.retry_floor_per_s)),
            |pool| Arc::clone(&pool.budget),
        );
        let (per_second, burst) = self.resumes;
        let resumes = old.map_or_else(
            || Arc::new(RetryBudget::of_time(per_second, burst)),
            |pool| Arc::clone(&pool.resumes),
        );
        let queue = old.map(|pool| Arc::clone(&pool.queue)).unwrap_or_default();
        let memory = old.map(|pool| Arc::clone(&pool.memory)).unwrap_or_default();
        Arc::new(Pool { endpoints, budget, resumes, queue, memory, source: Arc::clone(table) })
    }

    /// What is said of endpoints that have left the table. Nothing to do for those that had no streams here.
    fn see_off(&self, old: Option<&Arc<Pool>>, table: &Table, gone: &gone::Memory, now: Instant) {
        for departing in &table.departing {
            let (id, generation) = (departing.id.as_str(), departing.generation);
            let here = old.and_then(|pool| {
                let at = pool.endpoints.binary_search_by(|endpoint| (*endpoint.id).cmp(id)).ok()?;
                pool.endpoints.get(at).filter(|endpoint| endpoint.generation == generation)
            });
            let live = here.map(|endpoint| &endpoint.live);
            let Some(live) = live.or_else(|| gone.find(&table.pool, id, generation)) else { continue };
            let order = Order::of_departing(departing.departure.as_ref(), live.drain());
            self.departures.order(live, order, now.into());
        }
    }

    fn next_endpoint(
        &self,
        old: Option<&Arc<Endpoint>>,
        wire: &Arc<Told>,
        pool: &str,
        gone: &mut gone::Memory,
        now: Instant,
    ) -> Option<Arc<Endpoint>> {
        if let Some(same) = old.filter(|old| Arc::ptr_eq(&old.told, wire)) {
            return Some(Arc::clone(same));
        }
        let draining = wire.state() == v1::EndpointState::Draining;
        let same_process = old.filter(|old| old.address == wire.address && old.generation == wire.generation);
        let resolved = match resolve(&wire.address) {
            Ok(resolved) => resolved,
            Err(reason) => {
                tracing::warn!(
                    endpoint = wire.id,
                    address = wire.address,
                    reason,
                    "endpoint left out: its address does not resolve"
                );
                return None;
            }
        };
        let live = same_process
            .map(|old| Arc::clone(&old.live))
            .or_else(|| gone.back(pool, &wire.id, &wire.address, wire.generation))
            .unwrap_or_default();
        live.note_drain(wire.drain_ms);
        self.departures.order(&live, Order::of(wire.departure.as_ref()), now.into());
        let mut endpoint = Endpoint::new(&wire.id, &wire.address, resolved, wire.generation, live);
        endpoint.draining = draining;
        endpoint.adapters = wire.adapters.iter().cloned().collect();
        endpoint.weight_percent = wire.weight_percent.unwrap_or(100).clamp(1, 100);
        endpoint.zone.clone_from(&wire.zone);
        endpoint.told = Arc::clone(wire);
        Some(Arc::new(endpoint))
    }
}

fn next_route(old: Option<&Arc<Route>>, name: &str, wire: &v1::ModelRoute) -> Arc<Route> {
    let targets = wire.targets.iter().map(|target| {
        Arc::new(Target {
            pool: target.pool.as_str().into(),
            served_model: target.served_model.clone(),
            weight: target.weight,
            adapter: (!target.adapter.is_empty()).then(|| target.adapter.clone()),
        })
    });
    let route = Route {
        model: name.into(),
        targets: targets.collect(),
        fallbacks: wire.fallbacks.clone(),
        parent: wire.parent.clone(),
        created_unix_s: wire.created_unix_s,
    };
    old.filter(|old| ***old == route).map_or_else(|| Arc::new(route), Arc::clone)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, NaN becomes 0, and the value is at most 1000"
)]
fn permille(ratio: f32) -> u32 {
    (ratio.clamp(0.0, 1.0) * 1_000.0).round() as u32
}

/// Addresses are nearly always literal; a name costs a blocking lookup, on the control thread, never on a request's.
fn resolve(address: &str) -> Result<SocketAddr, String> {
    if let Ok(literal) = address.parse() {
        return Ok(literal);
    }
    let mut found = address.to_socket_addrs().map_err(|e| e.to_string())?;
    found.next().ok_or_else(|| "the name has no address".to_owned())
}

#[cfg(test)]
mod tests {
    use penstock_proto::xds;

    use super::*;

    fn wire(id: &str, address: &str, generation: u64) -> v1::Endpoint {
        v1::Endpoint {
            id: id.into(),
            address: address.into(),
            generation,
            state: v1::EndpointState::Ready.into(),
            ..Default::default()
        }
    }

    fn resource(name: &str, type_url: &str, message: &impl prost::Message) -> xds::Resource {
        xds::Resource {
            name: name.into(),
            version: format!("{:?}", message.encode_to_vec()),
            resource: Some(xds::Any { type_url: type_url.into(), value: message.encode_to_vec() }),
            ..Default::default()
        }
    }

    fn response(type_url: &str, revision: u64, resource: xds::Resource) -> xds::DeltaDiscoveryResponse {
        xds::DeltaDiscoveryResponse {
            type_url: type_url.into(),
            system_version_info: format!("1.{revision}"),
            nonce: revision.to_string(),
            resources: vec![resource],
            ..Default::default()
        }
    }

    fn with_table(before: &XdsState, revision: u64, endpoints: Vec<v1::Endpoint>) -> XdsState {
        let table = v1::EndpointTable { pool: "p".into(), endpoints, ..Default::default() };
        let table = resource("p", xds::ENDPOINT_TABLE_TYPE, &table);
        before.apply(&response(xds::ENDPOINT_TABLE_TYPE, revision, table)).expect("a good table")
    }

    fn state(endpoints: Vec<v1::Endpoint>) -> XdsState {
        let route = v1::ModelRoute { model: "m".into(), pool: "p".into(), ..Default::default() };
        let route = resource("m", xds::MODEL_ROUTE_TYPE, &route);
        with_table(&XdsState::default(), 1, endpoints)
            .apply(&response(xds::MODEL_ROUTE_TYPE, 1, route))
            .expect("a good route")
    }

    fn first(table: &EndpointTable) -> Arc<Endpoint> {
        Arc::clone(&table.load().pools["p"].endpoints[0])
    }

    #[test]
    fn counts_survive_a_swap_and_a_change_of_state() {
        let table = EndpointTable::new(UpstreamConfig::default(), &ResumeConfig::default());
        let before = state(vec![wire("a", "127.0.0.1:1", 7)]);
        table.apply(&before);
        let ticket = first(&table).reserve(0);
        let mut draining = wire("a", "127.0.0.1:1", 7);
        draining.state = v1::EndpointState::Draining.into();
        table.apply(&with_table(&before, 2, vec![draining]));
        let after = first(&table);
        assert!(after.draining);
        assert_eq!(after.inflight(), 1);
        drop(ticket);
        assert_eq!(after.inflight(), 0, "a ticket taken before the swap is given back after it");
    }

    #[test]
    fn a_new_generation_starts_clean() {
        let table = EndpointTable::new(UpstreamConfig::default(), &ResumeConfig::default());
        let before = state(vec![wire("a", "127.0.0.1:1", 7)]);
        table.apply(&before);
        let _ticket = first(&table).reserve(0);
        table.apply(&with_table(&before, 2, vec![wire("a", "127.0.0.1:1", 8)]));
        assert_eq!(first(&table).inflight(), 0);
    }

    #[test]
    fn an_unchanged_pool_is_kept_as_it_is() {
        let table = EndpointTable::new(UpstreamConfig::default(), &ResumeConfig::default());
        let state = state(vec![wire("a", "127.0.0.1:1", 7)]);
        table.apply(&state);
        let before = Arc::clone(&table.load().pools["p"]);
        table.apply(&state);
        assert!(Arc::ptr_eq(&before, &table.load().pools["p"]));
    }

    /// Through table flapping an ejected engine must not return as a good one.
    #[test]
    fn an_ejected_endpoint_that_leaves_and_returns_is_ejected_still() {
        let rules =
            crate::health::Rules { consecutive_failures: 1, ..crate::health::rules(&Default::default()) };
        let table = EndpointTable::new(UpstreamConfig::default(), &ResumeConfig::default());
        let (a, b) = (wire("a", "127.0.0.1:1", 7), wire("b", "127.0.0.1:2", 7));
        let with_both = state(vec![a.clone(), b.clone()]);
        table.apply(&with_both);
        first(&table).reserve(0).failed(crate::error::UpstreamFailure::Connect, 0, &rules);
        let without = with_table(&with_both, 2, vec![b.clone()]);
        table.apply(&without);
        assert_eq!(table.load().pools["p"].endpoints.len(), 1);
        let again = with_table(&without, 3, vec![a, b.clone()]);
        table.apply(&again);
        assert!(first(&table).is_ejected(1), "the same process");
        table.apply(&without);
        table.apply(&with_table(&again, 4, vec![wire("a", "127.0.0.1:1", 8), b]));
        assert!(!first(&table).is_ejected(1), "another one");
    }

    #[test]
    fn an_unresolvable_endpoint_does_not_take_the_others_with_it() {
        let table = EndpointTable::new(UpstreamConfig::default(), &ResumeConfig::default());
        table.apply(&state(vec![wire("a", "no-such-host.invalid:1", 1), wire("b", "127.0.0.1:2", 1)]));
        let snapshot = table.load();
        assert_eq!(snapshot.pools["p"].endpoints.len(), 1);
        assert_eq!(&*snapshot.pools["p"].endpoints[0].id, "b");
        assert_eq!(snapshot.routes["m"].targets[0].served_model, "m");
    }
}
