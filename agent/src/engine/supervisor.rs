//! One engine's supervisor: a task that owns the engine from its first start to the last of its processes.
//!
//! The story is [`Supervisor::run`] (life after life, with pauses) and [`Supervisor::one_life`] (take over or launch,
//! serve, end); `serving` has a life's middle and `ending` its end. A supervisor belongs to one assignment and never changes
//! it: another generation is another supervisor, started when this one has returned. It returns when nothing of its engine
//! is left, or when it was told to leave the engine running for the next agent. After failures it waits, longer each time;
//! `attempts` says when it gives the engine up here, which it tells and goes on trying, slowly.

mod warm;

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{
    Life, State,
    attempts::{Attempts, Kind, Rules},
    context::Context,
    launch::{self, Engine, Failure},
    process::Exit,
    verdict,
};
use crate::{assignment::Assignment, backoff::Backoff, board::EngineView, warm::Way};
use warm::ordered_awake;
pub(super) use warm::{drain_times, ordered_to_end};

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
pub(super) enum Ended {
    Stopped,
    Kept,
    Failed(Failure, Kind),
}

/// Why an engine should no longer run.
pub(super) enum Served {
    Ordered(Order),
    Failed(Failure),
    /// It runs and does nothing of use: why.
    Hung(String, Kind),
}

/// The task of one assignment.
pub(crate) struct Supervisor {
    pub(super) cx: Arc<Context>,
    pub(super) assignment: Assignment,
    pub(super) orders: watch::Receiver<Order>,
    pub(super) life: Life,
    pub(super) restarts: u32,
    /// There was a process already: the next one is a restart.
    pub(super) started: bool,
    /// Failures in a row; forgotten once an engine has been ready for long enough.
    pub(super) attempts: Attempts,
    warm: warm::Memory,
}

impl Supervisor {
    /// A supervisor that has done nothing yet, and is on the board.
    pub(crate) fn new(cx: Arc<Context>, assignment: Assignment, orders: watch::Receiver<Order>) -> Self {
        cx.board.put(EngineView::new(assignment.clone(), ""));
        Self {
            cx,
            assignment,
            orders,
            life: Life::begin(),
            restarts: 0,
            started: false,
            attempts: Attempts::default(),
            warm: warm::Memory::default(),
        }
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
                Ended::Failed(failure, kind) => {
                    let pause = self.note_failure(&failure, kind, &backoff, &mut rng);
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
                return Ended::Failed(failure, Kind::Other);
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
                Ended::Failed(failure, Kind::Other)
            }
            Served::Hung(reason, kind) => Ended::Failed(self.end_hung(engine, &reason).await, kind),
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
            view.origin.clone_from(&engine.origin);
        });
    }

    /// Counts a failure and says how long to wait after it; `None`: no further try can help.
    fn note_failure(
        &mut self,
        failure: &Failure,
        kind: Kind,
        backoff: &Backoff,
        rng: &mut fastrand::Rng,
    ) -> Option<Duration> {
        let config = &self.cx.config;
        let rules = Rules { failures: config.give_up_failures, stuck_starts: config.give_up_stuck_starts };
        let same_again = failure.permanent || failure.hopeless;
        self.attempts.failed(if same_again { Kind::Permanent } else { kind }, rules);
        let failures = self.attempts.failures();
        let slow = Backoff::new(config.give_up_retry_s.saturating_mul(1_000), 0);
        let pause = match (failure.permanent, self.attempts.is_given_up()) {
            (true, _) => None,
            (_, true) => Some(slow.pause(1, rng)),
            _ => Some(backoff.pause(failures, rng)),
        };
        let gave_up = self.attempts.is_given_up().then(|| match pause {
            None => format!("no further start can help: {}", failure.reason),
            Some(_) => format!(
                "given up here after {failures} failures in a row, tried again every {} s; the last: {}",
                config.give_up_retry_s, failure.reason
            ),
        });
        if let Some(gave_up) = gave_up.as_ref().filter(|_| pause.is_some()) {
            self.cx.board.update(self.id(), |view| view.reason.clone_from(gave_up));
        }
        self.show_attempts(gave_up.as_deref());
        pause
    }

    /// What the control plane is told of failures; `gave_up`: why, if it is so.
    pub(super) fn show_attempts(&self, gave_up: Option<&str>) {
        let failures = self.attempts.failures();
        self.cx.board.update(self.id(), |view| {
            (view.failures, view.gave_up) = (failures, gave_up.map(str::to_owned));
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
            Some(Order::Sleep) => Some(ordered_awake(&mut orders).await).filter(|order| *order != Order::Run),
            order => order,
        }
    }

    fn finish(&mut self) {
        self.move_to(State::Stopped, "");
        self.cx.forget(self.id());
        self.cx.board.remove(self.id());
    }

    pub(super) fn move_to(&mut self, state: State, reason: &str) {
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

    /// The exit, why, and what the engine last wrote.
    pub(super) fn explain(&self, exit: Exit) -> Failure {
        verdict::failure(&self.cx, self.id(), exit)
    }

    pub(super) fn reason(&self) -> String {
        let own = |view: &EngineView| view.assignment.replica_id == self.assignment.replica_id;
        self.cx.board.all().into_iter().find(own).map(|view| view.reason).unwrap_or_default()
    }

    pub(super) fn id(&self) -> &str {
        &self.assignment.replica_id
    }
}

/// The first order that is not "run". A reconciler that has gone leaves engines to the next agent.
pub(super) async fn ordered(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.wait_for(|order| *order != Order::Run).await {
        Ok(order) => order.clone(),
        Err(_) => Order::Keep,
    }
}
