//! Which endpoint takes a request: filters over the pool, then a policy over what is left, then a place reserved at once.
//!
//! - [`policy`]: the choice, over plain data; the same code runs in [`crate::simulator`].
//! - [`considered`]: what a pick looked at, for those who ask why.
//! - [`load`]: how busy an endpoint is thought to be, and how much a young one should carry.
//! - [`affinity`]: sessions to endpoints, by keyed hashes and under a load bound.
//! - [`prefix`]: who probably has a prompt's beginning in its cache, in fixed memory.
//! - [`resolve`]: which pools, in which order, for the name that a client asked for.
//!
//! Filters, in order: not draining, has the adapter that is asked for, not tried by this request before, healthy ([`crate::health`]). At most a share of the pool
//! may be out for its health. Beyond it, and when nothing healthy is left, the pool is in *panic*: those that react at all are
//! taken, however badly they do, since suspicion against so many is more likely wrong, and since trying a sick engine beats
//! refusing a client; those that do not react only when there is nobody else. Last: not at its limit ([`saturation`]); when
//! that takes out all that were left, the request waits. No policy ever sees an endpoint that a filter took out.
//!
//! Reports of the engines ([`crate::endpoints::reported`]) tell of other proxies' requests and of engines' own queues. What
//! they say may be wrong (vLLM's gauges can stay up after a mass abort) or may not come any more, and an engine that
//! answers is then still an engine that answers: so they decide between endpoints and how many requests one gets at a time,
//! never that an idle one gets none.

pub mod affinity;
pub mod considered;
pub mod load;
pub mod policy;
pub mod prefix;
pub mod resolve;

use std::{collections::BTreeMap, sync::Arc};

use penstock_config::proxy::{QueueConfig, RoutingConfig};

use self::{
    affinity::{HashKey, LoadBound},
    considered::Considered,
    policy::{Asked, How, Policy, Rules, View},
    prefix::{Blocks, Chain},
};
use crate::{
    admission::saturation::{self, Limits, Reported},
    endpoints::{Endpoint, Pool, Ticket, reported::ReportedLoad},
};

/// What a pick may look at besides the pool and the request.
#[derive(Debug, Clone)]
pub struct PickRules {
    /// Largest share of a pool that ejections may take away, in percent.
    pub max_ejected_percent: u32,
    /// Milliseconds until a new endpoint carries its whole share; 0: at once.
    pub slow_start_ms: u64,
    /// Age at which an engine's report of its load is not believed any more; 0: reports are not looked at.
    pub load_stale_ms: u64,
    /// This proxy's zone; empty: every endpoint is near.
    pub zone: String,
    /// Of all hashes.
    pub key: HashKey,
    /// How prompts are cut for prefix affinity.
    pub blocks: Blocks,
    /// When an engine is at its limit.
    pub limits: Limits,
    /// How to choose, where a model has no rules of its own.
    pub rules: Rules,
    /// By the name that clients use.
    pub by_model: BTreeMap<String, Policy>,
}

impl PickRules {
    /// What the settings say. `rng` makes a key where they have none.
    pub fn new(
        config: &RoutingConfig,
        queue: &QueueConfig,
        max_ejected_percent: u32,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let key = match config.hash_key.as_str() {
            "" => HashKey::random(rng),
            secret => HashKey::from_secret(secret),
        };
        Self {
            max_ejected_percent,
            slow_start_ms: config.slow_start_ms,
            load_stale_ms: config.load_stale_ms,
            zone: config.zone.clone(),
            key,
            blocks: Blocks { bytes: config.prefix_block_bytes, most: config.prefix_blocks },
            limits: Limits {
                waiting: queue.engine_waiting,
                kv_permille: queue.kv_percent * 10,
                busy_step_ms: queue.busy_step_ms,
                inflight: queue.engine_inflight,
            },
            rules: Rules {
                policy: config.policy,
                bound: LoadBound { percent: config.load_bound_percent, floor: config.load_bound_floor },
                zone_spill: config.zone_spill,
                prefix_entries: config.prefix_entries,
            },
            by_model: config.policy_by_model.clone(),
        }
    }

    /// The rules of one model.
    pub fn of(&self, model: &str) -> Rules {
        Rules { policy: self.by_model.get(model).copied().unwrap_or(self.rules.policy), ..self.rules }
    }

    /// What takes a prompt's prefixes while it is scanned, if any model's policy looks at them. The model is known only
    /// when the scan is over.
    pub fn chain(&self) -> Option<Chain> {
        let wanted = |policy: &Policy| *policy == Policy::PrefixAffinity;
        let any = wanted(&self.rules.policy) || self.by_model.values().any(wanted);
        any.then(|| Chain::new(self.key, self.blocks))
    }
}

/// Why nobody was picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpicked {
    /// The pool has no endpoint that this request may try.
    Nobody,
    /// It has, and each is at its limit.
    Saturated,
    /// It has none because nobody asked for the model lately; one starts when somebody waits.
    Asleep,
}

/// Reserves a place at the endpoint that `rules` choose of those the filters leave. `chance` gives a number in `0..n`.
///
/// # Errors
/// [`Unpicked`] when the filters leave none.
pub fn pick(
    pool: &Pool,
    tried: &[Arc<str>],
    asked: &Asked<'_>,
    now_ms: u64,
    with: (&PickRules, &Rules),
    chance: impl FnMut(usize) -> usize,
) -> Result<(Ticket, How), Unpicked> {
    pick_seen(pool, tried, asked, now_ms, with, chance, None)
}

