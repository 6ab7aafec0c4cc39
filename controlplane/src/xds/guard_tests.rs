//! What is held, and what is not.

use super::*;
use crate::{
    model::{Deployment, EngineSpec, desired::Drain},
    view::Stored,
    xds::project::Projector,
};
use penstock_config::controlplane::XdsConfig;
use penstock_proto::v1;
use prost::Message;

/// A fleet as its store would be, and what becomes of it.
struct Fleet {
    view: View,
    projector: Projector,
    snapshot: crate::xds::snapshot::Snapshot,
}

impl Fleet {
    /// Pools of the given numbers of endpoints; endpoint n stands on node n.
    fn new(pools: &[(&str, usize)]) -> Self {
        let mut fleet = Self {
            view: View::default(),
            projector: Projector::new(&XdsConfig::default()),
            snapshot: Default::default(),
        };
        for (pool, count) in pools {
            for n in 0..*count {
                fleet.register(pool, n);
            }
        }
        fleet.tables();
        fleet
    }

    fn model(&mut self, pool: &str) -> &mut ModelView {
        let deployment = || {
            let spec = EngineSpec {
                engine: "sim".into(),
                model_path: pool.into(),
                args: vec![],
                env: BTreeMap::new(),
                gpus_per_replica: 1,
                lora: vec![],
                warm: Default::default(),
                options: Default::default(),
                resources: Default::default(),
            };
            let value = Deployment {
                model: pool.into(),
                replicas: 1,
                spec,
                created_unix_s: 7,
                policy: Default::default(),
            };
            Some(Stored { value, mod_revision: 1, lease: 0 })
        };
        let model = self.view.models.entry(pool.to_owned());
        let model =
            model.or_insert_with(|| ModelView { deployment: deployment(), ..Default::default() }.into());
        Arc::make_mut(model)
    }

    fn register(&mut self, pool: &str, n: usize) {
        let node = crate::model::Node {
            node_id: format!("node-{n}"),
            agent_version: String::new(),
            advertise_host: String::new(),
            zone: String::new(),
            region: String::new(),
            labels: BTreeMap::new(),
            gpus: vec![],
        };
        let node = Stored { value: node, mod_revision: 1, lease: 1 };
        self.view.nodes.insert(format!("node-{n}"), node.into());
        let endpoint = RegisteredEndpoint {
            model: pool.into(),
            replica_id: format!("{pool}-{n}"),
            generation: 1,
            address: "127.0.0.1:1".into(),
            pid: 1,
            node_id: format!("node-{n}"),
            zone: String::new(),
            adapters: vec![],
            weight_percent: None,
            drain_ms: None,
        };
        let model = self.model(pool);
        model.generations.insert(endpoint.replica_id.clone(), 1);
        model.endpoints.insert(endpoint.replica_id.clone(), endpoint.into());
    }

    /// The node's lease ends, and with it everything that hangs on it.
    fn lapse(&mut self, n: usize) {
        self.view.nodes.remove(&format!("node-{n}"));
        for model in self.view.models.values_mut() {
            Arc::make_mut(model).endpoints.retain(|_, endpoint| endpoint.node_id != format!("node-{n}"));
        }
    }

    /// How many endpoints each pool's table has by now, in the order of their names; None: no snapshot is made.
    fn tables(&mut self) -> Option<Vec<usize>> {
        self.view.revision += 1;
        self.snapshot = self.projector.next(&self.snapshot, &self.view)?;
        let tables = self.snapshot.resources(crate::xds::kind::Kind::Table).values();
        let count = |body| v1::EndpointTable::decode(body).expect("valid").endpoints.len();
        Some(tables.map(|table| count(table.body.clone())).collect())
    }
}

#[test]
fn one_node_that_dies_takes_its_endpoints_along() {
    let mut fleet = Fleet::new(&[("a", 2), ("b", 2)]);
    fleet.lapse(0);
    assert_eq!(fleet.tables(), Some(vec![1, 1]));
    assert_eq!(fleet.projector.held(), Held::default());
}

#[test]
fn the_only_node_of_a_pool_is_not_taken_for_dead_because_it_is_silent() {
    let mut fleet = Fleet::new(&[("a", 1), ("b", 20)]);
    fleet.lapse(0);
    assert_eq!(fleet.tables(), Some(vec![1, 19]), "b can do without");
    assert_eq!(fleet.projector.held().endpoints(), 1);
    fleet.register("a", 0);
    fleet.register("b", 0);
    assert_eq!(fleet.tables(), Some(vec![1, 20]));
    assert_eq!(fleet.projector.held(), Held::default());
}

