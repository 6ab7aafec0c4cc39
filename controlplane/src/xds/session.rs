//! One subscriber's protocol state: what it asked for, what it has, what it was sent, what it said to that. Pure.
//!
//! At most one response of a kind is outstanding. [`Session::next`] makes the next one out of the newest snapshot, in the order
//! of [`Kind::STEPS`]: what others refer to comes first and goes last, and is answered before ([`Step::after`]).
//!
//! A refused response (NACK) changes nothing in what the subscriber is taken to have. If it held several resources they
//! are offered again one by one, so that a single bad one does not hold the others back; one that was refused alone is
//! offered again when it changes, or when the retry time has passed (the subscriber's guard may have been lifted).
//!
//! The state is that of the delta protocol; [`super::sotw`] speaks state of the world on top of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{Version, xds};

use super::{
    kind::{Kind, Step},
    snapshot::{Resource, Snapshot},
};

/// Longest reason of a NACK that is kept, in characters.
const MAX_REASON: usize = 1_000;

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    kinds: [State; 6],
    seen_sequence: Option<u64>,
    last_nonce: u64,
    nack_retry: Duration,
    newest: Version,
}

/// Subscription and knowledge of one kind.
#[derive(Debug, Default)]
struct State {
    wanted: Option<Wanted>,
    /// The first response was made; it is made even when there is nothing to say.
    answered: bool,
    /// What the subscriber has, with what is outstanding.
    known: HashMap<Arc<str>, Known>,
    /// Names whose resource may differ from what is known.
    dirty: BTreeSet<Arc<str>>,
    outstanding: Option<Outstanding>,
    /// Refused together with others: to be offered alone.
    suspects: BTreeSet<Arc<str>>,
    /// Refused alone.
    refused: BTreeMap<Arc<str>, Refused>,
    /// Of the last response.
    nonce: String,
    status: KindStatus,
}

/// A resource that the subscriber has.
#[derive(Debug, Clone)]
struct Known {
    version: Arc<str>,
    /// None if it is of an earlier connection.
    resource: Option<Arc<Resource>>,
}

#[derive(Debug, Default)]
struct Wanted {
    everything: bool,
    names: BTreeSet<String>,
}

impl Wanted {
    fn has(&self, name: &str) -> bool {
        self.everything || self.names.contains(name)
    }
}

/// What a response offered; None for a removal.
type Offer = BTreeMap<Arc<str>, Option<Arc<Resource>>>;

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    version: Version,
    offer: Offer,
    /// What was known of those names before.
    before: HashMap<Arc<str>, Option<Known>>,
}

#[derive(Debug)]
struct Refused {
    version: Option<Arc<str>>,
    at: Instant,
}

/// How a subscriber does with one kind, for the API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KindStatus {
    /// Version of the last acknowledged response.
    pub acked: Option<Version>,
    /// Responses refused.
    pub nacks: u64,
    /// The reason of the last refusal; empty once a later response was acknowledged.
    pub nack_reason: String,
    /// Resources that it does not take, by name.
    pub refused: Vec<Arc<str>>,
}

/// What a request brought about, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// A subscription, or a word about an older response.
    Nothing,
    /// The outstanding response was acknowledged.
    Ack(Kind),
    /// The outstanding response was refused.
    Nack(Kind),
}

/// A response, before it is put into the words of a protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What it is about.
    pub kind: Kind,
    /// By which it is answered.
    pub nonce: String,
    /// Of the snapshot.
    pub version: Version,
    /// What is new or changed.
    pub changed: Vec<(Arc<str>, Arc<Resource>)>,
    /// What has gone.
    pub removed: Vec<Arc<str>>,
}

impl Session {
    /// A subscriber that has asked for nothing yet.
    pub fn new(nack_retry: Duration) -> Self {
        Self {
            kinds: Default::default(),
            seen_sequence: None,
            last_nonce: 0,
            nack_retry,
            newest: Version::default(),
        }
    }

