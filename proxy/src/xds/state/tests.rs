use penstock_proto::xds::{Any, ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE};
use proptest::prelude::*;

use super::*;

fn endpoint(id: &str, address: &str) -> v1::Endpoint {
    let state = v1::EndpointState::Ready as i32;
    v1::Endpoint {
        id: id.to_owned(),
        address: address.to_owned(),
        generation: 1,
        state,
        ..Default::default()
    }
}

fn resource(type_url: &str, name: &str, message: &impl Message) -> xds::Resource {
    let any = Any { type_url: type_url.to_owned(), value: message.encode_to_vec() };
    xds::Resource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource: Some(any),
        ..Default::default()
    }
}

fn table(pool: &str, endpoints: Vec<v1::Endpoint>) -> xds::Resource {
    resource(
        ENDPOINT_TABLE_TYPE,
        pool,
        &v1::EndpointTable { pool: pool.to_owned(), endpoints, ..Default::default() },
    )
}

fn route(model: &str, pool: &str) -> xds::Resource {
    let (model, pool) = (model.to_owned(), pool.to_owned());
    resource(MODEL_ROUTE_TYPE, &model.clone(), &v1::ModelRoute { model, pool, ..Default::default() })
}

fn response(type_url: &str, version: &str, resources: Vec<xds::Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: version.to_owned(),
        type_url: type_url.to_owned(),
        resources,
        ..Default::default()
    }
}

fn tables(version: &str, resources: Vec<xds::Resource>) -> DeltaDiscoveryResponse {
    response(ENDPOINT_TABLE_TYPE, version, resources)
}

fn routes(version: &str, resources: Vec<xds::Resource>) -> DeltaDiscoveryResponse {
    response(MODEL_ROUTE_TYPE, version, resources)
}

fn removed(mut response: DeltaDiscoveryResponse, names: &[&str]) -> DeltaDiscoveryResponse {
    response.removed_resources = names.iter().map(|&name| name.to_owned()).collect();
    response
}

/// Two pools, each with a route, at version 2.10.
fn serving() -> XdsState {
    let two = tables(
        "2.10",
        vec![
            table("a", vec![endpoint("a-0", "127.0.0.1:1")]),
            table("b", vec![endpoint("b-0", "127.0.0.1:2")]),
        ],
    );
    let state = XdsState::default().apply(&two).expect("tables");
    assert!(!state.is_complete(), "routes have not been heard of");
    state.apply(&routes("2.10", vec![route("a", "a"), route("b", "b")])).expect("routes")
}

/// The one reason why `response` is refused.
#[track_caller]
fn refusal(response: &DeltaDiscoveryResponse) -> String {
    let reasons = serving().apply(response).expect_err("refused");
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    reasons[0].clone()
}

#[test]
fn tables_then_routes_make_a_complete_state() {
    let state = serving();
    assert!(state.is_complete());
    assert_eq!(state.version(), Version { term: 2, revision: 10 });
    let route = state.route("a").expect("there");
    assert_eq!(route.served_model, "a", "filled in");
    assert_eq!(state.table(&route.pool).expect("there").endpoints[0].id, "a-0");
    assert_eq!(state.resource_versions(ENDPOINT_TABLE_TYPE).len(), 2);
    assert_eq!(state.resource_versions(MODEL_ROUTE_TYPE)["b"], "1");
    assert!(state.resource_versions("other").is_empty());
    assert!((state.table("c").is_none(), state.route("c").is_none()) == (true, true));
}

#[test]
fn an_empty_fleet_is_complete_too() {
    let state = XdsState::default().apply(&tables("1.1", vec![])).expect("tables");
    assert!(state.apply(&routes("1.1", vec![])).expect("routes").is_complete());
}

