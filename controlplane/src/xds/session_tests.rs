//! The delta protocol, step by step.

use super::*;
use crate::{
    view::ModelView,
    xds::project::{
        Projector,
        tests::{model, view},
    },
};
use std::sync::Arc;

const RETRY: Duration = Duration::from_secs(30);

/// What our own proxies ask for.
const OURS: [Kind; 2] = [Kind::Table, Kind::Route];

fn ask(kind: Kind) -> xds::DeltaDiscoveryRequest {
    xds::DeltaDiscoveryRequest { type_url: kind.url(), ..Default::default() }
}

fn ack(kind: Kind, response: &Reply) -> xds::DeltaDiscoveryRequest {
    xds::DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..ask(kind) }
}

fn nack(kind: Kind, response: &Reply) -> xds::DeltaDiscoveryRequest {
    let error = xds::Status { code: 3, message: "bad".into(), details: vec![] };
    xds::DeltaDiscoveryRequest { error_detail: Some(error), ..ack(kind, response) }
}

fn names(reply: &Reply) -> Vec<&str> {
    reply.changed.iter().map(|(name, _)| name.as_ref()).collect()
}

/// A subscriber to everything, and the snapshots it is shown.
struct Scene {
    session: Session,
    snapshot: Snapshot,
    projector: Projector,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let mut session = Session::new(RETRY);
        let now = Instant::now();
        for kind in OURS {
            session.hear(ask(kind), now).expect("known type");
        }
        Self { session, snapshot: Snapshot::default(), projector: Projector::default(), now }
    }

    fn publish(&mut self, models: &[(&str, &Arc<ModelView>)]) {
        let revision = self.snapshot.version.revision + 1;
        let view = crate::view::View { term: 1, ..view(revision, models) };
        self.snapshot = self.projector.next(&self.snapshot, &view).expect("nothing is held");
    }

    fn next(&mut self) -> Option<(Kind, Reply)> {
        self.session.next(&self.snapshot, self.now).map(|reply| (reply.kind, reply))
    }

    fn status(&self, kind: Kind) -> KindStatus {
        self.session
            .status()
            .into_iter()
            .find_map(|(k, status)| (k == kind).then_some(status))
            .expect("asked for")
    }

    /// Acknowledges everything there is; says what came, as "T+a" (table added) or "R-a" (route removed).
    fn settle(&mut self) -> Vec<String> {
        let mut seen = Vec::new();
        while let Some((kind, response)) = self.next() {
            let letter = if kind == Kind::Table { 'T' } else { 'R' };
            seen.extend(names(&response).iter().map(|n| format!("{letter}+{n}")));
            seen.extend(response.removed.iter().map(|n| format!("{letter}-{n}")));
            assert_eq!(self.session.hear(ack(kind, &response), self.now), Ok(Heard::Ack(kind)));
        }
        seen
    }
}

#[test]
fn tables_come_before_routes_and_go_after_them() {
    let mut scene = Scene::new();
    scene.publish(&[("a", &model("a", true, &[])), ("b", &model("b", true, &["b-0"]))]);
    assert_eq!(scene.settle(), ["T+a", "T+b", "R+a", "R+b"]);
    assert_eq!(scene.session.synced(), Some(scene.snapshot.version));
    scene.publish(&[("b", &model("b", true, &["b-0", "b-1"])), ("c", &model("c", true, &[]))]);
    assert_eq!(scene.settle(), ["T+b", "T+c", "R+c", "R-a", "T-a"], "only what changed");
}

#[test]
fn the_first_answer_comes_even_when_there_is_nothing() {
    let mut scene = Scene::new();
    scene.publish(&[]);
    let (kind, response) = scene.next().expect("an answer");
    assert_eq!((kind, response.version.to_string().as_str()), (Kind::Table, "1.1"));
    scene.session.hear(ack(kind, &response), scene.now).expect("valid");
    assert_eq!(scene.next().expect("an answer").0, Kind::Route);
}

