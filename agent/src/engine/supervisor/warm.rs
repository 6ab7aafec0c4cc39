//! A supervisor's part in warm starts: before a process is started, and while an engine sleeps.
//!
//! A sleeping engine is asked nothing: no health, no progress, no load. Only its end is noticed, and an order. What cannot
//! sleep is ended, what cannot be woken is started anew.

use std::{pin::pin, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Ended, Order, Served, Supervisor, ordered};
use crate::{
    engine::{
        State,
        attempts::Kind,
        context::Context,
        launch::{Beginning, Engine, Failure},
        stop::{self, DrainTimes},
    },
    warm::{Started, Way, disk, prefetch, restore, sleep},
};

/// What is remembered from one life to the next.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The hook failed: this assignment is not restored again, for this reason.
    no_restore: Option<String>,
    /// It could not be woken, for this reason, and is started cold for it.
    not_woken: Option<String>,
    /// The next life begins without a pause.
    at_once: bool,
}

/// How falling asleep went.
enum Fell {
    Asleep,
    /// It is wanted again.
    Awake,
    Ended(Served),
}

impl Order {
    /// What an assignment asks for.
    pub(crate) fn of(asleep: bool) -> Self {
        if asleep { Self::Sleep } else { Self::Run }
    }
}

/// The first order to end, in either way.
pub(in crate::engine) async fn ordered_to_end(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.wait_for(|order| matches!(order, Order::Stop(_) | Order::Keep)).await {
        Ok(order) => order.clone(),
        Err(_) => Order::Keep,
    }
}

/// The first order that is not to sleep.
pub(in crate::engine) async fn ordered_awake(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.wait_for(|order| *order != Order::Sleep).await {
        Ok(order) => order.clone(),
        Err(_) => Order::Keep,
    }
}

/// How long an idle engine is given to become quiet.
pub(in crate::engine) fn drain_times(cx: &Context) -> DrainTimes {
    let ms = Duration::from_millis;
    DrainTimes {
        settle: ms(cx.config.settle_ms),
        longest: ms(cx.config.drain_ms),
        poll: ms(cx.config.load_ms),
        reading: ms(cx.config.load_timeout_ms),
    }
}

impl Supervisor {
    /// Everything that comes before a process: what it is started by, its model on this node, room on the disk.
    pub(in crate::engine) async fn prepare(&mut self) -> Result<Beginning, Ended> {
        let (cx, since) = (self.cx.clone(), Instant::now());
        let note = self.warm.not_woken.take().unwrap_or_default();
        let mut beginning = Beginning { since, way: Way::Cold, note, hook: None };
        let hook = match self.warm.no_restore.clone() {
            // Told and counted when it failed.
            Some(why) => Err(why),
            None => restore::hook(&cx, &self.assignment).await.inspect_err(|why| {
                tracing::warn!(replica = self.id(), why, "not restored: started cold");
                cx.metrics.warm_failed(Way::Restored);
            }),
        };
        match hook {
            Ok(hook) => beginning.hook = hook,
            Err(why) => beginning.note = format!("not restored: {why}"),
        }
        if beginning.hook.is_some() {
            beginning.way = Way::Restored;
            return Ok(beginning);
        }
        match self.fetch().await {
            Err(order) => return Err(self.ordered_unstarted(&order)),
            Ok(Ok(true)) => beginning.way = Way::Prefetched,
            Ok(Ok(false)) => {}
            Ok(Err(reason)) => {
                self.move_to(State::Failed, &reason);
                return Err(Ended::Failed(Failure::passing(reason), Kind::Other));
            }
        }
        Ok(beginning)
    }

    /// Its model on this node, and room on the disk: whether the agent fetched it, or why there is none; or an order that
    /// came before that.
    async fn fetch(&self) -> Result<Result<bool, String>, Order> {
        let (cx, id, spec) = (self.cx.clone(), self.id(), &self.assignment.spec);
        let mut orders = self.orders.clone();
        let told = |_: &'static str, text: &str| cx.board.update(id, |view| view.reason = text.to_owned());
        let cancel = CancellationToken::new();
        let mut fetching = pin!(async {
            let fetched = prefetch::before_start(&cx, spec, &cancel, &told).await?;
            disk::before_start(&cx.warm, spec).await.map(|()| fetched)
        });
        let order = tokio::select! {
            order = ordered(&mut orders) => order,
            fetched = &mut fetching => return Ok(fetched),
        };
        cancel.cancel();
        // It ends its command first.
        fetching.await.ok();
        Err(order)
    }

    /// What comes of an order while there is no process.
    pub(in crate::engine) fn ordered_unstarted(&mut self, order: &Order) -> Ended {
        match order {
            Order::Keep | Order::Run => Ended::Kept,
            Order::Stop(_) => {
                self.cx.deregister(&self.assignment);
                Ended::Stopped
            }
            Order::Sleep => {
                let reason = "it should sleep and does not run: it is started anew when it is wanted";
                self.move_to(State::Failed, reason);
                Ended::Failed(Failure::passing(reason), Kind::Other)
            }
        }
    }