#[test]
fn a_delta_changes_what_it_names_and_shares_the_rest() {
    let before = serving();
    let delta =
        tables("2.11", vec![table("a", vec![endpoint("a-0", "127.0.0.1:1"), endpoint("a-1", "[::1]:3")])]);
    let after = before.apply(&delta).expect("fine");
    assert_eq!(after.table("a").expect("there").endpoints.len(), 2);
    assert!(Arc::ptr_eq(before.table("b").expect("b"), after.table("b").expect("b")));
    assert_eq!(before.table("a").expect("there").endpoints.len(), 1, "the old state is as it was");

    let mut same = table("b", vec![endpoint("b-0", "127.0.0.1:2")]);
    same.version = "2".to_owned();
    let resent = after.apply(&tables("2.11", vec![same])).expect("the same version again is not older");
    assert!(
        Arc::ptr_eq(resent.table("b").expect("b"), after.table("b").expect("b")),
        "nothing new, same Arc"
    );
    assert_eq!(resent.tables()["b"].version, "2");
}

#[test]
fn routes_go_before_their_tables() {
    let state = serving().apply(&removed(routes("2.11", vec![]), &["a", "never-there"])).expect("fine");
    let state = state.apply(&removed(tables("2.11", vec![]), &["a"])).expect("fine");
    assert_eq!((state.table("a"), state.route("a")), (None, None));
    assert_eq!((state.tables().len(), state.routes().len()), (1, 1));
}

#[test]
fn a_withdrawn_table_serves_until_its_route_is_gone() {
    let state = serving().apply(&removed(tables("2.11", vec![]), &["a"])).expect("fine");
    assert!(state.table("a").is_some() && state.route("a").is_some());
    assert!(
        !state.resource_versions(ENDPOINT_TABLE_TYPE).contains_key("a"),
        "sent again if it is there after all"
    );
    let state_without = state.apply(&removed(routes("2.12", vec![]), &["a"])).expect("fine");
    assert_eq!(state_without.table("a"), None);

    let elsewhere = state.apply(&routes("2.12", vec![route("a", "b")])).expect("fine");
    assert_eq!(elsewhere.table("a"), None, "the route has moved on");

    let back = state.apply(&tables("2.12", vec![table("a", vec![])])).expect("fine");
    let back = back.apply(&removed(routes("2.13", vec![]), &["a"])).expect("fine");
    assert!(back.table("a").is_some(), "it was sent again and is no longer withdrawn");
}

#[test]
fn an_older_version_is_refused() {
    assert_eq!(
        refusal(&tables("2.9", vec![])),
        "version 2.9 is older than 2.10, which this proxy already has"
    );
    assert_eq!(
        refusal(&routes("1.900", vec![])),
        "version 1.900 is of an older term than 2.10, which this proxy already has"
    );
    assert!(refusal(&tables("seven", vec![])).contains("TERM.REVISION"));
    assert!(serving().apply(&tables("3.1", vec![])).is_ok(), "a newer term may start again");
    let ahead = serving().apply(&tables("2.30", vec![])).expect("newer");
    assert!(ahead.apply(&routes("2.11", vec![])).is_ok(), "each type has its own revision within a term");
    assert!(ahead.apply(&tables("2.11", vec![])).is_err());
}

#[test]
fn a_foreign_type_is_refused() {
    let reason = refusal(&response("type.googleapis.com/envoy.config.cluster.v3.Cluster", "2.11", vec![]));
    assert!(reason.contains("not one this proxy subscribes to"), "{reason}");
    let foreign = resource(MODEL_ROUTE_TYPE, "a", &v1::ModelRoute::default());
    assert!(refusal(&tables("2.11", vec![foreign])).contains("in a response about"));
}

#[test]
fn content_that_cannot_be_read_is_refused() {
    let mut broken = table("a", vec![]);
    broken.resource = Some(Any { type_url: ENDPOINT_TABLE_TYPE.to_owned(), value: vec![0x0a, 0xff] });
    assert!(refusal(&tables("2.11", vec![broken.clone()])).contains("cannot be decoded"));
    broken.resource = None;
    assert_eq!(refusal(&tables("2.11", vec![broken])), "resource \"a\" has no content");
}

