//! One subscriber's protocol state: what it asked for, what it has, what it was sent, what it said to that. Pure.
//!
//! At most one response is outstanding. [`Session::next`] makes the next one out of the newest snapshot: first tables
//! that are new or changed, then routes (with removals) whose tables it has, then tables that are gone.
//!
//! A refused response (NACK) changes nothing in what the subscriber is taken to have. If it held several resources they
//! are offered again one by one, so that a single bad one does not hold the others back; one that was refused alone is
//! offered again when it changes, or when the retry time has passed (the subscriber's guard may have been lifted).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use penstock_proto::{Version, xds};

use super::snapshot::{Kind, Snapshot};

/// Longest reason of a NACK that is kept, in characters.
const MAX_REASON: usize = 1_000;

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    kinds: [State; 2],
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
    /// Resource versions that the subscriber has, with what is outstanding.
    known: HashMap<String, String>,
    /// Names whose resource may differ from what is known.
    dirty: BTreeSet<String>,
    outstanding: Option<Outstanding>,
    /// Refused together with others: to be offered alone.
    suspects: BTreeSet<String>,
    /// Refused alone.
    refused: BTreeMap<String, Refused>,
    status: KindStatus,
}

#[derive(Debug, Default)]
struct Wanted {
    everything: bool,
    names: BTreeSet<String>,
}

/// What a response offered: version per resource, None for a removal.
type Offer = BTreeMap<String, Option<String>>;

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    version: Version,
    offer: Offer,
    /// What was known of those names before.
    before: HashMap<String, Option<String>>,
}

#[derive(Debug)]
struct Refused {
    version: Option<String>,
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

    fn state(&mut self, kind: Kind) -> &mut State {
        let [tables, routes] = &mut self.kinds;
        match kind {
            Kind::Table => tables,
            Kind::Route => routes,
        }
    }

