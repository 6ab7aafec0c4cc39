//! From the loss of an engine in the middle of a stream to another engine's first event of the rest.
//!
//! What to ask is [`crate::resume`]'s; here is who is asked, when it is worth it, and what it costs the fleet: a stream goes on
//! a few times at most, a pool's streams so many times a second, and the next engine is found, waited for and held like that of
//! any request.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::HeaderValue;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Gateway,
    attempts::{Errand, Place, Search},
};
use crate::{
    downstream,
    endpoints::Pool,
    error::{GatewayError, UpstreamFailure},
    openai::Api,
    record::Record,
    resume::{Answers, Loss, NoPlan, Question, Refusal, tracker::Plan},
    routing::Unpicked,
    streaming::{leg::Leg, relay::Relay},
    upstream::{
        client::{Answer, Failed},
        request::EngineRequest,
        retry::Next,
    },
};

/// Pause between two looks for an engine while there is none.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Questions to one engine before a plan is given up: each brings it nearer.
const MOST_QUESTIONS: usize = 12;

/// Longest wait for the answer to one.
const QUESTION: Duration = Duration::from_secs(5);

/// Header of the request's id.
const REQUEST_ID: &str = "x-request-id";

/// How often one stream went on, and whether it still may.
#[derive(Debug, Default)]
pub(super) struct Resumes {
    count: u32,
    stays: bool,
}

impl Resumes {
    /// Whether it was found that it cannot leave an engine that is still there.
    pub(super) const fn stays(&self) -> bool {
        self.stays
    }

    /// It cannot leave the engine that it is at.
    pub(super) const fn stay(&mut self) {
        self.stays = true;
    }
}

/// The rest of a stream, about to come.
pub(super) struct Continuation {
    /// At whose engine.
    pub(super) place: Place,
    /// Its connection.
    pub(super) leg: Leg,
    /// Its first events.
    pub(super) first: Bytes,
}

/// Why a stream does not go on elsewhere.
pub(super) enum NotOn {
    /// It would be wrong, or nobody took it.
    Refused(Refusal),
    /// The request is over.
    Failed(GatewayError),
}

impl From<Refusal> for NotOn {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<GatewayError> for NotOn {
    fn from(error: GatewayError) -> Self {
        match error {
            GatewayError::ClientGone | GatewayError::ClientStalled | GatewayError::Draining => {
                Self::Failed(error)
            }
            // Nobody has room, nobody is there: whichever words a new request would get.
            _ => Self::Refused(Refusal::NoCapacity),
        }
    }
}

/// Why one engine did not bring the rest.
enum Declined {
    /// Another may.
    Failed(Failed),
    /// None will.
    Refused(Refusal),
}

impl Gateway {
    /// Finds an engine that goes on with a stream that `left` has lost, or is to lose.
    pub(super) async fn go_on(
        &self,
        relay: &mut Relay<'_>,
        record: &mut Record<'_>,
        left: &Place,
        errand: &Errand<'_>,
        loss: Loss,
        resumes: &mut Resumes,
    ) -> Result<Continuation, NotOn> {
        let began = Instant::now();
        self.metrics.resumes.lost(loss);
        if loss == Loss::ErrorEvent {
            self.metrics.inband_errors.inc();
        }
        if let Some(failure) = loss.failure() {
            self.note_failure(left.ticket(), &Failed::inside(failure, loss.label()));
        }
        let went = self.try_to_go_on(relay, record, left, errand, loss, resumes, began).await;
        let endpoint = &left.endpoint().id;
        match &went {
            Ok((_, recomputed)) => {
                *resumes = Resumes { count: resumes.count + 1, stays: false };
                let added = began.elapsed();
                self.metrics.resumes.resumed(endpoint, loss, added.as_secs_f64(), *recomputed);
                record.resumed(added);
            }
            Err(NotOn::Refused(refusal)) => {
                self.metrics.resumes.refused(endpoint, *refusal);
                record.not_resumed(loss, *refusal);
            }
            Err(NotOn::Failed(_)) => {}
        }
        tracing::debug!(
            request = record.request_id(),
            endpoint = &**endpoint,
            loss = loss.label(),
            outcome = match &went {
                Ok(_) => "resumed",
                Err(NotOn::Refused(refusal)) => refusal.label(),
                Err(NotOn::Failed(error)) => error.code(),
            },
            "stream lost its engine"
        );
        went.map(|(continuation, _)| continuation)
    }