#[test]
fn one_response_is_outstanding_and_the_newest_snapshot_follows_it() {
    let mut scene = Scene::new();
    scene.publish(&[("a", &model("a", true, &["a-0"]))]);
    let (kind, first) = scene.next().expect("tables");
    for n in 1..100 {
        let ids: Vec<String> = (0..n).map(|i| format!("a-{i}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        scene.publish(&[("a", &model("a", true, &ids))]);
        assert_eq!(scene.next(), None, "nothing queues");
    }
    assert_eq!(scene.session.synced(), None);
    scene.session.hear(ack(kind, &first), scene.now).expect("valid");
    let (_, second) = scene.next().expect("the newest");
    assert_eq!(second.changed[0].1, scene.snapshot.resources(Kind::Table)["a"]);
    let stale = scene.session.hear(ack(kind, &first), scene.now);
    assert_eq!(stale, Ok(Heard::Nothing), "an older nonce is no answer");
    assert_eq!(scene.next(), None);
}

#[test]
fn a_reconnecting_subscriber_is_sent_only_what_differs() {
    let mut scene = Scene::new();
    let (a, b) = (model("a", true, &[]), model("b", true, &[]));
    scene.publish(&[("a", &a), ("b", &b)]);
    let versions = |kind: Kind| {
        let all = scene.snapshot.resources(kind).iter();
        all.map(|(name, r)| (name.as_ref().to_owned(), r.version.as_ref().to_owned()))
            .collect::<HashMap<_, _>>()
    };
    let mut tables = versions(Kind::Table);
    tables.insert("gone".into(), "x".into());
    tables.insert("b".into(), "old".into());
    let routes = versions(Kind::Route);
    scene.session = Session::new(RETRY);
    for (kind, initial_resource_versions) in [(Kind::Table, tables), (Kind::Route, routes)] {
        let request = xds::DeltaDiscoveryRequest { initial_resource_versions, ..ask(kind) };
        scene.session.hear(request, scene.now).expect("valid");
    }
    assert_eq!(scene.settle(), ["T+b", "T-gone"]);
    assert_eq!(scene.session.synced(), Some(scene.snapshot.version));
}

#[test]
fn a_refusal_isolates_the_bad_resource_and_is_not_repeated_until_it_changes_or_time_passes() {
    let mut scene = Scene::new();
    scene.publish(&[("bad", &model("bad", true, &["x"])), ("good", &model("good", true, &[]))]);
    let mut offered = Vec::new();
    while let Some((kind, response)) = scene.next() {
        let letter = if kind == Kind::Table { 'T' } else { 'R' };
        offered.push(format!("{letter}{}", names(&response).join(",")));
        let verdict = match names(&response).contains(&"bad") {
            true => nack(kind, &response),
            false => ack(kind, &response),
        };
        scene.session.hear(verdict, scene.now).expect("valid");
        assert!(offered.len() < 20, "it does not end: {offered:?}");
    }
    assert_eq!(offered, ["Tbad,good", "Tbad", "Tgood", "Rgood"], "and no route without its table");
    assert_eq!(scene.status(Kind::Table).nacks, 2);
    assert_eq!(scene.status(Kind::Table).nack_reason, "bad");
    assert_eq!(scene.session.synced(), None);
    let due = scene.session.retry_at().expect("a retry");
    scene.now = due;
    let (kind, again) = scene.next().expect("offered again");
    assert_eq!(names(&again), ["bad"]);
    scene.session.hear(nack(kind, &again), scene.now).expect("valid");
    assert_eq!(scene.next(), None);
    scene.publish(&[("bad", &model("bad", true, &[])), ("good", &model("good", true, &[]))]);
    assert_eq!(scene.settle(), ["T+bad", "R+bad"]);
    assert_eq!(scene.status(Kind::Table).nack_reason, "", "a later acknowledgement clears it");
    assert_eq!(scene.session.retry_at(), None);
}

#[test]
fn what_was_refused_and_then_withdrawn_is_forgotten() {
    let mut scene = Scene::new();
    scene.publish(&[("a", &model("a", true, &["x"]))]);
    let (kind, response) = scene.next().expect("tables");
    scene.session.hear(nack(kind, &response), scene.now).expect("valid");
    scene.publish(&[]);
    assert_eq!(scene.settle(), [""; 0], "it never had it");
    assert_eq!(scene.session.synced(), Some(scene.snapshot.version));
}

#[test]
fn names_can_be_subscribed_to_one_by_one() {
    let mut scene = Scene::new();
    scene.publish(&[("a", &model("a", true, &[])), ("b", &model("b", true, &[]))]);
    scene.session = Session::new(RETRY);
    let subscribe = |names: &[&str]| xds::DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..ask(Kind::Table)
    };
    scene.session.hear(subscribe(&["a"]), scene.now).expect("valid");
    assert_eq!(scene.settle(), ["T+a"]);
    scene.session.hear(subscribe(&["b"]), scene.now).expect("valid");
    assert_eq!(scene.settle(), ["T+b"]);
    let unsubscribe =
        xds::DeltaDiscoveryRequest { resource_names_unsubscribe: vec!["a".into()], ..ask(Kind::Table) };
    scene.session.hear(unsubscribe, scene.now).expect("valid");
    scene.publish(&[("a", &model("a", true, &["x"])), ("b", &model("b", true, &["y"]))]);
    assert_eq!(scene.settle(), ["T+b"]);
    scene.session.hear(subscribe(&["*"]), scene.now).expect("valid");
    assert_eq!(scene.settle(), ["T+a"]);
    scene.session.hear(subscribe(&["a"]), scene.now).expect("valid");
    assert_eq!(scene.settle(), ["T+a"], "asked for again is sent again");
}

#[test]
fn a_subscriber_that_fell_far_behind_compares_everything_once() {
    let mut scene = Scene::new();
    scene.publish(&[("a", &model("a", true, &[])), ("z", &model("z", true, &[]))]);
    scene.settle();
    for n in 0..super::super::snapshot::RECENT * 2 {
        let id = format!("a-{n}");
        scene.publish(&[("a", &model("a", true, &[&id]))]);
    }
    assert_eq!(scene.settle(), ["T+a", "R-z", "T-z"]);
}

#[test]
fn an_unknown_type_is_refused_in_words() {
    let request =
        xds::DeltaDiscoveryRequest { type_url: "type.googleapis.com/x".into(), ..Default::default() };
    let error = Session::new(RETRY).hear(request, Instant::now()).expect_err("unknown");
    assert!(error.contains("EndpointTable"), "{error}");
}
