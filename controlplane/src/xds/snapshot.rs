//! View → resources. Pure.
//!
//! Per model one pool of the model's name: its [`v1::EndpointTable`]. Per name that clients can ask for a
//! [`v1::ModelRoute`] ([`super::routes`]). A deployment without endpoints has a route and an empty table, so that proxies
//! answer "nobody serves it now" and not "no such model". A deleted one loses its route at once; its table stays while
//! engines are registered, which are draining by then.
//!
//! Cost: a changed model costs its own table; the others cost a pointer comparison. A snapshot remembers which
//! resources the last [`RECENT`] changes touched, so that a subscriber that keeps up never looks at the rest.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use penstock_proto::{
    Version, v1,
    xds::{ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE},
};
use prost::Message;
use xxhash_rust::xxh3::xxh3_64;

use super::routes::Sources;
use crate::view::{ModelView, View};

/// Changes that a snapshot remembers. A subscriber that is further behind compares everything once.
pub const RECENT: usize = 64;

/// The two types of resources, in the order in which they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`v1::EndpointTable`].
    Table,
    /// [`v1::ModelRoute`].
    Route,
}

impl Kind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Table, Self::Route];

    /// From its type URL.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }

    /// Its type URL.
    pub fn url(self) -> &'static str {
        match self {
            Self::Table => ENDPOINT_TABLE_TYPE,
            Self::Route => MODEL_ROUTE_TYPE,
        }
    }

    /// Its metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Table => "endpoint_table",
            Self::Route => "model_route",
        }
    }
}

/// One encoded resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Hash of `body`.
    pub version: Arc<str>,
    /// The protobuf message.
    pub body: Bytes,
    /// Of a route: the tables it needs.
    pub pools: Vec<String>,
}

impl Resource {
    fn of(message: &impl Message, pools: Vec<String>) -> Self {
        let body: Bytes = message.encode_to_vec().into();
        let version = format!("{:016x}", xxh3_64(&body)).into();
        Self { version, body, pools }
    }
}

/// What one published change touched.
#[derive(Debug, Clone)]
pub struct Change {
    /// The snapshot that brought it.
    pub sequence: u64,
    /// Names of tables and routes, changed or removed.
    pub names: Arc<[(Kind, String)]>,
}

/// Everything published, at one version. Immutable and shared.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// (term, revision) of the view it was made from.
    pub version: Version,
    /// Counts published snapshots of this process, from 1; 0 is the one before the first.
    pub sequence: u64,
    /// Tables by pool.
    pub tables: BTreeMap<String, Resource>,
    /// Routes by model.
    pub routes: BTreeMap<String, Resource>,
    /// The newest changes, oldest first.
    pub recent: VecDeque<Change>,
    /// What they were made from.
    sources: Sources,
}

impl Snapshot {
    /// Resources of a kind, by name.
    pub fn resources(&self, kind: Kind) -> &BTreeMap<String, Resource> {
        match kind {
            Kind::Table => &self.tables,
            Kind::Route => &self.routes,
        }
    }

    /// The snapshot that follows this one when the store looks like `view`.
    pub fn next(&self, view: &View, term: u64) -> Self {
        let mut next = self.clone();
        next.version = Version { term, revision: view.revision };
        next.sequence += 1;
        let changed = next.sources.update(view);
        let mut names = Vec::new();
        for model in changed.models {
            let table = next.sources.model(&model).and_then(|source| table(&model, source));
            put(&mut next.tables, (Kind::Table, model), table, &mut names);
        }
        for name in changed.names {
            let route = next.sources.route(&name).map(|route| {
                let pools = route.targets.iter().map(|target| target.pool.clone()).collect();
                Resource::of(&route, pools)
            });
            put(&mut next.routes, (Kind::Route, name), route, &mut names);
        }
        next.recent.push_back(Change { sequence: next.sequence, names: names.into() });
        while next.recent.len() > RECENT {
            next.recent.pop_front();
        }
        next
    }

    /// Whether every route has its tables; else the routes that lack one.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let lacks = |route: &Resource| route.pools.iter().any(|pool| !self.tables.contains_key(pool));
        let dangling: Vec<String> =
            self.routes.iter().filter(|(_, route)| lacks(route)).map(|(model, _)| model.clone()).collect();
        if dangling.is_empty() { Ok(()) } else { Err(dangling) }
    }
}

/// Notes a resource as it is now, and its name if it was another one.
fn put(
    resources: &mut BTreeMap<String, Resource>,
    (kind, name): (Kind, String),
    resource: Option<Resource>,
    names: &mut Vec<(Kind, String)>,
) {
    if resources.get(&name) == resource.as_ref() {
        return;
    }
    names.push((kind, name.clone()));
    match resource {
        Some(resource) => resources.insert(name, resource),
        None => resources.remove(&name),
    };
}

