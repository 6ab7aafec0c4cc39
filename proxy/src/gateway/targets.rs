//! The targets of a route, asked in turn, and then its fallbacks.

use pingora_core::protocols::http::ServerSession;

use super::{Done, Gateway, attempts::Outcome};
use crate::{
    error::GatewayError,
    record::Record,
    routing::{
        policy::Asked,
        resolve::{self, Step},
    },
    upstream::request::EngineRequest,
};

impl Gateway {
    /// Asks whoever may answer for `model`, until one has. `aim` makes the request one for engines that know the model by the
    /// name it is given.
    pub(super) async fn ask_targets(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        model: &str,
        asked: &Asked<'_>,
        mut request: EngineRequest,
        aim: impl Fn(&mut EngineRequest, &str),
    ) -> Result<Done, GatewayError> {
        let places = self.places(model, asked.session)?;
        record.model(model, self.table.load().version);
        record.stream(request.stream);
        // Whoever has room now goes first; only when nobody has is it worth to wait, and then for who should have answered.
        let alone = places.len() == 1;
        let (mut last, mut full) = (None, None);
        for Step { target, fallback } in places {
            self.metrics.routed(model, &target.pool, fallback);
            aim(&mut request, &target.served_model);
            let asked = Asked { adapter: target.adapter.as_deref(), ..*asked };
            match self.attempts(session, record, (model, &target), &asked, &request, alone).await? {
                Outcome::Answered(done) => return Ok(done),
                Outcome::Unanswered(failed) => last = failed.or(last),
                Outcome::Full => full = full.or(Some(target)),
            }
        }
        if let Some(target) = full {
            aim(&mut request, &target.served_model);
            let asked = Asked { adapter: target.adapter.as_deref(), ..*asked };
            let waited = self.attempts(session, record, (model, &target), &asked, &request, true);
            match Box::pin(waited).await? {
                Outcome::Answered(done) => return Ok(done),
                Outcome::Unanswered(failed) => last = failed.or(last),
                Outcome::Full => {}
            }
        }
        Box::pin(self.give_up(session, record, model, last)).await
    }

    /// Who may answer a request for `model`, in the order in which they are asked.
    fn places(&self, model: &str, session: Option<u64>) -> Result<Vec<Step>, GatewayError> {
        let snapshot = self.snapshot()?;
        let draw = session.unwrap_or_else(|| fastrand::u64(..));
        resolve::resolve(&snapshot.routes, model, self.pick_rules.key, draw)
            .ok_or_else(|| GatewayError::UnknownModel { model: model.to_owned() })
    }
}
