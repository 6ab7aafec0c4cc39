//! plan(): what should change, and what waits on what. No I/O, no clock, no memory between calls.
//!
//! It starts from the placements as they are and moves as little as it can: what is placed stays. The result is whole
//! new placements for the models that change, which the caller commits by compare-and-swap on what this plan read; so
//! it never has to be right about anything but its arguments. Where a decision needs to know since when something is so
//! (a node lost, a load high, a rollout stuck), that time is an argument too: `memory.rs` keeps it.
//!
//! The pieces: `nodes.rs` says whether a node is for a replica at all, `gpus.rs` which of its GPUs, `placement.rs` which
//! node, `explain.rs` why none; `scale.rs` how many replicas; `rollout.rs` takes one model's next step; `rebalance.rs`
//! picks the one replica to move; `failures.rs` notes where engines fail over and over; `safety.rs` bounds it all; `report.rs` says what is not as wanted yet.
//!
//! Invariants, each held by a property test: a plan of an achieved plan is empty; no GPU is given to two replicas that
//! do not both share theirs, nor more memory than it has; voluntary changes never leave fewer ready replicas than
//! `min_available`, nor, without one, than the wanted number less `max_unavailable`, unless a rollout finds no room for
//! a replacement, and then one less; a plan starts and stops no more than its caps; more room never moves a replica.
//!
//! A model that goes to zero and may sleep keeps its replicas' places: they are asleep (`Assignment::asleep`), serve nobody, and
//! are woken before anything is placed. A sleeper's GPUs stay its own, memory and all; who finds no place otherwise has one
//! ended. So there is never less memory than waking needs.
//!
//! A replica ends in two steps: it is withdrawn (its phase becomes Leaving: the agent loses the assignment, proxies see
//! it draining, its GPUs stay taken), and forgotten once its engine is known to be gone. Absent: zones as a hard rule;
//! replicas that span nodes; moving replicas to make room for others.

mod explain;
mod failures;
mod gpus;
pub mod memory;
mod nodes;
mod placement;
mod rebalance;
mod report;
mod rollout;
mod safety;
pub mod scale;
mod standing;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    time::{Duration, Instant},
};

use crate::model::{Deployment, EngineObserved, Gpu, NodePolicy, Phase, Placement, desired};
use placement::{Capacity, RoomMade};
use rollout::Step;
use safety::Caps;
pub use scale::{Demand, Load, Window};

/// What the store holds.
#[derive(Debug, Default)]
pub struct Desired<'a> {
    /// By model.
    pub deployments: BTreeMap<&'a str, &'a Deployment>,
    /// By model.
    pub placements: BTreeMap<&'a str, &'a Placement>,
    /// The last generation given out.
    pub last_generation: u64,
}

/// What is seen of the fleet.
#[derive(Debug, Default)]
pub struct Observed<'a> {
    /// Every present node, and every absent one that a placement names.
    pub nodes: BTreeMap<&'a str, NodeSeen<'a>>,
    /// Generation of each registered endpoint, by replica.
    pub registered: BTreeMap<&'a str, u64>,
    /// Registered replicas that an operator drains: they serve nobody new.
    pub drained: BTreeSet<&'a str>,
    /// Engines as reported, by replica.
    pub engines: BTreeMap<&'a str, &'a EngineObserved>,
    /// Withdrawn replicas whose engine is known to have ended.
    pub gone: BTreeSet<&'a str>,
    /// Nodes on which engines of a model failed so long ago that they may be tried again, by model.
    pub forgiven: BTreeMap<&'a str, BTreeSet<String>>,
    /// What is known of models over time; a missing one has no history.
    pub models: BTreeMap<&'a str, ModelSeen>,
    /// How long the store has not been followed; zero while it is.
    pub view_age: Duration,
    /// None: it is not the time, or it is off. Else how often one replica may be moved: it may be now.
    pub rebalance: Option<Duration>,
}

/// A node.
#[derive(Debug, Clone, Default)]
pub struct NodeSeen<'a> {
    /// None: present. Else since when it is lost.
    pub lost_since: Option<Instant>,
    /// Its zone; that of a lost node where it is remembered.
    pub zone: &'a str,
    /// Its region.
    pub region: &'a str,
    /// Its agent's labels.
    pub labels: Option<&'a BTreeMap<String, String>>,
    /// What operators say of it.
    pub policy: Option<&'a NodePolicy>,
    /// Its GPUs; empty when it is lost.
    pub gpus: &'a [Gpu],
    /// Memory in use on its GPUs in MiB, by their uuids, as far as it was reported.
    pub used_mib: BTreeMap<&'a str, u64>,
}

/// What is known of a model over time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelSeen {
    /// Since when its load calls for another number.
    pub window: Window,
    /// Requests that wait for it in proxies.
    pub demand: Option<Demand>,
    /// Not as wanted, and nothing got nearer to it since then.
    pub unmoved_since: Option<Instant>,
}