#[test]
fn a_name_that_differs_from_the_content_is_refused() {
    let mut wrong = table("a", vec![]);
    wrong.name = "b".to_owned();
    assert_eq!(refusal(&tables("2.11", vec![wrong])), "table \"b\" says it is of pool \"a\"");
    let mut wrong = route("a", "a");
    wrong.name = "c".to_owned();
    assert_eq!(refusal(&routes("2.11", vec![wrong])), "route \"c\" says it is of model \"a\"");
    assert_eq!(refusal(&tables("2.11", vec![table("", vec![])])), "a table has no name");
}

#[test]
fn ambiguous_responses_are_refused() {
    let twice = tables("2.11", vec![table("a", vec![]), table("a", vec![])]);
    assert_eq!(refusal(&twice), "resource \"a\" is there twice");
    let both = removed(tables("2.11", vec![table("a", vec![])]), &["a"]);
    assert_eq!(refusal(&both), "resource \"a\" is both sent and removed");
    let ids = vec![endpoint("x", "h:1"), endpoint("x", "h:2")];
    assert_eq!(
        refusal(&tables("2.11", vec![table("a", ids)])),
        "table \"a\": endpoint id \"x\" is there twice"
    );
}

#[test]
fn endpoints_need_an_id_a_state_and_an_address() {
    let one = |endpoint: v1::Endpoint| tables("2.11", vec![table("a", vec![endpoint])]);
    assert_eq!(refusal(&one(endpoint("", "h:1"))), "table \"a\": endpoint number 0 has no id");
    for state in [0, 3, -1] {
        let reason = refusal(&one(v1::Endpoint { state, ..endpoint("x", "h:1") }));
        assert_eq!(
            reason,
            format!("table \"a\": endpoint \"x\": state {state} is not READY (1) or DRAINING (2)")
        );
    }
    let draining = v1::EndpointState::Draining as i32;
    assert!(serving().apply(&one(v1::Endpoint { state: draining, ..endpoint("x", "h:1") })).is_ok());
    for address in
        ["127.0.0.1:80", "[::1]:65535", "engine-3.gpu.internal:10814", "localhost:1", "node_1.:9", "x.y.:1"]
    {
        assert!(serving().apply(&one(endpoint("x", address))).is_ok(), "{address}");
    }
    for address in [
        "",
        "host",
        "host:",
        ":80",
        "host:0",
        "127.0.0.1:0",
        "host:65536",
        "host:+8",
        "host:8o",
        "http://host:80",
        "::1:80",
        "[::1]",
        "a b:1",
        "a/b:1",
        "a@b:1",
        "-:",
        "..:1",
        ".:1",
    ] {
        let reason = refusal(&one(endpoint("x", address)));
        assert!(reason.contains(&format!("address {address:?} is not host:port")), "{reason}");
    }
}

#[test]
fn a_route_needs_its_table() {
    assert_eq!(
        refusal(&routes("2.11", vec![route("c", "nowhere")])),
        "route \"c\" names pool \"nowhere\", of which there is no endpoint table"
    );
}

#[test]
fn all_that_is_wrong_is_told_at_once_up_to_a_bound() {
    let mut bad = tables("1.1", vec![table("", vec![endpoint("", "nonsense")])]);
    bad.resources.push(table("a", vec![v1::Endpoint::default()]));
    let reasons = serving().apply(&bad).expect_err("refused");
    assert_eq!(reasons.len(), 7, "{reasons:?}");
    let many = (0..500).map(|_| endpoint("", "h:1")).collect();
    let reasons = serving().apply(&tables("2.11", vec![table("a", many)])).expect_err("refused");
    assert_eq!((reasons.len(), reasons[20].as_str()), (21, "and 480 more"));
}

