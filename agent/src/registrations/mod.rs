//! Which engines should be routed to, what the control plane has been told, and what it answered.
//!
//! [`Registrations`] is pure: supervisors say what is wanted, the fleet session asks what is due and feeds the answers
//! back. Level-triggered: after a reconnect everything wanted is told again, everything left is told until it is confirmed.
//! [`Registry`] is the same thing shared between tasks.
//!
//! Invariant: an answer counts only for the generation that was asked for, so that a late one cannot confirm another.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_proto::v1;
use tokio::sync::watch;

/// What is to be routed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The deployment's model.
    pub(crate) model: String,
    /// The assignment's generation.
    pub(crate) generation: u64,
    /// host:port for proxies.
    pub(crate) address: String,
    /// Main process.
    pub(crate) pid: u32,
    /// LoRA adapters it has loaded, in order.
    pub(crate) adapters: Vec<String>,
    /// How long its requests are waited for once it is deregistered.
    pub(crate) drain_ms: u32,
}

/// How a registration stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Not wanted.
    None,
    /// Not answered yet.
    Waiting,
    /// The engine is routed to.
    Accepted,
    /// It is not, and why.
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Link {
    Untold,
    Asked(Instant),
    Accepted,
    Refused(String, Instant),
}

#[derive(Debug)]
enum Entry {
    Wanted(Wanted, Link),
    /// To be deregistered; confirmed entries are removed.
    Leaving {
        model: String,
        generation: u64,
        asked: Option<Instant>,
    },
}

/// The registrations of this node by replica id.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    entries: BTreeMap<String, Entry>,
    /// Shares of requests in percent of engines that get less than a full one.
    weights: BTreeMap<String, u32>,
}

impl Registrations {
    /// The engine is ready. Saying so again changes nothing.
    pub(crate) fn want(&mut self, replica_id: &str, wanted: Wanted) {
        if let Some(Entry::Wanted(before, _)) = self.entries.get(replica_id)
            && *before == wanted
        {
            return;
        }
        self.entries.insert(replica_id.into(), Entry::Wanted(wanted, Link::Untold));
    }

    /// The engine must not be routed to any longer. Told even if it never was wanted here: an earlier agent may have
    /// registered it.
    pub(crate) fn leave(&mut self, replica_id: &str, model: &str, generation: u64) {
        if let Some(Entry::Leaving { generation: before, .. }) = self.entries.get(replica_id)
            && *before == generation
        {
            return;
        }
        self.entries
            .insert(replica_id.into(), Entry::Leaving { model: model.into(), generation, asked: None });
    }

    /// Which engines get less than a full share of requests, in percent. False: that is what was known.
    fn weigh(&mut self, weights: BTreeMap<String, u32>) -> bool {
        if self.weights == weights {
            return false;
        }
        for (replica_id, entry) in &mut self.entries {
            if let Entry::Wanted(_, link) = entry
                && self.weights.get(replica_id) != weights.get(replica_id)
            {
                *link = Link::Untold;
            }
        }
        self.weights = weights;
        true
    }

    /// A new session knows nothing of what the last one was told.
    pub(crate) fn session_started(&mut self) {
        for entry in self.entries.values_mut() {
            match entry {
                Entry::Wanted(_, link) => *link = Link::Untold,
                Entry::Leaving { asked, .. } => *asked = None,
            }
        }
    }

    /// New assignments: what was refused before may be accepted now.
    pub(crate) fn assignments_arrived(&mut self) {
        for entry in self.entries.values_mut() {
            if let Entry::Wanted(_, link @ Link::Refused(..)) = entry {
                *link = Link::Untold;
            }
        }
    }

