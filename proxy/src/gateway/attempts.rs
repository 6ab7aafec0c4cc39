//! Engines asked in turn until one has answered, and the answer handed on.

use std::{sync::Arc, time::Duration};

use pingora_core::protocols::http::ServerSession;

use super::Gateway;
use crate::{
    downstream::{self, respond},
    endpoints::{Ticket, table::Target},
    error::{GatewayError, UpstreamFailure},
    record::Record,
    routing::{self, policy::Asked},
    streaming::relay::{self, RelayContext},
    upstream::{
        client::{Answer, Failed, Open, Whole},
        request::EngineRequest,
        retry::{self, Next},
    },
};

/// Names the deployment that answered.
const MODEL: &str = "x-penstock-model";

/// What came of asking a target's engines.
pub(super) enum Outcome {
    /// The client has its answer, or the beginning of one.
    Answered,
    /// It has seen nothing; the last failure, if any engine was asked.
    Unanswered(Option<Failed>),
}

impl Gateway {
    /// Asks a target's engines in turn until one has answered, then hands the answer on.
    pub(super) async fn attempts(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        (model, target): (&str, &Target),
        asked: &Asked<'_>,
        request: &EngineRequest,
    ) -> Result<Outcome, GatewayError> {
        let Some(pool) = self.pool(target)? else { return Ok(Outcome::Unanswered(None)) };
        pool.budget.earn();
        let rules = self.pick_rules.of(model);
        let mut tried: Vec<Arc<str>> = Vec::new();
        let mut last: Option<Failed> = None;
        let mut resent = false;
        loop {
            let Some(pool) = self.pool(target)? else { return Ok(Outcome::Unanswered(last)) };
            let chance = |n| fastrand::usize(0..n);
            let with = (&self.pick_rules, &rules);
            let picked = routing::pick(&pool, &tried, asked, self.now_ms(), with, chance);
            let Some((ticket, how)) = picked else { return Ok(Outcome::Unanswered(last)) };
            self.metrics.picks.with_label_values(&[rules.policy.name(), how.label()]).inc();
            let answered = tokio::select! {
                biased;
                answered = self.engines.ask(ticket.endpoint(), request, |origin| self.metrics.connected(origin)) => answered,
                () = downstream::gone(session) => return Err(GatewayError::ClientGone),
                () = self.lifecycle.cut().cancelled() => return Err(GatewayError::Draining),
            };
            let failed = match answered {
                Ok(mut answer) => {
                    name_model(&mut answer, model, target);
                    self.hand_on(session, record, answer, ticket).await?;
                    return Ok(Outcome::Answered);
                }
                Err(failed) => failed,
            };
            self.note_failure(&ticket, &failed);
            let tries = tried.len() + 1;
            let attempts = self.config.upstream.attempts;
            match retry::after_failure(failed.failure, tries, attempts, resent, || {
                pool.budget.take(self.now_ms())
            }) {
                Next::Retry => tried.push(Arc::clone(&ticket.endpoint().id)),
                Next::Resend => resent = true,
                Next::GiveUp => return Ok(Outcome::Unanswered(Some(failed))),
            }
            self.metrics.retries.with_label_values(&[failed.failure.label()]).inc();
            last = Some(failed);
        }
    }

    /// Writes an answer to the client. The ticket is held to its end.
    async fn hand_on(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        answer: Answer,
        ticket: Ticket,
    ) -> Result<(), GatewayError> {
        record.begun();
        match answer {
            Answer::Whole(whole) => {
                ticket.endpoint().succeeded();
                self.write_whole(session, record, *whole).await
            }
            Answer::Open(open) => self.stream(session, record, *open, ticket).await,
        }
    }

    async fn stream(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        open: Open,
        ticket: Ticket,
    ) -> Result<(), GatewayError> {
        record.status(open.head.status.as_u16());
        let context = RelayContext {
            idle: Duration::from_millis(self.config.upstream.idle_ms),
            cut: self.lifecycle.cut(),
            shape: record.shape(),
            metrics: &self.metrics,
        };
        let relayed = relay::relay(session, open, &context).await;
        record.usage(&relayed.facts.usage);
        if relayed.facts.error.is_some() {
            self.metrics.inband_errors.inc();
        }
        match (&relayed.outcome, &relayed.facts.error) {
            (Ok(()), None) => ticket.endpoint().succeeded(),
            (Ok(()), Some(message)) => {
                let failed = Failed::inside(UpstreamFailure::MidStream, message);
                self.note_failure(&ticket, &failed);
            }
            (Err(GatewayError::Upstream(failure)), _) => {
                self.note_failure(&ticket, &Failed::inside(*failure, "while streaming"));
            }
            (Err(_), _) => {}
        }
        if let Some(connection) = relayed.connection {
            self.engines.release(connection, ticket.endpoint()).await;
        }
        relayed.outcome
    }

    async fn write_whole(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        whole: Whole,
    ) -> Result<(), GatewayError> {
        record.status(whole.head.status.as_u16());
        record.tail(&whole.body);
        self.metrics.bytes_out.inc_by(whole.body.len() as u64);
        respond::whole_with_head(session, whole.head, whole.body).await.map_err(|_| GatewayError::ClientGone)
    }

    /// No attempt is left: the engine's own error answer if there is one, else ours.
    pub(super) async fn give_up(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        last: Option<Failed>,
    ) -> Result<(), GatewayError> {
        match last {
            Some(Failed { answer: Some(whole), .. }) => self.write_whole(session, record, *whole).await,
            Some(failed) => Err(GatewayError::Upstream(failed.failure)),
            None => Err(GatewayError::NoEndpoint { model: model.to_owned() }),
        }
    }

    fn note_failure(&self, ticket: &Ticket, failed: &Failed) {
        let endpoint = ticket.endpoint();
        self.metrics.attempt_failures.with_label_values(&[failed.failure.label()]).inc();
        tracing::debug!(
            endpoint = &*endpoint.id,
            failure = failed.failure.label(),
            detail = failed.detail,
            "attempt failed"
        );
        if failed.failure.counts_against_endpoint() && endpoint.failed(self.now_ms(), &self.outlier_rules) {
            self.metrics.ejections.inc();
            tracing::warn!(
                endpoint = &*endpoint.id,
                address = endpoint.address,
                detail = failed.detail,
                "endpoint ejected"
            );
        }
    }
}

/// Says which deployment answered, where that is not what was asked for.
fn name_model(answer: &mut Answer, model: &str, target: &Target) {
    if *target.pool != *model {
        let head = match answer {
            Answer::Whole(whole) => &mut whole.head,
            Answer::Open(open) => &mut open.head,
        };
        // A name that no header can hold is not worth the answer.
        head.insert_header(MODEL, &*target.pool).ok();
    }
}
