//! A run that answers in one body.
//!
//! What it will say is computed at once; then it waits until the batch has granted all of it.

use super::{
    super::{
        chat::first_reason,
        error::ApiError,
        faults::{Fault, FaultKind},
        generation::{Finish, Outcome, complete},
        http::Response,
    },
    Next, Run, Wake, flushed,
};

impl Run<'_> {
    /// Answers, whatever the end is.
    pub(super) async fn unary(mut self, headers: &str) -> Next {
        let mut outcomes: Vec<Outcome> =
            self.choices.iter().map(|c| complete(c.generation.clone(), u64::MAX)).collect();
        let fault = self.fault.take();
        let fault_at = fault.as_ref().map(|f| f.after_tokens.unwrap_or(0));
        for choice in &self.choices {
            if let Some(ticket) = &choice.ticket {
                // The first token is observed; the next one that matters is the last, or the fault's.
                ticket.wake_at(1);
            }
        }
        loop {
            if let Some(fault) = &fault
                && fault_at.is_some_and(|at| at <= self.sent)
            {
                return self.strike_unary(fault, outcomes, headers).await;
            }
            if self.unfinished == 0 {
                break;
            }
            match self.wait().await {
                Wake::Token(choice) => self.take_credit(choice, &outcomes[choice], fault_at),
                Wake::Gone => return self.disconnected(),
                Wake::Interrupted => match self.interruption() {
                    Some(error) => return self.fail(&error, headers, "engine_error").await,
                    None => {
                        self.truncate(&mut outcomes);
                        return self.answer(&outcomes, headers, "aborted").await;
                    }
                },
            }
        }
        self.answer(&outcomes, headers, "finished").await
    }

    /// Takes what is granted to `choice`, and says when to be woken next.
    fn take_credit(&mut self, choice: usize, outcome: &Outcome, fault_at: Option<u64>) {
        if self.clock.first.is_none() {
            self.observe_start(choice);
            self.clock.token(&self.engine.metrics);
        }
        let total = u64::try_from(outcome.ids.len()).unwrap_or(u64::MAX);
        let until = fault_at.filter(|_| choice == 0).map_or(total, |at| at.clamp(1, total));
        let one = &mut self.choices[choice];
        let Some(ticket) = &one.ticket else { return };
        self.text.clear();
        let before = one.generation.generated();
        // The credit may be ahead by more than one: take all of it, up to where something happens.
        while one.generation.generated() < until && ticket.has_more_than(one.generation.generated()) {
            if one.generation.step(&mut self.text).is_none() {
                break;
            }
            if one.generation.prefix().len().is_multiple_of(super::BLOCK_TOKENS) {
                one.blocks.push(one.generation.prefix().hash());
            }
        }
        let taken = one.generation.generated() - before;
        self.sent += taken;
        self.engine.metrics.generation_tokens.inc_by(taken);
        ticket.gave(taken);
        ticket.wake_at(until);
        if one.generation.is_finished() {
            one.end();
            self.unfinished -= 1;
        }
    }

    /// Cuts the outcomes down to what was granted.
    fn truncate(&self, outcomes: &mut [Outcome]) {
        for (choice, outcome) in self.choices.iter().zip(outcomes) {
            if !choice.generation.is_finished() {
                let so_far = usize::try_from(choice.generation.generated()).unwrap_or(usize::MAX);
                outcome.ids.truncate(so_far);
                outcome.text = super::super::tokens::decoded(&outcome.ids);
                outcome.finish = Finish::Abort;
            }
        }
    }

    async fn answer(&mut self, outcomes: &[Outcome], headers: &str, outcome: &str) -> Next {
        self.observe_end(first_reason(outcomes));
        let response = self.rendered(outcomes, headers);
        self.recorder.status(200);
        self.conn.respond(&response, self.keep_alive);
        self.settle(outcome).await
    }

    fn rendered(&mut self, outcomes: &[Outcome], headers: &str) -> Response {
        let usage = self.usage();
        let mut response = Response::json(200, self.render.unary(outcomes, usage));
        response.headers.push_str(headers);
        response
    }

    async fn fail(&mut self, error: &ApiError, headers: &str, outcome: &str) -> Next {
        let mut response = Response::json(error.status, self.render.error_body(error));
        response.headers.push_str(headers);
        self.recorder.status(error.status);
        self.conn.respond(&response, self.keep_alive);
        self.settle(outcome).await
    }

    async fn settle(&mut self, outcome: &str) -> Next {
        self.recorder.tokens(self.sent);
        let next = flushed(self.conn, self.keep_alive).await;
        self.recorder.end(outcome);
        next
    }

    /// The faults of a stream, as far as they exist for one body.
    async fn strike_unary(&mut self, fault: &Fault, mut outcomes: Vec<Outcome>, headers: &str) -> Next {
        self.recorder.tokens(self.sent);
        let name = format!("fault {}", fault.kind.name());
        match fault.kind {
            FaultKind::Error => self.fail(&ApiError::engine_dead(), headers, &name).await,
            FaultKind::Abort => {
                self.truncate(&mut outcomes);
                self.answer(&outcomes, headers, &name).await
            }
            FaultKind::Freeze | FaultKind::Hang => match self.wait_for_the_end().await {
                Wake::Interrupted => self.fail(&ApiError::engine_dead(), headers, "engine_error").await,
                _ => self.disconnected(),
            },
            FaultKind::Crash => {
                self.engine.crash(fault.code);
                Next::Close
            }
            FaultKind::Reset => {
                self.conn.reset();
                self.recorder.end(&name);
                Next::Close
            }
            FaultKind::GarbageHttp => {
                self.conn.out.extend_from_slice(b"ZZ this is not HTTP\r\n\r\n");
                self.settle(&name).await;
                Next::Close
            }
            FaultKind::Cut | FaultKind::Close | FaultKind::End => {
                // The header promises the whole body.
                let response = self.rendered(&outcomes, headers);
                let sent = if fault.kind == FaultKind::Cut { fault.byte.min(response.body.len()) } else { 0 };
                self.conn.head(200, response.content_type, headers, true, Some(response.body.len()));
                self.conn.out.extend_from_slice(&response.body[..sent]);
                self.settle(&name).await;
                Next::Close
            }
            FaultKind::GarbageSse => {
                let mut response = self.rendered(&outcomes, headers);
                response.body.truncate(response.body.len() / 2);
                self.recorder.status(200);
                self.conn.respond(&response, self.keep_alive);
                self.settle(&name).await
            }
            FaultKind::Slow
            | FaultKind::Status
            | FaultKind::Busy
            | FaultKind::Unhealthy
            | FaultKind::NeverReady
            | FaultKind::CrashOnLoad => self.answer(&outcomes, headers, "finished").await,
        }
    }
}
