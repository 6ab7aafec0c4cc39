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
    model::NodeObserved,
    plan::{Action, Desired, NodeSeen, Observed, Plan, Rules, plan},
    store::{Compare, StoreError, Txn, TxnOutcome, keys},
    view::View,
};

/// How long the last word of an engine's load is kept: past any use that a proxy has for it.
const LOAD_KEPT: Duration = Duration::from_secs(60);

/// What waits on what, by model, as of a revision.
#[derive(Debug, Default)]
pub struct Reports {
    /// Sentences by model.
    pub waiting: BTreeMap<String, Vec<String>>,
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
    let mut standing = core.leadership.changes();
    let mut liveness = Liveness::default();
    let tick = Duration::from_millis(core.config.reconcile.tick_ms);
    loop {
        views.mark_unchanged();
        roster.mark_unchanged();
        standing.mark_unchanged();
        // Not before the view holds everything that was written before this term: a stale view decides nothing.
        if core.leadership.term() != Some(core.view().term) {
            // Whoever leads next counts for itself how long nodes are lost.
            liveness = Liveness::default();
            core.reports.send_replace(Arc::default());
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                // A process that cannot be elected any more has no sender.
                Ok(()) = standing.changed() => {}
                () = tokio::time::sleep(tick) => {}
            }
            continue;
        }
        let started = Instant::now();
        let outcome = pass(&core, &mut liveness, started).await;
        core.metrics.reconcile_seconds.observe(started.elapsed().as_secs_f64());
        let label = outcome.unwrap_or_else(|error| {
            tracing::warn!(%error, "a pass of reconcile failed; the next one tries again");
            "error"
        });
        core.metrics.reconciles.with_label_values(&[label]).inc();
        tokio::time::sleep(Duration::from_millis(core.config.reconcile.coalesce_ms)).await;
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            _ = roster.changed() => {}
            () = tokio::time::sleep(tick) => {}
        }
    }
}

/// One look, one plan. Returns its metric label.
async fn pass(core: &Core, liveness: &mut Liveness, now: Instant) -> Result<&'static str, StoreError> {
    let view = core.view();
    core.loads.prune(LOAD_KEPT, now);
    core.roster.prune(|node| view.nodes.contains_key(node) || view.by_node.contains_key(node));
    let nodes = core.roster.nodes();
    let named: BTreeSet<&str> = view.by_node.keys().map(String::as_str).collect();
    let lost = liveness.update(&named, |node| view.nodes.contains_key(node), now);
    let desired = desired(&view);
    let observed = observed(&view, &nodes, &lost, core.report_interval());
    let rules = Rules { lost_grace: Duration::from_millis(core.config.fleet.lost_grace_ms) };
    let plan = plan(&desired, &observed, &rules, now);
    for action in &plan.actions {
        announce(core, action);
    }
    let label = if plan.changes.is_empty() { "settled" } else { "changed" };
    let committed = commit(core, &view, &plan).await?;
    core.reports.send_replace(Arc::new(Reports { waiting: plan.report }));
    Ok(match committed {
        Committed::All => label,
        Committed::Outrun => "conflict",
    })
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
    nodes: &'a BTreeMap<String, NodeObserved>,
    lost: &BTreeMap<&'a str, Instant>,
    settle: Duration,
) -> Observed<'a> {
    let mut observed = Observed::default();
    for (name, node) in &view.nodes {
        let seen = NodeSeen { lost_since: None, zone: &node.value.zone, gpus: &node.value.gpus };
        observed.nodes.insert(name, seen);
    }
    for (name, since) in lost {
        observed.nodes.insert(name, NodeSeen { lost_since: Some(*since), zone: "", gpus: &[] });
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
        let drains = model.iter().flat_map(|m| &m.drains);
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
    };
    core.metrics.plan_actions.with_label_values(&[label]).inc();
}
