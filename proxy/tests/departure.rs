//! Streams that are told to go on elsewhere: in order, at the pace, over tables that change under them.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use penstock_config::proxy::ProxyConfig;
use penstock_proto::v1;
use penstock_proxy::endpoints::{Endpoint, Leave, departure};
use support::*;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const PAUSE: Duration = Duration::from_millis(100);

/// A gateway with two endpoints, and streams at the first.
struct Streams {
    proxy: Proxy,
    /// Who was told, why and when, in that order.
    told: Arc<Mutex<Vec<(usize, Leave, Instant)>>>,
    tasks: JoinSet<()>,
    stop: CancellationToken,
}

fn endpoints() -> Vec<SocketAddr> {
    (1..=2).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect()
}

fn moved() -> v1::Departure {
    v1::Departure { move_after_ms: Some(0), fenced: false }
}

impl Streams {
    fn start() -> Self {
        let mut config = ProxyConfig::default();
        config.resume.moves_per_second = 10;
        let proxy = Proxy::start(config, &endpoints());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(departure::run(Arc::clone(&proxy.gateway), stop.clone()));
        Self { proxy, told: Arc::default(), tasks, stop }
    }

    fn first(&self) -> Arc<Endpoint> {
        Arc::clone(&self.proxy.gateway.table.load().pools["m"].endpoints[0])
    }

    /// A stream, by its number, at the first endpoint.
    async fn begin(&mut self, number: usize) {
        self.begin_at(&self.first(), number).await;
    }

    async fn begin_at(&mut self, endpoint: &Arc<Endpoint>, number: usize) {
        let ticket = endpoint.reserve(self.proxy.gateway.now_ms());
        let (told, begun) = (Arc::clone(&self.told), Arc::new(tokio::sync::Notify::new()));
        let begins = Arc::clone(&begun);
        self.tasks.spawn(async move {
            let mut leave = std::pin::pin!(ticket.leave());
            // From the first poll on it stands in line.
            let leave = std::future::poll_fn(|context| {
                let polled = leave.as_mut().poll(context);
                begins.notify_one();
                polled
            });
            let leave = leave.await;
            told.lock().unwrap().push((number, leave, Instant::now()));
        });
        begun.notified().await;
    }

    /// New tables, with these changes to the first endpoint.
    fn swap(&self, change: impl FnOnce(&mut v1::EndpointTable)) {
        let mut table = table("m", &endpoints());
        change(&mut table);
        self.proxy.gateway.table.apply(&fleet(vec![table], vec![route("m", &[("m", 1)], &[])]));
    }

    fn told(&self) -> Vec<(usize, Leave, Instant)> {
        self.told.lock().unwrap().clone()
    }

    async fn until_told(&self, count: usize) -> Vec<(usize, Leave, Instant)> {
        eventually("they are told", || self.told().len() >= count).await;
        self.told()
    }

    fn counted(&self, leave: Leave) -> u64 {
        self.proxy.gateway.metrics.streams_leave.with_label_values(&[leave.label()]).get()
    }

    async fn end(mut self) {
        self.stop.cancel();
        self.tasks.abort_all();
        while self.tasks.join_next().await.is_some() {}
        self.proxy.settles().await;
    }
}

#[tokio::test]
async fn streams_are_moved_in_order_at_the_pace_and_those_that_raced_have_a_turn() {
    let mut streams = Streams::start();
    let old = streams.first();
    for number in 0..8 {
        streams.begin(number).await;
    }
    assert_eq!(old.departure(), None);
    streams.swap(|table| {
        table.endpoints[0].state = v1::EndpointState::Draining.into();
        table.endpoints[0].departure = Some(moved());
    });
    streams.until_told(3).await;
    // A table that changes something else, and a request that had picked before the first swap.
    streams.swap(|table| {
        table.endpoints[0].state = v1::EndpointState::Draining.into();
        table.endpoints[0].departure = Some(moved());
        table.endpoints[0].adapters = vec!["more".into()];
    });
    streams.begin_at(&old, 8).await;
    let told = streams.until_told(9).await;
    let order: Vec<usize> = told.iter().map(|(number, ..)| *number).collect();
    assert_eq!(order, (0..9).collect::<Vec<_>>());
    assert!(told.iter().all(|(_, leave, _)| *leave == Leave::Moved));
    let took = told[8].2 - told[0].2;
    assert!(took >= PAUSE * 8 - Duration::from_millis(150), "{took:?} for eight pauses");
    assert_eq!((streams.counted(Leave::Moved), streams.counted(Leave::Fenced)), (9, 0));
    streams.end().await;
}

#[tokio::test]
async fn an_undrain_keeps_those_that_were_not_moved() {
    let mut streams = Streams::start();
    for number in 0..20 {
        streams.begin(number).await;
    }
    streams.swap(|table| {
        table.endpoints[0].state = v1::EndpointState::Draining.into();
        table.endpoints[0].departure = Some(moved());
    });
    streams.until_told(2).await;
    streams.swap(|_| ());
    let told = streams.told().len();
    tokio::time::sleep(PAUSE * 4).await;
    // One may have been on its way.
    assert!(streams.told().len() <= told + 1 && told < 19, "{told}");
    assert!(streams.first().departure().is_none() && !streams.first().draining);
    streams.end().await;
}

#[tokio::test]
async fn what_is_left_at_an_engine_that_is_about_to_be_stopped_leaves_at_once() {
    let mut streams = Streams::start();
    // Its agent waits for 1.2 s: a quarter of that before, streams leave.
    streams.swap(|table| table.endpoints[0].drain_ms = Some(1_200));
    let old = streams.first();
    for number in 0..6 {
        streams.begin(number).await;
    }
    let gone = Instant::now();
    streams.swap(|table| {
        let endpoint = table.endpoints.remove(0);
        let departing = v1::Departing { id: endpoint.id, generation: endpoint.generation, departure: None };
        // Of others nobody here knows anything.
        let other = v1::Departing { id: "another".into(), ..departing.clone() };
        table.departing = vec![other, departing];
    });
    assert_eq!(streams.proxy.gateway.table.load().pools["m"].endpoints.len(), 1);
    assert_eq!(old.departure().map(|shown| (shown.moves_in_ms, shown.streams)), Some((None, 6)));
    let told = streams.until_told(6).await;
    assert!(told.iter().all(|(_, leave, _)| *leave == Leave::Fenced));
    let (first, last) = (told[0].2 - gone, told[5].2 - gone);
    assert!(first >= Duration::from_millis(900), "{first:?}");
    assert!(last < first + PAUSE * 4, "{first:?} to {last:?}: at once");
    assert_eq!(streams.counted(Leave::Fenced), 6);
    streams.end().await;
}

#[tokio::test]
async fn a_fenced_endpoint_is_left_at_once_and_one_that_leaves_silently_keeps_its_streams() {
    let mut streams = Streams::start();
    for number in 0..3 {
        streams.begin(number).await;
    }
    // A lease that lapsed: nobody said that its engine is stopped.
    streams.swap(|table| drop(table.endpoints.remove(0)));
    streams.swap(|_| ());
    assert!(streams.first().departure().is_none() && streams.told().is_empty());
    streams.swap(|table| {
        table.endpoints[0].departure = Some(v1::Departure { move_after_ms: None, fenced: true });
    });
    let told = streams.until_told(3).await;
    assert!(told.iter().all(|(_, leave, _)| *leave == Leave::Fenced));
    streams.end().await;
}
