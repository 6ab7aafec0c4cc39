//! Where each name leads, as proxies are told. Pure.
//!
//! Three kinds of names, the first that has a name wins: routes that an operator made, deployments (each has an implicit route to
//! itself), LoRA adapters (to every deployment that has one of that name). An adapter whose name is taken is served under
//! no other; the API reports it.
//!
//! What a route refers to and is not there is left out. A route that then leads nowhere is not told at all: proxies answer that
//! there is no such model.
//!
//! Cost: a changed model costs its own names and the routes that target one of them, not the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use penstock_proto::v1;

use crate::{
    model::{Deployment, Route},
    view::{ModelView, Stored, View},
};

/// What routes were made from the last time.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    models: BTreeMap<String, Arc<ModelView>>,
    routes: BTreeMap<String, Arc<Stored<Route>>>,
    /// Which deployments have an adapter, by its name.
    adapters: BTreeMap<String, BTreeSet<String>>,
}

/// What differs from the last time.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Models, in any way, each with what it was before.
    pub models: Vec<(String, Option<Arc<ModelView>>)>,
    /// Names whose route may be another one.
    pub names: BTreeSet<String>,
}

impl Sources {
    /// Takes the view in and says what changed.
    pub fn update(&mut self, view: &View) -> Changed {
        let mut changed = Changed::default();
        let same = |name: &String, model: &Arc<ModelView>| {
            self.models.get(name).is_some_and(|before| Arc::ptr_eq(before, model))
        };
        let new = view.models.iter().filter(|(name, model)| !same(name, model)).map(|(name, _)| name);
        let gone = self.models.keys().filter(|name| !view.models.contains_key(*name));
        let names: Vec<String> = new.chain(gone).cloned().collect();
        for name in names {
            let after = view.models.get(&name);
            let before = match after {
                Some(model) => self.models.insert(name.clone(), model.clone()),
                None => self.models.remove(&name),
            };
            changed.names.insert(name.clone());
            let (had, has) = (names_of(before.as_ref()), names_of(after));
            for adapter in had.difference(&has) {
                if let Some(models) = self.adapters.get_mut(adapter) {
                    models.remove(&name);
                }
                self.adapters.retain(|_, models| !models.is_empty());
            }
            for adapter in has.difference(&had) {
                self.adapters.entry(adapter.clone()).or_default().insert(name.clone());
            }
            changed.names.extend(had.into_iter().chain(has));
            changed.models.push((name, before));
        }
        let targets_any = |route: &Arc<Stored<Route>>| {
            route.value.targets.iter().any(|target| changed.names.contains(&target.model))
        };
        let touched: Vec<String> = view
            .routes
            .iter()
            .filter(|(_, route)| targets_any(route))
            .map(|(name, _)| name.clone())
            .collect();
        changed.names.extend(touched);
        let same = |name: &String, route: &Arc<Stored<Route>>| {
            self.routes.get(name).is_some_and(|before| Arc::ptr_eq(before, route))
        };
        changed.names.extend(view.routes.iter().filter(|(n, r)| !same(n, r)).map(|(name, _)| name.clone()));
        changed.names.extend(self.routes.keys().filter(|name| !view.routes.contains_key(*name)).cloned());
        if !changed.names.is_empty() {
            self.routes.clone_from(&view.routes);
        }
        changed
    }

    /// Every model.
    pub fn models(&self) -> &BTreeMap<String, Arc<ModelView>> {
        &self.models
    }

    /// The view of a model.
    pub fn model(&self, name: &str) -> Option<&Arc<ModelView>> {
        self.models.get(name)
    }

    /// Where `name` leads, if anywhere.
    pub fn route(&self, name: &str) -> Option<v1::ModelRoute> {
        let mut route = v1::ModelRoute { model: name.to_owned(), ..v1::ModelRoute::default() };
        if let Some(made) = self.routes.get(name) {
            let made = &made.value;
            route.targets = made.targets.iter().filter_map(|t| self.target(&t.model, t.weight)).collect();
            route.fallbacks.clone_from(&made.fallbacks);
            route.created_unix_s = made.created_unix_s;
        } else if let Some(deployment) = self.deployment(name) {
            route.targets.extend(self.target(name, 1));
            route.created_unix_s = deployment.created_unix_s;
        } else {
            let models = self.adapters.get(name)?;
            route.targets = models.iter().map(|model| adapter_target(model, name, 1)).collect();
            route.parent.clone_from(models.first()?);
            route.created_unix_s = self.deployment(&route.parent)?.created_unix_s;
        }
        // Proxies of before there were targets look at one alone.
        if let Some(main) = route.targets.iter().find(|t| t.weight > 0).or(route.targets.first()).cloned() {
            (route.pool, route.served_model) = (main.pool, main.served_model);
        }
        (!route.targets.is_empty() || !route.fallbacks.is_empty()).then_some(route)
    }

    fn deployment(&self, name: &str) -> Option<&Deployment> {
        self.models.get(name)?.deployment.as_ref().map(|stored| &stored.value)
    }

    /// An adapter that several deployments have is served by the first of them.
    fn target(&self, name: &str, weight: u32) -> Option<v1::RouteTarget> {
        if self.deployment(name).is_some() {
            let (pool, served_model) = (name.to_owned(), name.to_owned());
            return Some(v1::RouteTarget { pool, served_model, weight, adapter: String::new() });
        }
        Some(adapter_target(self.adapters.get(name)?.first()?, name, weight))
    }
}

fn adapter_target(pool: &str, adapter: &str, weight: u32) -> v1::RouteTarget {
    let (served_model, adapter) = (adapter.to_owned(), adapter.to_owned());
    v1::RouteTarget { pool: pool.to_owned(), served_model, weight, adapter }
}

fn names_of(model: Option<&Arc<ModelView>>) -> BTreeSet<String> {
    model.map(|model| model.adapters().into_iter().map(str::to_owned).collect()).unwrap_or_default()
}
