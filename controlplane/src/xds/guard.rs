//! What proxies are not told: that many engines have gone when nobody wanted it and nobody saw it. Pure.
//!
//! An endpoint that took requests is *missing* when its registration has gone while the plan still counts on it and its node
//! has not been heard of either: its lease has lapsed. That is the absence of news, not news of an absence: a store that
//! forgot leases, a network cut between agents and control planes. What an operator or the plan asked for (drain, scale
//! down, rollout, deletion) and what an agent said itself (an engine that ended) are never missing. An endpoint stays missing
//! until it registers again or the plan gives it up, as it does for a node that is lost for longer than its grace.
//!
//! Missing endpoints stay in the tables (*held*) where they would leave a pool without any: a table that is empty serves
//! nobody, so there is nothing to win by it. They stay everywhere once more than the set share of the fleet is missing, on more
//! than one node: one may die at any moment. Proxies judge endpoints by what these answer, so one that is held and dead
//! costs a retry.
//!
//! Models that vanish without a trace, with more than that share of the fleet in them, hold the whole snapshot: deletions
//! take the way through draining. Both end by themselves when the cause does, or when an operator lets them pass
//! ([`View::let_pass`]). Absent: memory over restarts; what a process first publishes waits for `fleet::settled`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::routes::Sources;
use crate::{
    model::RegisteredEndpoint,
    store::Revision,
    view::{ModelView, View},
};

/// See the module's text.
#[derive(Debug, Default)]
pub struct Guard {
    /// Of the fleet; 0: nothing is ever held.
    max_loss_percent: usize,
    /// Endpoints that take requests.
    ready: usize,
    /// By pool, those with something missing.
    pools: BTreeMap<String, Pool>,
    /// Up to which decision of an operator things were let pass.
    passed: Revision,
    all: String,
}

#[derive(Debug, Default)]
struct Pool {
    missing: BTreeMap<String, Arc<RegisteredEndpoint>>,
    held: bool,
    /// Whether anything takes requests in it.
    serves: bool,
}

/// What is held, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Why no snapshot is published; empty when they are.
    pub snapshot: String,
    /// Endpoints that stay in tables though nobody hears of them, by pool.
    pub pools: BTreeMap<String, usize>,
}

impl Held {
    /// Endpoints in all pools.
    pub fn endpoints(&self) -> usize {
        self.pools.values().sum()
    }

    /// Sentences; none when nothing is held.
    pub fn sentences(&self) -> Vec<String> {
        let whole = Some(self.snapshot.clone()).filter(|reason| !reason.is_empty());
        let pools = self.pools.iter().map(|(pool, count)| {
            format!(
                "{count} endpoints of {pool} are not heard of any more, nor are their nodes, and nobody asked for that: \
                 proxies still have them"
            )
        });
        whole.into_iter().chain(pools).collect()
    }
}

fn ready(model: &ModelView) -> impl Iterator<Item = &Arc<RegisteredEndpoint>> {
    let deployed = model.deployment.is_some();
    model.endpoints.values().filter(move |endpoint| deployed && model.takes_requests(endpoint))
}

/// Whether the plan still counts on the endpoint.
fn is_wanted(model: &ModelView, endpoint: &RegisteredEndpoint) -> bool {
    model.deployment.is_some() && model.takes_requests(endpoint)
}

impl Guard {
    /// With nothing missing. 0 percent: it never holds anything.
    pub fn new(max_loss_percent: u8) -> Self {
        Self { max_loss_percent: max_loss_percent.into(), ..Self::default() }
    }

    fn is_too_much(&self, lost: usize, of: usize) -> bool {
        self.max_loss_percent > 0 && lost * 100 > self.max_loss_percent * of
    }

    /// Whether models that took requests have vanished in a way that no deletion takes, and with them too much of the fleet.
    pub fn holds_all(&mut self, last: &Sources, view: &View) -> bool {
        self.all.clear();
        if view.let_pass > self.passed || last.models().len() <= view.models.len() {
            return false;
        }
        let gone = last.models().iter().filter(|(name, _)| !view.models.contains_key(*name));
        let lost: Vec<_> = gone.flat_map(|(_, model)| ready(model)).collect();
        let models: BTreeSet<&str> = lost.iter().map(|endpoint| endpoint.model.as_str()).collect();
        if !self.is_too_much(lost.len(), self.ready) || nodes(lost.iter().copied()) < 2 {
            return false;
        }
        self.all = format!(
            "{} models with {} of {} endpoints that took requests are not in the store any more, without having been \
             drained: proxies keep what they have",
            models.len(),
            lost.len(),
            self.ready
        );
        true
    }

    /// Takes changed models in, each with what it was. The pools whose table changes by what is held now, or is not any
    /// more, among others.
    pub fn look(&mut self, changed: &[(String, Option<Arc<ModelView>>)], view: &View) -> Vec<String> {
        let mut touched = Vec::new();
        if view.let_pass > self.passed {
            self.passed = view.let_pass;
            touched.extend(std::mem::take(&mut self.pools).into_keys());
        }
        let nothing = ModelView::default();
        for (name, before) in changed {
            let before = before.as_deref().unwrap_or(&nothing);
            let after = view.models.get(name).map_or(&nothing, |model| model);
            let serving = ready(after).count();
            self.ready = (self.ready + serving).saturating_sub(ready(before).count());
            let pool = self.pools.entry(name.clone()).or_default();
            pool.serves = serving > 0;
            let lost = ready(before).filter(|endpoint| !view.nodes.contains_key(&endpoint.node_id));
            pool.missing.extend(lost.map(|endpoint| (endpoint.replica_id.clone(), endpoint.clone())));
            pool.missing
                .retain(|id, endpoint| !after.endpoints.contains_key(id) && is_wanted(after, endpoint));
        }
        let missing = || self.pools.values().flat_map(|pool| pool.missing.values());
        let (lost, on_nodes) = (missing().count(), nodes(missing()));
        let fleet = on_nodes > 1 && self.is_too_much(lost, self.ready + lost);
        let guards = self.max_loss_percent > 0;
        for (name, pool) in &mut self.pools {
            let held = guards && !pool.missing.is_empty() && (fleet || !pool.serves);
            if std::mem::replace(&mut pool.held, held) != held {
                touched.push(name.clone());
            }
        }
        self.pools.retain(|_, pool| !pool.missing.is_empty());
        touched
    }

    /// Endpoints of a pool that stay in its table.
    pub fn kept(&self, pool: &str) -> impl Iterator<Item = &Arc<RegisteredEndpoint>> {
        self.pools.get(pool).filter(|pool| pool.held).into_iter().flat_map(|pool| pool.missing.values())
    }

    /// What is held.
    pub fn held(&self) -> Held {
        let held = self.pools.iter().filter(|(_, pool)| pool.held);
        Held {
            snapshot: self.all.clone(),
            pools: held.map(|(name, pool)| (name.clone(), pool.missing.len())).collect(),
        }
    }
}

fn nodes<'a>(endpoints: impl Iterator<Item = &'a Arc<RegisteredEndpoint>>) -> usize {
    endpoints.map(|endpoint| endpoint.node_id.as_str()).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
