//! Whether an endpoint is to be picked: one state machine, fed from four sources.
//!
//! - [`state`]: the machine itself, with its argument. Everything below only finds things out; this decides.
//! - [`vitals`]: an endpoint's live figures: what picks read without a lock, and the machine behind a lock that only
//!   endpoints in doubt take.
//! - [`window`]: the last ten seconds' successes and failures, and the last first-token times, in a few atomics.
//! - [`peers`]: who does worse than the rest of its pool, by success rate or by speed.
//! - [`progress`]: whether an engine that says nothing is hung or merely busy.
//! - [`probe`]: the questions put to an engine: its health, one token, its counters.
//! - [`watch`]: the task that looks at all endpoints ten times a second and has them probed and examined.
//!
//! The four sources: *requests* (each attempt's end, told by [`crate::gateway`]), *probes*, *progress* (bytes of answers), and
//! the *control plane's word*. The last is kept apart on purpose. A draining endpoint is filtered out by
//! [`crate::routing`] whatever its health, and a table that lists an ejected endpoint as ready does not bring it back: what
//! this proxy sees itself outweighs what it is told, since it is newer and about its own path to the engine. Only a
//! new generation, a new process, starts clean.
//!
//! The largest share that may be out, and what is tried when nothing is left, look at a pool and live in [`crate::routing`].

pub mod peers;
pub mod probe;
pub mod progress;
pub mod state;
pub mod vitals;
pub mod watch;
pub mod window;

use penstock_config::proxy::HealthConfig;
use serde_json::{Value, json};

pub use self::{
    state::{Phase, Reason, Rules, Transition},
    vitals::{Pulse, Vitals},
};
use crate::{
    endpoints::{Endpoint, Snapshot},
    telemetry::metrics::Metrics,
};

/// The machine's rules as the settings say.
pub fn rules(config: &HealthConfig) -> Rules {
    Rules {
        consecutive_failures: config.consecutive_failures,
        base_ejection_ms: config.base_ejection_ms,
        max_ejection_ms: config.max_ejection_ms,
        trials: config.trial_requests,
        probe_successes: config.probe_successes,
        silence_is_examined: config.hang_ms > 0,
    }
}

/// One endpoint's health for people, as JSON.
pub fn describe(endpoint: &Endpoint, now_ms: u64) -> Value {
    let vitals = endpoint.vitals();
    let reading = vitals.read(now_ms);
    let first_tokens: Vec<u64> = vitals.first_tokens.recent(now_ms).map(|sample| sample.took_ms).collect();
    json!({
        "state": reading.phase.label(),
        "reason": reading.out.map(|out| out.reason.label()),
        "ejected_for_ms": reading.out.map(|out| out.until_ms.saturating_sub(now_ms)),
        "success_rate": vitals.window.recent(now_ms, 1).map(|tally| tally.rate()),
        "first_token_ms": first_tokens,
        "last_progress_age_ms": reading.progress_age_ms,
        "flowing": endpoint.signs(now_ms).flowing,
    })
}

/// Endpoints by the state of their health, as JSON; draining ones apart.
pub fn count(snapshot: &Snapshot, now_ms: u64) -> Value {
    let mut counts: std::collections::BTreeMap<&str, u64> =
        Phase::ALL.iter().map(|phase| (phase.label(), 0)).chain([("draining", 0)]).collect();
    for endpoint in snapshot.pools.values().flat_map(|pool| &pool.endpoints) {
        let state = if endpoint.draining { "draining" } else { endpoint.vitals().phase(now_ms).label() };
        *counts.entry(state).or_default() += 1;
    }
    json!(counts)
}

/// Counts and logs a change of an endpoint's state, if there was one. `detail` says what brought it about.
pub fn report(metrics: &Metrics, endpoint: &Endpoint, change: Option<Transition>, detail: &str) {
    match change {
        None => {}
        Some(Transition::Ejected { reason, for_ms }) => {
            metrics.ejections.with_label_values(&[reason.label()]).inc();
            tracing::warn!(
                endpoint = &*endpoint.id,
                address = endpoint.address,
                reason = reason.label(),
                for_ms,
                detail,
                "endpoint ejected"
            );
        }
        Some(Transition::Returned) => {
            metrics.endpoint_returns.inc();
            tracing::info!(endpoint = &*endpoint.id, address = endpoint.address, "endpoint is back");
        }
    }
}
