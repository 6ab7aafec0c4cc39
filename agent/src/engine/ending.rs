//! The end of a life: in good order, or because something broke.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    State, dump,
    launch::{Engine, Failure},
    stop,
    supervisor::{Supervisor, drain_times},
};

impl Supervisor {
    /// Deregisters, drains, ends.
    pub(super) async fn stop(&mut self, mut engine: Engine, reason: &str) {
        let cx = self.cx.clone();
        let begun = Instant::now();
        let was_ready = self.life.state() == State::Ready;
        self.move_to(State::Draining, reason);
        tracing::info!(replica = self.id(), reason, "stopping engine");
        cx.deregister(&self.assignment);
        cx.registry.left(self.id(), cx.deregister).await;
        if was_ready {
            let outcome = tokio::select! {
                outcome = stop::drain(&cx.probe, &engine.target, drain_times(&cx)) => outcome,
                _ = engine.tree.exited() => "ended by itself",
                () = cx.hurry.cancelled() => "cut short by a second signal",
            };
            tracing::info!(replica = self.id(), outcome, "engine drained");
        }
        cx.put_down(self.id(), &mut engine.tree, cx.term()).await;
        cx.metrics.stopped(begun.elapsed());
        tracing::info!(replica = self.id(), "engine stopped; nothing of it is left");
    }

    /// Ends an engine that runs and does nothing: out of routing, dumped while its processes are there to be looked at, ended.
    /// There is nothing to drain: its streams stand still, and end sooner with it than without.
    pub(super) async fn end_hung(&mut self, mut engine: Engine, reason: &str) -> Failure {
        let cx = self.cx.clone();
        let was_ready = self.life.state() == State::Ready;
        self.note_failed(engine.way, reason);
        self.move_to(State::Draining, reason);
        tracing::error!(replica = self.id(), reason, "ending an engine that hangs");
        cx.deregister(&self.assignment);
        let settled = async {
            cx.registry.left(self.id(), cx.deregister).await;
            if was_ready {
                sleep(Duration::from_millis(cx.config.settle_ms)).await;
            }
        };
        let (dump, ()) = tokio::join!(dump::write(&cx, self.id(), &engine, reason), settled);
        let reason = match dump {
            Some(path) => format!("{reason}; dump: {}", path.display()),
            None => reason.to_owned(),
        };
        cx.put_down(self.id(), &mut engine.tree, cx.orphan_term()).await;
        self.move_to(State::Failed, &reason);
        self.clear(&reason);
        Failure::passing(reason)
    }

    /// Makes the failure visible, takes the engine out of routing at once, and ends what is left of it.
    pub(super) async fn fail(&mut self, mut engine: Engine, failure: &Failure) {
        self.note_failed(engine.way, &failure.reason);
        self.move_to(State::Failed, &failure.reason);
        self.cx.deregister(&self.assignment);
        self.cx.put_down(self.id(), &mut engine.tree, self.cx.orphan_term()).await;
        self.clear(&failure.reason);
    }

    /// The board forgets the processes that are gone.
    fn clear(&self, reason: &str) {
        self.cx.board.update(self.id(), |view| {
            (view.pid, view.port, view.load) = (0, 0, None);
            view.missing.clear();
            view.address.clear();
            view.reason = reason.to_owned();
        });
    }
}
