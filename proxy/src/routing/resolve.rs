//! From the name that a client asked for to the places that may answer, in the order in which they are tried. Pure.
//!
//! A route's targets share its requests by weight. Which one comes first is decided by weighted rendezvous hashing: each
//! target gets a score from its weight and a draw, the best wins. The draw is the session's hash where there is one, so that a
//! session stays on its side of a split, on every proxy with the same `routing.hash_key`; and when weights change, or a
//! target goes, only the sessions move that must (a running sum of weights would move others, too). Without a session the
//! draw is random, and shares are exact on average.
//!
//! After the first come the other targets that have a weight, by their scores, then the fallbacks' targets, in the order of the
//! route's list, each followed by its own fallbacks. A name is looked at once, so cycles end; depth and length are
//! bounded, whatever the tables say.
//!
//! A target without weight is passed over, unless all are: weights are shares of what is there.

use std::{collections::BTreeMap, sync::Arc};

use super::affinity::{HashKey, mix};
use crate::endpoints::{Route, table::Target};

/// Places tried for one request, at most.
pub const MAX_STEPS: usize = 16;

/// Fallbacks of fallbacks, at most.
pub const MAX_DEPTH: usize = 4;

/// One place to try.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Where.
    pub target: Arc<Target>,
    /// It is there only because the route's own targets could not answer.
    pub fallback: bool,
}

/// The places for `model` in order; `None` if there is no such route. `draw` is the session's keyed hash, or random.
pub fn resolve(
    routes: &BTreeMap<String, Arc<Route>>,
    model: &str,
    key: HashKey,
    draw: u64,
) -> Option<Vec<Step>> {
    let route = routes.get(model)?;
    let mut plan = Plan { routes, key, draw, seen: Vec::new(), steps: Vec::new() };
    plan.visit(route, 0);
    Some(plan.steps)
}

struct Plan<'a> {
    routes: &'a BTreeMap<String, Arc<Route>>,
    key: HashKey,
    draw: u64,
    /// Names looked at. A handful: no set is faster.
    seen: Vec<&'a str>,
    steps: Vec<Step>,
}

impl<'a> Plan<'a> {
    fn visit(&mut self, route: &'a Arc<Route>, depth: usize) {
        if self.seen.contains(&&*route.model) {
            return;
        }
        self.seen.push(&route.model);
        for target in self.ordered(&route.targets) {
            let there = self.steps.iter().any(|step| step.target.same_place(&target));
            if !there && self.steps.len() < MAX_STEPS {
                self.steps.push(Step { target, fallback: depth > 0 });
            }
        }
        if depth == MAX_DEPTH {
            return;
        }
        for name in &route.fallbacks {
            if self.steps.len() == MAX_STEPS {
                return;
            }
            if let Some(next) = self.routes.get(name) {
                self.visit(next, depth + 1);
            }
        }
    }

    /// The targets that may answer, the best score first.
    fn ordered(&self, targets: &[Arc<Target>]) -> Vec<Arc<Target>> {
        if let [only] = targets {
            return vec![Arc::clone(only)];
        }
        let weightless = targets.iter().all(|target| target.weight == 0);
        let mut scored: Vec<(f64, &Arc<Target>)> = targets
            .iter()
            .map(|target| (target, if weightless { 1 } else { target.weight }))
            .filter(|(_, weight)| *weight > 0)
            .map(|(target, weight)| (self.score(target, weight), target))
            .collect();
        scored.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        scored.into_iter().map(|(_, target)| Arc::clone(target)).collect()
    }

    /// Smaller is better. Of exponentially distributed scores with these rates, each is the smallest with a chance of its
    /// rate's share.
    fn score(&self, target: &Target, weight: u32) -> f64 {
        let name = self.key.endpoint(&target.pool, self.key.hash(target.served_model.as_bytes()));
        // In the middle of its step: never 0, never 1.
        let bits = u32::try_from(mix(self.draw, name) >> 32).unwrap_or(u32::MAX);
        let uniform = (f64::from(bits) + 0.5) / (f64::from(u32::MAX) + 1.0);
        -uniform.ln() / f64::from(weight)
    }
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
