//! Routes over REST and on their way to proxies: aliases, splits, fallbacks, LoRA adapters; and news of loads.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, Proxy};
use penstock_proto::{
    v1,
    xds::{self, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use prost::Message;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

async fn deploy(plane: &Plane, models: &[&str]) {
    for model in models {
        let path = format!("/api/v2/deployments/{model}");
        assert_eq!(plane.call("PUT", &path, Some(r#"{"replicas":0}"#)).await.0, 201);
    }
}

fn targets(route: &v1::ModelRoute) -> Vec<(&str, &str, u32)> {
    route.targets.iter().map(|t| (t.pool.as_str(), t.adapter.as_str(), t.weight)).collect()
}

#[tokio::test]
async fn every_bad_route_is_refused_with_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start_with(dir.path(), |config| config.limits.max_routes = 2).await;
    deploy(&plane, &["big", "small"]).await;
    let put =
        async |name: &str, body: &str| plane.call("PUT", &format!("/api/v2/routes/{name}"), Some(body)).await;
    let (status, made) = put("a", r#"{"targets":[{"model":"big"}],"fallbacks":["small"]}"#).await;
    assert_eq!((status, &made["targets"][0]["weight"]), (201, &json!(100)), "{made}");
    assert_eq!(put("b", r#"{"targets":[{"model":"small"}],"fallbacks":["a"]}"#).await.0, 201);
    for (name, body, field, part) in [
        ("a", "[]", "", "a JSON object"),
        ("a", r#"{"targets":[{"model":"gone"}]}"#, "targets[0].model", "neither a deployment nor an adapter"),
        ("a", r#"{"targets":[{"model":"big","weight":2000}]}"#, "targets[0].weight", "0 to 1000, not 2000"),
        ("a", r#"{"targets":[{"model":"big"}],"fallbacks":["b"]}"#, "fallbacks[0]", "a -> b -> a"),
        ("a", r#"{"targets":[{"model":"big"}],"fallbacks":["c"]}"#, "fallbacks[0]", "no deployment, adapter"),
        ("big", r#"{"targets":[{"model":"small"}]}"#, "targets", "must keep it among its targets"),
        (".x", r#"{"targets":[{"model":"small"}]}"#, "name", "1 to 256 characters"),
    ] {
        let (status, answer) = put(name, body).await;
        let error = &answer["error"];
        assert_eq!((status, error["code"].as_str()), (400, Some("invalid_field")), "{body}: {answer}");
        assert_eq!(error["field"].as_str().unwrap_or_default(), field, "{answer}");
        assert!(error["message"].as_str().unwrap().contains(part), "{answer}");
    }
    let (status, answer) = put("third", r#"{"targets":[{"model":"big"}]}"#).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (403, Some("too_many_routes")));
    let (status, answer) = plane.call("PUT", "/api/v2/deployments/a", Some("{}")).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("name_is_a_route")), "{answer}");
    for name in ["gone", "small"] {
        assert_eq!(plane.call("DELETE", &format!("/api/v2/routes/{name}"), None).await.0, 404, "{name}");
    }
    assert_eq!(plane.get("/api/v2/routes/small").await["implicit"], true);
    assert_eq!(plane.call("GET", "/api/v2/routes/gone", None).await.0, 404);
    plane.stop().await;
}

#[tokio::test]
async fn a_route_reaches_proxies_follows_its_targets_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    deploy(&plane, &["big", "next", "small"]).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let body =
        r#"{"targets":[{"model":"big","weight":90},{"model":"next","weight":10}],"fallbacks":["small"]}"#;
    assert_eq!(plane.call("PUT", "/api/v2/routes/big", Some(body)).await.0, 201);
    let (status, again) = plane.call("PUT", "/api/v2/routes/big", Some(body)).await;
    assert_eq!((status, &again["implicit"]), (200, &json!(false)), "an equal put changes nothing");
    let seen =
        proxy.wait("the split", |now| now.routes.get("big").is_some_and(|r| r.targets.len() == 2)).await;
    let route = &seen.routes["big"];
    assert_eq!(targets(route), [("big", "", 90), ("next", "", 10)]);
    assert_eq!((route.pool.as_str(), &route.fallbacks[..]), ("big", &["small".to_owned()][..]));

    // A target that goes leaves its share to the other, and is reported; the route stays as it was made.
    assert_eq!(plane.call("DELETE", "/api/v2/deployments/next", None).await.0, 200);
    let one = |now: &common::Applied| now.routes.get("big").is_some_and(|r| targets(r) == [("big", "", 90)]);
    proxy.wait("the other target", one).await;
    let shown = plane.get("/api/v2/routes/big").await;
    assert_eq!((&shown["missing"], shown["targets"].as_array().unwrap().len()), (&json!(["next"]), 2));
    plane.stop().await;

    let plane = Plane::start(dir.path()).await;
    assert_eq!(plane.get("/api/v2/routes/big").await["missing"], json!(["next"]));
    let proxy = Proxy::connect(&plane, "p").await;
    proxy.wait("the route after a restart", one).await;
    deploy(&plane, &["next"]).await;
    proxy.wait("both again", |now| now.routes["big"].targets.len() == 2).await;
    assert_eq!(plane.call("DELETE", "/api/v2/routes/big", None).await.0, 200);
    let itself = |now: &common::Applied| targets(&now.routes["big"]) == [("big", "", 1)];
    let last = proxy.wait("the implicit route", itself).await;
    assert!(!last.dangling, "no route was ever told before its tables");
    plane.stop().await;
}

#[tokio::test]
async fn adapters_become_names_and_a_deployment_of_the_same_name_wins() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n", 2).await;
    let proxy = Proxy::connect(&plane, "p").await;
    let body = r#"{"engine":"sim","lora":[{"name":"sql","path":"/l/sql"}]}"#;
    assert_eq!(plane.call("PUT", "/api/v2/deployments/base", Some(body)).await.0, 201);
    let a = agent.wait_assigned(1).await.remove(0);
    assert_eq!(a.spec.as_ref().unwrap().lora[0].path, "/l/sql");
    let seen = proxy.wait("the adapter's route", |now| now.routes.contains_key("sql")).await;
    assert_eq!(targets(&seen.routes["sql"]), [("base", "sql", 1)], "before any engine is ready");
    assert_eq!(
        (seen.routes["sql"].parent.as_str(), seen.routes["sql"].served_model.as_str()),
        ("base", "sql")
    );

    // Loaded at run time, one more; and one that no client could name.
    let address = "127.0.0.1:10814";
    assert!(agent.register_with(&a, a.generation, address, &["art", "sql", "no name"]).await.accepted);
    let seen = proxy.wait("the other adapter", |now| now.routes.contains_key("art")).await;
    let endpoint = |now: &common::Applied| now.tables["base"].endpoints[0].adapters.clone();
    assert_eq!(endpoint(&seen), ["art", "sql"]);
    let shown = plane.get("/api/v2/deployments/base").await;
    let expected = json!([
        {"name": "art", "endpoints": 1, "reason": ""}, {"name": "sql", "endpoints": 1, "reason": ""},
    ]);
    assert_eq!(shown["adapters"], expected);

    assert!(agent.register_with(&a, a.generation, address, &["sql"]).await.accepted);
    proxy.wait("it to be unloaded", |now| !now.routes.contains_key("art") && endpoint(now) == ["sql"]).await;
    deploy(&plane, &["sql"]).await;
    proxy.wait("the deployment", |now| targets(&now.routes["sql"]) == [("sql", "", 1)]).await;
    let shown = plane.get("/api/v2/deployments/base").await;
    assert!(shown["adapters"][0]["reason"].as_str().unwrap().contains("deployment of that name"), "{shown}");
    assert_eq!(plane.call("DELETE", "/api/v2/deployments/sql", None).await.0, 200);
    proxy.wait("the adapter again", |now| now.routes.get("sql").is_some_and(|r| r.parent == "base")).await;
    // An alias of an adapter.
    let alias = r#"{"targets":[{"model":"sql"}]}"#;
    assert_eq!(plane.call("PUT", "/api/v2/routes/tables", Some(alias)).await.0, 201);
    let named = |now: &common::Applied| {
        now.routes.get("tables").is_some_and(|r| targets(r) == [("base", "sql", 100)])
    };
    proxy.wait("the alias", named).await;
    plane.stop().await;
}

#[tokio::test]
async fn news_of_loads_reach_those_who_ask_with_their_age_and_apart_from_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let agent = Agent::connect(&plane, "n", 1).await;
    plane.call("PUT", "/api/v2/deployments/a%2Fb", Some("{}")).await;
    let a = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&a, 10_814).await.accepted);
    let revision = plane.get("/api/v2/cluster/status").await["revision"].clone();

    let (outbound, stream) = mpsc::channel(8);
    let request = xds::DeltaDiscoveryRequest {
        node: Some(xds::Node { id: "p".into(), ..Default::default() }),
        type_url: xds::ENGINE_LOAD_TYPE.into(),
        ..Default::default()
    };
    outbound.send(request.clone()).await.unwrap();
    let address = format!("http://{}", plane.grpc);
    let mut client = AggregatedDiscoveryServiceClient::connect(address).await.unwrap();
    let stream = client.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap();
    let mut inbound = stream.into_inner();
    let mut next = async || {
        let response = inbound.message().await.unwrap().unwrap();
        let nonce = response.nonce.clone();
        outbound.send(xds::DeltaDiscoveryRequest { response_nonce: nonce, ..request.clone() }).await.unwrap();
        let resource = &response.resources[0];
        let any = resource.resource.as_ref().unwrap();
        (resource.name.clone(), v1::EngineLoad::decode(any.value.as_slice()).unwrap())
    };
    let (name, load) = next().await;
    assert_eq!((name.as_str(), load.running, load.generation), ("a/b/a-b-0", 3, a.generation));
    assert!(load.age_ms < 5_000, "{load:?}");
    // A change comes at once, from a generation that is present; nobody else's word counts.
    let told = |running, generation| {
        let load = v1::EngineLoad { running, generation, age_ms: 40, ..Default::default() };
        let loads = vec![v1::ReplicaLoad { replica_id: a.replica_id.clone(), load: Some(load) }];
        v1::agent_message::Message::Load(v1::LoadReport { loads })
    };
    agent.engines.lock().unwrap().clear();
    agent.send(told(77, a.generation + 1)).await;
    agent.send(told(9, a.generation)).await;
    loop {
        let (_, load) = next().await;
        assert_ne!(load.running, 77, "of a generation that is not there");
        if load.running == 9 {
            assert!(load.age_ms >= 40, "{load:?}");
            break;
        }
    }
    assert!(plane.metric("penstock_controlplane_engine_loads_total{outcome=\"unassigned\"}").await >= 1.0);
    assert_eq!(plane.get("/api/v2/cluster/status").await["revision"], revision, "nothing was stored");
    plane.stop().await;
}
