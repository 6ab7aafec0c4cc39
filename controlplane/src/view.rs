//! The store's content as typed values: one immutable [`View`] per revision, kept up by a watch.
//!
//! Everything that reads (plan, sessions, xDS, REST) reads a view, so that it sees one revision, and so that a store
//! that cannot be read leaves the last good view in place: an empty view is never made out of a failed read. Everything
//! that writes compares revisions, so a view that lags costs a retry and nothing else.
//!
//! Views share what did not change: an update costs the changed models plus one pointer per model and node.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::{
    access::StoredToken,
    leadership::{Leader, number},
    metrics::Metrics,
    model::{
        Assignment, Deployment, Node, NodePolicy, Phase, Placement, RegisteredEndpoint, Route, desired::Drain,
    },
    store::{Entry, Event, LeaseId, Revision, Store, StoreError, keys},
};

/// A value and where it stands in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<T> {
    /// The value.
    pub value: T,
    /// Revision of its last write.
    pub mod_revision: Revision,
    /// The lease it hangs on, or 0.
    pub lease: LeaseId,
}

/// Everything about one model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelView {
    /// What is wanted; None once deleted.
    pub deployment: Option<Stored<Deployment>>,
    /// Where its replicas belong.
    pub placement: Option<Stored<Placement>>,
    /// Engines that are registered, by replica.
    pub endpoints: BTreeMap<String, Arc<RegisteredEndpoint>>,
    /// Replicas that an operator drains, and how.
    pub drains: BTreeMap<String, Drain>,
    /// Generation of each active assignment that is to serve, by replica: not of those that shall sleep.
    pub generations: BTreeMap<String, u64>,
}

impl ModelView {
    /// Whether a replica takes new requests: registered, for the present generation of an active assignment, not
    /// drained.
    pub fn takes_requests(&self, endpoint: &RegisteredEndpoint) -> bool {
        let present = self.generations.get(&endpoint.replica_id) == Some(&endpoint.generation);
        present && !self.drains.contains_key(&endpoint.replica_id)
    }

    /// Names of its LoRA adapters while it is deployed: those it shall have and those that engines say they have.
    pub fn adapters(&self) -> BTreeSet<&str> {
        let Some(deployment) = &self.deployment else { return BTreeSet::new() };
        let wanted = deployment.value.spec.lora.iter().map(|adapter| adapter.name.as_str());
        let loaded = self.endpoints.values().flat_map(|endpoint| &endpoint.adapters).map(String::as_str);
        wanted.chain(loaded).collect()
    }

    fn is_empty(&self) -> bool {
        self.deployment.is_none()
            && self.placement.is_none()
            && self.endpoints.is_empty()
            && self.drains.is_empty()
    }
}

/// What has a place on one node, by replica: the model's name and the assignment. Leaving ones are among them.
pub type NodeAssignments = BTreeMap<String, (String, Assignment)>;

/// The store at one revision.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The revision.
    pub revision: Revision,
    /// By name: every model that has any key.
    pub models: BTreeMap<String, Arc<ModelView>>,
    /// Routes that were made, by name; deployments have implicit ones besides.
    pub routes: BTreeMap<String, Arc<Stored<Route>>>,
    /// Nodes that are present.
    pub nodes: BTreeMap<String, Arc<Stored<Node>>>,
    /// What operators say of nodes, present or not.
    pub node_policies: BTreeMap<String, Arc<Stored<NodePolicy>>>,
    /// Tokens of the REST API, by name.
    pub tokens: BTreeMap<String, Arc<Stored<StoredToken>>>,
    /// Assignments by node.
    pub by_node: BTreeMap<String, Arc<NodeAssignments>>,
    /// The last term that anybody took; the revision belongs to it.
    pub term: u64,
    /// What a restore put before the terms of this store.
    pub term_base: u64,
    /// Who leads; None while nobody does.
    pub leader: Option<Stored<Leader>>,
    /// Revision of the last word of an operator that lets pass what is held back from proxies.
    pub let_pass: Revision,
    /// The last generation given out.
    pub last_generation: u64,
    /// Revision of the key that holds it; 0 if there is none yet.
    pub generation_revision: Revision,
    /// None: the store is followed. Else since when it is not: what is here may have passed.
    pub unfollowed_since: Option<Instant>,
}

