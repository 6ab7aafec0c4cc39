//! Stopping without losing anybody, as a numbered sequence.
//!
//! 1. `/readyz` says 503: load balancers look away.
//! 2. `drain.unready_ms` pass, for them to notice.
//! 3. The listener closes; connections that stay idle for another moment are closed, HTTP/2 ones told to go away.
//! 4. Requests under way finish, streams included, for up to `drain.deadline_ms` or until a second signal.
//! 5. What is left gets an error event and ends.
//!
//! When a successor has taken over the sockets ([`crate::upgrade`]) there is no hurry: [`Lifecycle::hand_over`] comes first.
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

use crate::upgrade;

/// After the listener has closed, how long a kept-alive connection may still bring the request it was about to send.
pub const LAST_REQUEST: Duration = Duration::from_millis(200);

/// After the last call, how long error events may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Whether the process is on its way out, and what it still waits for.
#[derive(Debug)]
pub struct Lifecycle {
    draining: AtomicBool,
    requests: TaskTracker,
    connections: TaskTracker,
    stop_accepting: watch::Sender<bool>,
    close_idle: CancellationToken,
    cut: CancellationToken,
    /// How attempts to give way to a new binary went.
    pub upgrades: upgrade::Status,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            draining: AtomicBool::new(false),
            requests: TaskTracker::new(),
            connections: TaskTracker::new(),
            stop_accepting: watch::Sender::new(false),
            close_idle: CancellationToken::new(),
            cut: CancellationToken::new(),
            upgrades: upgrade::Status::default(),
        }
    }
}

/// How long connections whose requests are over may take to be closed.
const GOODBYES: Duration = Duration::from_millis(500);

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

    /// Counts a client's connection in, until the token is dropped.
    pub fn connection(&self) -> TaskTrackerToken {
        self.connections.token()
    }

    /// Clients' connections that are open.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Becomes true when no more connections are wanted: listeners close, answers end their connection, HTTP/2 clients are
    /// told to go away.
    pub fn watch(&self) -> ShutdownWatch {
        self.stop_accepting.subscribe()
    }

    /// Cancelled when connections that wait for a request are to be closed.
    pub fn close_idle(&self) -> &CancellationToken {
        &self.close_idle
    }

    /// Cancelled at the last call.
    pub fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// A successor accepts on our sockets: takes no more connections and finishes what there is. A client that keeps its
    /// connection may send one more request on it, as it would have done; the answer ends the connection, so that nobody
    /// meets one that is just closing. Comes back when nothing is left, or only connections that nobody has used for
    /// `keepalive`; [`Self::drain`] ends these.
    pub async fn hand_over(&self, keepalive: Duration) {
        self.draining.store(true, Relaxed);
        self.stop_accepting.send_replace(true);
        self.requests.close();
        self.connections.close();
        let unused = async {
            tokio::time::sleep(keepalive).await;
            self.requests.wait().await;
        };
        tokio::select! {
            () = self.connections.wait() => {}
            () = unused => {}
        }
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
        self.close_idle.cancel();
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
        // Their requests are over; what is left to do is to close them, which under TLS takes a word.
        self.connections.close();
        drop(timeout(LAST_REQUEST + GOODBYES, self.connections.wait()).await);
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
    async fn after_a_hand_over_it_waits_for_requests_and_lets_kept_connections_be_used_once_more() {
        let keepalive = Duration::from_secs(75);
        let lifecycle = Lifecycle::default();
        let (busy, idle) = (lifecycle.connection(), lifecycle.connection());
        let request = lifecycle.request();
        let began = tokio::time::Instant::now();
        let finish = async {
            tokio::time::sleep(Duration::from_secs(600)).await;
            assert!(!lifecycle.close_idle().is_cancelled());
            drop((request, busy));
        };
        tokio::join!(lifecycle.hand_over(keepalive), finish);
        assert_eq!(
            began.elapsed().as_secs(),
            600,
            "an unused connection is not waited for longer than {keepalive:?}"
        );
        drop(idle);
        let began = tokio::time::Instant::now();
        lifecycle.hand_over(keepalive).await;
        assert_eq!(began.elapsed().as_secs(), 0, "with no connection left there is nothing to wait for");
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