    /// What to send now; noted as sent. Anything unanswered or refused for `retry` is due again.
    pub(crate) fn due(&mut self, now: Instant, retry: Duration) -> Vec<v1::agent_message::Message> {
        let old = |at: Instant| now.saturating_duration_since(at) >= retry;
        let mut messages = Vec::new();
        for (replica_id, entry) in &mut self.entries {
            match entry {
                Entry::Wanted(wanted, link) => {
                    let due = match link {
                        Link::Untold => true,
                        Link::Asked(at) | Link::Refused(_, at) => old(*at),
                        Link::Accepted => false,
                    };
                    if due {
                        *link = Link::Asked(now);
                        messages.push(v1::agent_message::Message::Register(v1::Registration {
                            model: wanted.model.clone(),
                            replica_id: replica_id.clone(),
                            generation: wanted.generation,
                            address: wanted.address.clone(),
                            pid: wanted.pid,
                            adapters: wanted.adapters.clone(),
                            weight_percent: self.weights.get(replica_id).copied(),
                            drain_ms: Some(wanted.drain_ms),
                        }));
                    }
                }
                Entry::Leaving { model, generation, asked } => {
                    if asked.is_none_or(old) {
                        *asked = Some(now);
                        messages.push(v1::agent_message::Message::Deregister(v1::Deregistration {
                            model: model.clone(),
                            replica_id: replica_id.clone(),
                            generation: *generation,
                        }));
                    }
                }
            }
        }
        messages
    }

    /// The answer to a registration. Whether it counted.
    pub(crate) fn answered(&mut self, result: &v1::RegistrationResult, now: Instant) -> bool {
        match self.entries.get_mut(&result.replica_id) {
            Some(Entry::Wanted(wanted, link)) if wanted.generation == result.generation => {
                *link = match result.accepted {
                    true => Link::Accepted,
                    false => Link::Refused(result.reason.clone(), now),
                };
                true
            }
            _ => false,
        }
    }

    /// The answer to a deregistration. Whether it counted.
    pub(crate) fn left(&mut self, result: &v1::DeregistrationResult) -> bool {
        let counts = matches!(
            self.entries.get(&result.replica_id),
            Some(Entry::Leaving { generation, .. }) if *generation == result.generation
        );
        counts && self.entries.remove(&result.replica_id).is_some()
    }

    /// How the replica's registration stands.
    pub(crate) fn standing(&self, replica_id: &str) -> Standing {
        match self.entries.get(replica_id) {
            Some(Entry::Wanted(_, Link::Accepted)) => Standing::Accepted,
            Some(Entry::Wanted(_, Link::Refused(reason, _))) => Standing::Refused(reason.clone()),
            Some(Entry::Wanted(..)) => Standing::Waiting,
            _ => Standing::None,
        }
    }

    /// Whether a deregistration of the replica is not confirmed yet.
    pub(crate) fn is_leaving(&self, replica_id: &str) -> bool {
        matches!(self.entries.get(replica_id), Some(Entry::Leaving { .. }))
    }
}

/// [`Registrations`] shared by the supervisors and the fleet session.
#[derive(Debug)]
pub(crate) struct Registry {
    registrations: Mutex<Registrations>,
    changes: watch::Sender<u64>,
    connected: watch::Sender<bool>,
}

impl Registry {
    /// Without registrations, without a session.
    pub(crate) fn new() -> Self {
        Self {
            registrations: Mutex::default(),
            changes: watch::Sender::new(0),
            connected: watch::Sender::new(false),
        }
    }

    /// Runs `change` on the registrations and wakes everybody who waits for a change.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Registrations) -> R) -> R {
        let result = change(&mut self.lock());
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        result
    }

    /// Which engines get less than a full share of requests, in percent. Wakes nobody when that is known.
    pub(crate) fn weigh(&self, weights: BTreeMap<String, u32>) {
        if self.lock().weigh(weights) {
            self.changes.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    /// What to send now; see [`Registrations::due`]. Wakes nobody: it is the woken who ask.
    pub(crate) fn due(&self, now: Instant, retry: Duration) -> Vec<v1::agent_message::Message> {
        self.lock().due(now, retry)
    }

    /// How the replica's registration stands.
    pub(crate) fn standing(&self, replica_id: &str) -> Standing {
        self.lock().standing(replica_id)
    }

    /// Wakes at every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Notes whether a session stands.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.send_replace(connected);
    }

    /// Waits until the replica's deregistration is confirmed, for at most `deadline`, and only while a session stands.
    /// Whether it was confirmed.
    pub(crate) async fn left(&self, replica_id: &str, deadline: Duration) -> bool {
        let mut changes = self.changes();
        let mut connected = self.connected.subscribe();
        let confirmed = async {
            while self.lock().is_leaving(replica_id) {
                let changed = tokio::select! {
                    changed = changes.changed() => changed,
                    _ = connected.wait_for(|connected| !connected) => return false,
                };
                if changed.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(deadline, confirmed).await.unwrap_or(false)
    }

    fn lock(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