    fn state(&self, kind: Kind) -> &State {
        let [tables, routes, clusters, assignments, listeners, configs] = &self.kinds;
        match kind {
            Kind::Table => tables,
            Kind::Route => routes,
            Kind::Cluster => clusters,
            Kind::Assignment => assignments,
            Kind::Listener => listeners,
            Kind::RouteConfig => configs,
        }
    }

    fn state_mut(&mut self, kind: Kind) -> &mut State {
        let [tables, routes, clusters, assignments, listeners, configs] = &mut self.kinds;
        match kind {
            Kind::Table => tables,
            Kind::Route => routes,
            Kind::Cluster => clusters,
            Kind::Assignment => assignments,
            Kind::Listener => listeners,
            Kind::RouteConfig => configs,
        }
    }

    /// How the subscriber does with the kinds that it asked for.
    pub fn status(&self) -> Vec<(Kind, KindStatus)> {
        let asked = Kind::ALL.into_iter().filter(|kind| self.state(*kind).wanted.is_some());
        let status = |state: &State| KindStatus {
            refused: state.refused.keys().chain(&state.suspects).cloned().collect(),
            ..state.status.clone()
        };
        asked.map(|kind| (kind, status(self.state(kind)))).collect()
    }

    /// Why the last response of a kind was refused.
    pub fn nack_reason(&self, kind: Kind) -> &str {
        &self.state(kind).status.nack_reason
    }

    /// The names asked for, one by one; None: it has not asked for this kind yet.
    pub(super) fn wanted(&self, kind: Kind) -> Option<&BTreeSet<String>> {
        self.state(kind).wanted.as_ref().map(|wanted| &wanted.names)
    }

    /// The nonce of the last response of a kind; empty before the first.
    pub(super) fn nonce(&self, kind: Kind) -> &str {
        &self.state(kind).nonce
    }

    /// Everything of a kind that it has, with what is outstanding.
    pub(super) fn known(&self, kind: Kind) -> impl Iterator<Item = (&Arc<str>, &Arc<Resource>)> {
        self.state(kind).known.iter().filter_map(|(name, known)| Some((name, known.resource.as_ref()?)))
    }

    /// The version up to which the subscriber has everything it can have: set when nothing is outstanding or refused
    /// after [`Session::next`] had nothing to say.
    pub fn synced(&self) -> Option<Version> {
        let settled = |s: &State| s.outstanding.is_none() && s.refused.is_empty() && s.dirty.is_empty();
        let subscribed = self.kinds.iter().any(|s| s.wanted.is_some());
        (subscribed && self.kinds.iter().all(settled)).then_some(self.newest)
    }

