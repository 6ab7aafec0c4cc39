//! What is known of one request, filled as it moves and counted once, when it is dropped: however a request ends, it is
//! counted.

use std::time::Instant;

use crate::{
    error::GatewayError,
    openai::{
        ErrorShape,
        usage::{BodyFacts, Usage},
    },
    telemetry::metrics::{Metrics, NO_MODEL},
};

/// One request's record.
#[derive(Debug)]
pub struct Record<'a> {
    metrics: &'a Metrics,
    request_id: String,
    started: Instant,
    api: &'static str,
    shape: ErrorShape,
    model: String,
    status: u16,
    blame: &'static str,
}

impl<'a> Record<'a> {
    /// Begins with the request's head read.
    pub fn new(metrics: &'a Metrics) -> Self {
        metrics.inflight.inc();
        Self {
            metrics,
            request_id: format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
            started: Instant::now(),
            api: "none",
            shape: ErrorShape::OpenAi,
            model: NO_MODEL.to_owned(),
            status: 499, // unless somebody says otherwise before the drop
            blame: "client",
        }
    }

    /// The id that the client, the engine and the log see.
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The shape in which errors are told.
    pub fn shape(&self) -> ErrorShape {
        self.shape
    }

    /// What was asked for.
    pub fn route(&mut self, api: &'static str, shape: ErrorShape) {
        self.api = api;
        self.shape = shape;
    }

    /// A deployed model's name.
    pub fn model(&mut self, model: &str) {
        model.clone_into(&mut self.model);
    }

    /// The body's length.
    pub fn body(&self, bytes: usize) {
        self.metrics.bytes_in.inc_by(bytes as u64);
    }

    /// The answer is about to be written.
    pub fn begun(&self) {
        self.metrics.ttft.observe(self.started.elapsed().as_secs_f64());
    }

    /// An answer with this status was written.
    pub fn status(&mut self, status: u16) {
        self.status = status;
        self.blame = match status {
            0..400 => "none",
            400..500 => "client",
            _ => "upstream",
        };
    }

    /// It ended with an error.
    pub fn failed(&mut self, error: &GatewayError) {
        self.status = error.status();
        self.blame = error.blame().label();
        if matches!(error, GatewayError::ClientGone | GatewayError::ClientStalled) {
            self.metrics.client_disconnects.inc();
        }
        tracing::debug!(
            request = self.request_id,
            code = error.code(),
            status = self.status,
            "request failed"
        );
    }

    /// Tokens as the engine counted them.
    pub fn usage(&self, usage: &Usage) {
        for (kind, tokens) in [("prompt", usage.prompt), ("completion", usage.completion)] {
            if let Some(tokens) = tokens {
                self.metrics.tokens.with_label_values(&[kind]).inc_by(tokens);
            }
        }
    }

    /// A whole answer's body, for its usage.
    pub fn tail(&self, body: &[u8]) {
        let mut tail = BodyFacts::default();
        tail.push(body);
        self.usage(&tail.usage());
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        self.metrics.inflight.dec();
        self.metrics.finished(self.api, &self.model, self.status, self.blame, self.started.elapsed());
    }
}