/// What a key stands for; remembered because a deletion names only the key.
#[derive(Debug, Clone)]
enum Slot {
    Deployment(String),
    Placement(String),
    Endpoint(String, String),
    Drain(String, String),
    Node(String),
    NodePolicy(String),
    Route(String),
    Token(String),
    Generation,
    LetPass,
    Leader,
    Term,
    TermBase,
}

impl View {
    /// The term as agents, proxies and operators know it: it never falls, not even when a backup was restored into a new
    /// store.
    pub fn published_term(&self) -> u64 {
        self.term.saturating_add(self.term_base)
    }

    /// Where a node stands: what an operator says, by the label "zone", before what its agent says. Endpoints of this view
    /// have it already.
    pub fn zone_of(&self, node_id: &str) -> Option<&str> {
        let said = self.node_policies.get(node_id).and_then(|policy| policy.value.labels.get("zone"));
        said.or_else(|| self.nodes.get(node_id).map(|node| &node.value.zone)).map(String::as_str)
    }
}

/// Makes views out of entries and events.
#[derive(Debug, Default)]
struct Builder {
    view: View,
    slots: HashMap<String, Slot>,
}

impl Builder {
    /// Takes one entry in. On an error the key keeps what it stood for before.
    fn put(&mut self, entry: &Entry) -> Result<(), StoreError> {
        let key = entry.key.as_str();
        let slot = if key.starts_with(keys::DEPLOYMENTS) {
            let deployment: Stored<Deployment> = read(entry)?;
            let name = deployment.value.model.clone();
            self.model(&name).deployment = Some(deployment);
            Slot::Deployment(name)
        } else if key.starts_with(keys::PLACEMENTS) {
            let placement: Stored<Placement> = read(entry)?;
            let name = placement.value.model.clone();
            self.set_placement(&name, Some(placement));
            Slot::Placement(name)
        } else if key.starts_with(keys::ENDPOINTS) {
            let mut endpoint: RegisteredEndpoint = read(entry)?.value;
            if let Some(zone) = self.view.zone_of(&endpoint.node_id) {
                zone.clone_into(&mut endpoint.zone);
            }
            let (name, id) = (endpoint.model.clone(), endpoint.replica_id.clone());
            self.model(&name).endpoints.insert(id.clone(), Arc::new(endpoint));
            Slot::Endpoint(name, id)
        } else if key.starts_with(keys::DRAINS) {
            let drain: Drain = read(entry)?.value;
            let (name, id) = (drain.model.clone(), drain.replica_id.clone());
            self.model(&name).drains.insert(id.clone(), drain);
            Slot::Drain(name, id)
        } else if key.starts_with(keys::ROUTES) {
            let route: Stored<Route> = read(entry)?;
            let name = route.value.name.clone();
            self.view.routes.insert(name.clone(), Arc::new(route));
            Slot::Route(name)
        } else if key.starts_with(keys::NODES) {
            let node: Stored<Node> = read(entry)?;
            let name = node.value.node_id.clone();
            self.view.nodes.insert(name.clone(), Arc::new(node));
            self.stands_elsewhere(&name);
            Slot::Node(name)
        } else if key.starts_with(keys::NODE_POLICIES) {
            let policy: Stored<NodePolicy> = read(entry)?;
            let name = policy.value.node_id.clone();
            self.view.node_policies.insert(name.clone(), Arc::new(policy));
            self.stands_elsewhere(&name);
            Slot::NodePolicy(name)
        } else if key.starts_with(keys::TOKENS) {
            let token: Stored<StoredToken> = read(entry)?;
            let name = token.value.name.clone();
            self.view.tokens.insert(name.clone(), Arc::new(token));
            Slot::Token(name)
        } else if key == keys::GENERATION {
            self.view.last_generation = number(&entry.value, key)?;
            self.view.generation_revision = entry.mod_revision;
            Slot::Generation
        } else if key == keys::LET_PASS {
            self.view.let_pass = entry.mod_revision;
            Slot::LetPass
        } else if key == keys::LEADER {
            self.view.leader = Some(read(entry)?);
            Slot::Leader
        } else if key == keys::TERM {
            self.view.term = entry.mod_revision;
            Slot::Term
        } else if key == keys::TERM_BASE {
            self.view.term_base = number(&entry.value, key)?;
            Slot::TermBase
        } else {
            return Ok(());
        };
        self.slots.insert(entry.key.clone(), slot);
        Ok(())
    }

