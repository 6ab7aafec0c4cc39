//! What nodes say, in memory, and which session speaks for each.
//!
//! One session per node: a newer one ends the older, because an agent that reconnects after a network fault must not
//! wait for its dead connection to be noticed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use penstock_proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::model::{EngineObserved, NodeObserved};

/// Every node that has said anything since this process started.
#[derive(Debug, Default)]
pub struct Roster {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, Arc<NodeObserved>>,
    sessions: BTreeMap<String, (u64, CancellationToken)>,
    last_session: u64,
}

/// A session's place in the roster.
#[derive(Debug)]
pub struct Seat {
    /// Its number, larger than that of every session before.
    pub number: u64,
    /// Cancelled when a newer session of the same node takes over.
    pub replaced: CancellationToken,
}

impl Roster {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Wakes when an engine came, went or changed its state; not for each report.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A node as last seen.
    pub fn node(&self, node_id: &str) -> Option<Arc<NodeObserved>> {
        self.inner().nodes.get(node_id).cloned()
    }

    /// Every node as last seen. Costs a pointer for each.
    pub fn nodes(&self) -> BTreeMap<String, Arc<NodeObserved>> {
        self.inner().nodes.clone()
    }

    /// Seats a session; an older one of the same node is told to go.
    pub fn connect(&self, node_id: &str, gpus: Vec<v1::Gpu>) -> Seat {
        let mut inner = self.inner();
        inner.last_session += 1;
        let seat = Seat { number: inner.last_session, replaced: CancellationToken::new() };
        let older = inner.sessions.insert(node_id.to_owned(), (seat.number, seat.replaced.clone()));
        if let Some((_, older)) = older {
            older.cancel();
        }
        let node = Arc::make_mut(inner.nodes.entry(node_id.to_owned()).or_default());
        (node.connected, node.gpus) = (true, gpus);
        node.withdrawn.clear();
        drop(inner);
        self.bump();
        seat
    }

    /// Notes what a node's Hello says of its programs, until its first report.
    pub fn greeted(&self, node_id: &str, programs: Vec<v1::EngineProgram>) {
        let mut inner = self.inner();
        Arc::make_mut(inner.nodes.entry(node_id.to_owned()).or_default()).programs = programs;
    }

    /// Takes a session's seat away, unless a newer one has it.
    pub fn disconnect(&self, node_id: &str, seat: &Seat) {
        let mut inner = self.inner();
        if inner.sessions.get(node_id).is_some_and(|(number, _)| *number == seat.number) {
            inner.sessions.remove(node_id);
            if let Some(node) = inner.nodes.get_mut(node_id) {
                Arc::make_mut(node).connected = false;
            }
            drop(inner);
            self.bump();
        }
    }

    /// Takes a report in.
    pub fn report(&self, node_id: &str, report: v1::NodeReport, now: Instant) {
        let engines: BTreeMap<String, EngineObserved> =
            report.engines.into_iter().map(|status| (status.replica_id.clone(), status.into())).collect();
        let mut inner = self.inner();
        let node = Arc::make_mut(inner.nodes.entry(node_id.to_owned()).or_default());
        let shape = |engines: &BTreeMap<String, EngineObserved>| -> Vec<_> {
            engines.iter().map(|(id, e)| (id.clone(), e.generation, e.state as u8)).collect()
        };
        let changed = shape(&node.engines) != shape(&engines) || !node.withdrawn.is_empty();
        (node.engines, node.gpus, node.reported_at) = (engines, report.gpus, Some(now));
        node.foreign = report.foreign;
        (node.disk, node.prefetches) = (report.disk, report.prefetches);
        node.gpu_source = report.gpu_source;
        node.programs = report.programs;
        drop(inner);
        if changed {
            self.bump();
        }
    }

    /// Notes that the node's session has a set of assignments without the `leaving` ones: they are withdrawn from now
    /// on, unless they were before.
    pub fn assigned(&self, node_id: &str, leaving: &[String], now: Instant) {
        let mut inner = self.inner();
        let node = Arc::make_mut(inner.nodes.entry(node_id.to_owned()).or_default());
        node.withdrawn.retain(|id, _| leaving.contains(id));
        for id in leaving {
            node.withdrawn.entry(id.clone()).or_insert(now);
        }
        drop(inner);
        self.bump();
    }

    /// Forgets nodes that are neither connected nor named by `keep`.
    pub fn prune(&self, keep: impl Fn(&str) -> bool) {
        self.inner().nodes.retain(|id, node| node.connected || keep(id));
    }
}
