//! The loop that makes placements follow what is wanted: look, plan, commit.
//!
//! It is woken by any change and by a tick, and takes no input: it reads everything each time and does the same
//! idempotent work, so there is one path and it is always exercised. It does not retry: a lost compare means that
//! something changed, and the next pass sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    core::Core,
    fleet::liveness::Liveness,
    model::{NodeObserved, Phase, observed::mean_ttft_ms},
    plan::{Action, Demand, Desired, Load, NodeSeen, Observed, Plan, Rules, memory::Memory, plan, scale},
    store::{Compare, StoreError, Txn, TxnOutcome, keys},
    view::{ModelView, View},
};

/// How many times as long as a pass took nothing is planned after it: so passes take a fifth of a core at most.
const REST: u32 = 4;
/// Leases that are renewed at a time when a term begins.
const RENEWALS: usize = 64;
/// How long the last word of an engine's load is kept: past any use that a proxy has for it.
const LOAD_KEPT: Duration = Duration::from_secs(60);

/// What waits on what, by model, as of a revision.
#[derive(Debug, Default)]
pub struct Reports {
    /// Sentences by model.
    pub waiting: BTreeMap<String, Vec<String>>,
    /// How many replicas each deployed model shall have: the operator's number, or what autoscaling makes of it.
    pub wanted: BTreeMap<String, u32>,
    /// Models whose rollout is stalled.
    pub stalled: BTreeSet<String>,
    /// Why nothing is changed at the moment, if that is so.
    pub held: Option<String>,
}

/// Whether everything that was planned is in the store.
enum Committed {
    All,
    /// Somebody else changed what this pass had read.
    Outrun,
}

/// Runs for ever.
pub async fn run(core: Arc<Core>) {
    let mut views = core.views.clone();
    let mut roster: watch::Receiver<u64> = core.roster.changes();
    let mut demands = core.demands.changes();
    let mut since = Since::default();
    let mut standing = core.leadership.changes();
    let mut greeted = None;
    let tick = Duration::from_millis(core.config.reconcile.tick_ms);
    loop {
        views.mark_unchanged();
        roster.mark_unchanged();
        demands.mark_unchanged();
        standing.mark_unchanged();
        // Not before the view holds everything that was written before this term: a stale view decides nothing.
        if core.leadership.term() != Some(core.view().term) {
            // Whoever leads next counts for itself how long nodes are lost.
            since = Since::default();
            core.reports.send_replace(Arc::default());
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                // A process that cannot be elected any more has no sender.
                Ok(()) = standing.changed() => {}
                () = tokio::time::sleep(tick) => {}
            }
            continue;
        }
        let term = core.leadership.term();
        if std::mem::replace(&mut greeted, term) != term {
            renew_nodes(&core).await;
        }
        let started = Instant::now();
        let outcome = pass(&core, &mut since, started).await;
        core.metrics.reconcile_seconds.observe(started.elapsed().as_secs_f64());
        let (label, is_capped) = outcome.unwrap_or_else(|error| {
            tracing::warn!(%error, "a pass of reconcile failed; the next one tries again");
            ("error", false)
        });
        core.metrics.reconciles.with_label_values(&[label]).inc();
        // A plan that hit its caps was all for this tick: else the caps would bound nothing. And in a large fleet, where a pass
        // takes its time, the changes that come meanwhile are looked at together.
        let coalesce = Duration::from_millis(core.config.reconcile.coalesce_ms);
        let pause =
            if is_capped { tick } else { coalesce.max(started.elapsed() * REST).min(tick.max(coalesce)) };
        tokio::time::sleep(pause).await;
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            _ = roster.changed() => {}
            _ = demands.changed() => {}
            () = tokio::time::sleep(tick) => {}
        }
    }
}

/// Gives every node its full time to connect to the one that leads now: it may be a while since anybody renewed its lease.
async fn renew_nodes(core: &Core) {
    let view = core.view();
    let leases: Vec<_> = view.nodes.values().map(|node| node.lease).filter(|lease| *lease != 0).collect();
    for some in leases.chunks(RENEWALS) {
        let renewals: Vec<_> = some.iter().map(|lease| core.store.lease_keep_alive(*lease)).collect();
        // One that has ended just now is the node's to ask for again; a store that is away is told of by the pass.
        drop(futures_util::future::join_all(renewals).await);
    }
}

