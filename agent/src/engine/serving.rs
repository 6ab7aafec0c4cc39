//! The middle of a life: from a started engine to the word that it should no longer run.
//!
//! Everything that may end it is polled side by side: an order, its exit, silence, a wedge. What is learnt meanwhile
//! (loads, adapters, the registration's standing) goes to the board.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::{
    State,
    attempts::Kind,
    canary::{Pulse, Subject},
    context::Context,
    launch::{self, Engine, Failure},
    load::Scrape,
    probe::Target,
    progress::Limits,
    readiness::{self, Lost, Question},
    supervisor::{Order, Served, Supervisor, drain_times, ordered, ordered_to_end},
    watch as watching,
};
use crate::{
    assignment::Assignment,
    registrations::{Standing, Wanted},
};

impl Supervisor {
    /// Until the engine should no longer run.
    pub(super) async fn serve(&mut self, engine: &mut Engine) -> Served {
        if let Some(served) = self.load(engine).await {
            return served;
        }
        self.note_started(engine);
        self.attempts.got_ready();
        self.show_attempts(None);
        launch::note_ready(&self.cx, self.id());
        self.move_to(State::Ready, "");
        tracing::info!(replica = self.id(), pid = engine.tree.pid(), base_url = %engine.target, "engine ready");
        if *self.orders.borrow() == Order::Sleep {
            return Served::Ordered(Order::Sleep);
        }
        // The list was just there to be read: without it now, the next look finds the adapters.
        let name = &self.assignment.spec.served_model_name;
        let adapters = self.cx.probe.adapters(&engine.target, name).await.unwrap_or_default();
        self.register(engine, adapters.clone());
        self.watch(engine, adapters).await
    }

    /// Until it is ready (`None`), or should no longer run.
    async fn load(&self, engine: &mut Engine) -> Option<Served> {
        let config = &self.cx.config;
        let mut orders = self.orders.clone();
        let question = Question {
            target: engine.target.clone(),
            port: engine.lease.port(),
            pgid: engine.tree.pid(),
            model: self.assignment.spec.served_model_name.clone(),
            poll: Duration::from_millis(config.ready_poll_ms),
            completion: Duration::from_millis(config.first_completion_ms),
        };
        let told = |waiting_for: &str| {
            self.cx.board.update(self.id(), |view| view.reason = format!("not ready: {waiting_for}"));
        };
        let ready = readiness::until_ready(&self.cx.probe, &question, told);
        // One that was ready before is still routed to: it has a ready engine's time to answer, not a loading one's.
        let silent = async {
            match engine.was_ready {
                true => until_silent(&self.cx, &engine.target, |_| false).await,
                false => std::future::pending().await,
            }
        };
        let (pulse, target) = (pulse(&self.cx), engine.target.clone());
        let wedged = async {
            match engine.was_ready {
                true => until_wedged(&self.cx, &self.assignment, &target, &pulse).await,
                false => std::future::pending().await,
            }
        };
        Some(tokio::select! {
            order = ordered_to_end(&mut orders) => Served::Ordered(order),
            exit = engine.tree.exited() => Served::Failed(self.explain(exit)),
            reason = silent => Served::Hung(reason, Kind::Other),
            reason = wedged => Served::Hung(reason, Kind::Other),
            ready = timeout(engine.ready_within, ready) => match ready {
                Ok(Ok(())) => return None,
                Ok(Err(lost @ Lost::Port { .. })) => Served::Failed(Failure::passing(lost.to_string())),
                Ok(Err(lost @ Lost::Silent { .. })) => Served::Hung(lost.to_string(), Kind::Stuck),
                Err(_) => Served::Hung(
                    format!(
                        "not ready within {} s ({}); last: {}",
                        engine.ready_within.as_secs(),
                        engine.way.limit(),
                        self.reason()
                    ),
                    Kind::Stuck,
                ),
            },
        })
    }

    /// Until a ready engine should no longer run.
    async fn watch(&mut self, engine: &mut Engine, adapters: Vec<String>) -> Served {
        let cx = self.cx.clone();
        let config = &cx.config;
        let ms = Duration::from_millis;
        let mut orders = self.orders.clone();
        let id = self.id().to_owned();
        let (pulse, assignment) = (pulse(&cx), self.assignment.clone());
        let wedged = until_wedged(&cx, &assignment, &engine.target, &pulse);
        let silent = until_silent(&cx, &engine.target, |since| pulse.moved() >= since);
        let (wanted, name) = (self.wanted(engine), self.assignment.spec.served_model_name.clone());
        let note = |adapters| {
            let wanted = Wanted { adapters, ..wanted.clone() };
            cx.registry.change(|r| r.want(&id, wanted));
        };
        let (target, period) = (engine.target.clone(), ms(config.adapters_ms));
        let adapters = watching::follow_adapters(&cx.probe, &target, &name, period, adapters, note);
        let attempts = &mut self.attempts;
        let stable = async {
            sleep(Duration::from_secs(config.stable_s)).await;
            attempts.forget();
            cx.board.update(&id, |view| view.failures = 0);
            std::future::pending().await
        };
        tokio::select! {
            order = ordered(&mut orders) => Served::Ordered(order),
            exit = engine.tree.exited() => Served::Failed(self.explain(exit)),
            reason = silent => Served::Hung(reason, Kind::Other),
            reason = wedged => Served::Hung(reason, Kind::Other),
            order = follow_registration(&cx, &id) => Served::Ordered(order),
            order = stable => Served::Ordered(order),
            never = adapters => match never {},
        }
    }

