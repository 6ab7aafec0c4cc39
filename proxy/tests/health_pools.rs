//! Health and whole pools: no storm of retries, somebody is always tried, counts and ejections survive what the control
//! plane says (drill DR33, promise P10).

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use penstock_config::proxy::ProxyConfig;
use penstock_proxy::health::Phase;
use support::{watched::*, *};
use tokio::task::JoinSet;

const CLIENTS: usize = 16;

/// Sends `each` requests by each of some clients; the answers.
async fn storm(proxy: &Proxy, each: usize) -> Vec<String> {
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let address = proxy.address;
        clients.spawn(async move {
            let mut answers = vec![];
            for _ in 0..each {
                let mut client = Client::connect(address).await;
                client.send(&post(CHAT, &chat(true))).await;
                answers.push(client.read_to_end().await);
            }
            answers
        });
    }
    clients.join_all().await.into_iter().flatten().collect()
}

/// P10. The rest of what fails is shared out by ejections, not by retries.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_half_of_the_engines_failing_upstream_requests_stay_within_a_fifth_more() {
    let sick = |_: usize, seen: &Seen| if is_probe(seen) { ok() } else { broken() };
    let well = |_: usize, seen: &Seen| if is_probe(seen) { ok() } else { after(2) };
    let engines = [
        Engine::replying(sick).await,
        Engine::replying(sick).await,
        Engine::replying(well).await,
        Engine::replying(well).await,
    ];
    let watched = Watched::start(ProxyConfig::default(), &engines.each_ref().map(|e| e.address));
    let answers = storm(&watched.proxy, 125).await;
    let upstream: usize = engines.iter().map(Engine::served).sum();
    assert!(upstream * 10 <= answers.len() * 12, "{upstream} upstream for {}", answers.len());
    assert!(failures(&answers).is_empty(), "{:?}", failures(&answers).first());
    watched.stop().await.settles().await;
}

/// DR33.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_every_engine_failing_clients_hear_it_at_once_and_engines_get_no_storm() {
    let dies = |_: usize, seen: &Seen| if is_probe(seen) { ok() } else { vec![Step::Reset] };
    let engines = [Engine::replying(dies).await, Engine::replying(dies).await, Engine::replying(dies).await];
    let mut config = ProxyConfig::default();
    // The floor is for quiet services; a slow machine would make this one of them.
    config.upstream.retry_floor_per_s = 0;
    let watched = Watched::start(config, &engines.each_ref().map(|e| e.address));
    let answers = storm(&watched.proxy, 60).await;
    let upstream: usize = engines.iter().map(Engine::served).sum();
    assert!(upstream * 10 <= answers.len() * 12, "{upstream} upstream for {}", answers.len());
    for answer in &answers {
        assert!(
            answer.starts_with("HTTP/1.1 50") && answer.contains("\"code\":\"engine_failed\""),
            "{answer}"
        );
    }
    watched.stop().await.settles().await;
}

/// DR33, with nobody listening at all.
#[tokio::test]
async fn with_every_engine_down_a_typed_503_comes_fast() {
    let watched = Watched::start(ProxyConfig::default(), &[nobody().await, nobody().await]);
    for _ in 0..50 {
        let asked = Instant::now();
        let answer = watched.proxy.exchange(&post(CHAT, &chat(true))).await;
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("engine_unreachable"), "{answer}");
        assert!(answer.to_ascii_lowercase().contains("retry-after"), "{answer}");
    }
}

/// ai-gateway #2502: with the checks against it, a pool stayed shut although it would have served.
#[tokio::test]
async fn with_everything_ejected_the_next_request_is_tried_all_the_same() {
    let ill = Switch::default();
    ill.on();
    let engine = {
        let ill = ill.clone();
        Engine::replying(move |_, _| if ill.is_on() { broken() } else { after(1) }).await
    };
    let mut config = ProxyConfig::default();
    config.health.base_ejection_ms = 600_000;
    config.health.max_ejection_ms = 600_000;
    let watched = Watched::start(config, &[engine.address]);
    for _ in 0..3 {
        watched.proxy.exchange(&post(CHAT, &chat(true))).await;
    }
    watched.ejected(0).await;
    ill.off();
    let answer = watched.proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains("[DONE]"), "{answer}");
}

/// A stream that is under way, and can be ended.
async fn open_stream(proxy: &Proxy) -> Client {
    let mut client = Client::connect(proxy.address).await;
    client.send(&post(CHAT, &chat(true))).await;
    client.read_until("one").await;
    client
}

