//! Streams that go on at another engine while theirs still serves them: whose turn it is, and when.
//!
//! The tables say what becomes of an endpoint's streams ([`Order`]): they end there (no order), they are moved from some moment
//! on, one after another, or all that are left leave at some moment, because their engine is stopped then or because nobody
//! answers for it any more. The order hangs on the endpoint's live figures, so it survives a swap, and stands when the endpoint
//! has left the tables: its streams are still there.
//!
//! Streams stand in a line, in the order in which they began. While streams are to be moved, the first in line gets a turn
//! every so often; those that end before it free their place, and those that join later have theirs behind the others. What
//! was told to leave is out of the line, and nothing calls it back: only those that still stand there are kept by an undrain.
//! A stream that was told and stays all the same, because no other engine takes it, may join again, at the end.
//!
//! Cost: a stream joins once, by a lock that it shares with the others of its endpoint, and quits once. In between a poll is
//! one atomic load. One task ([`run`]) calls those whose turn it is; it sleeps while no endpoint has an order.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use penstock_proto::v1;
use serde::Serialize;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::endpoint::Live;
use crate::gateway::Gateway;

/// Between two looks at the lines of endpoints that streams leave.
const LOOK: Duration = Duration::from_millis(50);
/// Turns that were due and not given are made up for up to this long: a late look does not make the pace slower.
const LATE: Duration = Duration::from_millis(100);
/// Streams leave this long before their engine is stopped, or a quarter of its time to drain, if that is shorter.
const BEFORE_STOP: Duration = Duration::from_secs(2);

/// Why a stream should go on elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// A planned move: its turn has come.
    Moved,
    /// Nobody answers for its engine any more, or that is about to be stopped.
    Fenced,
}

impl Leave {
    /// Every reason.
    pub const ALL: [Self; 2] = [Self::Moved, Self::Fenced];

    /// As in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Fenced => "fenced",
        }
    }
}

/// What becomes of an endpoint's streams. Times count from when this proxy learnt of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Order {
    /// They are moved, one after another, from then on.
    pub move_after: Option<Duration>,
    /// Those that are left leave at once.
    pub leave_after: Option<Duration>,
}

impl Order {
    /// Of an endpoint that is in the tables.
    pub(super) fn of(departure: Option<&v1::Departure>) -> Self {
        let Some(departure) = departure else { return Self::default() };
        let move_after = departure.move_after_ms.map(|ms| Duration::from_millis(ms.into()));
        Self { move_after, leave_after: departure.fenced.then_some(Duration::ZERO) }
    }

    /// Of one that has left them and is stopped `drain` later, if that is known.
    pub(super) fn of_departing(departure: Option<&v1::Departure>, drain: Option<Duration>) -> Self {
        let order = Self::of(departure);
        let stopped = drain.map(|drain| drain.saturating_sub(BEFORE_STOP.min(drain / 4)));
        Self { leave_after: order.leave_after.or(stopped), ..order }
    }
}

/// Something that was ordered, and when it takes effect.
#[derive(Debug, Clone, Copy)]
struct Due {
    after: Duration,
    at: Instant,
}

impl Due {
    /// What was said before keeps its time when it is said again.
    fn next(before: Option<Self>, after: Option<Duration>, now: Instant) -> Option<Self> {
        let same = before.filter(|due| Some(due.after) == after);
        same.or_else(|| Some(Self { after: after?, at: now.checked_add(after?)? }))
    }
}

/// Who goes when: pure.
#[derive(Debug)]
struct Line<T> {
    /// In the order in which they joined.
    waiting: BTreeMap<u64, T>,
    joined: u64,
    moves: Option<Due>,
    leaves: Option<Due>,
    /// When the next one may be moved.
    next_turn: Option<Instant>,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), joined: 0, moves: None, leaves: None, next_turn: None }
    }
}

impl<T> Line<T> {
    fn join(&mut self, who: T) -> u64 {
        self.joined += 1;
        self.waiting.insert(self.joined, who);
        self.joined
    }

    fn quit(&mut self, number: u64) {
        self.waiting.remove(&number);
    }

    fn obey(&mut self, order: Order, now: Instant) {
        self.moves = Due::next(self.moves, order.move_after, now);
        self.leaves = Due::next(self.leaves, order.leave_after, now);
    }

    fn has_order(&self) -> bool {
        self.moves.is_some() || self.leaves.is_some()
    }

    /// Those who are to go now, `pause` lying between two that are moved.
    fn call(&mut self, now: Instant, pause: Duration) -> Vec<(T, Leave)> {
        if self.leaves.is_some_and(|due| due.at <= now) {
            return std::mem::take(&mut self.waiting).into_values().map(|who| (who, Leave::Fenced)).collect();
        }
        let Some(begin) = self.moves.map(|due| due.at).filter(|at| *at <= now) else { return Vec::new() };
        let earliest = now.checked_sub(LATE).unwrap_or(now).max(begin);
        let mut turn = self.next_turn.map_or(earliest, |turn| turn.max(earliest));
        let mut called = Vec::new();
        while turn <= now
            && let Some((_, who)) = self.waiting.pop_first()
        {
            called.push((who, Leave::Moved));
            turn += pause;
        }
        self.next_turn = Some(turn);
        called
    }
}

