//! The text that Prometheus scrapes: the gauges of [`super::metrics`] are set from the state at that moment.

use std::sync::Arc;

use prometheus::{Encoder, TextEncoder};

use super::metrics::Metrics;
use crate::{
    endpoints::{Pool, Snapshot},
    health::Phase,
    routing,
    xds::status::XdsStatusView,
};

/// What the gauges of state are set from when somebody asks.
#[derive(Debug)]
pub struct State<'a> {
    /// The tables in use.
    pub snapshot: &'a Snapshot,
    /// The control plane's connection.
    pub xds: &'a XdsStatusView,
    /// Whether the process is stopping.
    pub draining: bool,
    /// Request bytes reserved in memory.
    pub body_bytes_held: usize,
    /// The clock that ejections are in.
    pub now_ms: u64,
    /// Largest share of a pool that may be out.
    pub max_ejected_percent: u32,
}

impl Metrics {
    /// The Prometheus text of everything, with the gauges of state brought up to date first.
    pub fn render(&self, state: &State<'_>) -> String {
        let State { snapshot, xds, draining, body_bytes_held, now_ms, max_ejected_percent } = *state;
        let all = || snapshot.pools.values().flat_map(|pool| &pool.endpoints);
        self.snapshot_revision.set(clamp(snapshot.version.revision));
        self.snapshot_term.set(clamp(snapshot.version.term));
        self.endpoints.set(clamp(all().count() as u64));
        self.endpoints_ejected.set(clamp(all().filter(|e| e.is_ejected(now_ms)).count() as u64));
        self.queue_depth.reset(); // pools come and go
        for (name, pool) in &snapshot.pools {
            self.queue_depth.with_label_values(&[name.as_str()]).set(clamp(pool.queue.len() as u64));
        }
        let mut by_phase = [0u64; Phase::ALL.len()];
        for phase in all().map(|endpoint| endpoint.vitals().phase(now_ms)) {
            by_phase[phase as usize] += 1;
        }
        for (phase, count) in Phase::ALL.into_iter().zip(by_phase) {
            self.endpoints_by_health.with_label_values(&[phase.label()]).set(clamp(count));
        }
        let panics = |pool: &&Arc<Pool>| routing::in_panic(pool, now_ms, max_ejected_percent);
        self.pools_in_panic.set(clamp(snapshot.pools.values().filter(panics).count() as u64));
        self.models.set(clamp(snapshot.routes.len() as u64));
        self.xds_connected.set(i64::from(xds.connected));
        self.xds_age_seconds.set(xds.last_response_age.map_or(-1, |age| clamp(age.as_secs())));
        self.xds_acks.set(clamp(xds.acks));
        self.xds_nacks.set(clamp(xds.nacks));
        self.snapshot_age_seconds.set(snapshot.applied.map_or(-1, |at| clamp(at.elapsed().as_secs())));
        self.snapshot_from_disk.set(i64::from(snapshot.loaded && xds.last_response_age.is_none()));
        self.draining.set(i64::from(draining));
        for model in snapshot.routes.keys() {
            self.of_model(model);
        }
        self.body_bytes_held.set(clamp(body_bytes_held as u64));
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(e) => format!("# metrics could not be rendered: {e}\n"),
        }
    }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