    fn delete(&mut self, key: &str) {
        match self.slots.remove(key) {
            Some(Slot::Deployment(name)) => self.model(&name).deployment = None,
            Some(Slot::Placement(name)) => self.set_placement(&name, None),
            Some(Slot::Endpoint(name, id)) => drop(self.model(&name).endpoints.remove(&id)),
            Some(Slot::Drain(name, id)) => drop(self.model(&name).drains.remove(&id)),
            Some(Slot::Node(name)) => drop(self.view.nodes.remove(&name)),
            Some(Slot::NodePolicy(name)) => {
                self.view.node_policies.remove(&name);
                self.stands_elsewhere(&name);
            }
            Some(Slot::Route(name)) => drop(self.view.routes.remove(&name)),
            Some(Slot::Token(name)) => drop(self.view.tokens.remove(&name)),
            Some(Slot::Generation) => (self.view.last_generation, self.view.generation_revision) = (0, 0),
            Some(Slot::Leader) => self.view.leader = None,
            // None of them ever falls.
            Some(Slot::Term | Slot::TermBase | Slot::LetPass) | None => {}
        }
        self.view.models.retain(|_, model| !model.is_empty());
    }

    fn model(&mut self, name: &str) -> &mut ModelView {
        Arc::make_mut(self.view.models.entry(name.to_owned()).or_default())
    }

    /// Brings the zone of a node's endpoints up to date; models without any there stay the same value.
    fn stands_elsewhere(&mut self, node_id: &str) {
        let Some(zone) = self.view.zone_of(node_id).map(str::to_owned) else { return };
        let is_wrong = |e: &Arc<RegisteredEndpoint>| e.node_id == node_id && e.zone != zone;
        for model in self.view.models.values_mut().filter(|model| model.endpoints.values().any(is_wrong)) {
            for endpoint in Arc::make_mut(model).endpoints.values_mut().filter(|e| is_wrong(e)) {
                Arc::make_mut(endpoint).zone.clone_from(&zone);
            }
        }
    }

    fn set_placement(&mut self, name: &str, placement: Option<Stored<Placement>>) {
        let by_id = |placement: &Option<Stored<Placement>>| -> BTreeMap<String, Assignment> {
            let all = placement.iter().flat_map(|p| &p.value.assignments);
            all.map(|a| (a.replica_id.clone(), a.clone())).collect()
        };
        let after = by_id(&placement);
        let model = self.model(name);
        let active = after.values().filter(|a| a.phase == Phase::Active && !a.asleep);
        model.generations = active.map(|a| (a.replica_id.clone(), a.generation)).collect();
        let before = by_id(&std::mem::replace(&mut model.placement, placement));
        for (id, assignment) in before.iter().filter(|(id, a)| after.get(*id) != Some(*a)) {
            if let Some(on_node) = self.view.by_node.get_mut(&assignment.node_id) {
                Arc::make_mut(on_node).remove(id);
            }
        }
        for (id, assignment) in after.into_iter().filter(|(id, a)| before.get(id) != Some(a)) {
            let on_node = self.view.by_node.entry(assignment.node_id.clone()).or_default();
            Arc::make_mut(on_node).insert(id, (name.to_owned(), assignment));
        }
        self.view.by_node.retain(|_, on_node| !on_node.is_empty());
    }
}

