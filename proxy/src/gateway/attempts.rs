//! Engines asked in turn until one has answered, and the answer handed on.

use std::{sync::Arc, time::Duration};

use pingora_core::protocols::http::ServerSession;

use super::{Done, Gateway};
use crate::{
    downstream::{self, respond},
    endpoints::Ticket,
    error::{GatewayError, UpstreamFailure},
    record::Record,
    routing::{self, policy::Asked},
    streaming::relay::{self, RelayContext},
    upstream::{
        answers,
        client::{Answer, Failed, Open, Whole},
        request::EngineRequest,
        retry::{self, Next},
    },
};

impl Gateway {
    /// Asks engines in turn until one has answered, then hands the answer on.
    pub(super) async fn attempts(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        asked: &Asked<'_>,
        request: &EngineRequest,
    ) -> Result<Done, GatewayError> {
        self.pool(model)?.budget.earn();
        let rules = self.pick_rules.of(model);
        let mut tried: Vec<Arc<str>> = Vec::new();
        let mut last: Option<Failed> = None;
        let mut resent = false;
        loop {
            let pool = self.pool(model)?;
            let chance = |n| fastrand::usize(0..n);
            let with = (&self.pick_rules, &rules);
            let picked = routing::pick(&pool, &tried, asked, self.now_ms(), with, chance);
            let Some((ticket, how)) = picked else {
                return self.give_up(session, record, model, last).await;
            };
            self.metrics.picks.with_label_values(&[rules.policy.name(), how.label()]).inc();
            let answered = tokio::select! {
                biased;
                answered = self.engines.ask(ticket.endpoint(), request, |origin| self.metrics.connected(origin)) => answered,
                () = downstream::gone(session) => return Err(GatewayError::ClientGone),
                () = self.lifecycle.cut().cancelled() => return Err(GatewayError::Draining),
            };
            let failed = match answered {
                Ok(answer) => return self.hand_on(session, record, answer, ticket).await,
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
                Next::GiveUp => return self.give_up(session, record, model, Some(failed)).await,
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
    ) -> Result<Done, GatewayError> {
        record.begun();
        match answer {
            Answer::Whole(whole) => {
                ticket.endpoint().succeeded();
                self.write_whole(session, record, *whole).await
            }
            Answer::Open(open) => self.stream(session, record, *open, ticket).await,
            Answer::Upgraded(upgraded) => self.upgrade(session, record, *upgraded, ticket).await,
        }
    }

    async fn stream(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        open: Open,
        ticket: Ticket,
    ) -> Result<Done, GatewayError> {
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
        relayed.outcome.map(|()| Done::Answered)
    }

    async fn write_whole(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        mut whole: Whole,
    ) -> Result<Done, GatewayError> {
        answers::normalise(&mut whole, record.shape());
        record.status(whole.head.status.as_u16());
        record.tail(&whole.body);
        self.metrics.bytes_out.inc_by(whole.body.len() as u64);
        let written = respond::whole_with_head(session, whole.head, whole.body).await;
        written.map(|()| Done::Answered).map_err(|_| GatewayError::ClientGone)
    }

    /// No attempt is left: the engine's own error answer if there is one, else ours.
    async fn give_up(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        last: Option<Failed>,
    ) -> Result<Done, GatewayError> {
        match last {
            Some(Failed { answer: Some(whole), .. }) => self.write_whole(session, record, *whole).await,
            Some(failed) => Err(GatewayError::Upstream(failed.failure)),
            None => Err(GatewayError::NoEndpoint { model: model.to_owned() }),
        }
    }

    pub(super) fn note_failure(&self, ticket: &Ticket, failed: &Failed) {
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
