//! What the gauges of [`super::metrics`] are read from.

use crate::{endpoints::Snapshot, xds::status::XdsStatusView};

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