/// Settings of the plan.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How long a node may be lost before its replicas are placed elsewhere.
    pub lost_grace: Duration,
    /// An engine that was started again so often without getting ready is placed elsewhere; 0: never.
    pub replace_after_restarts: u32,
    /// A spec that failed on so many nodes, and is ready on none, is not placed on further ones; 0: it always is.
    pub hold_after_nodes: u32,
    /// Most replicas that one plan starts.
    pub max_starts: usize,
    /// Most replicas that one plan stops.
    pub max_stops: usize,
    /// A store that was not followed for longer is not acted upon; zero: it always is.
    pub max_view_age: Duration,
}

/// One decision, for the log and the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A new replica got a place.
    Place {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
        /// Its generation.
        generation: u64,
    },
    /// A replica shall end.
    Withdraw {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
        /// Why.
        reason: String,
    },
    /// A withdrawn replica has ended; its GPUs are free.
    Forget {
        /// The replica.
        replica_id: String,
    },
    /// Autoscaling wants another number of replicas.
    Scale {
        /// The model.
        model: String,
        /// What it was.
        from: u32,
        /// What it is.
        to: u32,
        /// Why.
        reason: String,
    },
    /// A replica shall sleep.
    Sleep {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
    },
    /// A replica that slept shall serve.
    Wake {
        /// The replica.
        replica_id: String,
        /// Its node.
        node_id: String,
    },
    /// The rebalancer wants a replica elsewhere.
    Move {
        /// The replica.
        replica_id: String,
        /// Where it is.
        node_id: String,
        /// Why.
        reason: String,
    },
}

/// What plan() decided.
#[derive(Debug, Default)]
pub struct Plan {
    /// New placements of the models that change; None: the placement has served its purpose.
    pub changes: BTreeMap<String, Option<Placement>>,
    /// Why, decision by decision.
    pub actions: Vec<Action>,
    /// What waits on what, in sentences, by model.
    pub report: BTreeMap<String, Vec<String>>,
    /// Why nothing was decided at all, if that is so.
    pub held: Option<String>,
    /// Models whose rollout got nothing done for as long as they allow.
    pub stalled: BTreeSet<String>,
    /// Models whose spec fails wherever it is placed.
    pub failing: BTreeSet<String>,
    /// There was more to do than one plan may.
    pub is_capped: bool,
    /// The last generation given out, now.
    pub last_generation: u64,
}

/// One model while it is planned.
struct Working<'a> {
    deployment: Option<&'a Deployment>,
    placement: Cow<'a, Placement>,
    changed: bool,
    /// How many replicas it shall have.
    wanted: u32,
    /// What autoscaling waits for.
    scaling: Option<String>,
    /// Its spec failed on so many nodes that it is not tried on more.
    is_held: bool,
}

impl Working<'_> {
    fn edit(&mut self) -> &mut Placement {
        self.changed = true;
        self.placement.to_mut()
    }
}

/// What every step of a plan reads.
#[derive(Clone, Copy)]
struct Context<'a> {
    observed: &'a Observed<'a>,
    rules: &'a Rules,
    now: Instant,
}

/// Decides.
pub fn plan(desired: &Desired<'_>, observed: &Observed<'_>, rules: &Rules, now: Instant) -> Plan {
    let mut plan = Plan { last_generation: desired.last_generation, ..Plan::default() };
    plan.held = safety::refusal(observed, rules);
    let may_act = plan.held.is_none();
    let context = Context { observed, rules, now };
    let mut models = working(desired);
    if may_act {
        // Everywhere first: what has ended makes room for others.
        for model in models.values_mut() {
            forget_ended(model, context, &mut plan.actions);
        }
    }
    for (name, model) in &mut models {
        set_wanted(name, model, context, may_act, &mut plan.actions);
        if may_act {
            failures::note(name, model, context);
        }
        model.is_held = failures::is_held(model, context);
    }
    let mut capacity = Capacity::new(observed, models.values().map(|m| m.placement.as_ref()));
    if may_act && observed.rebalance.is_some() {
        plan.actions.extend(rebalance::mark_one(&mut models, &capacity, context));
    }
    let mut caps = Caps::new(rules);
    for (name, mut model) in models {
        let mut step = Step::new(&mut model, context, &mut capacity, &mut caps);
        if may_act {
            step.take(&mut plan.actions, &mut plan.last_generation);
        }
        let outcome = step.outcome();
        if outcome.is_held {
            plan.failing.insert(name.to_owned());
        }
        if report::is_stalled(&outcome, context, name) {
            plan.stalled.insert(name.to_owned());
        }
        let mut sentences = report::sentences(&outcome, context, name);
        if let Some(held) = plan.held.as_ref().filter(|_| !sentences.is_empty()) {
            sentences.insert(0, held.clone());
        }
        if !sentences.is_empty() {
            plan.report.insert(name.to_owned(), sentences);
        }
        let spent = may_act && model.deployment.is_none() && model.placement.assignments.is_empty();
        if spent {
            plan.changes.insert(name.to_owned(), None);
        } else if model.changed {
            plan.changes.insert(name.to_owned(), Some(model.placement.into_owned()));
        }
    }
    end_sleepers(capacity.make_room(&mut caps), desired, &mut plan);
    plan.is_capped = caps.is_hit;
    plan
}

