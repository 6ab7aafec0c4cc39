//! Faults between the tokens of a stream.

use std::time::Duration;

use super::{
    super::{error::ApiError, faults::FaultKind, render::Frame},
    Next, Run, Wake,
};

/// What striking did.
pub(super) enum Strike {
    /// Nothing, or nothing that ends the stream.
    None,
    /// The stream is over.
    Over(Next),
}

impl Run<'_> {
    /// Strikes the request's fault if it is due now.
    pub(super) async fn strike(&mut self, frame: &mut Frame) -> Strike {
        let Some(fault) = self.fault.take_if(|fault| fault.is_due(self.sent)) else { return Strike::None };
        // All tokens before the fault reach the peer first, whatever the burst.
        if self.send(frame).await.is_err() {
            return Strike::Over(self.disconnected());
        }
        if fault.kind == FaultKind::Cut {
            frame.cut_at(None, fault.byte);
            return Strike::None;
        }
        let mut whole = std::mem::take(frame);
        let next = match fault.kind {
            FaultKind::Freeze | FaultKind::Hang => {
                self.recorder.tokens(self.sent);
                match self.frozen(&mut whole, fault.keep_alive_ms).await {
                    Wake::Interrupted => self.end_interrupted(whole).await,
                    _ => self.disconnected(),
                }
            }
            FaultKind::Error => {
                if self.render.error(frame, &ApiError::engine_dead()) {
                    let frame = std::mem::take(frame);
                    self.finish(frame, "fault error").await
                } else {
                    self.cut_off(frame, "fault error").await
                }
            }
            FaultKind::Abort => {
                self.abort(frame);
                let frame = std::mem::take(frame);
                self.finish(frame, "fault abort").await
            }
            FaultKind::End => self.finish(whole, "fault end").await,
            FaultKind::GarbageSse => {
                frame.event(|out| {
                    out.extend_from_slice(b"data: {\"id\":\"garbage\",\"choices\":[{\"delta\":{\"cont\n\n")
                });
                return Strike::None;
            }
            FaultKind::GarbageHttp => {
                frame.garbage();
                self.cut_off(frame, "fault garbage_http").await
            }
            FaultKind::Close => self.cut_off(frame, "fault close").await,
            FaultKind::Reset => {
                self.conn.reset();
                self.recorder.tokens(self.sent);
                self.recorder.end("fault reset");
                Next::Close
            }
            FaultKind::Crash => {
                self.engine.crash(fault.code);
                Next::Close
            }
            FaultKind::Cut
            | FaultKind::Slow
            | FaultKind::Status
            | FaultKind::Busy
            | FaultKind::Unhealthy
            | FaultKind::NeverReady
            | FaultKind::CrashOnLoad => return Strike::None,
        };
        Strike::Over(next)
    }

    /// Waits for the end of the peer or of the engine, with a comment every `keep_alive_ms` if that is not 0.
    async fn frozen(&mut self, frame: &mut Frame, keep_alive_ms: u64) -> Wake {
        if keep_alive_ms == 0 {
            return self.wait_for_the_end().await;
        }
        let pause = Duration::from_millis(keep_alive_ms);
        loop {
            if let Ok(wake) = tokio::time::timeout(pause, self.wait_for_the_end()).await {
                return wake;
            }
            frame.keep_alive();
            if self.send(frame).await.is_err() {
                return Wake::Gone;
            }
        }
    }

    /// Sends what is framed and lets the connection close without an end of the body.
    pub(super) async fn cut_off(&mut self, frame: &mut Frame, outcome: &str) -> Next {
        if self.send(frame).await.is_err() {
            return self.disconnected();
        }
        self.recorder.tokens(self.sent);
        self.recorder.end(outcome);
        Next::Close
    }
}
