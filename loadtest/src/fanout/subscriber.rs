//! Subscribers: each takes and acknowledges what it is told, and notes when it knew of each change.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES, v1,
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE, Node,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// A change that not all subscribers know of yet.
struct Expected {
    slot: usize,
    draining: bool,
    made: Instant,
    missing: u32,
}

struct Inner {
    complete: usize,
    /// By pool and id.
    expected: HashMap<(String, String), Expected>,
    slots: std::collections::HashSet<usize>,
    each: Histogram<u64>,
    all: Histogram<u64>,
}

/// What all of them were told.
pub(super) struct Told(Mutex<Inner>);

impl Default for Told {
    fn default() -> Self {
        let (each, all) = (histogram(), histogram());
        let (expected, slots) = Default::default();
        Self(Mutex::new(Inner { complete: 0, expected, slots, each, all }))
    }
}

/// Of microseconds, up to five minutes.
fn histogram() -> Histogram<u64> {
    crate::updates::histogram()
}

impl Told {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribers that have tables and routes.
    pub(super) fn complete(&self) -> usize {
        self.lock().complete
    }

    /// Whether a change of this endpoint is under way.
    pub(super) fn is_expected(&self, slot: usize) -> bool {
        self.lock().slots.contains(&slot)
    }

    /// An endpoint changes now.
    pub(super) fn expect(&self, slot: usize, pool: &str, id: &str, draining: bool, subscribers: u32) {
        let expected = Expected { slot, draining, made: Instant::now(), missing: subscribers };
        let mut inner = self.lock();
        inner.slots.insert(slot);
        inner.expected.insert((pool.to_owned(), id.to_owned()), expected);
    }

    /// Changes that somebody does not know of yet.
    pub(super) fn outstanding(&self) -> usize {
        self.lock().expected.len()
    }

    /// From the changes' making to each subscriber, and to the last of them.
    pub(super) fn take(&self) -> (Histogram<u64>, Histogram<u64>) {
        let inner = self.lock();
        (inner.each.clone(), inner.all.clone())
    }

    /// A subscriber has that table. `had`: which of its endpoints it knew to be draining.
    fn table(&self, table: &v1::EndpointTable, had: &mut HashMap<String, bool>, now: Instant) {
        for endpoint in &table.endpoints {
            let draining = endpoint.state() == v1::EndpointState::Draining;
            if had.insert(endpoint.id.clone(), draining) == Some(draining) {
                continue;
            }
            let mut inner = self.lock();
            let key = (table.pool.clone(), endpoint.id.clone());
            let Some(expected) = inner.expected.get_mut(&key).filter(|e| e.draining == draining) else {
                continue;
            };
            expected.missing = expected.missing.saturating_sub(1);
            let (missing, slot, took) = (expected.missing, expected.slot, micros(now - expected.made));
            inner.each.saturating_record(took);
            if missing == 0 {
                inner.all.saturating_record(took);
                inner.expected.remove(&key);
                inner.slots.remove(&slot);
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
}

/// One subscription, for as long as the benchmark runs.
pub(super) async fn run(grpc: String, number: u32, told: Arc<Told>) -> Result<(), String> {
    let (requests, outbound) = mpsc::channel(64);
    for url in [ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE] {
        let request = DeltaDiscoveryRequest {
            node: Some(Node { id: format!("proxy-{number}"), ..Default::default() }),
            type_url: url.into(),
            resource_names_subscribe: vec!["*".into()],
            ..Default::default()
        };
        requests.send(request).await.map_err(|e| e.to_string())?;
    }
    let client = AggregatedDiscoveryServiceClient::connect(format!("http://{grpc}")).await;
    let mut client = client.map_err(|e| e.to_string())?.max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let opened = client.delta_aggregated_resources(ReceiverStream::new(outbound)).await;
    let mut inbound = opened.map_err(|s| s.to_string())?.into_inner();
    let mut draining = HashMap::new();
    let mut complete = false;
    loop {
        let response = inbound.message().await.map_err(|s| s.to_string())?;
        let response = response.ok_or("the control plane closed a subscription")?;
        requests.send(answer(&response)).await.map_err(|e| e.to_string())?;
        if response.type_url == ENDPOINT_TABLE_TYPE {
            let now = Instant::now();
            for resource in &response.resources {
                let body = resource.resource.as_ref().map(|any| any.value.as_slice()).unwrap_or_default();
                let table = v1::EndpointTable::decode(body).map_err(|e| format!("a table: {e}"))?;
                told.table(&table, &mut draining, now);
            }
        } else if !std::mem::replace(&mut complete, true) {
            told.lock().complete += 1;
        }
    }
}

fn answer(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}