async fn endless() -> Engine {
    Engine::replying(|_, seen| match is_probe(seen) {
        true => ok(),
        false => vec![Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into()), Step::UntilClosed],
    })
    .await
}

/// vllm-project/router #197: each health check set every worker's count of requests to nothing.
#[tokio::test]
async fn neither_a_probe_nor_a_table_touches_the_count_of_requests_under_way() {
    let engine = endless().await;
    let mut config = ProxyConfig::default();
    config.health.probe_interval_ms = 100;
    let watched = Watched::start(config, &[engine.address]);
    let client = open_stream(&watched.proxy).await;
    eventually("it was probed", || engine.seen().iter().filter(|seen| is_probe(seen)).count() > 2).await;
    watched.proxy.gateway.table.apply(&state(&[engine.address, nobody().await]));
    assert_eq!(watched.endpoint(0).inflight(), 1);
    drop(client);
    watched.stop().await.settles().await;
}

/// Gateway API inference extension #1739: an endpoint that went and came back had a count below nothing.
#[tokio::test]
async fn an_endpoint_that_goes_and_comes_back_has_no_count_below_nothing() {
    let engine = endless().await;
    let watched = Watched::start(ProxyConfig::default(), &[engine.address]);
    let client = open_stream(&watched.proxy).await;
    let table = &watched.proxy.gateway.table;
    table.apply(&state(&[]));
    table.apply(&state(&[engine.address]));
    drop(client);
    eventually("the engine sees the end", || engine.closed_at().len() == 1).await;
    watched.proxy.settles().await;
    assert_eq!(watched.endpoint(0).inflight(), 0);
}

#[tokio::test]
async fn a_table_that_calls_an_ejected_endpoint_ready_does_not_bring_it_back() {
    let watched = Watched::start(ProxyConfig::default(), &[nobody().await, endless().await.address]);
    watched.ejected(0).await;
    let address: std::net::SocketAddr = watched.endpoint(0).address.parse().unwrap();
    watched.proxy.gateway.table.apply(&state(&[address, nobody().await]));
    assert_eq!(watched.phase(0), Phase::Ejected);
}

#[tokio::test]
async fn probes_end_with_the_endpoint_and_with_the_process() {
    let silent = Engine::replying(|_, _| vec![Step::UntilClosed]).await;
    let gone = Engine::replying(|_, _| ok()).await;
    let mut config = ProxyConfig::default();
    config.health.probe_interval_ms = 100;
    config.health.probe_timeout_ms = 600_000;
    let watched = Watched::start(config, &[silent.address, gone.address]);
    eventually("both are probed", || !silent.seen().is_empty() && gone.seen().len() > 2).await;
    watched.proxy.gateway.table.apply(&state(&[silent.address]));
    // One may have been under way.
    let before = gone.seen().len();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(gone.seen().len() <= before + 1, "{before} before, {} now", gone.seen().len());
    watched.stop().await;
    eventually("the probe under way is dropped", || silent.closed_at().len() == 1).await;
}

#[tokio::test]
async fn metrics_and_readyz_tell_the_states() {
    let watched = Watched::start(ProxyConfig::default(), &[nobody().await, nobody().await]);
    for at in 0..2 {
        watched.ejected(at).await;
    }
    let gateway = &watched.proxy.gateway;
    let now_ms = gateway.now_ms();
    let described = penstock_proxy::health::describe(&watched.endpoint(0), now_ms);
    assert_eq!((&described["state"], &described["reason"]), (&"ejected".into(), &"probe".into()));
    let counts = penstock_proxy::health::count(&gateway.table.load(), now_ms);
    assert_eq!((&counts["ejected"], &counts["admitted"]), (&2.into(), &0.into()));
    let snapshot = gateway.table.load();
    let text = gateway.metrics.render(&penstock_proxy::telemetry::metrics::State {
        snapshot: &snapshot,
        xds: &penstock_proxy::xds::status::XdsStatus::default().view(),
        draining: false,
        body_bytes_held: 0,
        now_ms,
        max_ejected_percent: 67,
    });
    for line in [
        "penstock_proxy_endpoints_by_health{state=\"ejected\"} 2",
        "penstock_proxy_pools_in_panic 1",
        "penstock_proxy_ejections_total{reason=\"probe\"} 2",
    ] {
        assert!(text.contains(line), "{line} missing in {text}");
    }
}
