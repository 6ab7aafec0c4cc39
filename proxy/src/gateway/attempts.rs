//! Engines asked in turn until one has answered, and the answer handed on.
//!
//! A place at an engine is looked for, and waited for where all are at their limit; it is held to the end of the answer.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use penstock_config::proxy::Patience;
use pingora_core::protocols::http::ServerSession;
use tokio::time::{Instant, sleep_until};

use super::{Done, Gateway};
use crate::{
    admission::queue::{Freed, Full, Number, WaitQueue, Waiting},
    downstream::{self, respond},
    endpoints::{Endpoint, Pool, Ticket, table::Target},
    error::{GatewayError, UpstreamFailure},
    health,
    record::Record,
    routing::{
        self, Unpicked,
        considered::Considered,
        policy::{Asked, How, Rules},
    },
    upstream::{
        answers,
        client::{Answer, Failed, Whole},
        request::EngineRequest,
        retry::{self, Next},
    },
};

/// Pause before engines that all failed a request are asked once more.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// Names the deployment that answered.
const MODEL: &str = "x-penstock-model";

/// What came of asking a target's engines.
pub(super) enum Outcome {
    /// The client has its answer, or the beginning of one.
    Answered(Done),
    /// It has seen nothing; the last failure, if any engine was asked.
    Unanswered(Option<Failed>),
    /// It has seen nothing, and each engine is at its limit, or yet to start.
    Full,
}

/// What a request is, to whoever brings its answer to an end.
pub(super) struct Errand<'a> {
    /// Who may answer it.
    pub(super) target: &'a Target,
    /// What picks look at.
    pub(super) asked: &'a Asked<'a>,
    /// The request as its engine got it.
    pub(super) request: &'a EngineRequest,
    /// How engines are picked.
    pub(super) rules: Rules,
    /// How long they are waited for.
    pub(super) patience: Patience,
}

/// One request's search for an engine that answers.
pub(super) struct Search<'a> {
    target: &'a Target,
    asked: &'a Asked<'a>,
    pub(super) rules: Rules,
    /// Endpoints that failed it, and those that answered busy since it last waited.
    pub(super) tried: Vec<Arc<str>>,
    /// How many of them, the last ones, answered busy.
    pub(super) busy: usize,
    /// Attempts that came to nothing, the free resend not counted.
    tries: usize,
    resent: bool,
    last: Option<Failed>,
    /// Its number in the queue, once it had to wait.
    number: Option<Number>,
    /// When it first had to, and how long it will.
    waiting_since: Option<(u64, Instant)>,
    /// Time it spent there and was not told of yet.
    pub(super) queued: Duration,
    /// Whether somebody wants to read what picks look at.
    pub(super) considers: bool,
}

impl<'a> Search<'a> {
    pub(super) fn new(target: &'a Target, asked: &'a Asked<'a>, rules: Rules, considers: bool) -> Self {
        Self {
            target,
            asked,
            rules,
            tried: Vec::new(),
            busy: 0,
            tries: 0,
            resent: false,
            last: None,
            number: None,
            waiting_since: None,
            queued: Duration::ZERO,
            considers,
        }
    }

    /// A sick engine is not asked again.
    pub(super) fn failed_by(&mut self, endpoint: &Endpoint) {
        let before_busy = self.tried.len().saturating_sub(self.busy);
        self.tried.insert(before_busy, Arc::clone(&endpoint.id));
    }

    /// A full one may have room later, but not at once.
    pub(super) fn refused_by(&mut self, endpoint: &Endpoint) {
        self.tried.push(Arc::clone(&endpoint.id));
        self.busy += 1;
    }

    /// All may be asked again; whether that makes a difference.
    pub(super) fn forget(&mut self) -> bool {
        self.busy = 0;
        let any = !self.tried.is_empty();
        self.tried.clear();
        any
    }

    /// Those that answered busy may be asked again.
    fn forgive_busy(&mut self) {
        let busy = std::mem::take(&mut self.busy);
        self.tried.truncate(self.tried.len().saturating_sub(busy));
    }
}