    fn wanted(&self, engine: &Engine) -> Wanted {
        Wanted {
            model: self.assignment.model.clone(),
            generation: self.assignment.generation,
            address: engine.address.clone(),
            pid: u32::try_from(engine.tree.pid()).unwrap_or_default(),
            adapters: Vec::new(),
            drain_ms: u32::try_from(drain_times(&self.cx).longest().as_millis()).unwrap_or(u32::MAX),
        }
    }

    fn register(&self, engine: &Engine, adapters: Vec<String>) {
        let wanted = Wanted { adapters, ..self.wanted(engine) };
        self.cx.registry.change(|r| r.want(self.id(), wanted));
    }
}

/// Returns, with the reason, when an engine that should answer has not for too long.
async fn until_silent(cx: &Context, target: &Target, moved_since: impl Fn(Instant) -> bool) -> String {
    let (period, deadline) = (cx.config.liveness_ms, cx.config.liveness_timeout_ms);
    let (period, deadline) = (Duration::from_millis(period), Duration::from_millis(deadline));
    let failures = cx.config.liveness_failures;
    let reason = watching::until_silent(&cx.probe, target, period, deadline, failures, moved_since).await;
    cx.metrics.liveness_failures.inc();
    reason
}

/// Of an engine that has proved itself, now or under an earlier agent.
fn pulse(cx: &Context) -> Pulse {
    let seconds = Duration::from_secs;
    Pulse::new(Limits { canary: seconds(cx.config.canary_s), wedge: seconds(cx.config.wedge_s) })
}

/// Follows what the engine says of its load; returns, with the reason, when it gets nowhere.
async fn until_wedged(cx: &Context, assignment: &Assignment, target: &Target, pulse: &Pulse) -> String {
    let Assignment { replica_id, spec, .. } = assignment;
    let ms = Duration::from_millis;
    let (period, deadline) = (ms(cx.config.load_ms), ms(cx.config.load_timeout_ms));
    // Of other servers than vLLM nobody expects vLLM's figures.
    let is_vllm = cx.config.programs.get(&spec.engine).is_some_and(|program| !program.is_exec());
    let notes = load_notes(cx, replica_id, pulse, is_vllm);
    let load = watching::follow_load(&cx.probe, target, period, deadline, notes);
    let subject = Subject { replica_id, target, model: &spec.served_model_name };
    let wedged = async {
        match cx.config.wedge_s {
            0 => std::future::pending().await,
            _ => pulse.until_wedged(cx, subject).await,
        }
    };
    tokio::select! {
        reason = wedged => reason,
        never = load => match never {},
    }
}

/// Puts readings on the board and into the engine's pulse; what is wrong with them is logged when it changes.
fn load_notes<'a>(
    cx: &'a Context,
    id: &'a str,
    pulse: &'a Pulse,
    is_vllm: bool,
) -> impl FnMut(Result<Scrape, String>, Instant) + 'a {
    let (mut failed, mut missing) = (false, Vec::new());
    move |reading, began| match reading {
        Ok(scrape) => {
            failed = false;
            cx.metrics.scrapes_ok.inc();
            if let Some(load) = pulse.read(&scrape, began) {
                cx.board.note_load(id, load, Instant::now());
            }
            if is_vllm && missing != scrape.missing {
                tracing::warn!(replica = id, missing = ?scrape.missing, "figures that an engine's /metrics lacks");
                missing.clone_from(&scrape.missing);
                cx.board.update(id, |view| view.missing = scrape.missing);
            }
        }
        Err(reason) => {
            cx.metrics.scrapes_failed.inc();
            if !std::mem::replace(&mut failed, true) {
                tracing::warn!(replica = id, reason, "an engine's load cannot be read");
            }
        }
    }
}

/// Keeps the board's word on the registration, until the agent itself goes.
async fn follow_registration(cx: &Context, replica_id: &str) -> Order {
    let mut changes = cx.registry.changes();
    loop {
        let (registration, reason) = match cx.registry.standing(replica_id) {
            Standing::None => ("", String::new()),
            Standing::Waiting => ("waiting", String::new()),
            Standing::Accepted => ("accepted", String::new()),
            Standing::Refused(reason) => ("refused", format!("registration refused: {reason}")),
        };
        cx.board.update(replica_id, |view| (view.registration, view.reason) = (registration.into(), reason));
        if changes.changed().await.is_err() {
            return Order::Keep;
        }
    }
}
