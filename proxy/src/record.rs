//! What is known of one request, filled as it moves and told once, when it is dropped: however a request ends, it is
//! counted, logged, and its routing kept if there is a reason to.
//!
//! A request that goes well costs it a few small strings, two clock reads and one buffer for its line; candidates are
//! written down only if [`Record::considers`].

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use http::request::Parts;
use penstock_proto::Version;

use crate::{
    downstream::respond::client_request_id,
    endpoints::{Endpoint, Pool},
    error::GatewayError,
    openai::{
        ErrorShape,
        usage::{BodyFacts, Usage},
    },
    resume::{Loss, Refusal},
    routing::{
        considered::Considered,
        policy::{How, Policy},
    },
    streaming::relay::Relayed,
    telemetry::{
        Telemetry,
        decisions::{Attempt, MAX_ATTEMPTS, Why},
        facts::{self, Facts, Millis, Outcome},
        metrics::NO_MODEL,
        models::ModelSeries,
    },
    upstream::{
        client::{Failed, Origin},
        retry::Next,
    },
};

/// Header by which a client asks that its request's routing be kept.
pub const EXPLAIN: &str = "x-penstock-explain";

/// One request's record.
#[derive(Debug)]
pub struct Record<'a> {
    telemetry: &'a Telemetry,
    started: Instant,
    shape: ErrorShape,
    facts: Facts,
    /// Of a deployed model, once it is known.
    series: Option<Arc<ModelSeries>>,
    /// Whether anything of an answer was written.
    begun: bool,
    logged: bool,
    asked: bool,
    sampled: bool,
    /// The attempt under way, or the one that gave the answer.
    attempt: Option<Attempt>,
    /// Those before it.
    failed: Vec<Attempt>,
}

impl<'a> Record<'a> {
    /// Begins with the request's head read.
    pub fn new(telemetry: &'a Telemetry) -> Self {
        telemetry.metrics.inflight.inc();
        let id = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        Self {
            telemetry,
            started: Instant::now(),
            shape: ErrorShape::OpenAi,
            facts: Facts::new(id),
            series: None,
            begun: false,
            logged: true,
            asked: false,
            sampled: telemetry.decisions.sampled(|n| fastrand::u32(0..n)),
            attempt: None,
            failed: Vec::new(),
        }
    }

    /// The id that the client, the engine and the log see.
    pub fn request_id(&self) -> &str {
        &self.facts.request_id
    }

    /// The shape in which errors are told.
    pub fn shape(&self) -> ErrorShape {
        self.shape
    }

    /// Where the connection came from.
    pub fn client(&mut self, address: IpAddr) {
        self.facts.client = Some(address);
    }

    /// The request's head.
    pub fn head(&mut self, head: &Parts) {
        self.facts.method = head.method.clone();
        facts::cut(head.uri.path()).clone_into(&mut self.facts.path);
        let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(id) = text("traceparent").and_then(facts::trace_id) {
            id.clone_into(&mut self.facts.trace_id);
        }
        if let Some(id) = client_request_id(&head.headers).and_then(|id| id.to_str().ok()) {
            id.clone_into(&mut self.facts.client_request_id);
        }
        self.asked =
            self.telemetry.decisions.is_on() && text(EXPLAIN).is_some_and(|value| value.trim() == "1");
    }

    /// A probe: counted, not logged.
    pub fn unlogged(&mut self) {
        self.logged = false;
    }

    /// The name of the caller's key.
    pub fn caller(&mut self, name: &str) {
        name.clone_into(&mut self.facts.key);
    }

    /// What was asked for.
    pub fn route(&mut self, api: &'static str, shape: ErrorShape) {
        self.facts.route = api;
        self.shape = shape;
    }

    /// The body's length.
    pub fn body(&mut self, bytes: usize) {
        self.facts.bytes_in = bytes as u64;
        self.telemetry.metrics.bytes_in.inc_by(bytes as u64);
    }

    /// A deployed model's name, by the tables of that version.
    pub fn model(&mut self, model: &str, snapshot: Version) {
        let series = self.telemetry.metrics.of_model(model);
        series.inflight.inc();
        self.facts.model = if *series.name == *model { Arc::clone(&series.name) } else { model.into() };
        self.facts.snapshot = snapshot;
        if let Some(before) = self.series.replace(series) {
            before.inflight.dec();
        }
    }