/// A place at an endpoint. On drop it is given back, and then whoever waits hears of it: the order of the fields.
pub(super) struct Place {
    ticket: Ticket,
    _freed: Freed,
    /// Where it was found, how, and what else was looked at.
    pub(super) pool: Arc<Pool>,
    how: How,
    seen: Option<Box<Considered>>,
}

impl Place {
    pub(super) fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// What was looked at for it, if somebody wants to read that.
    pub(super) const fn take_seen(&mut self) -> Option<Box<Considered>> {
        self.seen.take()
    }

    pub(super) const fn how(&self) -> How {
        self.how
    }

    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        self.ticket.endpoint()
    }
}

/// When to come back, from how long the first in the queue has waited: those who leave now would have waited as long.
fn retry_after_s(oldest_ms: u64) -> u32 {
    u32::try_from(oldest_ms.div_ceil(1_000)).unwrap_or(u32::MAX).clamp(1, 30)
}

impl Gateway {
    /// Asks a target's engines in turn until one has answered, then hands the answer on. `waits`: in the pool's queue while
    /// each is at its limit.
    pub(super) async fn attempts(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        (model, target): (&str, &Target),
        asked: &Asked<'_>,
        request: &EngineRequest,
        waits: bool,
    ) -> Result<Outcome, GatewayError> {
        let Some(pool) = self.pool(target)? else { return Ok(Outcome::Unanswered(None)) };
        pool.budget.earn();
        let patience = self.config.upstream.patience(model);
        let mut search = Search::new(target, asked, self.pick_rules.of(model), record.considers());
        loop {
            let placed = self.place(session, &mut search, waits).await;
            record.queued(std::mem::take(&mut search.queued));
            // Under overload thousands come by here; what a sample of them saw will do.
            if !matches!(placed, Ok(Ok(_)))
                && (placed.is_ok() || record.considers())
                && let Some(pool) = self.pool(target)?
            {
                let (tried, policy) = (&search.tried, search.rules.policy);
                record.unplaced(&pool, tried, search.asked.adapter, policy, self.now_ms());
            }
            let mut place = match placed? {
                Ok(place) => place,
                // A retry was decided on, and each has failed it: one of them may be back, or another be there.
                Err(Unpicked::Nobody) if waits && search.forget() => {
                    self.pause(session, AGAIN_AFTER).await?;
                    continue;
                }
                Err(Unpicked::Nobody) => return Ok(Outcome::Unanswered(search.last)),
                Err(Unpicked::Saturated | Unpicked::Asleep) => return Ok(Outcome::Full),
            };
            let how = (search.rules.policy, place.how);
            record.picked(&place.pool, place.ticket.endpoint(), how, place.seen.take());
            let first_byte = Duration::from_millis(patience.first_byte_ms);
            // Boxed, and gone with its memory before a stream begins.
            let asking = self.engines.ask(place.endpoint(), request, first_byte, |o| record.connected(o));
            let answered = tokio::select! {
                biased;
                answered = Box::pin(asking) => answered,
                () = downstream::gone(session) => return Err(GatewayError::ClientGone),
                () = self.lifecycle.cut().cancelled() => return Err(GatewayError::Draining),
            };
            let failed = match answered {
                Ok(mut answer) => {
                    name_model(&mut answer, model, target);
                    let errand = Errand { target, asked, request, rules: search.rules, patience };
                    return self
                        .hand_on(session, record, answer, place, &errand)
                        .await
                        .map(Outcome::Answered);
                }
                Err(failed) => failed,
            };
            self.note_failure(&place.ticket, &failed);
            search.tries += 1;
            let Some(pool) = self.pool(target)? else { return Ok(Outcome::Unanswered(Some(failed))) };
            let budget = || pool.budget.take(self.now_ms());
            let attempts = self.config.upstream.attempts;
            let next = retry::after_failure(failed.failure, search.tries, attempts, search.resent, budget);
            record.attempt_failed(&failed, next);
            match next {
                Next::Retry if failed.failure == UpstreamFailure::Busy => search.refused_by(place.endpoint()),
                Next::Retry => search.failed_by(place.endpoint()),
                Next::Resend => {
                    search.resent = true;
                    search.tries -= 1;
                }
                Next::GiveUp => return Ok(Outcome::Unanswered(Some(failed))),
            }
            self.metrics.retries.with_label_values(&[failed.failure.label()]).inc();
            search.last = Some(failed);
        }
    }

