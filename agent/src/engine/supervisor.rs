//! One engine's supervisor: a task that owns the engine from its first start to the last of its processes.
//!
//! The story is [`Supervisor::run`] (life after life, with pauses) and [`Supervisor::one_life`] (take over or launch,
//! serve, end). A supervisor belongs to one assignment and never changes it: another generation is another supervisor,
//! started when this one has returned. It returns when nothing of its engine is left, or when it was told to leave the
//! engine running for the next agent.

mod warm;

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    Life, State,
    context::Context,
    launch::{self, Engine, Failure},
    load::Load,
    logs,
    probe::Target,
    process::Exit,
    readiness::{self, Question},
    stop,
    watch as watching,
};
use crate::{
    assignment::Assignment,
    backoff::Backoff,
    board::EngineView,
    registrations::{Standing, Wanted},
    warm::Way,
};

/// Lines of the log that explain an exit.
const REASON_LINES: usize = 5;

/// What a supervisor is told. Later orders replace earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// Keep an engine running.
    Run,
    /// Keep it asleep.
    Sleep,
    /// Drain and end it, for this reason, and return.
    Stop(String),
    /// Leave it as it is for the next agent, and return.
    Keep,
}

/// How one life ended.
enum Ended {
    Stopped,
    Kept,
    Failed(Failure),
}

/// Why an engine should no longer run.
enum Served {
    Ordered(Order),
    Failed(Failure),
}

/// The task of one assignment.
pub(crate) struct Supervisor {
    cx: Arc<Context>,
    assignment: Assignment,
    orders: watch::Receiver<Order>,
    life: Life,
    restarts: u32,
    /// There was a process already: the next one is a restart.
    started: bool,
    /// In a row; forgotten once an engine has been ready for long enough.
    failures: u32,
    warm: warm::Memory,
}

impl Supervisor {
    /// A supervisor that has done nothing yet, and is on the board.
    pub(crate) fn new(cx: Arc<Context>, assignment: Assignment, orders: watch::Receiver<Order>) -> Self {
        cx.board.put(EngineView::new(assignment.clone(), ""));
        let (life, warm) = (Life::begin(), warm::Memory::default());
        Self { cx, assignment, orders, life, restarts: 0, started: false, failures: 0, warm }
    }

    /// Keeps the engine running until told otherwise. Returns its replica id.
    pub(crate) async fn run(mut self) -> String {
        let backoff = Backoff::new(self.cx.config.backoff_min_ms, self.cx.config.backoff_max_ms);
        let mut rng = fastrand::Rng::new();
        loop {
            match self.one_life().await {
                Ended::Kept => break,
                Ended::Stopped => {
                    self.finish();
                    break;
                }
                Ended::Failed(failure) => {
                    self.failures = self.failures.saturating_add(1);
                    let pause = (!failure.permanent).then(|| backoff.pause(self.failures, &mut rng));
                    let pause = self.pause(pause);
                    tracing::error!(replica = self.id(), reason = failure.reason, ?pause, "engine failed");
                    match self.rest(pause).await {
                        None => {}
                        Some(Order::Keep) => break,
                        Some(_) => {
                            self.finish();
                            break;
                        }
                    }
                    self.move_to(State::Starting, &format!("starting again: {}", failure.reason));
                }
            }
        }
        self.id().to_owned()
    }

    /// From nothing, or from what an earlier agent left, to nothing.
    async fn one_life(&mut self) -> Ended {
        if let Some(ended) = self.ordered_before_start() {
            return ended;
        }
        let mut way = Way::Adopted;
        let engine = match launch::take_over(&self.cx, &self.assignment).await {
            Some(engine) => Ok(engine),
            None => {
                let beginning = match self.prepare().await {
                    Ok(beginning) => beginning,
                    Err(ended) => return ended,
                };
                way = beginning.way;
                let restarts = self.restarts.saturating_add(u32::from(self.started));
                launch::launch(&self.cx, &self.assignment, restarts, beginning).await
            }
        };
        let mut engine = match engine {
            Ok(engine) => engine,
            Err(failure) => {
                self.note_failed(way, &failure.reason);
                self.move_to(State::Failed, &failure.reason);
                return Ended::Failed(failure);
            }
        };
        self.show(&engine);
        self.move_to(State::Loading, "");
        let mut served = match engine.asleep {
            true => Served::Ordered(Order::Sleep),
            false => self.serve(&mut engine).await,
        };
        while let Served::Ordered(Order::Sleep) = served {
            served = match self.sleep(&mut engine).await {
                Some(served) => served,
                None => self.serve(&mut engine).await,
            };
        }
        match served {
            Served::Ordered(Order::Stop(reason)) => {
                self.stop(engine, &reason).await;
                Ended::Stopped
            }
            Served::Ordered(Order::Keep | Order::Run | Order::Sleep) => Ended::Kept,
            Served::Failed(failure) => {
                self.fail(engine, &failure).await;
                Ended::Failed(failure)
            }
        }
    }

