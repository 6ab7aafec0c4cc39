//! How long a request's head has been on its way. The connection tells it of bytes, the reader of the head asks it.
//!
//! A connection that idles between requests has no head on its way, however long: that time is pingora's keep-alive.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// The clock of one HTTP/1 connection's heads.
#[derive(Debug)]
pub struct HeadClock {
    /// The next byte begins a head.
    waiting: AtomicBool,
    began: Mutex<Option<Instant>>,
    bytes: Notify,
    /// The first head began with the connection.
    first: AtomicBool,
}

impl HeadClock {
    /// The first head's time runs from `began`.
    pub fn new(began: Instant) -> Self {
        Self {
            waiting: AtomicBool::new(false),
            began: Mutex::new(Some(began)),
            bytes: Notify::new(),
            first: AtomicBool::new(true),
        }
    }

    /// The reader waits for a head from here on.
    pub fn next_head(&self) {
        if self.first.swap(false, Relaxed) {
            return;
        }
        *self.began.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.waiting.store(true, Relaxed);
    }

    /// Bytes came. One load, but for the first bytes of a head.
    pub fn bytes_came(&self) {
        if self.waiting.load(Relaxed) && self.waiting.swap(false, Relaxed) {
            *self.began.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            self.bytes.notify_one();
        }
    }

    /// Resolves `limit` after the head's beginning; never while none has begun.
    pub async fn expired(&self, limit: Duration) {
        loop {
            let began = *self.began.lock().unwrap_or_else(PoisonError::into_inner);
            match began {
                Some(began) => return sleep_until(began + limit).await,
                None => self.bytes.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(15);

    #[tokio::test(start_paused = true)]
    async fn the_first_head_runs_from_the_connections_beginning() {
        let clock = HeadClock::new(Instant::now());
        advance(Duration::from_secs(10)).await;
        clock.next_head();
        let began = Instant::now();
        clock.expired(LIMIT).await;
        assert_eq!(began.elapsed().as_secs(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_head_runs_from_its_first_byte_and_later_bytes_do_not_move_it() {
        let clock = HeadClock::new(Instant::now());
        clock.next_head();
        clock.bytes_came(); // of the first request's body
        clock.next_head();
        let idle = timeout(Duration::from_secs(3_600), clock.expired(LIMIT)).await;
        assert!(idle.is_err(), "no head has begun");
        clock.bytes_came();
        advance(Duration::from_secs(10)).await;
        clock.bytes_came();
        let began = Instant::now();
        clock.expired(LIMIT).await;
        assert_eq!(began.elapsed().as_secs(), 5);
    }
}