fn read<T: DeserializeOwned>(entry: &Entry) -> Result<Stored<T>, StoreError> {
    let value = serde_json::from_slice(&entry.value)
        .map_err(|e| StoreError::Open(format!("the store's key {} cannot be read: {e}", entry.key)))?;
    Ok(Stored { value, mod_revision: entry.mod_revision, lease: entry.lease })
}

/// Keeps the view up to date.
pub struct ViewKeeper {
    store: Arc<dyn Store>,
    metrics: Arc<Metrics>,
    builder: Builder,
    views: watch::Sender<Arc<View>>,
}

impl ViewKeeper {
    /// Nothing was read yet: views begin with one of revision 0, which says nothing.
    pub fn new(store: Arc<dyn Store>, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics, builder: Builder::default(), views: watch::Sender::new(Arc::default()) }
    }

    /// Reads the whole store once.
    pub async fn load(&mut self) -> Result<(), StoreError> {
        self.list().await
    }

    /// Follows the views.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.views.subscribe()
    }

    /// Follows the store for ever. While it cannot be read the last view stands.
    pub async fn run(mut self) {
        let mut pause = Duration::from_millis(50);
        while self.builder.view.revision == 0 {
            match self.list().await {
                Ok(()) => break,
                Err(error) => tracing::warn!(%error, "the store cannot be read yet; trying again"),
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
        pause = Duration::from_millis(50);
        loop {
            match self.follow().await {
                Ok(()) => pause = Duration::from_millis(50),
                Err(error) => {
                    tracing::warn!(%error, "the store cannot be followed; the last view stands");
                    if self.builder.view.unfollowed_since.is_none() {
                        self.builder.view.unfollowed_since = Some(Instant::now());
                        self.publish();
                    }
                    tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
            }
            self.metrics.view_resyncs.inc();
            if let Err(error) = self.list().await {
                tracing::warn!(%error, "the store cannot be listed; the last view stands");
            }
        }
    }

    /// Until the watch ends: Ok when events were lost to compaction.
    async fn follow(&mut self) -> Result<(), StoreError> {
        let mut watch = self.store.watch(keys::ROOT, self.builder.view.revision + 1).await?;
        while let Some(batch) = watch.next().await {
            let batch = match batch {
                Ok(batch) => batch,
                Err(crate::store::WatchError::Compacted { .. }) => return Ok(()),
                Err(broken) => return Err(StoreError::Unavailable(broken.to_string())),
            };
            for event in &batch.events {
                match event {
                    Event::Put(entry) => self.put(entry),
                    Event::Delete { key, .. } => self.builder.delete(key),
                }
            }
            self.builder.view.revision = batch.revision;
            self.publish();
        }
        Err(StoreError::Unavailable("the watch ended".into()))
    }

    async fn list(&mut self) -> Result<(), StoreError> {
        let listing = self.store.list(keys::ROOT).await?;
        if listing.revision < self.builder.view.revision {
            let (now, had) = (listing.revision, self.builder.view.revision);
            return Err(StoreError::Rewound(format!("it is at revision {now} and was at {had}")));
        }
        self.builder = Builder::default();
        for entry in &listing.entries {
            self.put(entry);
        }
        self.builder.view.revision = listing.revision;
        self.publish();
        Ok(())
    }

    fn put(&mut self, entry: &Entry) {
        if let Err(error) = self.builder.put(entry) {
            self.metrics.view_unreadable.inc();
            tracing::error!(%error, "a stored value was passed over");
        }
    }

    fn publish(&self) {
        self.views.send_replace(Arc::new(self.builder.view.clone()));
    }
}

/// Waits, for a second at most, until the view has reached `revision`: so that what was written can be read.
pub async fn reached(views: &watch::Receiver<Arc<View>>, revision: Revision) {
    let mut views = views.clone();
    let waiting = views.wait_for(|view| view.revision >= revision);
    if tokio::time::timeout(Duration::from_secs(1), waiting).await.is_err() {
        tracing::warn!(revision, "the view lags behind the store by more than a second");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: String, value: &str, mod_revision: u64) -> Entry {
        let value = value.to_owned().into();
        Entry { key, value, create_revision: 1, mod_revision, version: 1, lease: 0 }
    }

    const PLACED: &str = r#"{"model":"a/b","slug":"a-b","next_ordinal":1,"assignments":[{"replica_id":"a-b-0",
        "generation":1,"node_id":"n","gpu_uuids":["g"],"phase":"active",
        "spec":{"engine":"sim","model_path":"p","gpus_per_replica":1}}]}"#;

    #[test]
    fn assignments_are_found_by_node_and_leave_with_their_placement() {
        let mut builder = Builder::default();
        builder.put(&entry(keys::placement("a/b"), PLACED, 1)).expect("valid");
        assert!(builder.view.by_node["n"].contains_key("a-b-0"));
        assert!(builder.view.models["a/b"].generations.contains_key("a-b-0"));
        let leaving = PLACED.replace("active", "leaving");
        builder.put(&entry(keys::placement("a/b"), &leaving, 2)).expect("valid");
        assert_eq!(builder.view.by_node["n"]["a-b-0"].1.phase, Phase::Leaving);
        assert!(builder.view.models["a/b"].generations.is_empty());
        builder.delete(&keys::placement("a/b"));
        assert!(builder.view.models.is_empty() && builder.view.by_node.is_empty());
    }

    #[test]
    fn an_unreadable_value_leaves_what_was_there() {
        let mut builder = Builder::default();
        builder.put(&entry(keys::placement("a/b"), PLACED, 1)).expect("valid");
        builder.put(&entry(keys::placement("a/b"), "{garbage", 2)).expect_err("garbage");
        assert_eq!(builder.view.models["a/b"].placement.as_ref().expect("kept").mod_revision, 1);
    }

    #[test]
    fn an_operators_zone_goes_before_the_agents_and_comes_off_again() {
        let mut builder = Builder::default();
        let endpoint = r#"{"model":"m","replica_id":"m-0","generation":1,"address":"h:1","pid":1,"node_id":"n","zone":"a"}"#;
        let other = endpoint.replace("m-0", "m-1").replace("\"n\"", "\"other\"");
        for (id, value) in [("m-0", endpoint), ("m-1", &other)] {
            builder.put(&entry(keys::endpoint("m", id), value, 1)).expect("valid");
        }
        builder.put(&entry(keys::node("n"), r#"{"node_id":"n","zone":"a"}"#, 2)).expect("valid");
        let zones = |view: &View| {
            let of = |id: &str| view.models["m"].endpoints[id].zone.clone();
            (view.zone_of("n").map(str::to_owned), of("m-0"), of("m-1"))
        };
        let untouched = builder.view.models["m"].clone();
        let policy = r#"{"node_id":"n","labels":{"zone":"b"}}"#;
        builder.put(&entry(keys::node_policy("n"), policy, 3)).expect("valid");
        assert_eq!(zones(&builder.view), (Some("b".into()), "b".into(), "a".into()));
        // Registered again, by an agent that knows nothing of it.
        builder.put(&entry(keys::endpoint("m", "m-0"), endpoint, 4)).expect("valid");
        assert_eq!(zones(&builder.view).1, "b");
        builder.delete(&keys::node_policy("n"));
        assert_eq!(zones(&builder.view), (Some("a".into()), "a".into(), "a".into()));
        assert_eq!(builder.view.models["m"], untouched);
    }

    #[test]
    fn views_share_what_did_not_change() {
        let mut builder = Builder::default();
        builder.put(&entry(keys::placement("a/b"), PLACED, 1)).expect("valid");
        let before = builder.view.clone();
        builder.put(&entry(keys::GENERATION.into(), "7", 2)).expect("valid");
        assert!(Arc::ptr_eq(&before.models["a/b"], &builder.view.models["a/b"]));
        assert_eq!(builder.view.last_generation, 7);
    }
}