/// Since when things are so: what a pass leaves to the next one. An empty one postpones and never hastens.
#[derive(Debug, Default)]
struct Since {
    liveness: Liveness,
    memory: Memory,
}

/// One look, one plan. Returns its metric label, and whether it hit a cap.
async fn pass(core: &Core, since: &mut Since, now: Instant) -> Result<(&'static str, bool), StoreError> {
    let view = core.view();
    core.loads.prune(LOAD_KEPT, now);
    core.roster.prune(|node| view.nodes.contains_key(node) || view.by_node.contains_key(node));
    let nodes = core.roster.nodes();
    let named: BTreeSet<&str> = view.by_node.keys().map(String::as_str).collect();
    let lost = since.liveness.update(&named, |node| view.nodes.contains_key(node), now);
    let present = view.nodes.keys().map(|name| (name.as_str(), view.zone_of(name).unwrap_or_default()));
    let zones = since.memory.zones(present, &lost.keys().copied().collect());
    let desired = desired(&view);
    let mut observed = observed(&view, &nodes, &lost, &zones, core.report_interval());
    observed.view_age = view.unfollowed_since.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
    let settings = &core.config.reconcile;
    let interval = Duration::from_secs(settings.rebalance_interval_s);
    let is_due = settings.rebalance && since.memory.rebalance_due(interval, now);
    observed.rebalance = is_due.then_some(interval);
    remember(&mut observed, &mut since.memory, &view, &nodes, &core.demands.now(now), core, now);
    let plan = plan(&desired, &observed, &rules(core), now);
    since.memory.planned(&plan, now);
    for action in &plan.actions {
        announce(core, action);
    }
    core.metrics.plan_stalled.set(i64::try_from(plan.stalled.len()).unwrap_or(i64::MAX));
    core.metrics.plan_failing.set(i64::try_from(plan.failing.len()).unwrap_or(i64::MAX));
    core.metrics.plan_held.set(i64::from(plan.held.is_some()));
    core.metrics.plan_capped.inc_by(u64::from(plan.is_capped));
    let label = if plan.changes.is_empty() { "settled" } else { "changed" };
    let committed = commit(core, &view, &plan).await?;
    let is_capped = plan.is_capped;
    let wanted = desired.deployments.iter().map(|(name, deployment)| {
        let after = plan.changes.get(*name).map(|change| change.as_ref().and_then(|p| p.scaled_to));
        let before = desired.placements.get(name).and_then(|p| p.scaled_to);
        ((*name).to_owned(), scale::present(deployment, after.unwrap_or(before)))
    });
    let wanted = wanted.collect();
    let reports = Reports { waiting: plan.report, wanted, stalled: plan.stalled, held: plan.held };
    core.reports.send_replace(Arc::new(reports));
    Ok(match committed {
        Committed::All => (label, is_capped),
        Committed::Outrun => ("conflict", is_capped),
    })
}

fn rules(core: &Core) -> Rules {
    let settings = &core.config.reconcile;
    Rules {
        lost_grace: Duration::from_millis(core.config.fleet.lost_grace_ms),
        replace_after_restarts: settings.replace_after_restarts,
        hold_after_nodes: settings.hold_after_nodes,
        max_starts: settings.max_starts,
        max_stops: settings.max_stops,
        max_view_age: Duration::from_millis(settings.max_view_age_ms),
    }
}