    /// How the subscriber does with a kind.
    pub fn status(&self, kind: Kind) -> &KindStatus {
        let [tables, routes] = &self.kinds;
        match kind {
            Kind::Table => &tables.status,
            Kind::Route => &routes.status,
        }
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
            let known = Kind::ALL.map(Kind::url).join(" and ");
            return Err(format!("resources of type {:?} are not served here; {known} are", request.type_url));
        };
        let heard = self.verdict(kind, &request, now);
        let state = self.state(kind);
        let first = state.wanted.is_none();
        let wanted = state.wanted.get_or_insert_default();
        let had_everything = wanted.everything;
        if first {
            state.known = request.initial_resource_versions.into_iter().collect();
            wanted.everything = request.resource_names_subscribe.is_empty();
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                wanted.everything = true;
            } else {
                // Asked for again means: send it again, whatever was sent before.
                if !first {
                    state.known.remove(&name);
                }
                state.dirty.insert(name.clone());
                wanted.names.insert(name);
            }
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                wanted.everything = false;
            } else if wanted.names.remove(&name) && !wanted.everything {
                state.known.remove(&name);
            }
        }
        if first || (wanted.everything && !had_everything) {
            // The snapshot is looked through once; afterwards its recent changes tell what to look at.
            self.seen_sequence = None;
        }
        Ok(heard)
    }

    fn verdict(&mut self, kind: Kind, request: &xds::DeltaDiscoveryRequest, now: Instant) -> Heard {
        let state = self.state(kind);
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
        for (name, version) in outstanding.offer {
            if alone {
                state.suspects.remove(&name);
                state.refused.insert(name.clone(), Refused { version, at: now });
            } else {
                state.suspects.insert(name.clone());
            }
            state.dirty.insert(name);
        }
        for (name, before) in outstanding.before {
            match before {
                Some(version) => state.known.insert(name, version),
                None => state.known.remove(&name),
            };
        }
        state.status.nacks += 1;
        state.status.nack_reason = error.message.chars().take(MAX_REASON).collect();
        Heard::Nack(kind)
    }

    /// The next response, if there is anything to say and nothing is outstanding.
    pub fn next(&mut self, snapshot: &Snapshot, now: Instant) -> Option<(Kind, xds::DeltaDiscoveryResponse)> {
        self.look(snapshot);
        if self.kinds.iter().any(|state| state.outstanding.is_some()) {
            return None;
        }
        let steps = [(Kind::Table, false), (Kind::Route, true), (Kind::Table, true)];
        for (kind, removals) in steps {
            if let Some(response) = self.respond(kind, removals, snapshot, now) {
                return Some((kind, response));
            }
        }
        None
    }

    /// Notes which names may differ from what the subscriber has.
    fn look(&mut self, snapshot: &Snapshot) {
        self.newest = snapshot.version;
        if self.seen_sequence == Some(snapshot.sequence) {
            return;
        }
        let oldest = snapshot.recent.front().map_or(u64::MAX, |change| change.sequence);
        let kept_up = self.seen_sequence.is_some_and(|seen| seen + 1 >= oldest);
        let seen = self.seen_sequence.unwrap_or(0);
        for kind in Kind::ALL {
            let state = self.state(kind);
            if kept_up {
                let newer = snapshot.recent.iter().filter(|change| change.sequence > seen);
                let names = newer.flat_map(|change| change.names.iter()).filter(|(k, _)| *k == kind);
                state.dirty.extend(names.map(|(_, name)| name.clone()));
            } else {
                state.dirty.extend(snapshot.resources(kind).keys().cloned());
                state.dirty.extend(state.known.keys().cloned());
            }
        }
        self.seen_sequence = Some(snapshot.sequence);
    }

    fn respond(
        &mut self,
        kind: Kind,
        removals: bool,
        snapshot: &Snapshot,
        now: Instant,
    ) -> Option<xds::DeltaDiscoveryResponse> {
        let retry = self.nack_retry;
        let [tables, routes] = &mut self.kinds;
        let (state, tables) = match kind {
            Kind::Table => (tables, None),
            Kind::Route => (routes, Some(&*tables)),
        };
        let wanted = state.wanted.as_ref()?;
        let resources = snapshot.resources(kind);
        let version = |name: &str| resources.get(name).map(|r| r.version.as_ref());
        let is_wanted = |name: &String| wanted.everything || wanted.names.contains(name);
        state
            .dirty
            .retain(|name| is_wanted(name) && version(name) != state.known.get(name).map(String::as_str));
        let dirty = &state.dirty;
        state.suspects.retain(|name| dirty.contains(name));
        state.refused.retain(|name, r| {
            dirty.contains(name) && r.version.as_deref() == version(name) && now < r.at + retry
        });
        // A route is held back until the subscriber has its tables, if it wants tables at all.
        let has_table = |name: &str| {
            let mut pools = resources.get(name).into_iter().flat_map(|r| &r.pools);
            let lacks = |t: &&State| t.wanted.is_some() && pools.any(|p| !t.known.contains_key(p));
            !tables.as_ref().is_some_and(lacks)
        };
        let may_go = |name: &&String| {
            (removals || resources.contains_key(*name))
                && !state.refused.contains_key(*name)
                && has_table(name)
        };
        let mut names: Vec<&String> =
            dirty.iter().filter(|n| !state.suspects.contains(*n)).filter(may_go).collect();
        if names.is_empty() {
            names.extend(state.suspects.iter().find(may_go));
        }
        let offer: Offer =
            names.into_iter().map(|name| (name.clone(), version(name).map(str::to_owned))).collect();
        if offer.is_empty() && (state.answered || (kind == Kind::Table && removals)) {
            return None;
        }
        state.answered = true;
        let before = offer.keys().map(|name| (name.clone(), state.known.get(name).cloned())).collect();
        for (name, version) in &offer {
            match version {
                Some(version) => state.known.insert(name.clone(), version.clone()),
                None => state.known.remove(name),
            };
            state.dirty.remove(name);
        }
        let response = xds::DeltaDiscoveryResponse {
            system_version_info: snapshot.version.to_string(),
            type_url: kind.url().to_owned(),
            nonce: (self.last_nonce + 1).to_string(),
            removed_resources: offer
                .iter()
                .filter(|(_, v)| v.is_none())
                .map(|(name, _)| name.clone())
                .collect(),
            resources: offer.keys().filter_map(|name| on_wire(kind, name, snapshot)).collect(),
            ..Default::default()
        };
        let nonce = response.nonce.clone();
        let state = self.state(kind);
        state.outstanding = Some(Outstanding { nonce, version: snapshot.version, offer, before });
        self.last_nonce += 1;
        Some(response)
    }
}

fn on_wire(kind: Kind, name: &str, snapshot: &Snapshot) -> Option<xds::Resource> {
    let resource = snapshot.resources(kind).get(name)?;
    let any = xds::Any { type_url: kind.url().to_owned(), value: resource.body.to_vec() };
    Some(xds::Resource {
        name: name.to_owned(),
        version: resource.version.as_ref().to_owned(),
        resource: Some(any),
        ..Default::default()
    })
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
