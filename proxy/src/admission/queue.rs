//! Waiting for a place, in order of arrival: one queue for each pool.
//!
//! A request waits only while every engine that could take it is at its limit ([`super::saturation`]). Only the first in
//! the queue looks for a place; when it has one it leaves, and the next looks at once. So places that fall free together
//! are taken in order, and a thousand that wait cost no more than one that looks. The first is woken when a request ends
//! ([`Freed`]) and looks again every [`LOOK_AGAIN`] besides, for what changes without one: a report, a new endpoint.
//!
//! A request that an engine then refuses as busy comes back to where it was, by the number it drew at first.
//! Whoever is dropped, because his client left or his time is over, has left the queue with that.
//!
//! Bounded: at most `queue.max_waiting` requests wait, each for at most `queue.deadline_ms`.
//! Cost where nobody waits: one atomic load a request, another when it ends.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::Notify;

/// For how long a request that found its model asleep counts as waiting after it has gone elsewhere, or has given up.
pub const WANTED_FOR_MS: u64 = 10_000;

/// How often the first in the queue looks without being woken.
pub const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A request's number in a queue, drawn when it first has to wait and kept from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(u64);

/// The queue is as long as it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

#[derive(Debug)]
struct Waiter {
    wake: Arc<Notify>,
    since_ms: u64,
}

/// Those who wait for a place at one pool's engines.
#[derive(Debug, Default)]
pub struct WaitQueue {
    waiting: Mutex<BTreeMap<u64, Waiter>>,
    /// Copy of the map's size, for a look without the lock.
    length: AtomicUsize,
    numbers: AtomicU64,
    /// When a request last found the model asleep, plus 1; 0: never.
    wanted_ms: AtomicU64,
}

impl WaitQueue {
    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.length.load(Relaxed)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A request found the model asleep.
    pub fn found_asleep(&self, now_ms: u64) {
        self.wanted_ms.store(now_ms.saturating_add(1), Relaxed);
    }

    /// Requests for which a model that sleeps should wake: those that wait, or one that did a moment ago.
    pub fn wanted(&self, now_ms: u64) -> u32 {
        let wanted_ms = self.wanted_ms.load(Relaxed);
        let lately = wanted_ms > 0 && now_ms < wanted_ms.saturating_add(WANTED_FOR_MS);
        u32::try_from(self.len()).unwrap_or(u32::MAX).max(u32::from(lately))
    }

    /// Milliseconds that the first has waited at `now_ms`; 0 if nobody waits.
    pub fn oldest_ms(&self, now_ms: u64) -> u64 {
        self.with(|waiting| waiting.values().next().map_or(0, |first| now_ms.saturating_sub(first.since_ms)))
    }

    /// Queues up: at the end, or where `number` was before. `since_ms` is when the request began to wait.
    ///
    /// # Errors
    /// [`Full`] if `most` wait already; not for one that has a number.
    pub fn enter(
        self: &Arc<Self>,
        number: Option<Number>,
        since_ms: u64,
        most: usize,
    ) -> Result<Waiting, Full> {
        let wake = Arc::new(Notify::new());
        let waiter = Waiter { wake: Arc::clone(&wake), since_ms };
        self.with(|waiting| {
            let number = match number {
                Some(Number(number)) => number,
                None if waiting.len() >= most => return Err(Full),
                None => self.numbers.fetch_add(1, Relaxed),
            };
            waiting.insert(number, waiter);
            Ok(Waiting { queue: Arc::clone(self), number, wake })
        })
    }

    /// A request ended somewhere: the first may have a place now.
    fn freed(&self) {
        if !self.is_empty() {
            self.with(wake_first);
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut BTreeMap<u64, Waiter>) -> T) -> T {
        // A poisoned map is whole: nothing in here can fail between two changes of it.
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut waiting);
        self.length.store(waiting.len(), Relaxed);
        result
    }
}