    /// Does nothing for so long, as long as anybody still wants the answer.
    pub(super) async fn pause(
        &self,
        session: &mut ServerSession,
        length: Duration,
    ) -> Result<(), GatewayError> {
        tokio::select! {
            () = tokio::time::sleep(length) => Ok(()),
            () = downstream::gone(session) => Err(GatewayError::ClientGone),
            () = self.lifecycle.cut().cancelled() => Err(GatewayError::Draining),
        }
    }

    /// A place at an endpoint, waited for in order of arrival, if it `waits`, while each is at its limit.
    pub(super) async fn place(
        &self,
        session: &mut ServerSession,
        search: &mut Search<'_>,
        waits: bool,
    ) -> Result<Result<Place, Unpicked>, GatewayError> {
        let Some(pool) = self.pool(search.target)? else { return Ok(Err(Unpicked::Nobody)) };
        let queue = Arc::clone(&pool.queue);
        let mut asleep = pool.is_asleep();
        if queue.is_empty() {
            match self.pick(search)? {
                Err(why @ (Unpicked::Saturated | Unpicked::Asleep)) => asleep = why == Unpicked::Asleep,
                Err(Unpicked::Nobody) if search.busy > 0 => asleep = false,
                picked => return Ok(picked),
            }
        }
        Box::pin(self.wait_for_place(session, search, &queue, asleep, waits)).await
    }

    async fn wait_for_place(
        &self,
        session: &mut ServerSession,
        search: &mut Search<'_>,
        queue: &Arc<WaitQueue>,
        asleep: bool,
        waits: bool,
    ) -> Result<Result<Place, Unpicked>, GatewayError> {
        search.forgive_busy();
        let now_ms = self.now_ms();
        if asleep {
            queue.found_asleep(now_ms);
            self.wanted.notify_one();
        }
        if !waits {
            return Ok(Err(if asleep { Unpicked::Asleep } else { Unpicked::Saturated }));
        }
        let settings = &self.config.queue;
        let patience = if asleep { settings.wake_ms } else { settings.deadline_ms };
        let (since_ms, deadline) = *search
            .waiting_since
            .get_or_insert_with(|| (now_ms, Instant::now() + Duration::from_millis(patience)));
        let saturated = || match asleep {
            true => GatewayError::Asleep { waited_ms: self.now_ms().saturating_sub(since_ms) },
            false => GatewayError::Saturated { retry_after_s: retry_after_s(queue.oldest_ms(self.now_ms())) },
        };
        let outcome = |outcome: &str| self.metrics.queue_outcomes.with_label_values(&[outcome]).inc();
        let waiting = queue.enter(search.number, since_ms, settings.max_waiting).map_err(|Full| {
            outcome("full");
            saturated()
        })?;
        search.number = Some(waiting.number());
        let found = tokio::select! {
            biased;
            found = self.found(search, &waiting) => found.inspect(|_| outcome("placed")),
            () = downstream::gone(session) => {
                outcome("client_gone");
                Err(GatewayError::ClientGone)
            }
            () = self.lifecycle.cut().cancelled() => {
                outcome("draining");
                Err(GatewayError::Draining)
            }
            () = sleep_until(deadline) => {
                outcome("deadline");
                Err(saturated())
            }
        };
        let waited = Duration::from_millis(self.now_ms() - now_ms);
        self.metrics.queue_wait.observe(waited.as_secs_f64());
        search.queued += waited;
        found
    }

    /// Looks for a place whenever it may be there, as the first in the queue.
    async fn found(
        &self,
        search: &Search<'_>,
        waiting: &Waiting,
    ) -> Result<Result<Place, Unpicked>, GatewayError> {
        loop {
            waiting.worth_looking().await;
            match self.pick(search)? {
                Err(Unpicked::Saturated | Unpicked::Asleep) => {}
                picked => return Ok(picked),
            }
        }
    }

