//! How the subscription to the control plane is doing: written by the client and the cache, read by `/metrics` and
//! `/readyz`. Written a few times a second at most, so one short lock around plain fields is enough.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_proto::Version;

/// Shared between the tasks of [`super`] and those who report.
#[derive(Debug, Default)]
pub struct XdsStatus {
    fields: Mutex<Fields>,
}

#[derive(Debug, Default)]
struct Fields {
    connected: bool,
    endpoint: String,
    version: Option<Version>,
    last_response: Option<Instant>,
    acks: u64,
    nacks: u64,
    reconnects: u64,
    last_nack: Option<String>,
    last_error: Option<String>,
    cache_writes: u64,
    cache_write_failures: u64,
}

/// One reading of [`XdsStatus`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XdsStatusView {
    /// Whether a control plane has answered on a stream that is still open.
    pub connected: bool,
    /// The control plane connected to, or tried last; empty before the first try.
    pub endpoint: String,
    /// Version of the last response that was accepted from the wire; `None` when serving from disk alone.
    pub version: Option<Version>,
    /// Time since the last response, accepted or not.
    pub last_response_age: Option<Duration>,
    /// Responses accepted.
    pub acks: u64,
    /// Responses refused.
    pub nacks: u64,
    /// Attempts at a session after the first, failed ones included.
    pub reconnects: u64,
    /// Why the last refused response was refused; stays until the next refusal.
    pub last_nack: Option<String>,
    /// Why the last session ended or could not begin; `None` again once connected.
    pub last_error: Option<String>,
    /// Times the state was written to disk.
    pub cache_writes: u64,
    /// Times it could not be.
    pub cache_write_failures: u64,
}

impl XdsStatus {
    /// What there is to report now.
    #[must_use]
    pub fn view(&self) -> XdsStatusView {
        let fields = self.lock();
        XdsStatusView {
            connected: fields.connected,
            endpoint: fields.endpoint.clone(),
            version: fields.version,
            last_response_age: fields.last_response.map(|at| at.elapsed()),
            acks: fields.acks,
            nacks: fields.nacks,
            reconnects: fields.reconnects,
            last_nack: fields.last_nack.clone(),
            last_error: fields.last_error.clone(),
            cache_writes: fields.cache_writes,
            cache_write_failures: fields.cache_write_failures,
        }
    }

    pub(super) fn connecting(&self, endpoint: &str) {
        let mut fields = self.lock();
        fields.reconnects += u64::from(!fields.endpoint.is_empty());
        endpoint.clone_into(&mut fields.endpoint);
    }

    /// A response came; whether it is the first on this stream.
    pub(super) fn responded(&self, now: Instant) -> bool {
        let mut fields = self.lock();
        fields.last_response = Some(now);
        fields.last_error = None;
        !std::mem::replace(&mut fields.connected, true)
    }

    pub(super) fn accepted(&self, version: Version) {
        let mut fields = self.lock();
        fields.acks += 1;
        fields.version = Some(version);
    }

    /// A response was refused; whether for other reasons than the last one.
    pub(super) fn refused(&self, reasons: &str) -> bool {
        let mut fields = self.lock();
        fields.nacks += 1;
        let before = fields.last_nack.replace(reasons.to_owned());
        before.as_deref() != Some(reasons)
    }

    /// The session is over; whether this is news (it was connected, or it failed otherwise than the last time).
    pub(super) fn lost(&self, error: &str) -> bool {
        let mut fields = self.lock();
        let was_connected = std::mem::replace(&mut fields.connected, false);
        let before = fields.last_error.replace(error.to_owned());
        was_connected || before.as_deref() != Some(error)
    }

    pub(super) fn cached(&self, written: bool) {
        let mut fields = self.lock();
        fields.cache_writes += u64::from(written);
        fields.cache_write_failures += u64::from(!written);
    }

    fn lock(&self) -> MutexGuard<'_, Fields> {
        // Every field is valid on its own, so what a panicking holder left is still worth reporting.
        self.fields.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
