//! What subscribers are told: every resource, encoded once and shared by all of them.
//!
//! A snapshot remembers which resources the last [`RECENT`] changes touched, so that a subscriber that keeps up never
//! looks at the rest. [`super::project`] makes them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use penstock_proto::Version;
use prost::Message;
use xxhash_rust::xxh3::xxh3_64;

use super::kind::Kind;

/// Changes that a snapshot remembers. A subscriber that is further behind compares everything once.
pub const RECENT: usize = 64;

/// Resources of one kind, by name.
pub type Resources = BTreeMap<Arc<str>, Arc<Resource>>;

/// One encoded resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Hash of `body`.
    pub version: Arc<str>,
    /// The protobuf message.
    pub body: Bytes,
    /// What it refers to, by name; of which kinds, [`Kind::needs`] says.
    pub pools: Vec<Arc<str>>,
}

impl Resource {
    /// Encodes `message`.
    pub fn of(message: &impl Message, pools: Vec<Arc<str>>) -> Self {
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
    /// Names of resources, changed or removed.
    pub names: Arc<[(Kind, Arc<str>)]>,
}

/// Everything published, at one version. Immutable and shared; a clone costs a few pointers.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// (term, revision) of the view it was made from.
    pub version: Version,
    /// Counts published snapshots of this process, from 1; 0 is the one before the first.
    pub sequence: u64,
    /// By [`Kind::index`].
    resources: [Arc<Resources>; 6],
    /// The newest changes, oldest first.
    pub recent: VecDeque<Change>,
}

impl Snapshot {
    /// Resources of a kind.
    pub fn resources(&self, kind: Kind) -> &Resources {
        let [tables, routes, clusters, assignments, listeners, configs] = &self.resources;
        match kind {
            Kind::Table => tables,
            Kind::Route => routes,
            Kind::Cluster => clusters,
            Kind::Assignment => assignments,
            Kind::Listener => listeners,
            Kind::RouteConfig => configs,
        }
    }

    /// Puts a resource as it is now, or takes it out, and notes its name if it was another one.
    pub(super) fn put(
        &mut self,
        kind: Kind,
        name: &str,
        resource: Option<Resource>,
        changed: &mut Vec<(Kind, Arc<str>)>,
    ) {
        let before = self.resources(kind).get_key_value(name);
        if before.map(|(_, resource)| &**resource) == resource.as_ref() {
            return;
        }
        let name: Arc<str> = before.map_or_else(|| name.into(), |(name, _)| name.clone());
        changed.push((kind, name.clone()));
        let Some(resources) = self.resources.get_mut(kind.index()) else { return };
        let resources = Arc::make_mut(resources);
        match resource {
            Some(resource) => resources.insert(name, Arc::new(resource)),
            None => resources.remove(&name),
        };
    }

    /// Numbers it, and notes what its change touched.
    pub(super) fn seal(&mut self, version: Version, changed: Vec<(Kind, Arc<str>)>) {
        self.version = version;
        self.sequence += 1;
        self.recent.push_back(Change { sequence: self.sequence, names: changed.into() });
        while self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    /// Whether everything that the last change touched has what it refers to; else what lacks something, in words. Costs
    /// what changed, unless something that may be referred to was removed. `all`: whether everything is looked at, as after
    /// a snapshot that failed.
    pub fn check(&self, all: bool) -> Result<(), Vec<String>> {
        let lacks = |kind: Kind, resource: &Resource| {
            let mut needed =
                kind.needs().iter().flat_map(|needed| resource.pools.iter().map(move |p| (needed, p)));
            needed
                .find(|(needed, pool)| !self.resources(**needed).contains_key(*pool))
                .map(|(needed, pool)| format!("{} {pool:?}", needed.label()))
        };
        let Some(change) = self.recent.back() else { return Ok(()) };
        let gone = |kind: Kind| {
            change.names.iter().any(|(k, name)| *k == kind && !self.resources(kind).contains_key(name))
        };
        let mut dangling = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.needs().is_empty()) {
            let mut look = |name: &str, resource: &Resource| {
                if let Some(what) = lacks(kind, resource) {
                    dangling.push(format!("{} {name:?} lacks {what}", kind.label()));
                }
            };
            if all || kind.needs().iter().any(|needed| gone(*needed)) {
                self.resources(kind).iter().for_each(|(name, resource)| look(name, resource));
                continue;
            }
            for (_, name) in change.names.iter().filter(|(k, _)| *k == kind) {
                if let Some(resource) = self.resources(kind).get(name) {
                    look(name, resource);
                }
            }
        }
        if dangling.is_empty() { Ok(()) } else { Err(dangling) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_refers_to_nothing_is_noticed_whichever_of_the_two_changed() {
        let resource = |pools: &[&str]| {
            let pools = pools.iter().map(|pool| (*pool).into()).collect();
            Some(Resource { version: "1".into(), body: Bytes::new(), pools })
        };
        let mut snapshot = Snapshot::default();
        let mut changed = Vec::new();
        snapshot.put(Kind::Table, "m", resource(&[]), &mut changed);
        snapshot.put(Kind::Route, "m", resource(&["m"]), &mut changed);
        snapshot.seal(Version::default(), std::mem::take(&mut changed));
        assert_eq!(snapshot.check(false), Ok(()));
        let good = snapshot.clone();
        snapshot.put(Kind::Table, "m", None, &mut changed);
        snapshot.seal(Version::default(), std::mem::take(&mut changed));
        let error = "model_route \"m\" lacks endpoint_table \"m\"".to_owned();
        assert_eq!(snapshot.check(false), Err(vec![error.clone()]));
        snapshot.seal(Version::default(), Vec::new());
        assert_eq!((snapshot.check(false), snapshot.check(true)), (Ok(()), Err(vec![error])));
        let mut snapshot = good;
        snapshot.put(Kind::RouteConfig, "penstock", resource(&["m"]), &mut changed);
        snapshot.seal(Version::default(), changed);
        let error = "route_configuration \"penstock\" lacks cluster \"m\"".to_owned();
        assert_eq!(snapshot.check(false), Err(vec![error]));
    }
}
