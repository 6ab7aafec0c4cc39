//! Requests for a model that was scaled to zero: held, told of, answered once an engine is there.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use penstock_config::proxy::ProxyConfig;
use penstock_proto::v1::{
    self,
    gateways_server::{Gateways, GatewaysServer},
};
use penstock_proxy::xds::{client::XdsSettings, wants::Wants};
use support::*;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

fn sleeping(pool: &str, engines: &[SocketAddr]) -> v1::EndpointTable {
    v1::EndpointTable { wakes: true, ..table(pool, engines) }
}

fn asleep() -> penstock_proxy::xds::state::XdsState {
    fleet(vec![sleeping("m", &[])], vec![route("m", &[("m", 1)], &[])])
}

/// A control plane that notes what proxies say.
#[derive(Clone, Default)]
struct Noted(Arc<Mutex<Vec<BTreeMap<String, u32>>>>);

#[tonic::async_trait]
impl Gateways for Noted {
    async fn want(&self, request: Request<v1::Demand>) -> Result<Response<v1::DemandTaken>, Status> {
        let demand = request.into_inner();
        assert_eq!(demand.source, "proxy-1");
        let models = demand.models.into_iter().map(|wanted| (wanted.model, wanted.queued));
        self.0.lock().unwrap().push(models.collect());
        Ok(Response::new(v1::DemandTaken {}))
    }
}

impl Noted {
    fn last(&self) -> Option<BTreeMap<String, u32>> {
        self.0.lock().unwrap().last().cloned()
    }

    async fn serve(self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(GatewaysServer::new(self));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }
}

fn wants(controlplanes: &[String]) -> Wants {
    let endpoints = controlplanes.to_vec();
    Wants::new(&XdsSettings { endpoints, node_id: "proxy-1".into(), ..XdsSettings::default() }).unwrap()
}

#[tokio::test]
async fn a_request_is_held_and_told_of_until_an_engine_is_there() {
    let noted = Noted::default();
    let address = noted.clone().serve().await;
    // The other one is down: whichever is asked first, the word arrives.
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let proxy = Proxy::start_on(ProxyConfig::default(), &asleep());
    let stop = CancellationToken::new();
    let told = wants(&[gone.to_string(), address.to_string()]);
    let told = tokio::spawn(told.run(Arc::clone(&proxy.gateway), stop.clone()));
    let mut first = Client::connect(proxy.address).await;
    first.send(&post(CHAT, &chat(true))).await;
    eventually("the first is told of", || noted.last() == Some([("m".into(), 1)].into())).await;
    let mut second = Client::connect(proxy.address).await;
    second.send(&post(CHAT, &chat(false))).await;
    eventually("both are told of", || noted.last() == Some([("m".into(), 2)].into())).await;
    let engine = Engine::start(|_| vec![Step::Send(sse(&["awake"]).into_bytes())]).await;
    let woken = fleet(vec![sleeping("m", &[engine.address])], vec![route("m", &[("m", 1)], &[])]);
    proxy.gateway.table.apply(&woken);
    assert!(first.read_to_end().await.contains("awake"));
    assert!(second.read_to_end().await.starts_with("HTTP/1.1 200 "));
    eventually("nothing is wanted any more", || noted.last() == Some(BTreeMap::new())).await;
    proxy.settles().await;
    stop.cancel();
    told.await.unwrap();
}

#[tokio::test]
async fn one_that_does_not_wake_in_time_is_told_so_in_words() {
    let mut config = ProxyConfig::default();
    config.queue.wake_ms = 100;
    let proxy = Proxy::start_on(config, &asleep());
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains(r#""code":"model_starting""#), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: 5\r\n"), "{answer}");
    let wanted = proxy.gateway.table.wanted(proxy.gateway.now_ms());
    assert_eq!(wanted.len(), 1, "whoever asks again finds it starting: {wanted:?}");
    proxy.settles().await;
}

#[tokio::test]
async fn a_model_that_may_not_sleep_is_refused_at_once_as_before() {
    let proxy = Proxy::start(ProxyConfig::default(), &[]);
    let asked = Instant::now();
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains(r#""code":"no_endpoint_available""#), "{answer}");
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert!(proxy.gateway.table.wanted(proxy.gateway.now_ms()).is_empty());
}

#[tokio::test]
async fn a_fallback_answers_meanwhile_and_the_sleeper_wakes_nevertheless() {
    let engine = Engine::start(|_| vec![Step::Send(sse(&["from the other"]).into_bytes())]).await;
    let tables = vec![sleeping("m", &[]), table("other", &[engine.address])];
    let routes = vec![route("m", &[("m", 1)], &["other"]), route("other", &[("other", 1)], &[])];
    let proxy = Proxy::start_on(ProxyConfig::default(), &fleet(tables, routes));
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("from the other"), "{answer}");
    let wanted = proxy.gateway.table.wanted(proxy.gateway.now_ms());
    assert_eq!(wanted.len(), 1, "{wanted:?}");
}

#[tokio::test]
async fn a_client_that_leaves_is_not_waited_for() {
    let proxy = Proxy::start_on(ProxyConfig::default(), &asleep());
    let mut client = Client::connect(proxy.address).await;
    client.send(&post(CHAT, &chat(true))).await;
    let depth = || proxy.gateway.table.load().pools["m"].queue.len();
    eventually("it is held", || depth() == 1).await;
    drop(client);
    eventually("it is not", || depth() == 0).await;
    proxy.settles().await;
}
