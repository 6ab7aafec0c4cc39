//! A run that streams.

use std::task::Poll;

use super::{
    super::{
        faults::{Fault, FaultKind},
        generation::Finish,
        render::{Frame, Token},
    },
    Next, Run, Wake,
    strike::Strike,
};

/// Writes of an unpaced stream between two yields to the other streams.
const WRITES_PER_TURN: usize = 16;

impl Run<'_> {
    /// Streams to the end, whatever it is.
    pub(super) async fn stream(mut self, headers: &str) -> Next {
        // vLLM sends the header as soon as the request is queued, long before the first token.
        self.conn.begin_stream(headers);
        self.recorder.status(200);
        let mut frame = Frame::default();
        let by_event = |fault: &mut Fault| fault.kind == FaultKind::Cut && fault.event.is_some();
        if let Some(fault) = self.fault.take_if(by_event) {
            frame.cut_at(fault.event, fault.byte);
        }
        self.render.greet(&mut frame);
        self.conn.out.append(&mut frame.out);
        if self.conn.flush().await.is_err() {
            return self.disconnected();
        }
        let burst = self.engine.options.sim.burst;
        let (mut events, mut writes, mut reason) = (0, 0, "length");
        while self.unfinished > 0 {
            if let Strike::Over(next) = self.strike(&mut frame).await {
                return next;
            }
            if frame.is_cut() {
                return self.cut_off(&mut frame, "fault cut").await;
            }
            let choice = match if self.interrupted() { None } else { self.ready() } {
                Some(choice) => choice,
                None => {
                    if self.send(&mut frame).await.is_err() {
                        return self.disconnected();
                    }
                    events = 0;
                    match self.wait().await {
                        Wake::Token(choice) => choice,
                        Wake::Gone => return self.disconnected(),
                        Wake::Interrupted => return self.end_interrupted(frame).await,
                    }
                }
            };
            if let Some(finish) = self.emit(choice, &mut frame) {
                reason = finish.reason();
            }
            events += 1;
            if events >= burst && self.unfinished > 0 {
                if self.send(&mut frame).await.is_err() {
                    return self.disconnected();
                }
                events = 0;
                writes += 1;
                if writes % WRITES_PER_TURN == 0 && self.has_left_after_yield().await {
                    return self.disconnected();
                }
            }
        }
        // Between the last token and the end of the stream.
        if let Strike::Over(next) = self.strike(&mut frame).await {
            return next;
        }
        let usage = self.usage();
        self.render.close(&mut frame, usage);
        self.observe_end(reason);
        self.recorder.tokens(self.sent);
        self.finish(frame, "finished").await
    }

    /// Ends the body, sends all, and settles the record.
    pub(super) async fn finish(&mut self, mut frame: Frame, outcome: &str) -> Next {
        if frame.is_cut() {
            return self.cut_off(&mut frame, "fault cut").await;
        }
        frame.out.extend_from_slice(b"0\r\n\r\n");
        if self.send(&mut frame).await.is_err() {
            return self.disconnected();
        }
        self.recorder.tokens(self.sent);
        self.recorder.end(outcome);
        if self.keep_alive { Next::Keep } else { Next::Close }
    }

    /// Makes the next token of `choice` and renders it.
    pub(super) fn emit(&mut self, choice: usize, frame: &mut Frame) -> Option<Finish> {
        if self.clock.first.is_none() {
            self.observe_start(choice);
            let usage = self.usage();
            self.render.open(frame, usage);
        }
        self.clock.token(&self.engine.metrics);
        self.text.clear();
        let one = &mut self.choices[choice];
        let step = one.generation.step(&mut self.text)?;
        one.note_block();
        if let Some(ticket) = &one.ticket {
            ticket.gave(1);
        }
        self.sent += 1;
        self.engine.metrics.generation_tokens.inc();
        let usage = super::Usage {
            prompt: self.prompt_tokens,
            completion: one.generation.generated(),
            cached: self.cached,
        };
        let token =
            Token { choice, id: Some(step.id), text: &self.text, finish: step.finish.as_ref(), usage };
        let every = self.engine.options.sim.stamp;
        if every > 0 && self.sent.is_multiple_of(every) {
            frame.stamp_next();
        }
        self.render.token(frame, &token);
        if step.finish.is_some() {
            one.end();
            self.unfinished -= 1;
        }
        step.finish
    }

    /// Sends the framed bytes.
    pub(super) async fn send(&mut self, frame: &mut Frame) -> Result<(), super::super::http::Gone> {
        if frame.out.is_empty() {
            return Ok(());
        }
        frame.fill_stamps(crate::clock::now_ns);
        std::mem::swap(&mut frame.out, &mut self.conn.out);
        self.conn.flush().await
    }

    /// Ends every choice by abort, as a shutdown does.
    pub(super) fn abort(&mut self, frame: &mut Frame) {
        let usage = self.usage();
        if self.clock.first.is_none() {
            self.render.open(frame, usage);
        }
        for choice in 0..self.choices.len() {
            let one = &mut self.choices[choice];
            if !one.generation.is_finished() {
                self.text.clear();
                one.generation.abort(&mut self.text);
                one.end();
                let token = Token { choice, id: None, text: &self.text, finish: Some(&Finish::Abort), usage };
                self.render.token(frame, &token);
            }
        }
        self.render.close(frame, usage);
    }

    /// Ends the stream as the engine's phase demands.
    pub(super) async fn end_interrupted(&mut self, mut frame: Frame) -> Next {
        match self.interruption() {
            Some(error) if self.render.error(&mut frame, &error) => self.finish(frame, "engine_error").await,
            Some(_) => self.cut_off(&mut frame, "engine_error").await,
            None => {
                self.abort(&mut frame);
                self.finish(frame, "aborted").await
            }
        };
        Next::Close
    }

    /// Lets other streams have their turn; true if the peer is gone.
    async fn has_left_after_yield(&mut self) -> bool {
        tokio::task::yield_now().await;
        std::future::poll_fn(|cx| Poll::Ready(self.conn.poll_gone(cx).is_ready())).await
    }
}