/// Notes since when each model stands as it does.
fn remember<'a>(
    observed: &mut Observed<'a>,
    memory: &mut Memory,
    view: &'a View,
    nodes: &BTreeMap<String, Arc<NodeObserved>>,
    demands: &BTreeMap<String, Demand>,
    core: &Core,
    now: Instant,
) {
    // A report under way, and one lost.
    let fresh = core.report_interval() * 3;
    for (name, model) in &view.models {
        let Some(deployment) = model.deployment.as_ref().map(|stored| &stored.value) else { continue };
        let placement = model.placement.as_ref().map(|stored| &stored.value);
        let is_ready = |id: &str, generation| {
            model.endpoints.get(id).is_some_and(|endpoint| endpoint.generation == generation)
        };
        let load = match deployment.policy.autoscaling {
            Some(_) => load(model, nodes, fresh, now),
            None => Load::default(),
        };
        let demand = demands.get(name).copied();
        let seen = memory.model(deployment, placement, is_ready, &load, demand, now);
        observed.models.insert(name, seen);
        let Some(placement) = placement else { continue };
        let fails = |node: &str| {
            let mut here =
                placement.assignments.iter().filter(|a| a.node_id == node && a.phase == Phase::Active);
            here.any(|a| !is_ready(&a.replica_id, a.generation))
        };
        let avoid = Duration::from_secs(core.config.reconcile.avoid_node_s);
        let forgiven = memory.forgiven(placement, fails, avoid, now);
        if !forgiven.is_empty() {
            observed.forgiven.insert(name, forgiven);
        }
    }
    memory.retain(|name| observed.models.contains_key(name));
}

/// What the ready replicas of a model do, by the last reports of their nodes. The time to the first token is the mean of all
/// requests that had one lately, wherever: an engine that had none says nothing of it.
fn load(
    model: &ModelView,
    nodes: &BTreeMap<String, Arc<NodeObserved>>,
    fresh: Duration,
    now: Instant,
) -> Load {
    let mut load = Load::default();
    let mut first_tokens = Vec::new();
    let active = model.placement.iter().flat_map(|stored| &stored.value.assignments);
    for a in active.filter(|a| a.phase == Phase::Active && !a.asleep) {
        let ready = model.endpoints.get(&a.replica_id).is_some_and(|e| e.generation == a.generation);
        if !ready {
            continue;
        }
        let node = nodes.get(&a.node_id).filter(|node| {
            let age = node.reported_at.map(|at| now.saturating_duration_since(at));
            node.connected && age.is_some_and(|age| age <= fresh)
        });
        let engine = node.and_then(|node| node.engines.get(&a.replica_id));
        match engine.filter(|engine| engine.generation == a.generation && engine.says_load) {
            Some(engine) => {
                load.reporting += 1;
                load.running += u64::from(engine.running);
                load.waiting += u64::from(engine.waiting);
                first_tokens.push(engine.ttft);
            }
            None => load.silent += 1,
        }
    }
    load.ttft_ms = mean_ttft_ms(&first_tokens);
    load
}

fn desired(view: &View) -> Desired<'_> {
    let mut desired = Desired { last_generation: view.last_generation, ..Desired::default() };
    for (name, model) in &view.models {
        if let Some(deployment) = &model.deployment {
            desired.deployments.insert(name, &deployment.value);
        }
        if let Some(placement) = &model.placement {
            desired.placements.insert(name, &placement.value);
        }
    }
    desired
}

fn observed<'a>(
    view: &'a View,
    nodes: &'a BTreeMap<String, Arc<NodeObserved>>,
    lost: &BTreeMap<&'a str, Instant>,
    zones: &'a BTreeMap<String, String>,
    settle: Duration,
) -> Observed<'a> {
    let mut observed = Observed::default();
    let policy = |name: &str| view.node_policies.get(name).map(|stored| &stored.value);
    for (name, node) in &view.nodes {
        let live = nodes.get(name).filter(|live| live.connected);
        let used = live.into_iter().flat_map(|live| &live.gpus);
        let seen = NodeSeen {
            lost_since: None,
            zone: view.zone_of(name).unwrap_or_default(),
            region: &node.value.region,
            labels: Some(&node.value.labels),
            policy: policy(name),
            gpus: &node.value.gpus,
            used_mib: used.map(|gpu| (gpu.uuid.as_str(), gpu.memory_used_mib)).collect(),
        };
        observed.nodes.insert(name, seen);
    }
    for (name, since) in lost {
        let zone = zones.get(*name).map_or("", String::as_str);
        let (lost_since, policy) = (Some(*since), policy(name));
        observed.nodes.insert(name, NodeSeen { lost_since, zone, policy, ..NodeSeen::default() });
    }
    for model in view.models.values() {
        observed.drained.extend(model.drains.keys().map(String::as_str));
    }
    for endpoint in view.models.values().flat_map(|model| model.endpoints.values()) {
        observed.registered.insert(&endpoint.replica_id, endpoint.generation);
    }
    for (name, node) in nodes {
        let Some(assigned) = view.by_node.get(name) else { continue };
        for (id, engine) in node.engines.iter().filter(|(id, _)| assigned.contains_key(*id)) {
            observed.engines.insert(id, engine);
        }
        observed.gone.extend(node.withdrawn.keys().filter(|id| node.is_gone(id, settle)).map(String::as_str));
    }
    observed
}

