//! Connections that wait for their next request.
//!
//! No task watches them. One that the engine has closed meanwhile, or on which it has said something out of turn, is found out
//! when it is taken, without a system call as long as nothing has happened on it; what nobody takes is closed by
//! [`Pool::sweep`], and makes room when others are put aside.
//!
//! A connection wakes the thread with whose runtime it is registered. One that was used from another thread would cost two
//! threads' wake-ups for each event, so a request gets one of its own runtime's, and another's only if there is none; that has
//! to be registered anew ([`Taken::Elsewhere`]), which still is cheaper than a new connection, above all for the engine.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{runtime, time::Instant};

/// Locks, so that threads that talk to different engines seldom meet.
const SHARDS: usize = 16;

/// Unused connections by address, the newest taken first.
#[derive(Debug)]
pub struct Pool<T> {
    shards: [Mutex<HashMap<SocketAddr, VecDeque<Idle<T>>>>; SHARDS],
    idle: AtomicUsize,
    most: usize,
    keepalive: Duration,
}

#[derive(Debug)]
struct Idle<T> {
    connection: T,
    since: Instant,
    home: runtime::Id,
}

/// Where a connection was last used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken<T> {
    /// In the asking thread's runtime.
    Here(T),
    /// In another.
    Elsewhere(T),
}

impl<T> Pool<T> {
    /// Keeps `most` connections for `keepalive` each.
    pub fn new(most: usize, keepalive: Duration) -> Self {
        Self { shards: Default::default(), idle: AtomicUsize::new(0), most, keepalive }
    }

    /// The newest connection to `address`, of the runtime `home` if there is one.
    pub fn take(&self, address: SocketAddr, home: runtime::Id, now: Instant) -> Option<Taken<T>> {
        let mut shard = self.shard(address);
        let waiting = shard.get_mut(&address)?;
        let of_home = |idle: &Idle<T>| idle.home == home && self.is_fresh(idle, now);
        let here = waiting.iter().rposition(of_home);
        let newest =
            waiting.len().checked_sub(1).filter(|_| waiting.back().is_some_and(|i| self.is_fresh(i, now)));
        let idle = waiting.remove(here.or(newest)?)?;
        self.idle.fetch_sub(1, Relaxed);
        Some(if here.is_some() { Taken::Here(idle.connection) } else { Taken::Elsewhere(idle.connection) })
    }

    /// Puts a connection aside. Where there are enough, the oldest to the same address makes room; failing that this one is
    /// closed.
    pub fn put(&self, address: SocketAddr, connection: T, home: runtime::Id, now: Instant) {
        let full = self.idle.fetch_add(1, Relaxed) >= self.most;
        // Closed when the lock is free again.
        let closed = {
            let mut shard = self.shard(address);
            let waiting = shard.entry(address).or_default();
            let oldest = if full { waiting.pop_front() } else { None };
            let idle = Idle { connection, since: now, home };
            if full && oldest.is_none() {
                Some(idle)
            } else {
                waiting.push_back(idle);
                oldest
            }
        };
        if closed.is_some() {
            self.idle.fetch_sub(1, Relaxed);
        }
    }

    /// Closes what has waited for too long.
    pub fn sweep(&self, now: Instant) {
        for shard in &self.shards {
            let mut old = Vec::new();
            {
                let mut shard = lock(shard);
                for waiting in shard.values_mut() {
                    while waiting.front().is_some_and(|idle| !self.is_fresh(idle, now)) {
                        old.extend(waiting.pop_front());
                    }
                }
                shard.retain(|_, waiting| !waiting.is_empty());
            }
            self.idle.fetch_sub(old.len(), Relaxed);
            // Closed here, where no request waits for the lock.
            drop(old);
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.idle.load(Relaxed)
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn is_fresh(&self, idle: &Idle<T>, now: Instant) -> bool {
        now.saturating_duration_since(idle.since) < self.keepalive
    }

    fn shard(&self, address: SocketAddr) -> MutexGuard<'_, HashMap<SocketAddr, VecDeque<Idle<T>>>> {
        // Addresses of a fleet differ in their last bytes, or in their ports.
        let last = match address.ip() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        let at = (usize::from(last) + usize::from(address.port())) % SHARDS;
        lock(&self.shards[at])
    }
}

/// A poisoned lock holds connections that are as good as before.
fn lock<T>(shard: &Mutex<T>) -> MutexGuard<'_, T> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Runtime;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    /// The ids of two runtimes, which must live as long as these are compared.
    fn homes() -> ([runtime::Id; 2], [Runtime; 2]) {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let runtimes = [runtime(), runtime()];
        (runtimes.each_ref().map(|runtime| runtime.handle().id()), runtimes)
    }

    #[test]
    fn the_newest_of_the_same_runtime_comes_first() {
        let ([here, there], _runtimes) = homes();
        let (pool, now) = (Pool::new(10, SECOND), Instant::now());
        for (connection, home) in [(1, here), (2, here), (3, there)] {
            pool.put(address(1), connection, home, now);
        }
        pool.put(address(2), 4, here, now);
        assert_eq!(pool.len(), 4);
        let take = || pool.take(address(1), here, now);
        assert_eq!(
            [take(), take(), take(), take()],
            [Some(Taken::Here(2)), Some(Taken::Here(1)), Some(Taken::Elsewhere(3)), None]
        );
        assert_eq!(pool.take(address(3), here, now), None);
        assert_eq!(pool.len(), 1);
    }

    #[test]
    fn what_has_waited_too_long_is_not_taken_and_swept() {
        let ([here, there], _runtimes) = homes();
        let (pool, now) = (Pool::new(10, SECOND), Instant::now());
        pool.put(address(1), 1, here, now);
        pool.put(address(1), 2, there, now + SECOND / 2);
        assert_eq!(pool.take(address(1), here, now + SECOND), Some(Taken::Elsewhere(2)));
        assert_eq!(pool.take(address(1), here, now + SECOND), None);
        assert_eq!(pool.len(), 1);
        pool.sweep(now + SECOND / 2);
        assert_eq!(pool.len(), 1);
        pool.sweep(now + SECOND);
        assert!(pool.is_empty() && pool.shards.iter().all(|shard| lock(shard).is_empty()));
    }

    #[test]
    fn there_are_never_more_than_allowed() {
        let ([here, _], _runtimes) = homes();
        let (pool, now) = (Pool::new(2, SECOND), Instant::now());
        (1..=3).for_each(|connection| pool.put(address(1), connection, here, now));
        pool.put(address(2), 4, here, now);
        assert_eq!(pool.len(), 2);
        assert_eq!(pool.take(address(2), here, now), None, "no room, and none of its own to close");
        assert_eq!(pool.take(address(1), here, now), Some(Taken::Here(3)));
        assert_eq!(pool.take(address(1), here, now), Some(Taken::Here(2)), "the oldest has made room");
        let none = Pool::new(0, SECOND);
        none.put(address(1), 1, here, now);
        assert_eq!(none.take(address(1), here, now), None);
    }
}
