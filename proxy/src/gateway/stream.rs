//! An answer that goes on after its first bytes, over as many engines as it takes.

use std::time::Duration;

use http::header;
use penstock_config::proxy::Patience;
use pingora_core::protocols::http::ServerSession;
use pingora_http::ResponseHeader;

use super::{
    Done, Gateway,
    attempts::{Errand, Place},
    go_on::{NotOn, Resumes},
};
use crate::{
    error::{GatewayError, UpstreamFailure},
    record::Record,
    resume::{Loss, Refusal, body::Members, tracker::Tracker, unary::Assembly},
    streaming::{
        leg::Leg,
        relay::{Interrupted, Relay, RelayContext},
    },
    upstream::client::{Failed, Open, Whole},
};

impl Gateway {
    /// Relays an answer that has begun to its end. An engine that is lost on the way is replaced where that can be right.
    pub(super) async fn stream(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        open: Open,
        mut place: Place,
        errand: &Errand<'_>,
    ) -> Result<Done, GatewayError> {
        record.status(open.head.status.as_u16());
        let is_stream = open.events.is_some();
        self.note_beginning(place.ticket(), open.head.status, is_stream);
        let Patience { idle_ms, .. } = errand.patience;
        let context = RelayContext {
            idle: Duration::from_millis(idle_ms),
            stall: Duration::from_millis(self.config.resume.stall_ms),
            write_stall: Duration::from_millis(self.config.limits.write_stall_ms),
            cut: self.lifecycle.cut(),
            shape: record.shape(),
            metrics: &self.metrics,
        };
        let tracker = match errand.request.resume.filter(|_| is_stream && open.head.status.is_success()) {
            Some(wishes) => Tracker::new(errand.request.api, wishes),
            None => Tracker::idle(),
        };
        let original = errand.request.whole.as_ref().filter(|_| !tracker.is_idle());
        let original = original.and_then(|body| Members::of(body).ok());
        let whole = original.map(|original| Assembly::new(errand.request.api, &original));
        let head = open.head.clone();
        let is_whole = whole.is_some();
        let mut relay = Relay::new(session, &context, tracker, whole);
        let (mut leg, first_head, first) = Leg::first(open);
        let mut interrupted =
            Box::pin(relay.begin(first_head, &mut leg, first, &place.ticket().pulse(self.started))).await;
        let mut resumes = Resumes::default();
        let outcome = loop {
            let copied = match interrupted {
                Ok(()) => {
                    let ticket = place.ticket();
                    let leave = async { Loss::of_leave(ticket.leave().await) };
                    let leave = (!relay.tracker.is_idle() && !resumes.stays()).then_some(leave);
                    relay.copy(&mut leg, &ticket.pulse(self.started), leave).await
                }
                Err(why) => Err(why),
            };
            let loss = match copied {
                Ok(()) => break Ok(()),
                // The client has its last event: how the engine's side ends is the engine's.
                Err(Interrupted::Lost(_)) if relay.tracker.facts.is_over() => break relay.close().await,
                Err(Interrupted::Failed(error)) => break Err(error),
                Err(Interrupted::Unfit(refusal)) => {
                    self.metrics.resumes.refused(&place.endpoint().id, refusal);
                    record.not_resumed(Loss::Garbage, refusal);
                    break Err(GatewayError::Lost { failure: UpstreamFailure::MidStream, refusal });
                }
                Err(Interrupted::Lost(loss)) => loss,
            };
            match Box::pin(self.go_on(&mut relay, record, &place, errand, loss, &mut resumes)).await {
                Ok(next) => {
                    place = next.place;
                    leg = next.leg;
                    let pulse = place.ticket().pulse(self.started);
                    interrupted = Box::pin(relay.go_on(&mut leg, next.first, &pulse)).await;
                }
                Err(NotOn::Refused(_)) if loss.is_optional() && !resumes.stays() => {
                    // The engine is still there: the stream stays as long as that lasts.
                    resumes.stay();
                    interrupted = Ok(());
                }
                Err(NotOn::Refused(refusal)) => break Err(given_up(loss, refusal)),
                Err(NotOn::Failed(error)) => break Err(error),
            }
        };
        let relayed = Box::pin(relay.finish(is_stream, outcome)).await;
        record.relayed(&relayed);
        match (&relayed.outcome, &relayed.facts.error) {
            (Ok(()), None) => self.note_end(place.ticket()),
            (Ok(()), Some(message)) => {
                self.note_failure(place.ticket(), &Failed::inside(UpstreamFailure::MidStream, message));
            }
            (Err(_), _) => {}
        }
        if let (Ok(()), Some(connection)) = (&relayed.outcome, leg.into_connection()) {
            self.engines.release(connection);
        }
        relayed.outcome?;
        if is_whole {
            let lost =
                GatewayError::Lost { failure: UpstreamFailure::MidStream, refusal: Refusal::Unreadable };
            let written = self.write_assembled(session, record, head, relayed.whole.ok_or(lost)?);
            return Box::pin(written).await;
        }
        Ok(Done::Answered)
    }
}

impl Gateway {
    /// An answer that was put together out of a stream's events.
    async fn write_assembled(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        mut head: ResponseHeader,
        body: Vec<u8>,
    ) -> Result<Done, GatewayError> {
        record.begun();
        // A content type that is a constant can be written.
        drop(head.insert_header(header::CONTENT_TYPE, "application/json"));
        self.write_whole(session, record, Whole { head, body: body.into() }).await
    }
}

/// The error of a stream that was lost and does not go on. Where nobody would have expected it to, it says no more than that.
fn given_up(loss: Loss, refusal: Refusal) -> GatewayError {
    let failure = loss.failure().unwrap_or(UpstreamFailure::MidStream);
    match refusal {
        Refusal::Disabled | Refusal::OptedOut | Refusal::Api => GatewayError::Upstream(failure),
        refusal => GatewayError::Lost { failure, refusal },
    }
}