/// What an operator sees of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Streams are moved in so many milliseconds, 0: now; None: they are not.
    pub moves_in_ms: Option<u64>,
    /// All that are left leave in so many milliseconds; None: they need not.
    pub leave_in_ms: Option<u64>,
    /// Streams whose turn has not come.
    pub streams: usize,
}

/// The line of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Departure {
    line: Mutex<Line<oneshot::Sender<Leave>>>,
}

/// A stream's place in a line, given up on drop.
struct Place<'a> {
    departure: &'a Departure,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.departure.line().quit(self.number);
    }
}

impl Departure {
    fn line(&self) -> MutexGuard<'_, Line<oneshot::Sender<Leave>>> {
        // No step of a line can panic half-way.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when the turn of this stream has come.
    pub(super) async fn turn(&self) -> Leave {
        let (tell, told) = oneshot::channel();
        let _place = Place { departure: self, number: self.line().join(tell) };
        match told.await {
            Ok(leave) => leave,
            // Nobody drops it untold; if somebody did, the stream would stay where it is.
            Err(_) => pending().await,
        }
    }

    /// Takes an order in. Whether it is the first after none.
    fn obey(&self, order: Order, now: Instant) -> bool {
        let mut line = self.line();
        let had_one = line.has_order();
        line.obey(order, now);
        line.has_order() && !had_one
    }

    /// Tells those whose turn has come. None: there is no order.
    fn call(&self, now: Instant, pause: Duration) -> Option<Called> {
        let mut line = self.line();
        if !line.has_order() {
            return None;
        }
        let called = line.call(now, pause);
        drop(line);
        let mut told = Called::default();
        for (tell, leave) in called {
            // A stream that has just ended is none that was told.
            if tell.send(leave).is_ok() {
                told.count(leave);
            }
        }
        Some(told)
    }

    pub(super) fn shown(&self, now: Instant) -> Option<Shown> {
        let line = self.line();
        let in_ms =
            |due: Due| u64::try_from(due.at.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX);
        line.has_order().then(|| Shown {
            moves_in_ms: line.moves.map(in_ms),
            leave_in_ms: line.leaves.map(in_ms),
            streams: line.waiting.len(),
        })
    }
}

/// Streams that were told to leave.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Called {
    /// In a planned move.
    pub moved: u64,
    /// Because their engine is stopped, or nobody answers for it.
    pub fenced: u64,
}

impl Called {
    fn count(&mut self, leave: Leave) {
        match leave {
            Leave::Moved => self.moved += 1,
            Leave::Fenced => self.fenced += 1,
        }
    }
}

/// The endpoints that streams leave, in the tables or not any more.
#[derive(Debug, Default)]
pub struct Departures {
    /// Those that went with their last stream are dropped at the next look.
    leaving: Mutex<Vec<Weak<Live>>>,
    begun: Notify,
}

impl Departures {
    fn leaving(&self) -> MutexGuard<'_, Vec<Weak<Live>>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An endpoint's order, as the tables have it now.
    pub(super) fn order(&self, live: &Arc<Live>, order: Order, now: Instant) {
        if live.departure.obey(order, now) {
            self.leaving().push(Arc::downgrade(live));
            self.begun.notify_one();
        }
    }

    /// Tells the streams whose turn has come; `pause` lies between two that are moved off one endpoint.
    pub fn call(&self, now: Instant, pause: Duration) -> Called {
        let mut all = Called::default();
        self.leaving().retain(|live| {
            let Some(told) = live.upgrade().and_then(|live| live.departure.call(now, pause)) else {
                return false;
            };
            all.moved += told.moved;
            all.fenced += told.fenced;
            true
        });
        all
    }

    /// Comes back when there is an endpoint that streams leave.
    async fn begun(&self) {
        while self.leaving().is_empty() {
            self.begun.notified().await;
        }
    }
}

/// Gives streams their turns until `stop`.
pub async fn run(gateway: Arc<Gateway>, stop: CancellationToken) {
    let pause = Duration::from_secs(1) / gateway.config().resume.moves_per_second.max(1);
    let departures = gateway.table.departures();
    let look = async || {
        departures.begun().await;
        let called = departures.call(Instant::now(), pause);
        for (leave, count) in [(Leave::Moved, called.moved), (Leave::Fenced, called.fenced)] {
            gateway.metrics.streams_leave.with_label_values(&[leave.label()]).inc_by(count);
        }
        sleep(LOOK).await;
    };
    while stop.run_until_cancelled(look()).await.is_some() {}
}

#[cfg(test)]
#[path = "departure_tests.rs"]
mod tests;