/// One transaction per model, so that one model's conflict does not hold up the others and no transaction grows with
/// the fleet. Each compares what the plan read: its placement and deployment, and the generation counter.
async fn commit(core: &Core, view: &View, plan: &Plan) -> Result<Committed, StoreError> {
    let mut counter = (view.generation_revision, view.last_generation);
    let mut committed = Committed::All;
    for (name, change) in &plan.changes {
        let model = view.models.get(name);
        let placed = model.and_then(|m| m.placement.as_ref());
        let wanted = model.and_then(|m| m.deployment.as_ref());
        let placement_key = keys::placement(name);
        let mut txn = Txn::new()
            .when(Compare::ModRevision(placement_key.clone(), placed.map_or(0, |p| p.mod_revision)))
            .when(Compare::ModRevision(keys::deployment(name), wanted.map_or(0, |d| d.mod_revision)));
        let newest = change.iter().flat_map(|p| &p.assignments).map(|a| a.generation).max().unwrap_or(0);
        if newest > counter.1 {
            txn = txn
                .when(Compare::ModRevision(keys::GENERATION.into(), counter.0))
                .put(keys::GENERATION, newest.to_string());
        }
        let stays = |id: &str| change.as_ref().is_some_and(|p| p.find(id).is_some());
        let drains = model.iter().flat_map(|m| m.drains.keys());
        for id in drains.filter(|id| !stays(id)) {
            txn = txn.delete(keys::drain(name, id));
        }
        txn = match change {
            Some(placement) => {
                let value = serde_json::to_vec(placement).map_err(|e| StoreError::Invalid(e.to_string()))?;
                txn.put(placement_key, value)
            }
            None => txn.delete(placement_key),
        };
        match core.commit(txn).await? {
            TxnOutcome::Committed { revision } => {
                if newest > counter.1 {
                    counter = (revision, newest);
                }
                core.seen(revision).await;
            }
            TxnOutcome::Conflict { failed, .. } => {
                tracing::debug!(model = name, ?failed, "a plan was outrun; the next pass plans anew");
                committed = Committed::Outrun;
            }
        }
    }
    Ok(committed)
}

fn announce(core: &Core, action: &Action) {
    let label = match action {
        Action::Place { replica_id, node_id, generation } => {
            tracing::info!(replica_id, node_id, generation, "placed");
            "place"
        }
        Action::Withdraw { replica_id, node_id, reason } => {
            tracing::info!(replica_id, node_id, reason, "withdrawn");
            "withdraw"
        }
        Action::Forget { replica_id } => {
            tracing::info!(replica_id, "ended");
            "forget"
        }
        Action::Scale { model, from, to, reason } => {
            tracing::info!(model, from, to, reason, "scaled");
            "scale"
        }
        Action::Sleep { replica_id, node_id } => {
            tracing::info!(replica_id, node_id, "put to sleep");
            "sleep"
        }
        Action::Wake { replica_id, node_id } => {
            tracing::info!(replica_id, node_id, "woken");
            "wake"
        }
        Action::Move { replica_id, node_id, reason } => {
            tracing::info!(replica_id, node_id, reason, "to be moved");
            "move"
        }
    };
    core.metrics.plan_actions.with_label_values(&[label]).inc();
}
