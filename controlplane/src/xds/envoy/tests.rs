//! What an Envoy gets.

use penstock_proto::xds::envoy::config::{
    core::v3::HealthStatus,
    endpoint::v3::lb_endpoint::HostIdentifier,
    route::v3::{Route, route::Action, route_action::ClusterSpecifier},
};

use super::*;

fn envoy() -> Envoy {
    let config = EnvoyConfig { listen: "[::]:8081".into(), ..EnvoyConfig::default() };
    Envoy::new(&config).expect("an address")
}

fn target(pool: &str, served_model: &str, weight: u32) -> v1::RouteTarget {
    v1::RouteTarget { pool: pool.into(), served_model: served_model.into(), weight, adapter: String::new() }
}

fn routes(of: &[(&str, Vec<v1::RouteTarget>)]) -> (Vec<Route>, Vec<String>) {
    let mut envoy = envoy();
    for (name, targets) in of {
        let route =
            v1::ModelRoute { model: (*name).to_owned(), targets: targets.clone(), ..Default::default() };
        envoy.note_route(name, Some(&route));
    }
    let config = front::routes(&envoy.names, envoy.idle);
    let pools = envoy.names.values().flat_map(front::Entry::pools).map(str::to_owned).collect();
    (config.virtual_hosts[0].routes.clone(), pools)
}

#[test]
fn endpoints_stand_in_their_zones_and_draining_ones_say_so() {
    let endpoint = |id: &str, address: &str, zone: &str, state: v1::EndpointState| v1::Endpoint {
        id: id.into(),
        address: address.into(),
        zone: zone.into(),
        state: state.into(),
        ..Default::default()
    };
    let table = v1::EndpointTable {
        pool: "m".into(),
        endpoints: vec![
            endpoint("m-0", "10.0.0.1:8000", "a", v1::EndpointState::Ready),
            endpoint("m-1", "[::1]:8001", "b", v1::EndpointState::Draining),
            endpoint("m-2", "10.0.0.2:8000", "a", v1::EndpointState::Ready),
        ],
        ..Default::default()
    };
    let assignment = pool::assignment(&table);
    let mut seen = Vec::new();
    for locality in &assignment.endpoints {
        let zone = &locality.locality.as_ref().expect("set").zone;
        for endpoint in &locality.lb_endpoints {
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else {
                panic!("no address")
            };
            let Some(address::Address::SocketAddress(socket)) =
                host.address.clone().and_then(|address| address.address)
            else {
                panic!("no socket")
            };
            seen.push((zone.as_str(), socket.address, endpoint.health_status()));
        }
    }
    assert_eq!(
        seen,
        [
            ("a", "10.0.0.1".to_owned(), HealthStatus::Healthy),
            ("a", "10.0.0.2".to_owned(), HealthStatus::Healthy),
            ("b", "::1".to_owned(), HealthStatus::Draining),
        ]
    );
}

#[test]
fn a_name_leads_to_its_pools_by_weight_and_to_words_where_a_body_would_have_to_be_rewritten() {
    let (routes, pools) = routes(&[
        ("adapter", vec![target("a", "adapter", 3), target("b", "adapter", 1), target("c", "adapter", 0)]),
        ("alias", vec![target("a", "a", 1)]),
        ("base", vec![target("a", "base", 1)]),
    ]);
    assert_eq!(pools, ["a", "b", "a"]);
    let [listing, adapter, alias, base, no_model, .., nothing] = &routes[..] else {
        panic!("{}", routes.len())
    };
    let cluster = |route: &Route| match route.action.clone() {
        Some(Action::Route(action)) => action.cluster_specifier,
        _ => None,
    };
    let Some(ClusterSpecifier::WeightedClusters(weighted)) = cluster(adapter) else { panic!("one cluster") };
    assert_eq!(weighted.clusters.len(), 2);
    assert_eq!(cluster(base), Some(ClusterSpecifier::Cluster("a".into())));
    let said = |route: &Route| format!("{:?}", route.action);
    assert!(said(listing).contains(r#"\"id\":\"base\""#) && !said(listing).contains("alias"));
    assert!(said(alias).contains("is known to its engines as"), "{}", said(alias));
    assert!(said(no_model).contains("names no model") && said(nothing).contains("nothing at this path"));
}

#[test]
fn routes_and_the_listener_are_made_once_as_long_as_names_stay() {
    let (mut envoy, mut snapshot) = (envoy(), Snapshot::default());
    let put = |envoy: &mut Envoy, snapshot: &mut Snapshot| {
        let mut changed = Vec::new();
        envoy.put_front(snapshot, &mut changed);
        changed.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>()
    };
    assert_eq!(put(&mut envoy, &mut snapshot), [Kind::Listener, Kind::RouteConfig]);
    let route =
        v1::ModelRoute { model: "m".into(), targets: vec![target("m", "m", 1)], ..Default::default() };
    envoy.note_route("m", Some(&route));
    assert_eq!(put(&mut envoy, &mut snapshot), [Kind::RouteConfig]);
    envoy.note_route("m", Some(&route));
    assert!(!envoy.changed);
    envoy.note_route("m", None);
    assert_eq!(put(&mut envoy, &mut snapshot), [Kind::RouteConfig]);
    assert!(Envoy::new(&EnvoyConfig::default()).is_none());
}