    fn pick(&self, search: &Search<'_>) -> Result<Result<Place, Unpicked>, GatewayError> {
        let Some(pool) = self.pool(search.target)? else { return Ok(Err(Unpicked::Nobody)) };
        let chance = |n| fastrand::usize(0..n);
        let with = (&self.pick_rules, &search.rules);
        let mut seen: Option<Box<Considered>> = search.considers.then(Box::default);
        let (tried, now_ms) = (&search.tried, self.now_ms());
        let picked =
            routing::pick_seen(&pool, tried, search.asked, now_ms, with, chance, seen.as_deref_mut());
        let why = |why| match why {
            // One that fails this request is not asleep.
            Unpicked::Nobody if tried.is_empty() && pool.is_asleep() => Unpicked::Asleep,
            other => other,
        };
        Ok(picked.map_err(why).map(|(ticket, how)| {
            self.metrics.picks.with_label_values(&[search.rules.policy.name(), how.label()]).inc();
            Place { ticket, _freed: Freed(Arc::clone(&pool.queue)), pool, how, seen }
        }))
    }

    /// Writes an answer to the client. The place is held to its end.
    async fn hand_on(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        answer: Answer,
        place: Place,
        errand: &Errand<'_>,
    ) -> Result<Done, GatewayError> {
        if errand.request.whole.is_none() || matches!(answer, Answer::Whole(_)) {
            record.begun();
        }
        match answer {
            Answer::Whole(whole) => {
                if self.note_beginning(&place.ticket, whole.head.status, false) {
                    self.note_end(&place.ticket);
                }
                Box::pin(self.write_whole(session, record, *whole)).await
            }
            Answer::Open(open) => Box::pin(self.stream(session, record, *open, place, errand)).await,
            Answer::Upgraded(upgraded) => {
                self.note_beginning(&place.ticket, StatusCode::OK, false);
                Box::pin(self.upgrade(session, record, *upgraded, place)).await
            }
        }
    }

    pub(super) async fn write_whole(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        mut whole: Whole,
    ) -> Result<Done, GatewayError> {
        answers::normalise(&mut whole, record.shape());
        record.status(whole.head.status.as_u16());
        record.whole(&whole.body);
        self.metrics.bytes_out.inc_by(whole.body.len() as u64);
        let written = respond::whole_with_head(session, whole.head, whole.body).await;
        written.map(|()| Done::Answered).map_err(|_| GatewayError::ClientGone)
    }

    /// No attempt is left: the engine's own error answer if there is one, else ours.
    pub(super) async fn give_up(
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
        if failed.failure == UpstreamFailure::Busy {
            ticket.refused(self.now_ms(), &self.pick_rules.limits);
        }
        let change = ticket.failed(failed.failure, self.now_ms(), &self.health_rules);
        health::report(&self.metrics, endpoint, change, &failed.detail);
    }

    /// Whether it is a good answer. A refusal says nothing of the engine: it is the client's.
    pub(super) fn note_beginning(&self, ticket: &Ticket, status: StatusCode, stream: bool) -> bool {
        if status.is_success() {
            ticket.accepted(self.now_ms(), &self.pick_rules.limits);
            let change = ticket.began(stream, self.now_ms(), &self.health_rules);
            health::report(&self.metrics, ticket.endpoint(), change, "");
        }
        status.is_success()
    }

    pub(super) fn note_end(&self, ticket: &Ticket) {
        let change = ticket.finished(self.now_ms(), &self.health_rules);
        health::report(&self.metrics, ticket.endpoint(), change, "");
    }
}

/// Says which deployment answered, where that is not what was asked for.
fn name_model(answer: &mut Answer, model: &str, target: &Target) {
    if *target.pool != *model {
        let head = match answer {
            Answer::Whole(whole) => &mut whole.head,
            Answer::Open(open) => &mut open.head,
            Answer::Upgraded(upgraded) => &mut upgraded.head,
        };
        // A name that no header can hold is not worth the answer.
        head.insert_header(MODEL, &*target.pool).ok();
    }
}