#[test]
fn a_fleet_that_falls_silent_is_held_until_it_speaks_again() {
    let mut fleet = Fleet::new(&[("a", 10)]);
    for n in 0..5 {
        fleet.lapse(n);
    }
    assert_eq!(fleet.tables(), Some(vec![5]), "half of it passes");
    for n in 5..8 {
        fleet.lapse(n);
        assert_eq!(fleet.tables(), Some(vec![10]), "more does not, though it comes one by one");
    }
    let held = fleet.projector.held();
    assert_eq!((held.endpoints(), held.sentences().len()), (8, 1));
    for n in 0..4 {
        fleet.register("a", n);
    }
    assert_eq!(fleet.tables(), Some(vec![6]), "six are there, four are missing, which passes");
    assert_eq!(fleet.projector.held(), Held::default());
}

#[test]
fn a_pool_is_not_emptied_by_silence() {
    let mut fleet = Fleet::new(&[("a", 2), ("b", 20)]);
    // b has endpoints on these nodes too, of which it can do without.
    fleet.lapse(0);
    fleet.lapse(1);
    assert_eq!(fleet.tables(), Some(vec![2, 18]));
    fleet.view.let_pass = fleet.view.revision;
    assert_eq!(fleet.tables(), Some(vec![0, 18]), "an operator has let it pass");
    assert_eq!(fleet.tables(), Some(vec![0, 18]));
}

#[test]
fn what_was_asked_for_is_never_held() {
    let mut fleet = Fleet::new(&[("a", 4)]);
    let drop_endpoints = |model: &mut ModelView| model.endpoints.clear();
    // Agents say that their engines have ended.
    drop_endpoints(fleet.model("a"));
    assert_eq!(fleet.tables(), Some(vec![0]));
    for change in [
        (|model| model.generations.clear()) as fn(&mut ModelView),
        |model| {
            model.drains.extend((0..4).map(|n| {
                let replica_id = format!("a-{n}");
                (replica_id.clone(), Drain { model: "a".into(), replica_id, move_streams: false })
            }))
        },
        |model| model.deployment = None,
    ] {
        let mut fleet = Fleet::new(&[("a", 4)]);
        (0..4).for_each(|n| fleet.lapse(n));
        change(fleet.model("a"));
        assert!(fleet.tables().is_some_and(|tables| tables.iter().all(|count| *count == 0)));
        assert_eq!(fleet.projector.held(), Held::default());
    }
    let mut fleet = Fleet::new(&[("a", 4)]);
    (0..4).for_each(|n| fleet.lapse(n));
    assert_eq!(fleet.tables(), Some(vec![4]));
    fleet.model("a").generations.clear();
    assert_eq!(fleet.tables(), Some(vec![0]), "the plan has given them up by now");
}

#[test]
fn a_store_that_lost_its_models_changes_nothing_that_was_published() {
    let mut fleet = Fleet::new(&[("a", 4), ("b", 4), ("c", 4)]);
    let kept = fleet.view.models.clone();
    fleet.view.models.clear();
    assert_eq!(fleet.tables(), None);
    assert!(fleet.projector.held().snapshot.starts_with("3 models with 12 of 12 endpoints"));
    fleet.view.models = kept.clone();
    assert_eq!(fleet.tables(), Some(vec![4, 4, 4]));
    fleet.view.models.remove("a");
    assert_eq!(fleet.tables(), Some(vec![4, 4]), "a third of the fleet may be gone");
    fleet.view.models.clear();
    assert_eq!(fleet.tables(), None);
    fleet.view.let_pass = fleet.view.revision;
    assert_eq!(fleet.tables(), Some(vec![]));
}

#[test]
fn zero_percent_holds_nothing() {
    let mut fleet = Fleet::new(&[("a", 4)]);
    let config = XdsConfig { guard_max_loss_percent: 0, ..XdsConfig::default() };
    fleet.projector = Projector::new(&config);
    fleet.tables();
    (0..4).for_each(|n| fleet.lapse(n));
    assert_eq!(fleet.tables(), Some(vec![0]));
}