    #[allow(clippy::too_many_arguments, reason = "one call, of one function's second half")]
    async fn try_to_go_on(
        &self,
        relay: &mut Relay<'_>,
        record: &mut Record<'_>,
        left: &Place,
        errand: &Errand<'_>,
        loss: Loss,
        resumes: &Resumes,
        began: Instant,
    ) -> Result<(Continuation, u64), NotOn> {
        if relay.tracker.is_idle() {
            return Err(self.why_nobody_remembers(errand.request).into());
        }
        let mut answers = Answers::default();
        if let Err(NoPlan::Refused(refusal)) = relay.tracker.plan(&errand.request.body, &answers) {
            return Err(refusal.into());
        }
        if resumes.count >= self.config.resume.attempts {
            return Err(Refusal::Attempts.into());
        }
        let mut search = Search::new(errand.target, errand.asked, errand.rules, record.considers());
        search.failed_by(left.endpoint());
        let deadline = began + Duration::from_millis(self.config.queue.deadline_ms);
        let (mut tries, mut left_behind) = (0, false);
        let mut costs = true;
        loop {
            let pool = self.pool(errand.target)?.ok_or(Refusal::NoCapacity)?;
            if costs && !pool.resumes.take(self.now_ms()) {
                return Err(Refusal::Budget.into());
            }
            let mut place = self.place_for_the_rest(relay, &mut search, left, loss, deadline).await?;
            record.queued(std::mem::take(&mut search.queued));
            if !std::mem::replace(&mut left_behind, true) {
                record.lost(loss);
            }
            let how = (search.rules.policy, place.how());
            let seen = place.take_seen();
            record.picked(place.pool(), place.endpoint(), how, seen);
            let asked = self.ask_for_the_rest(relay, record, &place, errand, &mut answers, resumes);
            let cut = self.lifecycle.cut();
            let declined = tokio::select! {
                biased;
                asked = asked => asked,
                () = cut.cancelled() => return Err(NotOn::Failed(GatewayError::Draining)),
            };
            let failed = match declined? {
                Ok((leg, first, recomputed)) => {
                    self.note_beginning(place.ticket(), http::StatusCode::OK, true);
                    return Ok((Continuation { place, leg, first }, recomputed));
                }
                Err(Declined::Refused(refusal)) => return Err(refusal.into()),
                Err(Declined::Failed(failed)) => failed,
            };
            self.note_failure(place.ticket(), &failed);
            // One that cannot be reached, or is full, costs nobody anything. One that was lost with it is one more.
            costs = !matches!(failed.failure, UpstreamFailure::Connect | UpstreamFailure::Busy);
            tries += u32::from(costs);
            let refusal = match () {
                () if resumes.count + tries >= self.config.resume.attempts => Some(Refusal::Attempts),
                () if Instant::now() >= deadline => Some(Refusal::NoCapacity),
                () => None,
            };
            record.attempt_failed(&failed, if refusal.is_some() { Next::GiveUp } else { Next::Retry });
            if let Some(refusal) = refusal {
                return Err(refusal.into());
            }
            match failed.failure {
                UpstreamFailure::Busy => search.refused_by(place.endpoint()),
                _ => search.failed_by(place.endpoint()),
            }
        }
    }

    /// Why nothing is known of a stream that was lost.
    fn why_nobody_remembers(&self, request: &EngineRequest) -> Refusal {
        match request.resume {
            _ if !self.config.resume.enabled => Refusal::Disabled,
            None if request.stream => Refusal::OptedOut,
            _ => Refusal::Api,
        }
    }

    /// A place at an engine that may go on. While there is none it is waited for, as long as a request waits for one; the
    /// engine that was lost may be it, if it is back.
    async fn place_for_the_rest(
        &self,
        relay: &mut Relay<'_>,
        search: &mut Search<'_>,
        left: &Place,
        loss: Loss,
        deadline: Instant,
    ) -> Result<Place, NotOn> {
        loop {
            match self.place(relay.session(), search, !loss.is_optional()).await? {
                Ok(place) if loss.is_optional() && place.endpoint().id == left.endpoint().id => {
                    return Err(Refusal::NoCapacity.into());
                }
                Ok(place) => return Ok(place),
                Err(_) if loss.is_optional() || Instant::now() >= deadline => {
                    return Err(Refusal::NoCapacity.into());
                }
                Err(Unpicked::Nobody | Unpicked::Saturated | Unpicked::Asleep) => {}
            }
            search.forget();
            self.pause(relay.session(), LOOK_EVERY).await?;
        }
    }

