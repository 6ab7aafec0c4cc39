//! The REST API's refusals and its plain reads; and what proxies refuse, as the API shows it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Plane, Proxy, wait};
use penstock_proto::xds::{
    DiscoveryRequest, ENDPOINT_TABLE_TYPE, ENGINE_LOAD_TYPE, Node,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

#[tokio::test]
async fn every_bad_request_is_refused_with_its_field_and_code() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let at = "/api/v2/deployments/m";
    let large = format!(r#"{{"model_path":"{}"}}"#, "x".repeat(2 << 20));
    for (method, path, body, status, code, field) in [
        ("PUT", at, Some("{"), 400, "invalid_json", ""),
        ("PUT", at, Some(""), 400, "invalid_json", ""),
        ("PUT", at, Some(r#"{"replicas":1,"replicas":2}"#), 400, "invalid_json", ""),
        ("PUT", at, Some("[]"), 400, "invalid_field", ""),
        ("PUT", at, Some(r#"{"replica":1}"#), 400, "invalid_field", "replica"),
        ("PUT", at, Some(r#"{"replicas":"1"}"#), 400, "invalid_field", "replicas"),
        ("PUT", at, Some(r#"{"replicas":10001}"#), 400, "invalid_field", "replicas"),
        ("PUT", at, Some(r#"{"args":["--port","1"]}"#), 400, "invalid_field", "args"),
        ("PUT", at, Some(r#"{"env":{"A":1}}"#), 400, "invalid_field", "env.A"),
        ("PUT", at, Some(large.as_str()), 413, "body_too_large", ""),
        ("PUT", "/api/v2/deployments/.hidden", Some("{}"), 400, "invalid_field", "model"),
        ("PUT", "/api/v2/deployments/a%20b", Some("{}"), 400, "invalid_field", "model"),
        ("PUT", "/api/v2/deployments/%FF", Some("{}"), 400, "invalid_field", "model"),
        ("PATCH", at, Some(r#"{"engine":"sim"}"#), 400, "invalid_field", "engine"),
        ("PATCH", at, Some("{}"), 400, "invalid_field", "replicas"),
        ("PATCH", at, Some(r#"{"replicas":1}"#), 404, "not_found", ""),
        ("GET", at, None, 404, "not_found", ""),
        ("DELETE", at, None, 404, "not_found", ""),
        ("POST", at, Some("{}"), 405, "method_not_allowed", ""),
        ("DELETE", "/api/v2/nodes", None, 405, "method_not_allowed", ""),
        ("GET", "/api/v2/endpoints/m-0", None, 404, "not_found", ""),
        ("POST", "/api/v2/endpoints/m-0/drain", None, 404, "not_found", ""),
        ("GET", "/nowhere", None, 404, "not_found", ""),
    ] {
        let (got, answer) = plane.call(method, path, body).await;
        let error = &answer["error"];
        assert_eq!((got, error["code"].as_str()), (status, Some(code)), "{method} {path}: {answer}");
        assert_eq!(error["field"].as_str().unwrap_or_default(), field, "{method} {path}: {answer}");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    let form = reqwest::Client::new().put(format!("http://{}{at}", plane.http));
    let answer = form.header("content-type", "text/plain").body("{}").send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 415);
    assert!(plane.get("/api/v2/deployments").await["deployments"].as_array().unwrap().is_empty());
    plane.stop().await;
}

#[tokio::test]
async fn what_was_put_can_be_read_at_once_and_an_equal_put_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let body = r#"{"replicas":0,"engine":"sim","args":["--x"],"env":{"A":"b"}}"#;
    let (status, first) = plane.call("PUT", "/api/v2/deployments/a%2Fb", Some(body)).await;
    assert_eq!(status, 201);
    let mut read = plane.get("/api/v2/deployments/a/b").await;
    assert_eq!(read["model_path"], "a/b");
    assert_eq!(read["revision"], first["revision"]);
    let (status, again) = plane.call("PUT", "/api/v2/deployments/a/b", Some(body)).await;
    assert_eq!((status, &again["revision"]), (200, &first["revision"]));
    let (status, scaled) = plane.call("PATCH", "/api/v2/deployments/a/b", Some(r#"{"replicas":2}"#)).await;
    assert_eq!((status, scaled["replicas"].as_u64()), (200, Some(2)));
    assert!(scaled["revision"].as_u64() > first["revision"].as_u64());
    assert_eq!(scaled["args"][0], "--x", "scaling keeps the rest");
    read = wait("a reason", async || {
        let read = plane.get("/api/v2/deployments/a/b").await;
        read["status"]["waiting"][0].is_string().then_some(read)
    })
    .await;
    assert_eq!(read["status"]["waiting"][0], "a-b-0 waits for a node: none is present");
    let models = plane.get("/api/v2/models").await;
    assert_eq!(
        models.to_string(),
        r#"{"models":[{"model":"a/b","replicas":2,"ready":0}],"next_cursor":null}"#
    );
    plane.stop().await;
}

#[tokio::test]
async fn probes_metrics_and_the_console_answer() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    wait("readiness", async || (plane.call("GET", "/readyz", None).await.0 == 200).then_some(())).await;
    for (path, kind, part) in [
        ("/livez", "text/plain", "ok"),
        ("/healthz", "text/plain", "ok"),
        ("/readyz", "application/json", "\"ready\":true"),
        ("/metrics", "text/plain", "penstock_controlplane_xds_nacks_total{type=\"model_route\"} 0"),
        ("/", "text/html", "<title>Penstock</title>"),
        ("/v1/admin/ui", "text/html", "app.js"),
        ("/console/app.js", "text/javascript", "/api/v2/"),
        ("/console/style.css", "text/css", "table"),
    ] {
        let answer = plane.fetch(path).await;
        assert_eq!(answer.status().as_u16(), 200, "{path}");
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(kind), "{path}");
        assert!(answer.text().await.unwrap().contains(part), "{path}");
    }
    let status = plane.get("/api/v2/cluster/status").await;
    assert_eq!((status["store"].as_str(), status["leader"].as_bool()), (Some("embedded"), Some(true)));
    assert_eq!(status["readyz"]["ready"], true);
    plane.stop().await;
}

#[tokio::test]
async fn a_proxys_refusal_is_shown_and_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start_with(dir.path(), |config| config.xds.nack_retry_ms = 300).await;
    let proxy = Proxy::connect(&plane, "proxy-1").await;
    *proxy.refuse.lock().unwrap() = Some(("bad".into(), "the table would be empty".into()));
    for model in ["good", "bad"] {
        plane.call("PUT", &format!("/api/v2/deployments/{model}"), Some(r#"{"replicas":0}"#)).await;
    }
    let refused = async || {
        let shown = plane.get("/api/v2/proxies").await["proxies"][0].clone();
        (shown["last_nack"] == "the table would be empty").then_some(shown)
    };
    let shown = wait("the refusal", refused).await;
    assert_eq!((shown["node_id"].as_str(), shown["version_synced"].as_str()), (Some("proxy-1"), Some("")));
    proxy.wait("the good one to arrive all the same", |p| p.routes.contains_key("good")).await;
    assert!(plane.metric("penstock_controlplane_xds_nacks_total{type=\"endpoint_table\"}").await >= 1.0);
    *proxy.refuse.lock().unwrap() = None;
    proxy.wait("the bad one, offered again", |p| p.routes.contains_key("bad")).await;
    wait("the refusal to be cleared", async || {
        let shown = plane.get("/api/v2/proxies").await;
        let proxy = &shown["proxies"][0];
        (proxy["last_nack"] == "" && proxy["version_synced"] == shown["version"]).then_some(())
    })
    .await;
    assert!(!proxy.now().dangling);
    drop(proxy);
    wait("the proxy to leave the list", async || {
        plane.get("/api/v2/proxies").await["proxies"].as_array().unwrap().is_empty().then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test]
async fn state_of_the_world_is_served_and_what_cannot_be_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    plane.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim","replicas":0}"#)).await;
    let mut client =
        AggregatedDiscoveryServiceClient::connect(format!("http://{}", plane.grpc)).await.unwrap();
    let mut ask = async |node: Option<Node>, type_url: &str| {
        let request = DiscoveryRequest { node, type_url: type_url.into(), ..Default::default() };
        // The stream stays open behind its one request.
        let requests = tokio_stream::StreamExt::chain(tokio_stream::iter([request]), tokio_stream::pending());
        let mut stream = client.stream_aggregated_resources(requests).await.unwrap().into_inner();
        stream.message().await.map(Option::unwrap)
    };
    let node = || Some(Node { id: "p".into(), ..Default::default() });
    wait("the table", async || {
        let told = ask(node(), ENDPOINT_TABLE_TYPE).await.unwrap();
        assert_eq!(told.type_url, ENDPOINT_TABLE_TYPE);
        (told.resources.len() == 1).then_some(())
    })
    .await;
    for (node, type_url, words) in [
        (None, ENDPOINT_TABLE_TYPE, "node.id"),
        (node(), "type.googleapis.com/x", "served are"),
        (node(), ENGINE_LOAD_TYPE, "DeltaAggregatedResources only"),
        (node(), "type.googleapis.com/envoy.config.cluster.v3.Cluster", "xds.envoy.listen is empty"),
    ] {
        let refused = ask(node, type_url).await.unwrap_err();
        assert!(refused.message().contains(words), "{words}: {}", refused.message());
    }
    plane.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = penstock_config::controlplane::ControlPlaneConfig::default();
    config.listen.http = taken.local_addr().unwrap().to_string();
    config.store.path = dir.path().join("s.redb").to_str().unwrap().into();
    let stop = tokio_util::sync::CancellationToken::new();
    let error = penstock_controlplane::run(config, None, stop).await.unwrap_err().to_string();
    assert!(error.contains("listen.http") && error.contains("127.0.0.1:"), "{error}");
}
