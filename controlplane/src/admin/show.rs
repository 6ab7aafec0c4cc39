//! How things look from outside: deployments with their status, endpoints with their state. Pure.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use crate::{
    model::{Assignment, EngineObserved, EngineState, NodeObserved, Phase},
    view::{ModelView, View},
};

/// One replica, from its assignment, its registration and its node's report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct EndpointShown {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) node: String,
    pub(super) address: String,
    pub(super) state: &'static str,
    pub(super) generation: u64,
    pub(super) pid: u32,
    pub(super) restarts: u32,
    pub(super) running: u32,
    pub(super) waiting: u32,
    pub(super) kv_used_ratio: f32,
    pub(super) adapters: Vec<String>,
    pub(super) reason: String,
    /// How it became ready last: "cold", "prefetched", "restored", "woken", "adopted", or empty.
    pub(super) started: String,
    pub(super) ready_ms: u64,
    /// Why not in a warmer way that was asked for.
    pub(super) start_note: String,
    pub(super) engine_version: String,
    pub(super) kv_events_address: String,
    pub(super) notes: Vec<String>,
    /// How its engine ended the last time, unasked.
    pub(super) last_exit: Option<ExitShown>,
}

/// Why an engine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct ExitShown {
    pub(super) cause: String,
    pub(super) detail: String,
    pub(super) advice: String,
    pub(super) retry_helps: bool,
    /// When its node last reported.
    pub(super) age_s: u64,
}

/// One LoRA adapter of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct AdapterShown {
    pub(super) name: String,
    /// Endpoints that have it loaded.
    pub(super) endpoints: usize,
    /// Why clients cannot ask for it by its name; empty if they can.
    pub(super) reason: String,
}

/// A deployment's adapters. A deployment or a route of the same name wins over an adapter.
pub(super) fn adapters(view: &View, model: &ModelView) -> Vec<AdapterShown> {
    let taken = |name: &str| {
        let deployed = view.models.get(name).is_some_and(|model| model.deployment.is_some());
        match (view.routes.contains_key(name), deployed) {
            (true, _) => "there is a route of that name, which is served instead".to_owned(),
            (_, true) => "there is a deployment of that name, which is served instead".to_owned(),
            _ => String::new(),
        }
    };
    let has = |name: &str| model.endpoints.values().filter(|e| e.adapters.iter().any(|a| a == name)).count();
    let shown = |name: &str| AdapterShown { name: name.into(), endpoints: has(name), reason: taken(name) };
    model.adapters().into_iter().map(shown).collect()
}

/// How a deployment stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Status {
    pub(super) ready: usize,
    pub(super) starting: usize,
    pub(super) draining: usize,
    pub(super) failed: usize,
    /// Serving nobody, and to be woken.
    pub(super) asleep: usize,
    /// How many it shall have: the operator's number, or what autoscaling makes of it.
    pub(super) wanted: u32,
    /// Its rollout got nothing done for as long as it allows.
    pub(super) stalled: bool,
    pub(super) waiting: Vec<String>,
}

/// Every replica of a model: those with a place in order, then registered ones that have none any more.
pub(super) fn endpoints(
    view: &View,
    name: &str,
    model: &ModelView,
    nodes: &BTreeMap<String, Arc<NodeObserved>>,
) -> Vec<EndpointShown> {
    let placed = model.placement.iter().flat_map(|p| &p.value.assignments);
    let mut out: Vec<EndpointShown> = placed
        .map(|a| {
            let engine = nodes.get(&a.node_id).and_then(|n| n.engines.get(&a.replica_id));
            let engine = engine.filter(|e| e.generation == a.generation);
            let present = view.nodes.contains_key(&a.node_id);
            let (state, reason) = state(model, a, engine, present);
            let mut shown = shown(name, &a.replica_id, &a.node_id, a.generation, engine);
            (shown.state, shown.reason) = (state, reason);
            if let Some(registered) = model.endpoints.get(&a.replica_id) {
                shown.address.clone_from(&registered.address);
                shown.pid = registered.pid;
                shown.adapters.clone_from(&registered.adapters);
            }
            shown
        })
        .collect();
    let has_place = |id: &str| model.placement.as_ref().is_some_and(|p| p.value.find(id).is_some());
    for endpoint in model.endpoints.values().filter(|e| !has_place(&e.replica_id)) {
        let mut shown = shown(name, &endpoint.replica_id, &endpoint.node_id, endpoint.generation, None);
        shown.address.clone_from(&endpoint.address);
        (shown.state, shown.pid) = ("draining", endpoint.pid);
        shown.reason = "it has no assignment any more".into();
        out.push(shown);
    }
    out
}

