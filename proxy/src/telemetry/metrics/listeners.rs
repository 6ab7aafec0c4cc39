//! The series of the gateway's listeners.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use super::Maker;
use crate::listener::Refusal;

/// What is counted for each listener, by its name in the settings.
#[derive(Debug)]
pub struct ListenerMetrics {
    accepted: IntCounterVec,
    open: IntGaugeVec,
    /// Connections closed before they brought a request, by listener and reason.
    pub refusals: IntCounterVec,
    certificate_expiry: IntGaugeVec,
    certificate_reloads: IntCounterVec,
}

impl ListenerMetrics {
    pub(super) fn new(make: &Maker<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            accepted: make.counters(
                "penstock_proxy_connections_total",
                "Clients' connections accepted, those refused for the limit not counted.",
                &["listener"],
            )?,
            open: make.gauges("penstock_proxy_connections_open", "Clients' connections.", &["listener"])?,
            refusals: make.counters(
                "penstock_proxy_connections_refused_total",
                "Clients' connections closed before they brought a request.",
                &["listener", "reason"],
            )?,
            certificate_expiry: make.gauges(
                "penstock_proxy_certificate_expiry_timestamp_seconds",
                "When the first certificate of the listener's chain expires.",
                &["listener"],
            )?,
            certificate_reloads: make.counters(
                "penstock_proxy_certificate_reloads_total",
                "Changed certificate files, by whether they are in use now or were refused.",
                &["listener", "result"],
            )?,
        })
    }

    /// Makes the series of a listener, at zero.
    pub fn exists(&self, listener: &str) {
        self.accepted.with_label_values(&[listener]).inc_by(0);
        self.open.with_label_values(&[listener]).add(0);
        for refusal in Refusal::ALL {
            self.refusals.with_label_values(&[listener, refusal.label()]).inc_by(0);
        }
    }

    /// Counts a connection in, until what it gives back is dropped.
    pub fn opened(&self, listener: &str) -> impl Drop + use<> {
        self.accepted.with_label_values(&[listener]).inc();
        let gauge = self.open.with_label_values(&[listener]);
        gauge.inc();
        Open(gauge)
    }

    /// Counts a connection that was closed before it brought a request.
    pub fn refused(&self, listener: &str, why: Refusal) {
        self.refusals.with_label_values(&[listener, why.label()]).inc();
    }

    /// Tells of the certificates in use.
    pub fn certificate(&self, listener: &str, expires_unix_s: i64) {
        self.certificate_expiry.with_label_values(&[listener]).set(expires_unix_s);
        for result in ["loaded", "refused"] {
            self.certificate_reloads.with_label_values(&[listener, result]).inc_by(0);
        }
    }

    /// Counts changed files of certificates.
    pub fn reloaded(&self, listener: &str, good: bool) {
        self.certificate_reloads
            .with_label_values(&[listener, if good { "loaded" } else { "refused" }])
            .inc();
    }
}

struct Open(IntGauge);
impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
