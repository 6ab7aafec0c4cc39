//! Stopping without losing anybody, as a numbered sequence.
//!
//! 1. `/readyz` says 503: load balancers look away.
//! 2. `drain.unready_ms` pass, for them to notice.
//! 3. The listener closes; connections that stay idle for another moment are closed, HTTP/2 ones told to go away.
//! 4. Requests under way finish, streams included, for up to `drain.deadline_ms` or until a second signal.
//! 5. What is left gets an error event and ends.
//!
//! Pingora's own SIGTERM sleeps a fixed time whatever is under way, and its server is therefore not used.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use penstock_config::proxy::DrainConfig;
use pingora_core::server::ShutdownWatch;
use tokio::{sync::watch, time::timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// After the listener has closed, how long a kept-alive connection may still bring the request it was about to send.
pub const LAST_REQUEST: Duration = Duration::from_millis(200);

/// After the last call, how long error events may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Whether the process is on its way out, and what it still waits for.
#[derive(Debug)]
pub struct Lifecycle {
    draining: AtomicBool,
    requests: TaskTracker,
    stop_accepting: watch::Sender<bool>,
    cut: CancellationToken,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            draining: AtomicBool::new(false),
            requests: TaskTracker::new(),
            stop_accepting: watch::Sender::new(false),
            cut: CancellationToken::new(),
        }
    }
}

impl Lifecycle {
    /// Whether stopping has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Counts a request in; its end is waited for until the token is dropped.
    pub fn request(&self) -> TaskTrackerToken {
        self.requests.token()
    }

    /// Requests under way.
    pub fn inflight(&self) -> usize {
        self.requests.len()
    }

    /// Becomes true when no more connections are wanted; what pingora's listeners watch.
    pub fn watch(&self) -> ShutdownWatch {
        self.stop_accepting.subscribe()
    }

    /// Cancelled at the last call.
    pub fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// The sequence. Returns the number of requests that had to be cut. `hurry` ends the wait early.
    pub async fn drain(&self, config: &DrainConfig, hurry: &CancellationToken) -> usize {
        self.draining.store(true, Relaxed);
        tracing::info!(inflight = self.inflight(), "draining: not ready any more");
        if config.unready_ms > 0 {
            // Either way the next step follows.
            drop(timeout(Duration::from_millis(config.unready_ms), hurry.cancelled()).await);
        }
        self.stop_accepting.send_replace(true);
        drop(timeout(LAST_REQUEST, hurry.cancelled()).await);
        self.requests.close();
        let deadline = Duration::from_millis(config.deadline_ms);
        tokio::select! {
            () = self.requests.wait() => {}
            () = tokio::time::sleep(deadline) => {}
            () = hurry.cancelled() => {}
        }
        let left = self.inflight();
        if left > 0 {
            tracing::warn!(left, "draining: the deadline has passed, streams are ended with an error event");
        }
        self.cut.cancel();
        drop(timeout(LAST_WORDS, self.requests.wait()).await);
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: DrainConfig = DrainConfig { unready_ms: 0, deadline_ms: 3_600_000 };

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_requests_and_cuts_none_that_finish() {
        let lifecycle = std::sync::Arc::new(Lifecycle::default());
        let request = lifecycle.request();
        let watch = lifecycle.watch();
        let drained = {
            let lifecycle = std::sync::Arc::clone(&lifecycle);
            async move { lifecycle.drain(&NEVER, &CancellationToken::new()).await }
        };
        let finish = async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop(request);
        };
        let (left, ()) = tokio::join!(drained, finish);
        assert_eq!(left, 0);
        assert!(lifecycle.is_draining());
        assert!(*watch.borrow());
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_deadline_what_is_left_is_cut() {
        let lifecycle = Lifecycle::default();
        let _request = lifecycle.request();
        let config = DrainConfig { unready_ms: 5, deadline_ms: 10 };
        assert_eq!(lifecycle.drain(&config, &CancellationToken::new()).await, 1);
        assert!(lifecycle.cut().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_ends_the_wait() {
        let lifecycle = Lifecycle::default();
        let _request = lifecycle.request();
        let hurry = CancellationToken::new();
        hurry.cancel();
        assert_eq!(lifecycle.drain(&NEVER, &hurry).await, 1);
    }
}