fn shown(
    model: &str,
    id: &str,
    node: &str,
    generation: u64,
    engine: Option<&EngineObserved>,
) -> EndpointShown {
    EndpointShown {
        id: id.to_owned(),
        model: model.to_owned(),
        node: node.to_owned(),
        address: engine.map(|e| e.address.clone()).unwrap_or_default(),
        state: "starting",
        generation,
        pid: engine.map_or(0, |e| e.pid),
        restarts: engine.map_or(0, |e| e.restarts),
        running: engine.map_or(0, |e| e.running),
        waiting: engine.map_or(0, |e| e.waiting),
        kv_used_ratio: engine.map_or(0.0, |e| e.kv_used_ratio),
        adapters: Vec::new(),
        reason: String::new(),
        started: engine.map(|e| e.started.way.clone()).unwrap_or_default(),
        ready_ms: engine.map_or(0, |e| e.started.ready_ms),
        start_note: engine.map(|e| e.started.note.clone()).unwrap_or_default(),
        engine_version: engine.map(|e| e.engine_version.clone()).unwrap_or_default(),
        kv_events_address: engine.map(|e| e.kv_events_address.clone()).unwrap_or_default(),
        notes: engine.map(|e| e.notes.clone()).unwrap_or_default(),
        last_exit: engine.and_then(|e| e.last_exit.as_ref()).map(|exit| ExitShown {
            cause: exit.cause.clone(),
            detail: exit.detail.clone(),
            advice: exit.advice.clone(),
            retry_helps: exit.retry_helps,
            age_s: exit.age_ms / 1_000,
        }),
    }
}

fn state(
    model: &ModelView,
    a: &Assignment,
    engine: Option<&EngineObserved>,
    present: bool,
) -> (&'static str, String) {
    let said = || engine.map(|e| e.reason.clone()).unwrap_or_default();
    let registered = model.endpoints.get(&a.replica_id).filter(|e| e.generation == a.generation);
    match (a.phase, registered, engine) {
        (Phase::Leaving, Some(_), _) => ("draining", "it shall end".into()),
        (Phase::Leaving, None, Some(e)) if e.state == EngineState::Draining => ("draining", said()),
        (Phase::Leaving, None, _) => ("stopping", "it shall end".into()),
        (Phase::Active, Some(_), _) if a.asleep => ("draining", "it is put to sleep".into()),
        (Phase::Active, Some(_), _) if model.drains.contains_key(&a.replica_id) => {
            let moves = model.drains.get(&a.replica_id).is_some_and(|drain| drain.move_streams);
            let reason =
                if moves { "an operator drains it and moves its streams" } else { "an operator drains it" };
            ("draining", reason.into())
        }
        // What its agent says of a ready one: figures that it does not tell, for one.
        (Phase::Active, Some(_), Some(e)) if e.state == EngineState::Ready => ("ready", said()),
        (Phase::Active, Some(_), _) => ("ready", String::new()),
        (Phase::Active, None, _) if !present => ("lost", "its node is lost".into()),
        // It may still drain, or be on its way.
        (Phase::Active, None, Some(e)) if a.asleep && e.state == EngineState::Ready => ("draining", said()),
        (Phase::Active, None, Some(e)) if e.state == EngineState::Ready => ("registering", said()),
        (Phase::Active, None, Some(e)) => (e.state.as_str(), said()),
        (Phase::Active, None, None) => ("starting", String::new()),
    }
}

/// Counts replicas by what they mean for the deployment.
pub(super) fn status(endpoints: &[EndpointShown], waiting: Vec<String>) -> Status {
    let mut status = Status { waiting, ..Status::default() };
    for endpoint in endpoints {
        match endpoint.state {
            "ready" => status.ready += 1,
            "draining" | "stopping" => status.draining += 1,
            "failed" => status.failed += 1,
            "asleep" => status.asleep += 1,
            _ => status.starting += 1,
        }
    }
    status
}