/// [`pick`], with what it looked at written to `seen`: done only where somebody will read it, since it looks at the whole
/// pool once more.
///
/// # Errors
/// As [`pick`]; then `seen` stays as it was if nobody is left, and there are [`Considered::nobody`]'s reasons.
pub fn pick_seen(
    pool: &Pool,
    tried: &[Arc<str>],
    asked: &Asked<'_>,
    now_ms: u64,
    (with, rules): (&PickRules, &Rules),
    mut chance: impl FnMut(usize) -> usize,
    mut seen: Option<&mut Considered>,
) -> Result<(Ticket, How), Unpicked> {
    let able = |endpoint: &Endpoint| asked.adapter.is_none_or(|name| endpoint.adapters.contains(name));
    let eligible =
        |endpoint: &Endpoint| !endpoint.draining && able(endpoint) && !tried.contains(&endpoint.id);
    let all: Vec<&Arc<Endpoint>> = pool.endpoints.iter().filter(|e| eligible(e)).collect();
    let mut among = |healthy: &dyn Fn(&Endpoint) -> bool,
                     reserve: &dyn Fn(&Arc<Endpoint>) -> Option<Ticket>| {
        let of_health = || all.iter().copied().filter(|e| healthy(e));
        let (mut left, mut views): (Vec<&Arc<Endpoint>>, Vec<View>) = of_health()
            .map(|endpoint| (endpoint, view(endpoint, now_ms, with)))
            .filter(|(endpoint, view)| !is_full(endpoint, view, now_ms, with))
            .unzip();
        let none = if left.len() < of_health().count() { Unpicked::Saturated } else { Unpicked::Nobody };
        loop {
            let chosen = policy::choose(rules, &views, asked, &pool.memory, &mut chance);
            if let Some(seen) = seen.as_deref_mut() {
                let chosen = chosen.map(|(index, _)| index);
                *seen =
                    Considered::of(&pool.endpoints, (tried, asked.adapter), &left, &views, chosen, now_ms);
            }
            let (index, how) = chosen.ok_or(none)?;
            match reserve(left.get(index).ok_or(none)?) {
                Some(ticket) => return Ok((ticket, how)),
                None => {
                    // Another pick has taken its last trial.
                    left.swap_remove(index);
                    views.swap_remove(index);
                }
            }
        }
    };
    let anyway = |endpoint: &Arc<Endpoint>| Some(endpoint.reserve(now_ms));
    let mut picked = Err(Unpicked::Nobody);
    if !too_many_ejected(&pool.endpoints, now_ms, with.max_ejected_percent) {
        picked = among(&|e| e.vitals().is_open(now_ms), &|e| e.try_reserve(now_ms));
    }
    if picked.as_ref().is_err_and(|why| *why == Unpicked::Nobody) {
        picked = among(&|e| !e.vitals().is_lost(now_ms), &anyway);
    }
    if picked.as_ref().is_err_and(|why| *why == Unpicked::Nobody) {
        picked = among(&|_| true, &anyway);
    }
    picked
}

/// Whether picks from the pool look past the health of its endpoints.
pub fn in_panic(pool: &Pool, now_ms: u64, max_ejected_percent: u32) -> bool {
    let mut candidates = pool.endpoints.iter().filter(|e| !e.draining).peekable();
    candidates.peek().is_some()
        && (too_many_ejected(&pool.endpoints, now_ms, max_ejected_percent)
            || !candidates.any(|e| e.vitals().is_open(now_ms)))
}

/// A report is believed only while it is fresh, and only of an engine that has a request of ours: whatever it says, one may be
/// sent, and its answer tells more.
fn is_full(endpoint: &Endpoint, view: &View, now_ms: u64, with: &PickRules) -> bool {
    let fresh = |report: &ReportedLoad| view.own > 0 && report.age_ms < with.load_stale_ms;
    let reported = endpoint.reported(now_ms).filter(fresh).map(|report| Reported {
        running: report.running,
        waiting: report.waiting,
        kv_permille: report.kv_used_permille,
    });
    saturation::is_full((view.own, view.load), reported, endpoint.busy(), now_ms, &with.limits)
}

fn view(endpoint: &Endpoint, now_ms: u64, with: &PickRules) -> View {
    let (own, report) = (endpoint.inflight(), endpoint.load_report());
    View {
        key: endpoint.key(with.key),
        load: load::estimate(own, report.as_ref(), now_ms, with.load_stale_ms),
        own,
        weight: load::share(
            load::weight(endpoint.age_ms(now_ms), with.slow_start_ms),
            endpoint.weight_percent,
        ),
        near: with.zone.is_empty() || endpoint.zone == with.zone,
    }
}

fn too_many_ejected(endpoints: &[Arc<Endpoint>], now_ms: u64, max_percent: u32) -> bool {
    let (mut out, mut all) = (0usize, 0usize);
    for endpoint in endpoints.iter().filter(|e| !e.draining) {
        all += 1;
        out += usize::from(endpoint.is_ejected(now_ms));
    }
    out * 100 > all * max_percent as usize
}

#[cfg(test)]
#[path = "pick_tests.rs"]
mod tests;