fn wake_first(waiting: &mut BTreeMap<u64, Waiter>) {
    if let Some(first) = waiting.values().next() {
        first.wake.notify_one();
    }
}

/// A request in the queue; it leaves on drop.
#[derive(Debug)]
pub struct Waiting {
    queue: Arc<WaitQueue>,
    number: u64,
    wake: Arc<Notify>,
}

impl Waiting {
    /// To come back with.
    pub fn number(&self) -> Number {
        Number(self.number)
    }

    /// Resolves when it is worth looking for a place: this one is the first, and something may have changed since the
    /// last call. Cancel-safe.
    pub async fn worth_looking(&self) {
        if self.is_first() {
            // Woken or not: the first looks now and then.
            drop(tokio::time::timeout(LOOK_AGAIN, self.wake.notified()).await);
            return;
        }
        while !self.is_first() {
            self.wake.notified().await;
        }
    }

    /// Whether nobody is before this one.
    pub fn is_first(&self) -> bool {
        self.queue.with(|waiting| waiting.keys().next() == Some(&self.number))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.queue.with(|waiting| {
            waiting.remove(&self.number);
            wake_first(waiting);
        });
    }
}

/// Tells the queue on drop that a request has ended.
#[derive(Debug)]
pub struct Freed(pub Arc<WaitQueue>);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.freed();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn queue() -> Arc<WaitQueue> {
        Arc::default()
    }

    #[tokio::test]
    async fn the_first_looks_and_the_next_as_soon_as_it_has_left() {
        let queue = queue();
        let first = queue.enter(None, 0, 9).expect("room");
        let second = queue.enter(None, 5, 9).expect("room");
        assert!(first.is_first() && !second.is_first());
        assert!(second.worth_looking().now_or_never().is_none());
        drop(first);
        assert!(second.is_first());
        second.worth_looking().now_or_never().expect("woken by the one before");
        assert_eq!(queue.oldest_ms(7), 2);
    }

    #[tokio::test]
    async fn an_ended_request_wakes_the_first_only() {
        let queue = queue();
        let first = queue.enter(None, 0, 9).expect("room");
        let second = queue.enter(None, 0, 9).expect("room");
        assert!(first.worth_looking().now_or_never().is_none());
        drop(Freed(Arc::clone(&queue)));
        first.worth_looking().now_or_never().expect("woken");
        assert!(second.worth_looking().now_or_never().is_none());
    }

    #[test]
    fn one_who_comes_back_is_where_he_was_and_always_finds_room() {
        let queue = queue();
        let first = queue.enter(None, 0, 2).expect("room");
        let _second = queue.enter(None, 0, 2).expect("room");
        assert_eq!(queue.enter(None, 0, 2).err(), Some(Full));
        let number = first.number();
        drop(first);
        let _third = queue.enter(None, 0, 2).expect("room again");
        let back = queue.enter(Some(number), 0, 2).expect("always");
        assert!(back.is_first());
        assert_eq!(queue.len(), 3);
    }

    #[test]
    fn a_sleeping_model_is_wanted_for_a_while_after_whoever_asked_has_gone() {
        let queue = queue();
        assert_eq!(queue.wanted(0), 0);
        queue.found_asleep(6);
        assert_eq!((queue.wanted(6), queue.wanted(6 + WANTED_FOR_MS)), (1, 1));
        assert_eq!(queue.wanted(7 + WANTED_FOR_MS), 0);
        let _waiting: Vec<_> = (0..3).map(|_| queue.enter(None, 0, 5).expect("room")).collect();
        assert_eq!(queue.wanted(7 + WANTED_FOR_MS), 3);
    }

    #[test]
    fn who_leaves_frees_his_place_at_once() {
        let queue = queue();
        let waiting: Vec<_> = (0..5).map(|_| queue.enter(None, 0, 5).expect("room")).collect();
        drop(waiting);
        assert!(queue.is_empty());
        assert!(queue.enter(None, 0, 1).is_ok());
    }
}
