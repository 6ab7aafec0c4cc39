//! Endpoints that fall ill and get well: who is left out, how soon, and how it comes back (drill DR32).

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use penstock_config::proxy::ProxyConfig;
use support::{watched::*, *};

/// DR32 and what every drill here is measured by.
const SOON: Duration = Duration::from_secs(5);

/// An engine that takes `usual_ms`, and does something else while the switch is on. Probes are answered at once.
async fn engine(
    usual_ms: u64,
    ill: &Switch,
    does: impl Fn(usize) -> Vec<Step> + Send + Sync + 'static,
) -> Engine {
    let ill = ill.clone();
    Engine::replying(move |number, seen| match is_probe(seen) {
        true => ok(),
        false if ill.is_on() => does(number),
        false => after(usual_ms),
    })
    .await
}

async fn healthy() -> Engine {
    engine(40, &Switch::default(), |_| vec![]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_fails_half_of_its_requests_is_left_out_and_comes_back_once_well() {
    let ill = Switch::default();
    let half = |number: usize| if number.is_multiple_of(2) { broken() } else { after(40) };
    let (bad, one, two) = (engine(40, &ill, half).await, healthy().await, healthy().await);
    let watched = Watched::start(ProxyConfig::default(), &[bad.address, one.address, two.address]);
    let load = Load::start(&watched.proxy, 8);
    eventually("there is load", || bad.served() > 20).await;
    ill.on();
    let took = watched.ejected(0).await;
    assert!(took < SOON, "{took:?}");
    assert_eq!(watched.ejections("success_rate") + watched.ejections("consecutive_failures"), 1);
    ill.off();
    watched.admitted(0).await;
    let before = bad.served();
    eventually("it is given requests again", || bad.served() > before + 5).await;
    let answers = load.end().await;
    assert!(failures(&answers).is_empty(), "failed attempts are made good: {:?}", failures(&answers));
    watched.stop().await.settles().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_became_two_seconds_slower_than_its_pool_is_left_out() {
    let ill = Switch::default();
    let slow = engine(40, &ill, |_| after(2_000)).await;
    let (one, two) = (healthy().await, healthy().await);
    let watched = Watched::start(ProxyConfig::default(), &[slow.address, one.address, two.address]);
    let load = Load::start(&watched.proxy, 12);
    eventually("there is load", || slow.served() > 20).await;
    ill.on();
    let took = watched.ejected(0).await;
    assert!(took < SOON, "{took:?}");
    assert_eq!(watched.ejections("latency"), 1);
    ill.off();
    watched.admitted(0).await;
    assert!(failures(&load.end().await).is_empty(), "slow is not failed");
    assert_eq!(watched.all_ejections(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_is_slow_as_a_whole_loses_nobody() {
    let ill = Switch::default();
    let engines = [engine(40, &ill, |_| after(1_500)).await, engine(40, &ill, |_| after(1_600)).await];
    let watched = Watched::start(ProxyConfig::default(), &engines.each_ref().map(|e| e.address));
    let load = Load::start(&watched.proxy, 12);
    eventually("there is load", || engines[0].served() > 20).await;
    ill.on();
    let before = engines[0].served();
    eventually("all are slow", || engines[0].served() > before + 24).await;
    assert!(failures(&load.end().await).is_empty());
    assert_eq!(watched.all_ejections(), 0);
}

/// Connections are taken, and nothing is ever said: no errors to count, and no request that ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_is_found_by_probes_and_comes_back_by_them() {
    let ill = Switch::default();
    let hole = {
        let ill = ill.clone();
        let silent = |ill: &Switch| ill.is_on().then(|| vec![Step::UntilClosed]);
        Engine::replying(move |_, seen| {
            silent(&ill).unwrap_or_else(|| if is_probe(seen) { ok() } else { after(40) })
        })
        .await
    };
    let well = healthy().await;
    let mut config = ProxyConfig::default();
    config.upstream.first_byte_ms = 6_000;
    let watched = Watched::start(config, &[hole.address, well.address]);
    let load = Load::start(&watched.proxy, 6);
    eventually("there is load", || hole.served() > 10).await;
    ill.on();
    let took = watched.ejected(0).await;
    assert!(took < SOON, "{took:?}");
    assert_eq!(watched.ejections("probe"), 1);
    ill.off();
    watched.admitted(0).await;
    let answers = load.end().await;
    let lost = failures(&answers);
    assert!(lost.len() <= 6, "only what was there already: {}", lost.len());
    assert!(lost.iter().all(|answer| answer.contains("engine_timeout")), "{lost:?}");
    watched.stop().await.settles().await;
}

/// DR19 for the proxy alone: nobody takes connections, nobody refuses them. `cli/tests/drill_node_offline.rs` has the whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_drops_all_packets_is_out_within_three_seconds_of_the_first_failed_connection() {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut filling = vec![];
    while let Ok(stream) =
        tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(address)).await
    {
        filling.push(stream.unwrap());
        assert!(filling.len() < 16, "its queue is full, further connections are dropped");
    }
    let well = healthy().await;
    let mut config = ProxyConfig::default();
    // Found by requests, not by a regular probe.
    config.health.probe_interval_ms = 600_000;
    let watched = Watched::start(config, &[address, well.address]);
    let load = Load::start(&watched.proxy, 6);
    let failed = || watched.proxy.gateway.metrics.attempt_failures.with_label_values(&["connect"]).get();
    eventually("a connection has failed", || failed() > 0).await;
    let took = watched.ejected(0).await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    let answers = load.end().await;
    assert!(failures(&answers).is_empty(), "{:?}", failures(&answers));
    drop(listener);
}

/// D10: no endpoint's check waits for another's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_dead_endpoints_are_found_out_side_by_side() {
    let dead = nobody().await;
    let mut config = ProxyConfig::default();
    config.health.probe_interval_ms = 1_000;
    let watched = Watched::start(config, &vec![dead; 2_000]);
    eventually("all are ejected", || watched.ejections("probe") >= 2_000).await;
}

/// agentgateway #1087: an endpoint was marked unhealthy and still given requests.
#[tokio::test]
async fn a_dead_engine_is_found_and_left_out_before_any_request_meets_it() {
    let well = healthy().await;
    let mut config = ProxyConfig::default();
    config.health.probe_interval_ms = 500;
    let watched = Watched::start(config, &[nobody().await, well.address]);
    watched.ejected(0).await;
    assert_eq!((watched.ejections("probe"), well.served()), (1, 0));
    for _ in 0..20 {
        let answer = watched.proxy.exchange(&post(CHAT, &chat(true))).await;
        assert!(answer.contains("[DONE]"), "{answer}");
    }
    let failed =
        |reason: &str| watched.proxy.gateway.metrics.attempt_failures.with_label_values(&[reason]).get();
    assert_eq!(failed("connect"), 0);
}

/// An engine whose streams stop after a token while the switch is on. `/health` stays good; the rest is up to `other`.
async fn stopping(ill: &Switch, other: impl Fn(usize, &Seen) -> Vec<Step> + Send + Sync + 'static) -> Engine {
    let ill = ill.clone();
    Engine::replying(move |number, seen| {
        if is_probe(seen) {
            return ok();
        }
        if !seen.head.starts_with("post /v1/chat/completions") {
            return if ill.is_on() { other(number, seen) } else { ok() };
        }
        let begin = Step::Send([SSE_HEAD, &chunk(&delta("one"))].concat().into());
        if ill.is_on() { vec![begin, Step::UntilClosed] } else { after(20) }
    })
    .await
}

fn impatient() -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.health.hang_ms = 600;
    config.health.hang_waiting_ms = 1_200;
    config.health.canary_ms = 600;
    config
}

/// Streams that have begun, and go no further.
async fn stuck(watched: &Watched, streams: usize) -> Vec<Client> {
    let mut clients = vec![];
    for _ in 0..streams {
        let mut client = Client::connect(watched.proxy.address).await;
        client.send(&post(CHAT, &chat(true))).await;
        client.read_until("one").await;
        clients.push(client);
    }
    clients
}

/// vLLM #39863: the core stands still while the API server answers.
#[tokio::test]
async fn an_engine_that_answers_probes_and_makes_no_tokens_is_left_out_until_it_does() {
    let ill = Switch::default();
    let frozen = |_: usize, seen: &Seen| match seen.head.starts_with("get /metrics") {
        true => send(&json_answer("200 OK", "vllm:generation_tokens_total 41\n")),
        false => vec![Step::UntilClosed],
    };
    let engine = stopping(&ill, frozen).await;
    ill.on();
    let watched = Watched::start(impatient(), &[engine.address]);
    let clients = stuck(&watched, 3).await;
    watched.ejected(0).await;
    assert_eq!((watched.ejections("hang"), watched.all_ejections()), (1, 1));
    drop(clients);
    ill.off();
    eventually("a token brings it to trials", || watched.phase(0) != penstock_proxy::health::Phase::Ejected)
        .await;
    for _ in 0..3 {
        let answer = watched.proxy.exchange(&post(CHAT, &chat(true))).await;
        assert!(answer.contains("[DONE]"), "{answer}");
    }
    watched.admitted(0).await;
    watched.stop().await.settles().await;
}

/// Ray #54070: an engine that was merely busy was killed for not answering its check.
#[tokio::test]
async fn an_engine_with_a_long_queue_is_known_by_its_counters_and_kept() {
    let ill = Switch::default();
    let queueing = |number: usize, seen: &Seen| match seen.head.starts_with("get /metrics") {
        true => send(&json_answer("200 OK", &format!("vllm:generation_tokens_total {number}\n"))),
        false => vec![Step::UntilClosed],
    };
    let engine = stopping(&ill, queueing).await;
    ill.on();
    let watched = Watched::start(impatient(), &[engine.address]);
    let clients = stuck(&watched, 3).await;
    eventually("it was examined twice", || watched.verdicts("alive") >= 2).await;
    assert_eq!((watched.all_ejections(), watched.verdicts("hung")), (0, 0));
    drop(clients);
    watched.stop().await.settles().await;
}

/// vime PR #350: generations of minutes tripped breakers on healthy engines.
#[tokio::test]
async fn whole_answers_that_take_longer_than_any_patience_eject_nobody() {
    let engine = Engine::replying(|_, seen| match &*seen.head {
        head if head.starts_with("get") || head.starts_with("post /v1/completions") => ok(),
        _ => vec![Step::UntilClosed],
    })
    .await;
    let mut config = impatient();
    config.upstream.first_byte_ms = 500;
    let watched = Watched::start(config, &[engine.address]);
    for _ in 0..8 {
        let answer = watched.proxy.exchange(&post(CHAT, &chat(false))).await;
        assert!(answer.contains("engine_timeout"), "{answer}");
    }
    assert!(watched.verdicts("alive") >= 1, "they were doubted, and the doubt was cleared");
    assert_eq!(watched.all_ejections(), 0);
}

/// The silence of a stream whose client does not read is not its engine's.
#[tokio::test]
async fn clients_that_do_not_read_cast_no_doubt_on_their_engine() {
    let much = chunk(&delta(&"x".repeat(60_000)));
    let engine = Engine::replying(move |_, seen| match is_probe(seen) {
        true => ok(),
        false => {
            let flood = std::iter::repeat_n(Step::Send(much.clone().into()), 400);
            std::iter::once(Step::Send(SSE_HEAD.into())).chain(flood).collect()
        }
    })
    .await;
    let mut config = impatient();
    config.health.hang_waiting_ms = 60_000;
    let watched = Watched::start(config, &[engine.address]);
    let mut clients = vec![];
    for _ in 0..3 {
        let mut client = Client::connect(watched.proxy.address).await;
        client.send(&post(CHAT, &chat(true))).await;
        clients.push(client);
    }
    let signs = || watched.endpoint(0).signs(watched.proxy.gateway.now_ms());
    eventually("all of them are stuck", || signs().inflight == 3 && signs().flowing == 0).await;
    eventually("for longer than the patience", || signs().silent_ms > 1_500).await;
    assert_eq!((watched.verdicts("alive"), watched.all_ejections()), (0, 0));
    drop(clients);
    watched.stop().await.settles().await;
}