prop_compose! {
    /// A response about a few names, some of it nonsense; the revision mostly grows.
    fn any_response()(
        about_tables in any::<bool>(),
        sent in prop::collection::vec((prop::sample::select(vec!["a", "b", "c", ""]), prop::sample::select(vec!["a", "b", "c", "x"])), 0..3),
        gone in prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 0..3),
        version in prop::sample::select(vec!["1.1", "1.1", "1.1", "1.2", "2.1", "x"]),
        address in prop::sample::select(vec!["h:1", "h:1", "h:1", "h:2", "nonsense"]),
    ) -> DeltaDiscoveryResponse {
        removed(match about_tables {
            true => tables(version, sent.iter().map(|(name, _)| table(name, vec![endpoint("e", address)])).collect()),
            false => routes(version, sent.iter().map(|(name, pool)| route(name, pool)).collect()),
        }, &gone)
    }
}

#[test]
fn a_route_of_before_there_were_targets_has_the_one_that_it_names() {
    let state = serving();
    let wanted = [v1::RouteTarget {
        pool: "a".to_owned(),
        served_model: "a".to_owned(),
        weight: 1,
        ..Default::default()
    }];
    assert_eq!(state.route("a").expect("there").targets, wanted);
}

#[test]
fn every_target_of_a_route_needs_its_table_and_a_route_leads_somewhere() {
    let split = |model: &str, pools: &[&str], fallbacks: &[&str]| {
        let target = |pool: &&str| v1::RouteTarget { pool: (*pool).to_owned(), ..Default::default() };
        let route = v1::ModelRoute {
            model: model.to_owned(),
            targets: pools.iter().map(target).collect(),
            fallbacks: fallbacks.iter().map(|&name| name.to_owned()).collect(),
            ..Default::default()
        };
        resource(MODEL_ROUTE_TYPE, model, &route)
    };
    let state = serving();
    let apply = |route| state.apply(&routes("2.11", vec![route]));
    let good = apply(split("s", &["a", "b"], &["nobody yet"])).expect("both are there");
    assert_eq!(good.route("s").expect("there").targets[1].served_model, "s", "filled in");
    apply(split("s", &[], &["a"])).expect("a route may have fallbacks alone");
    assert!(apply(split("s", &["a", "gone"], &[])).unwrap_err()[0].contains("\"gone\""));
    assert!(apply(split("s", &[], &[])).unwrap_err()[0].contains("neither a target nor a fallback"));
    assert!(apply(split("s", &["a"; 65], &[])).unwrap_err()[0].contains("65 targets"));
    // A table that is withdrawn stays for as long as any target needs it.
    let kept = good.apply(&removed(tables("2.12", vec![]), &["b"])).expect("kept");
    let gone = kept.apply(&removed(routes("2.13", vec![]), &["b", "s"])).expect("its routes go");
    assert!(kept.table("b").is_some() && gone.table("b").is_none());
}

proptest! {
    #[test]
    fn whatever_comes_a_state_is_whole_and_versions_only_grow(responses in prop::collection::vec(any_response(), 0..40)) {
        let mut state = XdsState::default();
        for response in responses {
            let Ok(next) = state.apply(&response) else { continue };
            prop_assert!(next.version() >= state.version());
            prop_assert!(next.is_complete() || !state.is_complete());
            for (model, route) in next.routes() {
                prop_assert!(next.table(&route.value.pool).is_some(), "{} has no table", model);
            }
            for pool in &next.withdrawn {
                prop_assert!(next.tables().contains_key(pool));
                prop_assert!(next.routes().values().any(|route| route.value.pool == *pool), "{} is held for none", pool);
            }
            for name in &response.removed_resources {
                prop_assert!(response.type_url != MODEL_ROUTE_TYPE || next.route(name).is_none());
                prop_assert!(response.type_url != ENDPOINT_TABLE_TYPE || next.table(name).is_none() || next.withdrawn.contains(name));
            }
            state = next;
        }
    }
}