    /// Whether a stream was asked for.
    pub fn stream(&mut self, asked: bool) {
        self.facts.stream = asked;
    }

    /// It has waited so long for an engine with room.
    pub fn queued(&mut self, waited: Duration) {
        self.facts.queue.0 += waited;
    }

    /// Whether somebody will want to read what picks look at.
    pub fn considers(&self) -> bool {
        self.asked || self.sampled
    }

    /// An endpoint was picked, and an attempt at it begins.
    pub fn picked(
        &mut self,
        pool: &Pool,
        endpoint: &Endpoint,
        (policy, how): (Policy, How),
        considered: Option<Box<Considered>>,
    ) {
        pool.source.pool.clone_into(&mut self.facts.deployment);
        self.facts.attempts += 1;
        self.facts.endpoint = Arc::clone(&endpoint.id);
        self.attempt = Some(Attempt {
            began: Millis(self.started.elapsed()),
            endpoint: Arc::clone(&endpoint.id),
            policy: policy.name(),
            how: how.label(),
            considered,
            ..Attempt::default()
        });
    }

    /// No endpoint could be picked, and why.
    pub fn unplaced(
        &mut self,
        pool: &Pool,
        tried: &[Arc<str>],
        adapter: Option<&str>,
        policy: Policy,
        now_ms: u64,
    ) {
        pool.source.pool.clone_into(&mut self.facts.deployment);
        self.attempt = Some(Attempt {
            began: Millis(self.started.elapsed()),
            policy: policy.name(),
            considered: Some(Box::new(Considered::nobody(&pool.endpoints, tried, adapter, now_ms))),
            ..Attempt::default()
        });
    }

    /// The attempt has a connection.
    pub fn connected(&mut self, origin: Origin) {
        self.telemetry.metrics.connected(origin);
        if let Some(attempt) = &mut self.attempt {
            attempt.connection = origin.label();
            attempt.connected = Some(attempt.since(self.started.elapsed()));
        }
    }

    /// The attempt failed, and this follows.
    pub fn attempt_failed(&mut self, failed: &Failed, next: Next) {
        self.broke(failed.failure.label(), &failed.detail);
        let Some(mut attempt) = self.attempt.take() else { return };
        attempt.next = next.label();
        if self.failed.len() < MAX_ATTEMPTS {
            self.failed.push(attempt);
        }
    }

    /// The stream lost its engine, and another is looked for.
    pub fn lost(&mut self, loss: Loss) {
        self.broke(loss.label(), "while streaming");
        let Some(mut attempt) = self.attempt.take() else { return };
        attempt.next = "resume";
        if self.failed.len() < MAX_ATTEMPTS {
            self.failed.push(attempt);
        }
    }

    /// It goes on with the attempt under way, so much later.
    pub fn resumed(&mut self, added: Duration) {
        self.facts.resumes += 1;
        self.facts.resume.0 += added;
        let now = self.started.elapsed();
        if let Some(attempt) = &mut self.attempt {
            attempt.first_byte = Some(attempt.since(now));
        }
    }

    /// It does not go on elsewhere.
    pub fn not_resumed(&mut self, loss: Loss, refusal: Refusal) {
        self.facts.resume_refused = refusal.label();
        let detail = format!("not resumed: {}", refusal.label());
        if loss.is_optional() {
            return;
        }
        self.broke(loss.label(), &detail);
    }

    /// The answer is about to be written.
    pub fn begun(&mut self) {
        let now = self.started.elapsed();
        self.begun = true;
        self.facts.ttft = Some(Millis(now));
        if let Some(attempt) = &mut self.attempt {
            attempt.first_byte = Some(attempt.since(now));
        }
        if let Some(series) = &self.series {
            series.ttft.observe(now.as_secs_f64());
        }
    }

    /// An answer with this status was written.
    pub fn status(&mut self, status: u16) {
        self.facts.status = status;
        self.facts.outcome = Outcome::Completed;
        self.facts.blame = match status {
            0..400 => "none",
            400..500 => "client",
            _ => "upstream",
        };
    }