    fn ordered_before_start(&mut self) -> Option<Ended> {
        let order = self.orders.borrow().clone();
        match &order {
            Order::Run => None,
            // An engine that an earlier agent left is taken over first, then stopped in good order, or left asleep.
            Order::Stop(_) | Order::Sleep if launch::living(&self.cx, self.id()).is_some() => None,
            order => Some(self.ordered_unstarted(order)),
        }
    }

    fn show(&mut self, engine: &Engine) {
        (self.restarts, self.started) = (engine.restarts, true);
        self.cx.board.update(self.id(), |view| {
            view.pid = engine.tree.pid();
            view.port = engine.lease.port();
            view.address.clone_from(&engine.address);
            view.restarts = engine.restarts;
            view.command.clone_from(&engine.command);
        });
    }

    /// Until the engine should no longer run.
    async fn serve(&mut self, engine: &mut Engine) -> Served {
        let log = self.cx.state.log(self.id());
        if let Some(served) = self.load(engine, &log).await {
            return served;
        }
        self.note_started(engine);
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
        self.watch(engine, &log, adapters).await
    }

    /// Until it is ready (`None`), or should no longer run.
    async fn load(&self, engine: &mut Engine, log: &Path) -> Option<Served> {
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
                true => until_silent(&self.cx, &engine.target).await,
                false => std::future::pending().await,
            }
        };
        Some(tokio::select! {
            order = warm::ordered_to_end(&mut orders) => Served::Ordered(order),
            exit = engine.tree.exited() => Served::Failed(self.explain(exit, engine.log_from)),
            reason = silent => Served::Failed(Failure::passing(reason)),
            never = watching::keep_log_small(log, config.log_bytes) => match never {},
            ready = timeout(engine.ready_within, ready) => match ready {
                Ok(Ok(())) => return None,
                Ok(Err(lost)) => Served::Failed(Failure::passing(lost.to_string())),
                Err(_) => Served::Failed(Failure::passing(format!(
                    "not ready within {} s ({}); last: {}",
                    engine.ready_within.as_secs(), engine.way.limit(), self.reason()
                ))),
            },
        })
    }

    /// Until a ready engine should no longer run.
    async fn watch(&mut self, engine: &mut Engine, log: &Path, adapters: Vec<String>) -> Served {
        let cx = self.cx.clone();
        let config = &cx.config;
        let ms = Duration::from_millis;
        let mut orders = self.orders.clone();
        let id = self.id().to_owned();
        let silent = until_silent(&cx, &engine.target);
        let (period, deadline) = (ms(config.load_ms), ms(config.load_timeout_ms));
        let load = watching::follow_load(&cx.probe, &engine.target, period, deadline, load_notes(&cx, &id));
        let (wanted, name) = (self.wanted(engine), self.assignment.spec.served_model_name.clone());
        let note = |adapters| {
            let wanted = Wanted { adapters, ..wanted.clone() };
            cx.registry.change(|r| r.want(&id, wanted));
        };
        let (target, period) = (engine.target.clone(), ms(config.adapters_ms));
        let adapters = watching::follow_adapters(&cx.probe, &target, &name, period, adapters, note);
        let failures = &mut self.failures;
        let stable = async {
            sleep(Duration::from_secs(config.stable_s)).await;
            *failures = 0;
            std::future::pending().await
        };
        tokio::select! {
            order = ordered(&mut orders) => Served::Ordered(order),
            exit = engine.tree.exited() => Served::Failed(self.explain(exit, engine.log_from)),
            reason = silent => Served::Failed(Failure::passing(reason)),
            order = follow_registration(&cx, &id) => Served::Ordered(order),
            order = stable => Served::Ordered(order),
            never = load => match never {},
            never = adapters => match never {},
            never = watching::keep_log_small(log, config.log_bytes) => match never {},
        }
    }

    fn wanted(&self, engine: &Engine) -> Wanted {
        Wanted {
            model: self.assignment.model.clone(),
            generation: self.assignment.generation,
            address: engine.address.clone(),
            pid: u32::try_from(engine.tree.pid()).unwrap_or_default(),
            adapters: Vec::new(),
        }
    }

    fn register(&self, engine: &Engine, adapters: Vec<String>) {
        let wanted = Wanted { adapters, ..self.wanted(engine) };
        self.cx.registry.change(|r| r.want(self.id(), wanted));
    }

    /// Deregisters, drains, ends.
    async fn stop(&mut self, mut engine: Engine, reason: &str) {
        let cx = self.cx.clone();
        let begun = Instant::now();
        let was_ready = self.life.state() == State::Ready;
        self.move_to(State::Draining, reason);
        tracing::info!(replica = self.id(), reason, "stopping engine");
        cx.deregister(&self.assignment);
        cx.registry.left(self.id(), cx.deregister).await;
        if was_ready {
            let outcome = tokio::select! {
                outcome = stop::drain(&cx.probe, &engine.target, warm::drain_times(&cx)) => outcome,
                _ = engine.tree.exited() => "ended by itself",
                () = cx.hurry.cancelled() => "cut short by a second signal",
            };
            tracing::info!(replica = self.id(), outcome, "engine drained");
        }
        cx.put_down(self.id(), &mut engine.tree, cx.term()).await;
        cx.metrics.stopped(begun.elapsed());
        tracing::info!(replica = self.id(), "engine stopped; nothing of it is left");
    }

    /// Makes the failure visible, takes the engine out of routing at once, and ends what is left of it.
    async fn fail(&mut self, mut engine: Engine, failure: &Failure) {
        self.note_failed(engine.way, &failure.reason);
        self.move_to(State::Failed, &failure.reason);
        self.cx.deregister(&self.assignment);
        self.cx.put_down(self.id(), &mut engine.tree, self.cx.orphan_term()).await;
        self.cx.board.update(self.id(), |view| {
            (view.pid, view.port, view.load) = (0, 0, None);
            view.address.clear();
            view.reason.clone_from(&failure.reason);
        });
    }

    /// Waits for `pause`, for ever without one, or for an order, which is returned.
    async fn rest(&self, pause: Option<Duration>) -> Option<Order> {
        let mut orders = self.orders.clone();
        let order = ordered(&mut orders);
        let order = match pause {
            Some(pause) => timeout(pause, order).await.ok(),
            None => Some(order.await),
        };
        match order {
            // What failed is started anew when it is wanted, and not in order to sleep.
            Some(Order::Sleep) => Some(warm::ordered_awake(&mut orders).await).filter(|o| *o != Order::Run),
            order => order,
        }
    }

    fn finish(&mut self) {
        self.move_to(State::Stopped, "");
        self.cx.forget(self.id());
        self.cx.board.remove(self.id());
    }

    fn move_to(&mut self, state: State, reason: &str) {
        if let Err(illegal) = self.life.move_to(state) {
            tracing::error!(replica = self.id(), %illegal, "defect in the supervisor");
            debug_assert!(false, "{illegal}");
            return;
        }
        self.cx.board.update(self.id(), |view| {
            view.state = state;
            view.reason = reason.into();
            view.registration.clear();
        });
    }

    /// The exit, and what the engine last wrote.
    fn explain(&self, exit: Exit, log_from: u64) -> Failure {
        self.cx.metrics.exited(exit.label());
        let lines = logs::tail(&self.cx.state.log(self.id()), log_from, REASON_LINES);
        let hint = match readiness::says_port_taken(&lines) {
            true => " (its port was taken; the next start takes another)",
            false => "",
        };
        let quoted = if lines.is_empty() {
            "it wrote nothing".into()
        } else {
            format!("last lines: {}", lines.join(" | "))
        };
        Failure::passing(format!("the engine {exit}{hint}; {quoted}"))
    }

    fn reason(&self) -> String {
        let own = |view: &EngineView| view.assignment.replica_id == self.assignment.replica_id;
        self.cx.board.all().into_iter().find(own).map(|view| view.reason).unwrap_or_default()
    }

    fn id(&self) -> &str {
        &self.assignment.replica_id
    }
}

/// The first order that is not "run". A reconciler that has gone leaves engines to the next agent.
async fn ordered(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.wait_for(|order| *order != Order::Run).await {
        Ok(order) => order.clone(),
        Err(_) => Order::Keep,
    }
}

/// Returns, with the reason, when an engine that should answer has not for too long.
async fn until_silent(cx: &Context, target: &Target) -> String {
    let (period, deadline) = (cx.config.liveness_ms, cx.config.liveness_timeout_ms);
    let (period, deadline) = (Duration::from_millis(period), Duration::from_millis(deadline));
    let reason =
        watching::until_silent(&cx.probe, target, period, deadline, cx.config.liveness_failures).await;
    cx.metrics.liveness_failures.inc();
    reason
}

/// Puts load readings on the board; a figure that is missing is logged once.
fn load_notes<'a>(cx: &'a Context, id: &'a str) -> impl FnMut(Result<Load, String>) + 'a {
    let mut told = false;
    move |reading| match reading {
        Ok(load) => {
            cx.metrics.scrapes_ok.inc();
            cx.board.note_load(id, load, std::time::Instant::now());
        }
        Err(reason) => {
            cx.metrics.scrapes_failed.inc();
            if !std::mem::replace(&mut told, true) {
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
