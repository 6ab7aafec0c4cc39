//! View → snapshot.
//!
//! Per model one pool of the model's name: its [`v1::EndpointTable`]. Per name that clients can ask for a
//! [`v1::ModelRoute`] ([`super::routes`]). A deployment without endpoints has a route and an empty table, so that proxies
//! answer "nobody serves it now" and not "no such model". A deleted one loses its route at once; its table stays while
//! engines are registered, which are draining by then. The same for a stock Envoy is made by [`super::envoy`]. What the
//! [`super::guard`] holds stays in the tables. What becomes of streams is said by `super::departure`.
//!
//! Cost: a changed model costs its own resources, once for all subscribers; the others cost a pointer comparison.

use std::sync::Arc;

use penstock_config::controlplane::XdsConfig;
use penstock_proto::{Version, v1};

use super::{
    departure,
    envoy::Envoy,
    guard::{Guard, Held},
    kind::Kind,
    routes::Sources,
    snapshot::{Resource, Snapshot},
};
use crate::view::{ModelView, View};

/// Makes each snapshot out of the one before and the view.
#[derive(Debug, Default)]
pub struct Projector {
    sources: Sources,
    guard: Guard,
    envoy: Option<Envoy>,
}

impl Projector {
    /// Nothing was projected yet.
    pub fn new(config: &XdsConfig) -> Self {
        let guard = Guard::new(config.guard_max_loss_percent);
        Self { sources: Sources::default(), guard, envoy: Envoy::new(&config.envoy) }
    }

    /// The snapshot that follows `last` when the store looks like `view`; None while the guard holds all of it.
    pub fn next(&mut self, last: &Snapshot, view: &View) -> Option<Snapshot> {
        if self.guard.holds_all(&self.sources, view) {
            return None;
        }
        let mut next = last.clone();
        let changed = self.sources.update(view);
        let mut models = self.guard.look(&changed.models, view);
        models.extend(changed.models.into_iter().map(|(name, _)| name));
        models.sort_unstable();
        models.dedup();
        let mut names = Vec::new();
        for model in &models {
            let table = table(model, self.sources.model(model), &self.guard);
            if let Some(envoy) = &self.envoy {
                envoy.put_pool(model, table.as_ref(), &mut next, &mut names);
            }
            let table = table.map(|table| Resource::of(&table, Vec::new()));
            next.put(Kind::Table, model, table, &mut names);
        }
        for name in changed.names {
            let route = self.sources.route(&name);
            if let Some(envoy) = &mut self.envoy {
                envoy.note_route(&name, route.as_ref());
            }
            let route = route.map(|route| {
                let pools = route.targets.iter().map(|target| target.pool.as_str().into()).collect();
                Resource::of(&route, pools)
            });
            next.put(Kind::Route, &name, route, &mut names);
        }
        if let Some(envoy) = &mut self.envoy {
            envoy.put_front(&mut next, &mut names);
        }
        next.seal(Version { term: view.published_term(), revision: view.revision }, names);
        Some(next)
    }

    /// What the guard holds at the moment.
    pub fn held(&self) -> Held {
        self.guard.held()
    }
}

/// The table of a pool: registered endpoints, and those that the guard holds.
fn table(pool: &str, model: Option<&Arc<ModelView>>, guard: &Guard) -> Option<v1::EndpointTable> {
    let registered = model.into_iter().flat_map(|model| model.endpoints.values().map(move |e| (model, e)));
    let mut endpoints: Vec<v1::Endpoint> = registered
        .map(|(model, endpoint)| {
            let ready = model.deployment.is_some() && model.takes_requests(endpoint);
            let state = if ready { v1::EndpointState::Ready } else { v1::EndpointState::Draining };
            v1::Endpoint { departure: departure::of(model, endpoint), ..on_wire(endpoint, state) }
        })
        .collect();
    endpoints.extend(guard.kept(pool).map(|endpoint| on_wire(endpoint, v1::EndpointState::Ready)));
    endpoints.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    let deployed = model.is_some_and(|model| model.deployment.is_some());
    let autoscaling = |model: &Arc<ModelView>| model.deployment.as_ref()?.value.policy.autoscaling.clone();
    let wakes = model.and_then(autoscaling).is_some_and(|autoscaling| autoscaling.min == 0);
    let departing = model.map(|model| departure::departing(model)).unwrap_or_default();
    (deployed || !endpoints.is_empty()).then(|| v1::EndpointTable {
        pool: pool.to_owned(),
        endpoints,
        wakes,
        departing,
    })
}

fn on_wire(endpoint: &crate::model::RegisteredEndpoint, state: v1::EndpointState) -> v1::Endpoint {
    v1::Endpoint {
        id: endpoint.replica_id.clone(),
        address: endpoint.address.clone(),
        generation: endpoint.generation,
        state: state.into(),
        zone: endpoint.zone.clone(),
        node_id: endpoint.node_id.clone(),
        adapters: endpoint.adapters.clone(),
        weight_percent: endpoint.weight_percent,
        departure: None,
        drain_ms: endpoint.drain_ms,
    }
}

#[cfg(test)]
#[path = "project_tests.rs"]
pub(crate) mod tests;
