//! The series of streams that lost their engine, and of how they went on.

use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::Maker;
use crate::resume::{Loss, Refusal};

/// Seconds. From a cached prefix at an idle engine to a long prefill behind a queue.
const ADDED_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What is counted of resumes. `endpoint` is a replica's id: as many as there were endpoints.
#[derive(Debug)]
pub struct ResumeMetrics {
    losses: IntCounterVec,
    resumes: IntCounterVec,
    refusals: IntCounterVec,
    added: Histogram,
    recomputed: IntCounter,
}

impl ResumeMetrics {
    pub(super) fn new(make: &Maker<'_>) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            losses: make.counters(
                "penstock_proxy_stream_losses_total",
                "Streams that lost their engine, or were told to leave it, by how.",
                &["reason"],
            )?,
            resumes: make.counters(
                "penstock_proxy_resumes_total",
                "Streams that went on at another engine, by the endpoint that they left and why.",
                &["endpoint", "reason"],
            )?,
            refusals: make.counters(
                "penstock_proxy_resume_refusals_total",
                "Streams that did not go on elsewhere, by the endpoint that they lost or stayed at and why not.",
                &["endpoint", "reason"],
            )?,
            added: make.histogram(
                "penstock_proxy_resume_added_seconds",
                "Time from the loss of an engine to the continuation's first event.",
                ADDED_BUCKETS,
            )?,
            recomputed: make.counter(
                "penstock_proxy_resume_recomputed_tokens_total",
                "Tokens of prompts and answers that were sent to a second engine to go on from.",
            )?,
        };
        for loss in Loss::ALL {
            metrics.losses.with_label_values(&[loss.label()]).inc_by(0);
        }
        Ok(metrics)
    }

    /// A stream lost its engine.
    pub fn lost(&self, loss: Loss) {
        self.losses.with_label_values(&[loss.label()]).inc();
    }

    /// It went on elsewhere, `added_s` seconds later.
    pub fn resumed(&self, endpoint: &str, loss: Loss, added_s: f64, recomputed: u64) {
        self.resumes.with_label_values(&[endpoint, loss.label()]).inc();
        self.added.observe(added_s);
        self.recomputed.inc_by(recomputed);
    }

    /// It did not.
    pub fn refused(&self, endpoint: &str, refusal: Refusal) {
        self.refusals.with_label_values(&[endpoint, refusal.label()]).inc();
    }
}