/// Every model that is wanted or still has a placement.
fn working<'a>(desired: &Desired<'a>) -> BTreeMap<&'a str, Working<'a>> {
    let mut slugs: BTreeSet<String> = desired.placements.values().map(|p| p.slug.clone()).collect();
    let model = |deployment, placement| Working {
        deployment,
        placement,
        changed: false,
        wanted: 0,
        scaling: None,
        is_held: false,
    };
    let mut models = BTreeMap::new();
    for (name, placement) in &desired.placements {
        let deployment = desired.deployments.get(name).copied();
        models.insert(*name, model(deployment, Cow::Borrowed(*placement)));
    }
    for (name, deployment) in &desired.deployments {
        if !models.contains_key(name) {
            let slug = free_slug(name, &slugs);
            slugs.insert(slug.clone());
            let placement = Placement {
                model: (*name).to_owned(),
                slug,
                next_ordinal: 0,
                assignments: Vec::new(),
                scaled_to: None,
                failures: None,
            };
            models.insert(*name, model(Some(*deployment), Cow::Owned(placement)));
        }
    }
    models
}

/// Ends sleepers whose GPUs others need.
fn end_sleepers(made: RoomMade, desired: &Desired<'_>, plan: &mut Plan) {
    for (model, replicas) in made.comes {
        let sentence = match replicas {
            1 => "gets a place for 1 replica when one that sleeps has ended for it".to_owned(),
            _ => format!("gets places for {replicas} replicas when others that sleep have ended for them"),
        };
        plan.report.entry(model).or_default().push(sentence);
    }
    for (model, replica_id) in made.ended {
        let change = match plan.changes.entry(model) {
            Entry::Occupied(change) => change.into_mut(),
            Entry::Vacant(change) => match desired.placements.get(change.key().as_str()) {
                Some(placement) => change.insert(Some((*placement).clone())),
                None => continue,
            },
        };
        let assignments = change.iter_mut().flat_map(|placement| &mut placement.assignments);
        let mut asleep = assignments.filter(|a| a.asleep && a.phase == Phase::Active);
        if let Some(a) = asleep.find(|a| a.replica_id == replica_id) {
            (a.phase, a.asleep) = (Phase::Leaving, false);
            let (node_id, reason) = (a.node_id.clone(), "it sleeps, and its GPU is needed".to_owned());
            plan.actions.push(Action::Withdraw { replica_id, node_id, reason });
        }
    }
}

/// "a/b" and "a-b" would give their replicas the same ids; the later one gets a number.
fn free_slug(model: &str, taken: &BTreeSet<String>) -> String {
    let plain = desired::slug(model);
    let numbered = (2_u64..).map(|n| format!("{plain}-v{n}"));
    std::iter::once(plain.clone()).chain(numbered).find(|slug| !taken.contains(slug)).unwrap_or(plain)
}

/// How many replicas a model shall have: the operator's number, or what autoscaling makes of it.
fn set_wanted(
    name: &str,
    model: &mut Working<'_>,
    context: Context<'_>,
    may_act: bool,
    actions: &mut Vec<Action>,
) {
    let Some(deployment) = model.deployment else { return };
    let scaled_to = model.placement.scaled_to;
    let seen = context.observed.models.get(name).copied().unwrap_or_default();
    model.wanted = scale::present(deployment, scaled_to);
    if !may_act {
        return;
    }
    if deployment.policy.autoscaling.is_none() {
        if scaled_to.is_some() {
            model.edit().scaled_to = None;
        }
        return;
    }
    let scaled = scale::decide(deployment, scaled_to, &seen.window, seen.demand, context.now);
    model.scaling = scaled.waits;
    if let Some(reason) = scaled.reason {
        let (from, to) = (model.wanted, scaled.replicas);
        actions.push(Action::Scale { model: name.to_owned(), from, to, reason });
        model.wanted = to;
        model.edit().scaled_to = Some(to);
    }
}

/// Removes withdrawn replicas whose engines have ended, or whose node has been lost for too long to wait for.
fn forget_ended(model: &mut Working<'_>, context: Context<'_>, actions: &mut Vec<Action>) {
    let observed = context.observed;
    let ended: BTreeSet<String> = model
        .placement
        .assignments
        .iter()
        .filter(|a| a.phase == Phase::Leaving && !observed.registered.contains_key(a.replica_id.as_str()))
        .filter(|a| observed.gone.contains(a.replica_id.as_str()) || context.is_given_up(&a.node_id))
        .map(|a| a.replica_id.clone())
        .collect();
    if !ended.is_empty() {
        model.edit().assignments.retain(|a| !ended.contains(&a.replica_id));
        actions.extend(ended.into_iter().map(|replica_id| Action::Forget { replica_id }));
    }
}