    /// Tells whoever looks how it became ready.
    pub(in crate::engine) fn note_started(&self, engine: &Engine) {
        let (way, took) = (engine.way, engine.since.elapsed());
        self.cx.metrics.became_ready(way, took);
        let started = Started { way: Some(way), took, note: engine.note.clone() };
        self.cx.board.update(self.id(), |view| view.started = started);
    }

    /// Takes in that an engine, or its start, failed in this way.
    pub(in crate::engine) fn note_failed(&mut self, way: Way, reason: &str) {
        if matches!(self.life.state(), State::Starting | State::Loading) && way == Way::Restored {
            self.cx.metrics.warm_failed(way);
            self.warm.no_restore = Some(format!("the hook failed: {reason}"));
            self.warm.at_once = true;
        }
    }

    /// The pause before the next life: none where a colder way is tried after a warmer one.
    pub(in crate::engine) fn pause(&mut self, pause: Option<Duration>) -> Option<Duration> {
        if std::mem::take(&mut self.warm.at_once) { Some(Duration::ZERO) } else { pause }
    }

    /// Puts the engine to sleep, and waits there for another order. None: it is to serve again.
    pub(in crate::engine) async fn sleep(&mut self, engine: &mut Engine) -> Option<Served> {
        match self.fall_asleep(engine).await {
            Fell::Asleep => {}
            Fell::Awake => return None,
            Fell::Ended(served) => return Some(served),
        }
        self.move_to(State::Asleep, "");
        self.cx.board.update(self.id(), |view| view.load = None);
        tracing::info!(replica = self.id(), level = self.level(), "engine asleep");
        let mut orders = self.orders.clone();
        let order = tokio::select! {
            order = ordered_awake(&mut orders) => order,
            exit = engine.tree.exited() => return Some(Served::Failed(self.explain(exit))),
        };
        match order {
            Order::Run => self.wake(engine).await,
            order => Some(Served::Ordered(order)),
        }
    }

    async fn fall_asleep(&mut self, engine: &mut Engine) -> Fell {
        let cx = self.cx.clone();
        if engine.asleep {
            // As an earlier agent left it: asleep, or not quite yet.
            return match sleep::is_sleeping(&cx.probe, &engine.target).await {
                Ok(true) => Fell::Asleep,
                Ok(false) => {
                    engine.asleep = false;
                    Fell::Awake
                }
                Err(reason) => Fell::Ended(self.cannot("be taken over asleep", &reason)),
            };
        }
        tracing::info!(replica = self.id(), "putting the engine to sleep");
        cx.board.update(self.id(), |view| view.reason = "is put to sleep".into());
        cx.deregister(&self.assignment);
        cx.registry.left(self.id(), cx.deregister).await;
        let mut orders = self.orders.clone();
        let drained = tokio::select! {
            drained = stop::drain(&cx.probe, &engine.target, drain_times(&cx)) => drained,
            exit = engine.tree.exited() => return Fell::Ended(Served::Failed(self.explain(exit))),
            order = ordered_awake(&mut orders) => return match order {
                Order::Run => Fell::Awake,
                order => Fell::Ended(Served::Ordered(order)),
            },
        };
        if drained != stop::DRAINED {
            let reason = "its requests did not end within engines.drain_ms";
            return Fell::Ended(self.cannot("be put to sleep", reason));
        }
        sleep::note(&cx, self.id(), true);
        engine.asleep = true;
        let deadline = Duration::from_millis(cx.warm.sleep_ms);
        let level = self.level();
        let fell = tokio::select! {
            fell = sleep::fall_asleep(&cx.probe, &engine.target, level, deadline) => fell,
            exit = engine.tree.exited() => return Fell::Ended(Served::Failed(self.explain(exit))),
        };
        match fell {
            Ok(()) => Fell::Asleep,
            Err(reason) => Fell::Ended(self.cannot("be put to sleep", &reason)),
        }
    }

    async fn wake(&mut self, engine: &mut Engine) -> Option<Served> {
        self.move_to(State::Loading, "wakes");
        tracing::info!(replica = self.id(), "waking the engine");
        let cx = self.cx.clone();
        let (mut orders, level) = (self.orders.clone(), self.level());
        let longest = Duration::from_millis(cx.warm.wake_ms);
        (engine.since, engine.way, engine.was_ready) = (Instant::now(), Way::Woken, false);
        engine.note.clear();
        let woken = tokio::select! {
            woken = sleep::wake(&cx.probe, &engine.target, level, longest) => woken,
            exit = engine.tree.exited() => return Some(Served::Failed(self.explain(exit))),
            order = ordered_to_end(&mut orders) => return Some(Served::Ordered(order)),
        };
        match woken {
            Ok(()) => {
                engine.asleep = false;
                engine.ready_within = longest.saturating_sub(engine.since.elapsed());
                sleep::note(&cx, self.id(), false);
                None
            }
            Err(reason) => {
                // Somebody waits for it.
                self.warm.at_once = true;
                self.warm.not_woken = Some(format!("not woken: {reason}"));
                Some(self.cannot("be woken", &reason))
            }
        }
    }

    fn cannot(&self, what: &str, reason: &str) -> Served {
        self.cx.metrics.warm_failed(Way::Woken);
        Served::Failed(Failure::passing(format!("it could not {what} ({reason}): it is ended")))
    }

    fn level(&self) -> u32 {
        self.assignment.spec.warm.sleep_level
    }
}