    /// When a refused response is due again, if one is.
    pub fn retry_at(&self) -> Option<Instant> {
        self.kinds.iter().flat_map(|s| s.refused.values()).map(|r| r.at + self.nack_retry).min()
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// A sentence about a type this server does not have.
    pub fn hear(&mut self, request: xds::DeltaDiscoveryRequest, now: Instant) -> Result<Heard, String> {
        let Some(kind) = Kind::from_url(&request.type_url) else {
            let known = Kind::ALL.map(Kind::url).join(", ");
            return Err(format!(
                "resources of type {:?} are not served here; served are {known}",
                request.type_url
            ));
        };
        let heard = self.verdict(kind, &request, now);
        let state = self.state_mut(kind);
        let first = state.wanted.is_none();
        let wanted = state.wanted.get_or_insert_default();
        let had_everything = wanted.everything;
        if first {
            let known = request.initial_resource_versions.into_iter();
            let known = known.map(|(name, v)| (name.into(), Known { version: v.into(), resource: None }));
            state.known = known.collect();
            wanted.everything = request.resource_names_subscribe.is_empty();
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                wanted.everything = true;
            } else {
                // Asked for again means: send it again, whatever was sent before.
                if !first {
                    state.known.remove(name.as_str());
                }
                state.dirty.insert(name.as_str().into());
                wanted.names.insert(name);
            }
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                wanted.everything = false;
            } else if wanted.names.remove(&name) && !wanted.everything {
                state.known.remove(name.as_str());
                state.refused.remove(name.as_str());
            }
        }
        if first || (wanted.everything && !had_everything) {
            // The snapshot is looked through once; afterwards its recent changes tell what to look at.
            self.seen_sequence = None;
        }
        Ok(heard)
    }

    fn verdict(&mut self, kind: Kind, request: &xds::DeltaDiscoveryRequest, now: Instant) -> Heard {
        let state = self.state_mut(kind);
        let answers =
            |o: &mut Outstanding| !request.response_nonce.is_empty() && o.nonce == request.response_nonce;
        let Some(outstanding) = state.outstanding.take_if(answers) else { return Heard::Nothing };
        let Some(error) = &request.error_detail else {
            for name in outstanding.offer.keys() {
                state.suspects.remove(name);
                state.refused.remove(name);
            }
            state.status.acked = Some(outstanding.version);
            if state.refused.is_empty() && state.suspects.is_empty() {
                state.status.nack_reason.clear();
            }
            return Heard::Ack(kind);
        };
        let alone = outstanding.offer.len() <= 1;
        for (name, resource) in outstanding.offer {
            if alone {
                let version = resource.map(|resource| resource.version.clone());
                state.suspects.remove(&name);
                state.refused.insert(name.clone(), Refused { version, at: now });
            } else {
                state.suspects.insert(name.clone());
            }
            state.dirty.insert(name);
        }
        for (name, before) in outstanding.before {
            match before {
                Some(known) => state.known.insert(name, known),
                None => state.known.remove(&name),
            };
        }
        state.status.nacks += 1;
        state.status.nack_reason = error.message.chars().take(MAX_REASON).collect();
        Heard::Nack(kind)
    }

    /// The next response, if there is anything to say that need not wait for an answer. To be asked for until there is none.
    pub fn next(&mut self, snapshot: &Snapshot, now: Instant) -> Option<Reply> {
        self.look(snapshot);
        Kind::STEPS.into_iter().find_map(|step| {
            let unanswered = step.after().iter().any(|kind| self.state(*kind).outstanding.is_some());
            if unanswered || (step.breaks_envoys() && self.waits(Kind::RouteConfig)) {
                return None;
            }
            self.reply(step, snapshot, now)
        })
    }

    /// Whether there is something of a kind to be told that cannot be told yet.
    fn waits(&self, kind: Kind) -> bool {
        let state = self.state(kind);
        state.wanted.is_some() && state.dirty.iter().any(|name| !state.refused.contains_key(name))
    }

    /// Notes which names may differ from what the subscriber has.
    fn look(&mut self, snapshot: &Snapshot) {
        self.newest = snapshot.version;
        if self.seen_sequence == Some(snapshot.sequence) {
            return;
        }
        let oldest = snapshot.recent.front().map_or(u64::MAX, |change| change.sequence);
        let kept_up = self.seen_sequence.filter(|seen| seen + 1 >= oldest);
        if let Some(seen) = kept_up {
            let newer = snapshot.recent.iter().rev().take_while(|change| change.sequence > seen);
            for (kind, name) in newer.flat_map(|change| change.names.iter()) {
                let state = self.state_mut(*kind);
                if state.wanted.is_some() {
                    state.dirty.insert(name.clone());
                }
            }
        } else {
            for kind in Kind::ALL {
                let state = self.state_mut(kind);
                if state.wanted.is_some() {
                    state.dirty.extend(snapshot.resources(kind).keys().cloned());
                    state.dirty.extend(state.known.keys().cloned());
                }
            }
        }
        self.seen_sequence = Some(snapshot.sequence);
    }

    /// Whether the subscriber has everything that a resource refers to, of the kinds that it asks for. What an Envoy refused
    /// is not waited for: its routes to other clusters are one resource with those to this one.
    fn may_have(&self, kind: Kind, resource: &Resource) -> bool {
        kind.needs().iter().all(|needed| {
            let state = self.state(*needed);
            let has = |pool: &Arc<str>| {
                state.known.contains_key(pool) || (kind.is_envoys() && state.refused.contains_key(pool))
            };
            state.wanted.is_none() || resource.pools.iter().all(has)
        })
    }

    fn reply(&mut self, step: Step, snapshot: &Snapshot, now: Instant) -> Option<Reply> {
        let Step { kind, removals } = step;
        let (retry, resources) = (self.nack_retry, snapshot.resources(kind));
        let state = self.state_mut(kind);
        let wanted = state.wanted.as_ref()?;
        if state.dirty.is_empty() && state.answered {
            return None;
        }
        let version = |name: &str| resources.get(name).map(|r| r.version.as_ref());
        let known = &state.known;
        state
            .dirty
            .retain(|name| wanted.has(name) && version(name) != known.get(name).map(|k| k.version.as_ref()));
        let dirty = &state.dirty;
        state.suspects.retain(|name| dirty.contains(name));
        state.refused.retain(|name, r| {
            dirty.contains(name) && r.version.as_deref() == version(name) && now < r.at + retry
        });
        let state = self.state(kind);
        let may_go = |name: &&Arc<str>| {
            let resource = resources.get(*name);
            (removals || resource.is_some())
                && !state.refused.contains_key(*name)
                && resource.is_none_or(|resource| self.may_have(kind, resource))
        };
        let mut names: Vec<&Arc<str>> =
            state.dirty.iter().filter(|n| !state.suspects.contains(*n)).filter(may_go).collect();
        if names.is_empty() {
            names.extend(state.suspects.iter().find(may_go));
        }
        let offer: Offer =
            names.into_iter().map(|name| (name.clone(), resources.get(name).cloned())).collect();
        // An Envoy would take an empty answer for "there is none" where "not yet" is meant.
        if offer.is_empty() && (state.answered || (kind.is_envoys() && !state.dirty.is_empty())) {
            return None;
        }
        Some(self.offer(kind, offer, snapshot.version))
    }

    fn offer(&mut self, kind: Kind, offer: Offer, version: Version) -> Reply {
        self.last_nonce += 1;
        let nonce = self.last_nonce.to_string();
        let mut renewed = Vec::new();
        let state = self.state_mut(kind);
        state.answered = true;
        state.nonce.clone_from(&nonce);
        let before = offer.keys().map(|name| (name.clone(), state.known.get(name).cloned())).collect();
        let (mut changed, mut removed) = (Vec::new(), Vec::new());
        for (name, resource) in &offer {
            state.dirty.remove(name);
            match resource {
                Some(resource) => {
                    changed.push((name.clone(), resource.clone()));
                    let (version, resource) = (resource.version.clone(), Some(resource.clone()));
                    if state.known.insert(name.clone(), Known { version, resource }).is_some() {
                        renewed.push(name.clone());
                    }
                }
                None => {
                    removed.push(name.clone());
                    state.known.remove(name);
                }
            }
        }
        state.outstanding = Some(Outstanding { nonce: nonce.clone(), version, offer, before });
        if let Some(kind) = kind.renews() {
            let state = self.state_mut(kind);
            for name in renewed {
                if state.known.remove(&name).is_some() {
                    state.dirty.insert(name);
                }
            }
        }
        Reply { kind, nonce, version, changed, removed }
    }
}

/// A reply in the words of the delta protocol.
pub fn delta(reply: &Reply) -> xds::DeltaDiscoveryResponse {
    let type_url = reply.kind.url();
    let on_wire = |(name, resource): &(Arc<str>, Arc<Resource>)| xds::Resource {
        name: name.as_ref().to_owned(),
        version: resource.version.as_ref().to_owned(),
        resource: Some(xds::Any { type_url: type_url.clone(), value: resource.body.to_vec() }),
        ..Default::default()
    };
    xds::DeltaDiscoveryResponse {
        system_version_info: reply.version.to_string(),
        nonce: reply.nonce.clone(),
        removed_resources: reply.removed.iter().map(|name| name.as_ref().to_owned()).collect(),
        resources: reply.changed.iter().map(on_wire).collect(),
        type_url,
        ..Default::default()
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
