//! One engine as the proxy sees it: who it is, and how it is doing.
//!
//! Identity is immutable and rebuilt with each snapshot. The live figures ride along behind an `Arc` as long as id,
//! address and generation stay the same, so that a swap loses neither a count nor an ejection, and a new process at an
//! old address starts clean.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use penstock_config::proxy::UpstreamConfig;
use pingora_core::upstreams::peer::HttpPeer;

use super::outlier::{Outlier, Rules};
use crate::{admission::saturation::Busy, routing::affinity::HashKey};

/// One registered engine.
#[derive(Debug)]
pub struct Endpoint {
    /// The replica's id.
    pub id: Arc<str>,
    /// As registered, host:port.
    pub address: String,
    /// Of the assignment it registered with.
    pub generation: u64,
    /// Finishes what it has, takes nothing new.
    pub draining: bool,
    /// Where it runs; may be empty.
    pub zone: String,
    /// Prebuilt: a pool key that never varies, so that connections are reused.
    pub peer: HttpPeer,
    pub(super) live: Arc<Live>,
}

/// What changes while an endpoint lives.
#[derive(Debug)]
pub(super) struct Live {
    inflight: AtomicU32,
    /// Copy of the outlier's `ejected_until_ms`, for picks without a lock.
    ejected_until_ms: AtomicU64,
    /// 1 while the outlier has anything to forget: successes of a clean endpoint take no lock.
    suspect: AtomicU32,
    outlier: Mutex<Outlier>,
    /// The last busy answer: how many of ours were there, and when. `u64::MAX` is never.
    busy: (AtomicU32, AtomicU64),
    /// Its name in hashes.
    key: OnceLock<u64>,
    /// When a pick first saw it, in milliseconds; what came before nobody needs to know.
    first_seen_ms: OnceLock<u64>,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            inflight: AtomicU32::default(),
            ejected_until_ms: AtomicU64::default(),
            suspect: AtomicU32::default(),
            outlier: Mutex::default(),
            busy: (AtomicU32::default(), AtomicU64::new(u64::MAX)),
            key: OnceLock::new(),
            first_seen_ms: OnceLock::new(),
        }
    }
}

impl Endpoint {
    /// An endpoint at a resolved address.
    pub(super) fn new(
        id: &str,
        address: &str,
        resolved: SocketAddr,
        generation: u64,
        config: &UpstreamConfig,
        live: Arc<Live>,
    ) -> Self {
        let mut peer = HttpPeer::new(resolved, false, String::new());
        peer.options.connection_timeout = Some(Duration::from_millis(config.connect_ms));
        peer.options.total_connection_timeout = Some(Duration::from_millis(config.connect_ms));
        peer.options.idle_timeout = Some(Duration::from_millis(config.keepalive_ms));
        Self {
            id: id.into(),
            address: address.to_owned(),
            generation,
            draining: false,
            zone: String::new(),
            peer,
            live,
        }
    }

    /// Requests under way, from pick to the end of the body.
    pub fn inflight(&self) -> u32 {
        self.live.inflight.load(Relaxed)
    }

    /// Its name in hashes: of the id and the generation, under the process's one key.
    pub fn key(&self, key: HashKey) -> u64 {
        *self.live.key.get_or_init(|| key.endpoint(&self.id, self.generation))
    }

    /// Milliseconds since a pick first saw it, for slow start.
    pub fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(*self.live.first_seen_ms.get_or_init(|| now_ms))
    }

    /// Whether failures keep it out of picks at `now_ms`.
    pub fn is_ejected(&self, now_ms: u64) -> bool {
        now_ms < self.live.ejected_until_ms.load(Relaxed)
    }

    /// It answered a request of ours, still counted, with "busy".
    pub fn refused(&self, now_ms: u64) {
        self.live.busy.0.store(self.inflight().saturating_sub(1), Relaxed);
        self.live.busy.1.store(now_ms, Relaxed);
    }

    /// Its last busy answer. The two numbers may be of two answers that came at one time, which does no harm.
    pub fn busy(&self) -> Option<Busy> {
        let at_ms = self.live.busy.1.load(Relaxed);
        (at_ms != u64::MAX).then(|| Busy { held: self.live.busy.0.load(Relaxed), at_ms })
    }

    /// Counts a request in; the count ends with the ticket.
    pub fn reserve(self: &Arc<Self>) -> Ticket {
        self.live.inflight.fetch_add(1, Relaxed);
        Ticket { endpoint: Arc::clone(self) }
    }

    /// An answer came. Free of locks unless something had failed before.
    pub fn succeeded(&self) {
        if self.live.suspect.load(Relaxed) != 0 {
            self.with_outlier(|outlier| outlier.success());
        }
    }

    /// A request failed in a way that counts. True if that ejected it.
    pub fn failed(&self, now_ms: u64, rules: &Rules) -> bool {
        self.with_outlier(|outlier| outlier.failure(now_ms, rules))
    }

    fn with_outlier<T>(&self, change: impl FnOnce(&mut Outlier) -> T) -> T {
        // A poisoned lock holds plain numbers: they are as good as before.
        let mut outlier = self.live.outlier.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut outlier);
        self.live.ejected_until_ms.store(outlier.ejected_until_ms(), Relaxed);
        self.live.suspect.store(u32::from(!outlier.is_clean()), Relaxed);
        result
    }
}

/// A request's place at an endpoint, held to the end of the body and given back on drop, however the request ends.
#[derive(Debug)]
pub struct Ticket {
    endpoint: Arc<Endpoint>,
}

impl Ticket {
    /// Where the request goes.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.endpoint.live.inflight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An endpoint for tests of picks.
    pub(crate) fn endpoint(id: &str) -> Arc<Endpoint> {
        let resolved = SocketAddr::from(([127, 0, 0, 1], 9));
        Arc::new(Endpoint::new(id, "127.0.0.1:9", resolved, 1, &UpstreamConfig::default(), Arc::default()))
    }

    #[test]
    fn a_ticket_counts_until_it_is_dropped() {
        let endpoint = endpoint("a");
        let (first, second) = (endpoint.reserve(), endpoint.reserve());
        assert_eq!(endpoint.inflight(), 2);
        drop(first);
        assert_eq!(endpoint.inflight(), 1);
        drop(second);
        assert_eq!(endpoint.inflight(), 0);
    }

    #[test]
    fn an_ejection_is_seen_by_picks_and_ends_with_a_success() {
        let rules = Rules { consecutive_failures: 1, base_ejection_ms: 100, max_ejection_ms: 100 };
        let endpoint = endpoint("a");
        assert!(endpoint.failed(1_000, &rules));
        assert!(endpoint.is_ejected(1_099));
        assert!(!endpoint.is_ejected(1_100));
        endpoint.succeeded();
        assert!(!endpoint.is_ejected(1_000));
    }
}