    /// Asks one engine what must be known, then for the rest.
    async fn ask_for_the_rest(
        &self,
        relay: &mut Relay<'_>,
        record: &mut Record<'_>,
        place: &Place,
        errand: &Errand<'_>,
        answers: &mut Answers,
        resumes: &Resumes,
    ) -> Result<Result<(Leg, Bytes, u64), Declined>, NotOn> {
        let request = errand.request;
        let name = format!("{}-r{}", request.request_id, resumes.count + 1);
        let again = |api, target: &str, stream, body: Vec<u8>| {
            let mut headers = request.headers.clone();
            if let Ok(value) = HeaderValue::from_str(&name) {
                headers.insert(REQUEST_ID, value);
            }
            EngineRequest {
                api,
                stream,
                request_id: request.request_id.clone(),
                target: target.to_owned(),
                headers,
                body: body.into(),
                resume: None,
                whole: None,
            }
        };
        let first_byte = Duration::from_millis(errand.patience.first_byte_ms);
        let mut questions = 0;
        let Plan { ask, seam, kept } = loop {
            let question = match relay.tracker.plan(&request.body, answers) {
                Ok(plan) => break plan,
                Err(NoPlan::Refused(refusal)) => return Ok(Err(Declined::Refused(refusal))),
                Err(NoPlan::Asks(question)) => question,
            };
            questions += 1;
            if questions > MOST_QUESTIONS {
                return Ok(Err(Declined::Refused(Refusal::Unreadable)));
            }
            let (api, path, body) = asked(&question, &request.body);
            let request = again(api, path, false, body);
            let answered = tokio::select! {
                biased;
                answered = self.engines.ask(place.endpoint(), &request, QUESTION.min(first_byte), |_| {}) => answered,
                () = downstream::gone(relay.session()) => return Err(NotOn::Failed(GatewayError::ClientGone)),
            };
            match answered {
                Ok(Answer::Whole(whole)) if whole.head.status.is_success() => {
                    if !answer(question, &whole.body, answers) {
                        return Ok(Err(Declined::Refused(Refusal::Unreadable)));
                    }
                }
                Ok(_) => return Ok(Err(Declined::Refused(Refusal::Unreadable))),
                Err(failed) => return Ok(Err(Declined::Failed(failed))),
            }
        };
        let request = again(request.api, ask.path, true, ask.body);
        let answered = tokio::select! {
            biased;
            answered = self.engines.ask(place.endpoint(), &request, first_byte, |origin| record.connected(origin)) => answered,
            () = downstream::gone(relay.session()) => return Err(NotOn::Failed(GatewayError::ClientGone)),
        };
        Ok(match answered {
            Ok(Answer::Open(open)) if open.events.is_some() && open.head.status.is_success() => {
                relay.tracker.resumed(kept);
                let (leg, first) = Leg::next(*open, seam);
                Ok((leg, first, ask.recomputed))
            }
            // Whatever it says against the request, another engine would say, too.
            Ok(_) => Err(Declined::Refused(Refusal::Mismatch)),
            Err(failed) => Err(Declined::Failed(failed)),
        })
    }
}

/// What is asked where, for a model by its engine's name.
fn asked(question: &Question, original: &[u8]) -> (Api, &'static str, Vec<u8>) {
    let model = crate::resume::body::Members::of(original).ok().and_then(|members| members.value("model"));
    let model = model.unwrap_or(Value::Null);
    let (api, path, body) = match question {
        Question::Text(ids) => (Api::Detokenize, "/detokenize", json!({"model": model, "tokens": ids})),
        Question::Tokens(text) => {
            let body = json!({"model": model, "prompt": text, "add_special_tokens": false});
            (Api::Tokenize, "/tokenize", body)
        }
        Question::Context => (Api::Tokenize, "/tokenize", json!({"model": model, "prompt": "x"})),
    };
    (api, path, body.to_string().into_bytes())
}

/// Notes the answer; whether it is one.
fn answer(question: Question, body: &[u8], answers: &mut Answers) -> bool {
    let Ok(mut body) = serde_json::from_slice::<Value>(body) else { return false };
    let number = |key: &str| body.get(key).and_then(Value::as_u64);
    match question {
        Question::Text(ids) => {
            let Some(Value::String(text)) = body.get_mut("prompt").map(Value::take) else { return false };
            answers.texts.push((ids.len(), text));
        }
        Question::Tokens(_) => answers.tokens = number("count"),
        Question::Context => answers.context = number("max_model_len"),
    }
    answers.tokens.is_some() || answers.context.is_some() || !answers.texts.is_empty()
}

impl Place {
    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}
