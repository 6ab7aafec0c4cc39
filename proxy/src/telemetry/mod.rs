//! What the proxy tells about itself.
//!
//! - [`metrics`]: every series it can emit; [`models`]: those that are counted by model.
//! - [`facts`]: all that is known of one request, in the form in which it is logged.
//! - [`access_log`]: one line of JSON for each request, off the request's path.
//! - [`decisions`]: how some requests were routed, kept for `penstock explain`.
//!
//! docs/observability.md is the reference for operators.

pub mod access_log;
pub mod decisions;
pub mod facts;
mod make;
pub mod metrics;
pub mod models;
mod state;

use std::sync::Arc;

use penstock_config::proxy::TelemetryConfig;

use self::{access_log::AccessLog, decisions::Decisions, metrics::Metrics};

/// Where a request's record leaves what it knows.
#[derive(Debug)]
pub struct Telemetry {
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Where requests are logged.
    pub access_log: AccessLog,
    /// Where routing decisions are kept.
    pub decisions: Decisions,
}

impl Telemetry {
    /// Nothing counted, nothing kept; the access log is off until [`access_log::open`] has given one.
    ///
    /// # Errors
    /// A metric declared twice: a defect.
    pub fn new(config: &TelemetryConfig) -> Result<Self, String> {
        let metrics = Arc::new(Metrics::new().map_err(|e| e.to_string())?);
        let decisions = Decisions::new(config.decisions_kept, config.decisions_sample);
        Ok(Self { metrics, access_log: AccessLog::default(), decisions })
    }
}