fn table(pool: &str, model: &ModelView) -> Option<Resource> {
    if model.deployment.is_none() && model.endpoints.is_empty() {
        return None;
    }
    let endpoints = model.endpoints.values().map(|endpoint| {
        let state = match model.deployment.is_some() && model.takes_requests(endpoint) {
            true => v1::EndpointState::Ready,
            false => v1::EndpointState::Draining,
        };
        v1::Endpoint {
            id: endpoint.replica_id.clone(),
            address: endpoint.address.clone(),
            generation: endpoint.generation,
            state: state.into(),
            zone: endpoint.zone.clone(),
            node_id: endpoint.node_id.clone(),
            adapters: endpoint.adapters.clone(),
        }
    });
    let wakes = model.deployment.as_ref().is_some_and(|stored| {
        stored.value.policy.autoscaling.as_ref().is_some_and(|autoscaling| autoscaling.min == 0)
    });
    let table = v1::EndpointTable { pool: pool.to_owned(), endpoints: endpoints.collect(), wakes };
    Some(Resource::of(&table, Vec::new()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        model::{Deployment, EngineSpec, RegisteredEndpoint},
        view::Stored,
    };

    /// A deployed model whose endpoints are registered without an assignment: so they are draining.
    pub(crate) fn model(name: &str, deployed: bool, endpoints: &[&str]) -> Arc<ModelView> {
        let spec = EngineSpec {
            engine: "sim".into(),
            model_path: name.into(),
            args: vec![],
            env: BTreeMap::new(),
            gpus_per_replica: 1,
            lora: vec![],
            resources: Default::default(),
        };
        let deployment = Deployment {
            model: name.into(),
            replicas: 1,
            spec,
            created_unix_s: 7,
            policy: Default::default(),
        };
        let endpoint = |id: &&str| RegisteredEndpoint {
            model: name.into(),
            replica_id: (*id).into(),
            generation: 1,
            address: "127.0.0.1:1".into(),
            pid: 1,
            node_id: "n".into(),
            zone: String::new(),
            adapters: vec![],
        };
        Arc::new(ModelView {
            deployment: deployed.then_some(Stored { value: deployment, mod_revision: 1, lease: 0 }),
            endpoints: endpoints.iter().map(|id| ((*id).to_owned(), Arc::new(endpoint(id)))).collect(),
            ..ModelView::default()
        })
    }

    pub(crate) fn view(revision: u64, models: &[(&str, &Arc<ModelView>)]) -> View {
        let models = models.iter().map(|(name, model)| ((*name).to_owned(), Arc::clone(model))).collect();
        View { revision, models, ..View::default() }
    }

    #[test]
    fn a_deployment_without_endpoints_has_a_route_and_an_empty_table() {
        let snapshot = Snapshot::default().next(&view(3, &[("m", &model("m", true, &[]))]), 2);
        assert_eq!(snapshot.version.to_string(), "2.3");
        let table = v1::EndpointTable::decode(snapshot.tables["m"].body.clone()).expect("valid");
        assert!(table.endpoints.is_empty());
        assert!(snapshot.routes.contains_key("m"));
        assert_eq!(snapshot.check(), Ok(()));
    }

    #[test]
    fn a_deleted_model_loses_its_route_first_and_its_table_with_its_last_endpoint() {
        let first = Snapshot::default().next(&view(1, &[("m", &model("m", true, &["m-0"]))]), 1);
        let second = first.next(&view(2, &[("m", &model("m", false, &["m-0"]))]), 1);
        assert!(second.routes.is_empty());
        let table = v1::EndpointTable::decode(second.tables["m"].body.clone()).expect("valid");
        assert_eq!(table.endpoints[0].state(), v1::EndpointState::Draining);
        let third = second.next(&view(3, &[]), 1);
        assert!(third.tables.is_empty());
        assert_eq!(third.recent.back().expect("kept").names.as_ref(), [(Kind::Table, "m".to_owned())]);
    }

    #[test]
    fn versions_are_of_the_content_alone() {
        let m = model("m", true, &["m-0"]);
        let first = Snapshot::default().next(&view(1, &[("m", &m)]), 1);
        let restarted = Snapshot::default().next(&view(9, &[("m", &m)]), 2);
        assert_eq!(first.tables, restarted.tables);
        let same = first.next(&view(2, &[("m", &Arc::new(ModelView::clone(&m)))]), 1);
        assert!(same.recent.back().expect("kept").names.is_empty(), "equal content is no change");
    }

    #[test]
    fn a_route_without_its_table_is_noticed() {
        let mut snapshot = Snapshot::default().next(&view(1, &[("m", &model("m", true, &[]))]), 1);
        snapshot.tables.clear();
        assert_eq!(snapshot.check(), Err(vec!["m".to_owned()]));
    }
}
