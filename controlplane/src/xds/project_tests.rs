//! Views in, snapshots out.

use std::collections::BTreeMap;

use prost::Message;

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
        warm: Default::default(),
        options: Default::default(),
        resources: Default::default(),
    };
    let deployment =
        Deployment { model: name.into(), replicas: 1, spec, created_unix_s: 7, policy: Default::default() };
    let endpoint = |id: &&str| RegisteredEndpoint {
        model: name.into(),
        replica_id: (*id).into(),
        generation: 1,
        address: "127.0.0.1:1".into(),
        pid: 1,
        node_id: "n".into(),
        zone: String::new(),
        adapters: vec![],
        weight_percent: None,
        drain_ms: None,
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

/// What comes of one view after the other.
pub(crate) fn projected(views: &[View]) -> Vec<Snapshot> {
    let (mut projector, mut last) = (Projector::new(&XdsConfig::default()), Snapshot::default());
    let mut all = Vec::new();
    for view in views {
        last = projector.next(&last, view).expect("nothing is held");
        all.push(last.clone());
    }
    all
}

fn decoded(snapshot: &Snapshot, pool: &str) -> v1::EndpointTable {
    let body = snapshot.resources(Kind::Table)[pool].body.clone();
    v1::EndpointTable::decode(body).expect("valid")
}

#[test]
fn a_deployment_without_endpoints_has_a_route_and_an_empty_table() {
    let view = View { term: 2, ..view(3, &[("m", &model("m", true, &[]))]) };
    let [snapshot] = &projected(&[view])[..] else { panic!("one") };
    assert_eq!(snapshot.version.to_string(), "2.3");
    assert!(decoded(snapshot, "m").endpoints.is_empty());
    assert!(snapshot.resources(Kind::Route).contains_key("m"));
    assert_eq!(snapshot.check(true), Ok(()));
}

#[test]
fn a_deleted_model_loses_its_route_first_and_its_table_with_its_last_endpoint() {
    let views = [
        view(1, &[("m", &model("m", true, &["m-0"]))]),
        view(2, &[("m", &model("m", false, &["m-0"]))]),
        view(3, &[]),
    ];
    let [_, second, third] = &projected(&views)[..] else { panic!("three") };
    assert!(second.resources(Kind::Route).is_empty());
    assert_eq!(decoded(second, "m").endpoints[0].state(), v1::EndpointState::Draining);
    assert!(third.resources(Kind::Table).is_empty());
    assert_eq!(third.recent.back().expect("kept").names.as_ref(), [(Kind::Table, "m".into())]);
}

#[test]
fn versions_are_of_the_content_alone() {
    let m = model("m", true, &["m-0"]);
    let first = projected(&[view(1, &[("m", &m)])]);
    let restarted = projected(&[view(9, &[("m", &m)])]);
    assert_eq!(first[0].resources(Kind::Table), restarted[0].resources(Kind::Table));
    let again = view(2, &[("m", &Arc::new(ModelView::clone(&m)))]);
    let same = projected(&[view(1, &[("m", &m)]), again]);
    assert!(same[1].recent.back().expect("kept").names.is_empty(), "equal content is no change");
}

#[test]
fn without_an_address_envoys_are_told_nothing_and_with_one_the_same_state() {
    let views = [view(1, &[("m", &model("m", true, &["m-0"]))])];
    let envoys = |snapshot: &Snapshot| {
        Kind::ALL.into_iter().filter(|kind| kind.is_envoys()).map(|kind| snapshot.resources(kind).len()).sum()
    };
    let none: usize = envoys(&projected(&views)[0]);
    assert_eq!(none, 0);
    let mut config = XdsConfig::default();
    config.envoy.listen = "127.0.0.1:8081".into();
    let snapshot = Projector::new(&config).next(&Snapshot::default(), &views[0]).expect("published");
    let some: usize = envoys(&snapshot);
    assert_eq!((some, snapshot.check(true)), (4, Ok(())));
}