    /// It ended with an error.
    pub fn failed(&mut self, error: &GatewayError) {
        self.facts.status = error.status();
        self.facts.blame = error.blame().label();
        self.facts.error = error.code();
        self.facts.outcome = match error {
            GatewayError::ClientGone | GatewayError::ClientStalled => Outcome::ClientGone,
            _ if self.begun => Outcome::Cut,
            _ => Outcome::Error,
        };
        if self.facts.outcome == Outcome::ClientGone {
            self.telemetry.metrics.client_disconnects.inc();
        }
        if let GatewayError::UnknownModel { model } = error {
            self.facts.model = facts::cut(model).into();
        }
        tracing::debug!(
            request = self.facts.request_id,
            code = error.code(),
            status = self.facts.status,
            "request failed"
        );
    }

    /// A stream was handed on, to this end.
    pub fn relayed(&mut self, relayed: &Relayed) {
        self.usage(&relayed.usage());
        self.facts.bytes_out += relayed.pace.bytes;
        let gaps = relayed.facts.events.saturating_sub(relayed.pace.events_before);
        if let (Ok(gaps @ 1..), true) = (u32::try_from(gaps), relayed.pace.longest_gap > Duration::ZERO) {
            let (mean, longest) = (relayed.pace.reading / gaps, relayed.pace.longest_gap);
            self.facts.itl_mean = Some(Millis(mean));
            self.facts.itl_max = Some(Millis(longest));
            if let Some(series) = &self.series {
                series.itl.observe(mean.as_secs_f64());
                series.itl_max.observe(longest.as_secs_f64());
            }
        }
        if let (Ok(()), Some(message)) = (&relayed.outcome, &relayed.facts.error) {
            self.telemetry.metrics.inband_errors.inc();
            self.facts.error = "engine_error_in_stream";
            self.facts.blame = "upstream";
            self.broke("error_in_stream", message);
        }
    }

    /// A whole answer's body, for its usage.
    pub fn whole(&mut self, body: &[u8]) {
        self.facts.bytes_out += body.len() as u64;
        let mut tail = BodyFacts::default();
        tail.push(body);
        self.usage(&tail.usage());
    }

    /// Tokens as the engine counted them.
    fn usage(&mut self, usage: &Usage) {
        (self.facts.prompt_tokens, self.facts.completion_tokens) = (usage.prompt, usage.completion);
        if let Some(series) = &self.series {
            series.prompt_tokens.inc_by(usage.prompt.unwrap_or_default());
            series.completion_tokens.inc_by(usage.completion.unwrap_or_default());
        }
    }

    fn broke(&mut self, failure: &'static str, detail: &str) {
        let now = self.started.elapsed();
        if let Some(attempt) = &mut self.attempt {
            attempt.failed = Some(attempt.since(now));
            attempt.failure = failure;
            facts::cut(detail).clone_into(&mut attempt.detail);
        }
    }

    /// Whether there is a reason to keep how it was routed.
    fn why(&self) -> Option<Why> {
        match () {
            () if self.facts.blame != "none" => Some(Why::Failed),
            () if self.facts.resumes > 0 => Some(Why::Resumed),
            () if !self.failed.is_empty() => Some(Why::Retried),
            () if self.asked => Some(Why::Asked),
            () if self.sampled => Some(Why::Sampled),
            () => None,
        }
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let Telemetry { metrics, access_log, decisions } = self.telemetry;
        let took = self.started.elapsed();
        metrics.inflight.dec();
        let model = self.series.as_ref().map_or(NO_MODEL, |series| &series.name);
        metrics.finished(self.facts.route, model, self.facts.status, self.facts.blame, took);
        if let Some(series) = &self.series {
            series.inflight.dec();
        }
        self.facts.time = SystemTime::now();
        self.facts.duration = Millis(took);
        if self.logged {
            access_log.write(&self.facts);
        }
        if let Some(why) = self.why().filter(|_| self.logged && decisions.is_on()) {
            metrics.decisions.with_label_values(&[why.label()]).inc();
            let mut attempts = std::mem::take(&mut self.failed);
            attempts.extend(self.attempt.take().filter(|_| attempts.len() < MAX_ATTEMPTS));
            let facts = std::mem::replace(&mut self.facts, Facts::new(String::new()));
            decisions.keep(why, facts, attempts);
        }
    }
}
