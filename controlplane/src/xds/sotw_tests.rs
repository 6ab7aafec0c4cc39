//! A subscriber to the state of the world, step by step.

use std::time::{Duration, Instant};

use prost::Message;

use super::*;
use crate::xds::{
    project::{
        Projector,
        tests::{model, view},
    },
    session::Heard,
    snapshot::Snapshot,
};

/// One subscriber, and the snapshots it is shown.
struct Scene {
    session: Session,
    snapshot: Snapshot,
    projector: Projector,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let mut config = penstock_config::controlplane::XdsConfig::default();
        config.envoy.listen = "127.0.0.1:8081".into();
        let session = Session::new(Duration::from_secs(30));
        let projector = Projector::new(&config);
        Self { session, snapshot: Snapshot::default(), projector, now: Instant::now() }
    }

    fn publish(&mut self, models: &[&str]) {
        let models: Vec<_> = models.iter().map(|name| (*name, model(name, true, &[]))).collect();
        let models: Vec<_> = models.iter().map(|(name, model)| (*name, model)).collect();
        let view = view(self.snapshot.version.revision + 1, &models);
        self.snapshot = self.projector.next(&self.snapshot, &view).expect("nothing is held");
    }

    fn ask(&mut self, kind: Kind, names: &[&str], nonce: &str, error: Option<&str>) -> Option<Heard> {
        let request = xds::DiscoveryRequest {
            type_url: kind.url(),
            resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
            response_nonce: nonce.to_owned(),
            error_detail: error.map(|text| xds::Status { message: text.into(), ..Default::default() }),
            ..Default::default()
        };
        let request = heard(request, &self.session)?;
        Some(self.session.hear(request, self.now).expect("a known type"))
    }

    fn next(&mut self) -> Option<(Kind, xds::DiscoveryResponse)> {
        let reply = self.session.next(&self.snapshot, self.now)?;
        Some((reply.kind, told(&reply, &self.session)))
    }

    /// The next response, acknowledged with a request for `names`: its kind, and the clusters in it.
    fn take(&mut self, names: &[&str]) -> Option<(Kind, Vec<String>)> {
        let (kind, response) = self.next()?;
        assert_eq!(self.ask(kind, names, &response.nonce, None), Some(Heard::Ack(kind)));
        Some((kind, clusters(&response)))
    }
}

/// Names of clusters, whichever of the two kinds they are told in.
fn clusters(response: &xds::DiscoveryResponse) -> Vec<String> {
    use penstock_proto::xds::envoy::config::{cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment};
    let name = |any: &xds::Any| match Kind::from_url(&any.type_url).expect("known") {
        Kind::Cluster => Cluster::decode(any.value.as_slice()).expect("valid").name,
        Kind::Assignment => ClusterLoadAssignment::decode(any.value.as_slice()).expect("valid").cluster_name,
        _ => String::new(),
    };
    response.resources.iter().map(name).collect()
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn an_envoy_is_made_whole_before_it_is_broken() {
    let mut scene = Scene::new();
    scene.publish(&["a", "b"]);
    scene.ask(Kind::Cluster, &[], "", None);
    assert_eq!(scene.take(&[]), Some((Kind::Cluster, strings(&["a", "b"]))));
    scene.ask(Kind::Assignment, &["a", "b"], "", None);
    scene.ask(Kind::Listener, &[], "", None);
    assert_eq!(scene.take(&["a", "b"]), Some((Kind::Assignment, strings(&["a", "b"]))));
    assert_eq!(scene.take(&[]), Some((Kind::Listener, strings(&[""]))));
    scene.ask(Kind::RouteConfig, &["penstock"], "", None);
    assert_eq!(scene.take(&["penstock"]), Some((Kind::RouteConfig, strings(&[""]))));
    assert_eq!(scene.take(&[]), None);

    scene.publish(&["b", "c"]);
    let all = strings(&["a", "b", "c"]);
    assert_eq!(scene.take(&[]), Some((Kind::Cluster, all)), "what goes is still told");
    assert_eq!(scene.next(), None, "the routes wait for the new cluster's endpoints");
    scene.ask(
        Kind::Assignment,
        &["a", "b", "c"],
        scene.session.nonce(Kind::Assignment).to_owned().as_str(),
        None,
    );
    assert_eq!(scene.take(&["a", "b", "c"]), Some((Kind::Assignment, strings(&["c"]))), "only what is new");
    assert_eq!(scene.take(&["penstock"]).expect("routes").0, Kind::RouteConfig);
    assert_eq!(scene.take(&[]), Some((Kind::Cluster, strings(&["b", "c"]))), "and then it goes");
    scene.ask(Kind::Assignment, &["b", "c"], scene.session.nonce(Kind::Assignment).to_owned().as_str(), None);
    assert_eq!(scene.next(), None);
    assert_eq!(scene.session.synced(), Some(scene.snapshot.version));
}

#[test]
fn an_older_nonce_is_not_heard_and_a_refusal_keeps_what_was_taken() {
    let mut scene = Scene::new();
    scene.publish(&["a"]);
    scene.ask(Kind::Cluster, &[], "", None);
    let (_, first) = scene.next().expect("clusters");
    assert_eq!(scene.ask(Kind::Cluster, &[], "no such", None), None);
    assert_eq!(scene.ask(Kind::Cluster, &[], &first.nonce, None), Some(Heard::Ack(Kind::Cluster)));
    scene.publish(&["a", "bad", "good"]);
    let (_, second) = scene.next().expect("clusters");
    assert_eq!(clusters(&second), ["a", "bad", "good"]);
    assert_eq!(scene.ask(Kind::Cluster, &[], &first.nonce, None), None);
    let refused = scene.ask(Kind::Cluster, &[], &second.nonce, Some("bad"));
    assert_eq!(refused, Some(Heard::Nack(Kind::Cluster)));
    let (_, third) = scene.next().expect("one of them alone");
    assert_eq!(clusters(&third), ["a", "bad"]);
    scene.ask(Kind::Cluster, &[], &third.nonce, Some("bad"));
    assert_eq!(scene.take(&[]), Some((Kind::Cluster, strings(&["a", "good"]))));
    assert_eq!(scene.next(), None);
    let status =
        scene.session.status().into_iter().find(|(kind, _)| *kind == Kind::Cluster).expect("asked").1;
    assert_eq!((status.nacks, status.nack_reason.as_str()), (2, "bad"));
    assert_eq!(status.refused, ["bad".into()]);
}

/// An Envoy acknowledges a new cluster when it has the cluster's endpoints, and not before.
#[test]
fn endpoints_do_not_wait_for_the_answer_about_their_clusters_but_routes_do() {
    let mut scene = Scene::new();
    scene.publish(&["a"]);
    scene.ask(Kind::Cluster, &[], "", None);
    scene.ask(Kind::RouteConfig, &["penstock"], "", None);
    let (_, clusters_told) = scene.next().expect("clusters");
    assert_eq!(scene.next(), None);
    scene.ask(Kind::Assignment, &["a"], "", None);
    let (kind, endpoints_told) = scene.next().expect("endpoints");
    assert_eq!(kind, Kind::Assignment);
    scene.ask(Kind::Assignment, &["a"], &endpoints_told.nonce, None);
    assert_eq!(scene.next(), None, "the clusters are not acknowledged yet");
    scene.ask(Kind::Cluster, &[], &clusters_told.nonce, None);
    assert_eq!(scene.next().expect("routes").0, Kind::RouteConfig);
}
