//! What a follower's proxies get and say, as processes on a real etcd: the link between control planes.
#![allow(clippy::unwrap_used)]

mod common;
mod etcd_support;

use common::{Agent, Plane, Proxy, wait};
use etcd_support::{Cluster, planes::Planes};
use penstock_proto::{
    v1::{self, gateways_client::GatewaysClient},
    xds::{
        DeltaDiscoveryRequest, ENGINE_LOAD_TYPE, Node,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Two control planes, the leader first.
async fn pair(cluster: &Cluster) -> (Planes, Plane, Plane) {
    let patient = |_| vec![("PENSTOCK_CONTROLPLANE__FLEET__DEREGISTER_ACK_WAIT_MS".into(), "60000".into())];
    let planes = Planes::start(cluster, 2, patient).await;
    let leader = planes.leader(&[0, 1]).await;
    let at = |index: usize| Plane::at(&planes.all[index].http, &planes.all[index].grpc);
    let (first, second) = (at(leader), at(1 - leader));
    wait("the link", async || (first.metric("penstock_controlplane_followers").await == 1.0).then_some(()))
        .await;
    (planes, first, second)
}

/// One engine, registered with the leader.
async fn serving(leader: &Plane) -> (Agent, v1::Assignment) {
    let agent = Agent::connect(leader, "node-1", 2).await;
    let (status, body) = leader.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    assert_eq!(status, 201, "{body}");
    let assigned = agent.wait_assigned(1).await.remove(0);
    assert!(agent.serve(&assigned, 10_814).await.accepted);
    (agent, assigned)
}

#[tokio::test]
async fn a_deregistration_waits_for_the_proxies_of_followers_too() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let (mut planes, leader, follower) = pair(&cluster).await;
    let (agent, assigned) = serving(&leader).await;
    let proxy = Proxy::connect(&follower, "far-proxy").await;
    let id = assigned.replica_id.clone();
    proxy.wait("the endpoint", |applied| applied.state_of("m", &id).is_some()).await;
    *proxy.mute.lock().unwrap() = true;
    agent.deregister(&assigned).await;
    // The endpoint is gone at the leader, whose own proxies (it has none) all know it.
    wait("it to be taken out", async || leader.endpoint(&id).await.filter(|e| e["state"] != "ready")).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!agent.deregistered(&id), "a proxy of the follower may still send to it");
    *proxy.mute.lock().unwrap() = false;
    agent.wait_deregistered(&id).await;
    assert!(proxy.now().state_of("m", &id).is_none());

    // One that is gone is not waited for.
    assert!(agent.serve(&assigned, 10_814).await.accepted);
    proxy.wait("the endpoint again", |applied| applied.state_of("m", &id).is_some()).await;
    *proxy.mute.lock().unwrap() = true;
    agent.deregister(&assigned).await;
    let gone = planes.all.iter().position(|plane| plane.http == follower.http).unwrap();
    planes.all[gone].kill();
    agent.wait_deregistered(&id).await;
    wait("the link's end", async || {
        (leader.metric("penstock_controlplane_followers").await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_followers_proxies_hear_of_loads_and_its_word_wakes_models() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let (_planes, leader, follower) = pair(&cluster).await;
    let (agent, assigned) = serving(&leader).await;

    let (ask, stream) = mpsc::channel(4);
    let request = DeltaDiscoveryRequest {
        node: Some(Node { id: "far-proxy".into(), ..Default::default() }),
        type_url: ENGINE_LOAD_TYPE.into(),
        resource_names_subscribe: vec!["*".into()],
        ..Default::default()
    };
    ask.send(request).await.unwrap();
    let mut client =
        AggregatedDiscoveryServiceClient::connect(format!("http://{}", follower.grpc)).await.unwrap();
    let mut news = client.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let heard = news.message().await.unwrap().unwrap();
    let load = v1::EngineLoad::decode(&*heard.resources[0].resource.as_ref().unwrap().value).unwrap();
    assert_eq!(heard.resources[0].name, format!("m/{}", assigned.replica_id));
    assert_eq!((load.running, load.waiting, load.generation), (3, 1, assigned.generation));

    let sleepy = r#"{"engine":"sim","replicas":0,"autoscaling":{"min":0,"max":1,"idle_to_zero_s":600}}"#;
    let (status, body) = leader.call("PUT", "/api/v2/deployments/sleepy", Some(sleepy)).await;
    assert_eq!(status, 201, "{body}");
    let mut gateways = GatewaysClient::connect(format!("http://{}", follower.grpc)).await.unwrap();
    wait("the follower to know the model", async || {
        let found = follower.get("/api/v2/models").await["models"].to_string();
        found.contains("sleepy").then_some(())
    })
    .await;
    let wanted = |model: &str| v1::Wanted { model: model.into(), queued: 2 };
    let models = vec![wanted("sleepy"), wanted("nobody-knows-it")];
    gateways.want(v1::Demand { source: "far-proxy".into(), models }).await.unwrap();
    let assigned =
        wait("it to wake", async || agent.assignments().into_iter().find(|a| a.model == "sleepy")).await;
    assert_eq!(assigned.replica_id, "sleepy-0");
    let refused = gateways.want(v1::Demand::default()).await.expect_err("nobody says so");
    assert!(refused.message().contains("whose it is"), "{refused}");
}

#[tokio::test]
async fn every_proxys_refusal_is_in_one_list_whichever_control_plane_is_asked() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let (_planes, leader, follower) = pair(&cluster).await;
    let near = Proxy::connect(&leader, "near-proxy").await;
    let far = Proxy::connect(&follower, "far-proxy").await;
    *far.refuse.lock().unwrap() = Some(("bad".into(), "the table would be empty".into()));
    let (status, body) = leader.call("PUT", "/api/v2/deployments/bad", Some(r#"{"replicas":0}"#)).await;
    assert_eq!(status, 201, "{body}");
    for asked in [&leader, &follower] {
        let both = wait("both proxies, one with its refusal", async || {
            let shown = asked.get("/api/v2/proxies").await;
            let [far, near] = shown["proxies"].as_array()?.as_slice() else { return None };
            let told =
                far["last_nack"] == "the table would be empty" && near["version_synced"] == shown["version"];
            told.then(|| (far.clone(), near.clone()))
        });
        let (far, near) = both.await;
        assert_eq!((&far["node_id"], &near["node_id"]), (&"far-proxy".into(), &"near-proxy".into()));
        assert_ne!(far["controlplane"], near["controlplane"]);
        assert_eq!(far["types"]["endpoint_table"]["last_nack"], "the table would be empty", "{far}");
    }
    *far.refuse.lock().unwrap() = None;
    drop(near);
    wait("one proxy without a refusal", async || {
        let shown = leader.get("/api/v2/proxies").await;
        // It is offered again after a time; until then the reason stays.
        (shown["proxies"].as_array()?.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_engines_log_is_read_through_whichever_control_plane_is_asked_and_has_the_session() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let (_planes, leader, follower) = pair(&cluster).await;
    // The session goes through the follower, and so does one of the two readers.
    let agent = Agent::connect(&follower, "node-1", 2).await;
    let (status, body) = leader.call("PUT", "/api/v2/deployments/m", Some(r#"{"engine":"sim"}"#)).await;
    assert_eq!(status, 201, "{body}");
    agent.wait_assigned(1).await;
    for (asked, plane) in [&leader, &follower].into_iter().enumerate() {
        let path = "/api/v2/models/m/replicas/m-0/logs?follow=true";
        let (mut response, id) = tokio::join!(plane.fetch(path), async {
            let first =
                |all: &[v1::LogRequest]| all.iter().filter(|r| !r.replica_id.is_empty()).count() > asked;
            let all = agent.log_requests(first).await;
            let request = all.into_iter().rfind(|request| !request.replica_id.is_empty()).unwrap();
            let part = v1::LogChunk { id: request.id, data: "one\n".into(), ..Default::default() };
            agent.send(v1::agent_message::Message::Log(part)).await;
            request.id
        });
        assert_eq!(response.status(), 200);
        assert_eq!(response.chunk().await.unwrap().unwrap(), "one\n");
        let part = v1::LogChunk { id, data: "two\n".into(), ..Default::default() };
        agent.send(v1::agent_message::Message::Log(part)).await;
        assert_eq!(response.chunk().await.unwrap().unwrap(), "two\n");
        drop(response);
        agent.log_requests(|all| all.iter().any(|request| request.id == id && request.cancel)).await;
    }
}
