//! One agent's session: Hello, Welcome, then assignments down and reports up until either side ends it.
//!
//! Every way it can end is a [`Status`] with a sentence, which the agent logs before it connects again. Ending a session
//! changes nothing in the store: the node's lease runs on, and a reconnect within it finds everything as it was.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{FLEET_PROTOCOL_VERSION, v1};
use tokio::{sync::mpsc, task::JoinSet};
use tonic::{Status, Streaming};

use super::{
    registration::{self, deregister, register},
    roster::Seat,
};
use crate::{
    core::Core,
    model::{Assignment, EngineSpec, Gpu, LoraAdapter, Node, Phase, validate},
    store::{Compare, LeaseId, StoreError, Txn, TxnOutcome, keys},
    view::{NodeAssignments, View},
};

pub(super) type Outbound = mpsc::Sender<Result<v1::ControllerMessage, Status>>;

/// An agent that says nothing at first, or does not read for this long, is gone.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// A renewal of a node's lease holds its session up no longer than this.
pub(super) const RENEWAL: Duration = Duration::from_secs(1);
/// Deregistrations that wait for proxies at the same time; more are answered without waiting.
const WAITING_DEREGISTRATIONS: usize = 1_024;

/// Runs a session to its end and tells the agent why it ended.
pub(super) async fn run(core: Arc<Core>, mut inbound: Streaming<v1::AgentMessage>, outbound: Outbound) {
    core.metrics.fleet_sessions.inc();
    let ended = match hello(&core, &mut inbound).await {
        Ok(hello) => serve(&core, hello, &mut inbound, &outbound).await,
        Err(status) => Err(status),
    };
    core.metrics.fleet_sessions.dec();
    if let Err(status) = ended {
        tracing::info!(code = ?status.code(), reason = status.message(), "a fleet session ended");
        // An agent that has gone away needs no reason.
        drop(tokio::time::timeout(PATIENCE, outbound.send(Err(status))).await);
    }
}

pub(super) async fn hello(
    core: &Core,
    inbound: &mut Streaming<v1::AgentMessage>,
) -> Result<v1::Hello, Status> {
    let first = tokio::select! {
        () = core.stop.cancelled() => return Err(stopping()),
        first = tokio::time::timeout(PATIENCE, inbound.message()) => first,
    };
    let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 10 seconds"))??;
    let Some(v1::agent_message::Message::Hello(hello)) = first.and_then(|m| m.message) else {
        return Err(Status::invalid_argument("a session begins with a Hello"));
    };
    if hello.protocol_version != FLEET_PROTOCOL_VERSION {
        return Err(Status::failed_precondition(format!(
            "the agent speaks fleet protocol {}, this control plane speaks {FLEET_PROTOCOL_VERSION}: \
             run the same release on both",
            hello.protocol_version
        )));
    }
    validate::node_id(&hello.node_id).map_err(Status::invalid_argument)?;
    Ok(hello)
}

async fn serve(
    core: &Arc<Core>,
    hello: v1::Hello,
    inbound: &mut Streaming<v1::AgentMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let node = describe(&hello);
    let seat = core.roster.connect(&node.node_id, hello.gpus);
    core.roster.greeted(&node.node_id, hello.programs);
    let result = async {
        let lease = arrive(core, &node).await.map_err(|e| Status::unavailable(e.to_string()))?;
        tracing::info!(node_id = node.node_id, lease, "an agent is connected");
        let mut session = Session::new(core.clone(), node.clone(), lease, outbound.clone());
        session.run(&seat, inbound).await
    };
    let result = result.await;
    core.logs.disconnect(&node.node_id, &seat);
    core.roster.disconnect(&node.node_id, &seat);
    result
}

fn describe(hello: &v1::Hello) -> Node {
    Node {
        node_id: hello.node_id.clone(),
        agent_version: hello.agent_version.clone(),
        advertise_host: hello.advertise_host.clone(),
        zone: hello.zone.clone(),
        region: hello.region.clone(),
        labels: hello.labels.clone().into_iter().collect(),
        gpus: hello.gpus.iter().map(stored_gpu).collect(),
    }
}

fn stored_gpu(gpu: &v1::Gpu) -> Gpu {
    Gpu {
        uuid: gpu.uuid.clone(),
        name: gpu.name.clone(),
        memory_total_mib: gpu.memory_total_mib,
        fault: gpu.fault.clone(),
        degraded: gpu.health == i32::from(v1::GpuHealth::Degraded),
        numa_node: gpu.numa_node,
        link_group: gpu.link_group.clone(),
    }
}

/// Puts the node's key on its lease: the one it still has, or a new one.
async fn arrive(core: &Core, node: &Node) -> Result<LeaseId, StoreError> {
    let key = keys::node(&node.node_id);
    loop {
        let present = core.store.get(&key).await?;
        let held = match &present {
            Some(entry) if entry.lease != 0 => match core.store.lease_keep_alive(entry.lease).await {
                Ok(()) => Some(entry.lease),
                Err(StoreError::LeaseNotFound(_)) => None,
                Err(error) => return Err(error),
            },
            _ => None,
        };
        let lease = match held {
            Some(lease) => lease,
            None => core.store.lease_grant(core.lease_ttl()).await?,
        };
        let unchanged = Compare::ModRevision(key.clone(), present.map_or(0, |entry| entry.mod_revision));
        match core.commit(put_node(node, lease)?.when(unchanged)).await {
            Ok(TxnOutcome::Committed { .. }) => return Ok(lease),
            // The lease ended, or another session of this node wrote, just now: look again.
            Ok(TxnOutcome::Conflict { .. }) | Err(StoreError::LeaseNotFound(_)) => {
                if held.is_none() {
                    drop(core.store.lease_revoke(lease).await);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn put_node(node: &Node, lease: LeaseId) -> Result<Txn, StoreError> {
    let value = serde_json::to_vec(node).map_err(|e| StoreError::Invalid(e.to_string()))?;
    Ok(Txn::new().put_leased(keys::node(&node.node_id), value, lease))
}

struct Session {
    core: Arc<Core>,
    node: Node,
    registrant: registration::Node,
    outbound: Outbound,
    /// The set that was sent last.
    sent: Option<Vec<v1::Assignment>>,
    /// The models that it was told to fetch; an agent begins with none.
    wished: Vec<v1::PrefetchWish>,
    /// What that was made from.
    seen: Option<Arc<NodeAssignments>>,
    renewed: Instant,
    /// Deregistrations that wait for proxies.
    waiting: JoinSet<v1::DeregistrationResult>,
}

impl Session {
    fn new(core: Arc<Core>, node: Node, lease: LeaseId, outbound: Outbound) -> Self {
        let registrant = registration::Node { node_id: node.node_id.clone(), zone: node.zone.clone(), lease };
        let (renewed, waiting) = (Instant::now(), JoinSet::new());
        let wished = Vec::new();
        Self { core, node, registrant, outbound, sent: None, wished, seen: None, renewed, waiting }
    }

    async fn run(&mut self, seat: &Seat, inbound: &mut Streaming<v1::AgentMessage>) -> Result<(), Status> {
        use v1::controller_message::Message;
        let core = self.core.clone();
        let welcome = v1::Welcome {
            term: core.view().published_term(),
            lease_ttl_ms: core.config.fleet.lease_ttl_ms,
            report_interval_ms: core.config.fleet.report_interval_ms,
        };
        self.send(Message::Welcome(welcome)).await?;
        let mut views = core.views.clone();
        views.mark_changed();
        let mut heard = tokio::time::Instant::now();
        let term = core.leadership.elected();
        let mut log_requests = core.logs.connect(&self.node.node_id, seat);
        loop {
            tokio::select! {
                biased;
                () = core.stop.cancelled() => return Err(stopping()),
                () = core.leadership.lost(term) => {
                    return Err(Status::unavailable("this control plane leads no more: connect again"));
                }
                () = seat.replaced.cancelled() => {
                    let node = &self.node.node_id;
                    return Err(Status::aborted(format!("node {node} connected again: the newer session goes on")));
                }
                () = tokio::time::sleep_until(heard + core.lease_ttl()) => {
                    return Err(Status::deadline_exceeded("no report for as long as the lease lasts"));
                }
                changed = views.changed() => {
                    changed.map_err(|_| stopping())?;
                    let view = views.borrow_and_update().clone();
                    self.push(&view).await?;
                }
                Some(done) = self.waiting.join_next(), if !self.waiting.is_empty() => {
                    if let Ok(result) = done {
                        self.send(Message::Deregistration(result)).await?;
                    }
                }
                Some(request) = log_requests.recv() => self.send(Message::Log(request)).await?,
                message = inbound.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    heard = tokio::time::Instant::now();
                    match message.message {
                        Some(v1::agent_message::Message::Log(chunk)) => core.logs.take(seat, chunk),
                        _ => self.take(message).await?,
                    }
                }
            }
        }
    }

    async fn take(&mut self, message: v1::AgentMessage) -> Result<(), Status> {
        use v1::agent_message::Message;
        match message.message {
            Some(Message::Report(report)) => self.report(report).await,
            Some(Message::Register(asked)) => self.register(asked).await,
            Some(Message::Deregister(asked)) => self.deregister(asked).await,
            Some(Message::Load(report)) => {
                let loads = report.loads.into_iter();
                self.loads(loads.filter_map(|replica| Some((replica.replica_id, replica.load?))));
                Ok(())
            }
            Some(Message::Hello(_)) => Err(Status::invalid_argument("a session has one Hello, at its start")),
            // A newer agent may say more than this build knows.
            Some(Message::Log(_)) | None => Ok(()),
        }
    }

    async fn report(&mut self, report: v1::NodeReport) -> Result<(), Status> {
        self.core.metrics.fleet_reports.inc();
        let gpus: Vec<Gpu> = report.gpus.iter().map(stored_gpu).collect();
        self.loads(report.engines.iter().filter_map(|engine| {
            Some((
                engine.replica_id.clone(),
                v1::EngineLoad { generation: engine.generation, ..engine.load? },
            ))
        }));
        self.core.roster.report(&self.node.node_id, report, Instant::now());
        if self.renewed.elapsed() >= self.core.lease_ttl() / 4 {
            let renewal = self.core.store.lease_keep_alive(self.registrant.lease);
            match tokio::time::timeout(RENEWAL, renewal).await {
                Ok(Ok(())) => self.renewed = Instant::now(),
                Ok(Err(error @ StoreError::LeaseNotFound(_))) => return Err(ended(error)),
                // A store without quorum ends no lease either: the session outlives the outage.
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(
                        node_id = self.node.node_id,
                        "a node's lease was not renewed; trying again"
                    );
                }
            }
        }
        // Figures that placement does not use are not stored, so this writes only when a GPU fails, comes or goes.
        if gpus != self.node.gpus {
            self.node.gpus = gpus;
            self.core
                .commit(put_node(&self.node, self.registrant.lease).map_err(ended)?)
                .await
                .map_err(ended)?;
        }
        Ok(())
    }

    /// Takes in what is said of this node's engines.
    fn loads(&self, loads: impl Iterator<Item = (String, v1::EngineLoad)>) {
        let (view, now) = (self.core.view(), Instant::now());
        let assigned = view.by_node.get(&self.node.node_id);
        for (id, load) in loads {
            let present = assigned.and_then(|assigned| assigned.get(&id));
            let outcome = match present.filter(|(_, assignment)| assignment.generation == load.generation) {
                Some((model, _)) if self.core.loads.put(model, &id, &load, now) => "new",
                Some(_) => "known",
                None => "unassigned",
            };
            self.core.metrics.loads.with_label_values(&[outcome]).inc();
        }
    }

    async fn register(&mut self, asked: v1::Registration) -> Result<(), Status> {
        let verdict = register(&self.core, &self.registrant, &asked).await;
        let (accepted, outcome, reason) = match verdict {
            Ok(outcome) => (true, outcome, String::new()),
            Err(refusal) => (false, refusal.outcome, refusal.reason),
        };
        self.core.metrics.registrations.with_label_values(&[outcome]).inc();
        let (replica_id, generation) = (asked.replica_id, asked.generation);
        tracing::info!(replica_id, generation, outcome, reason, "registration");
        let result = v1::RegistrationResult { replica_id, generation, accepted, reason };
        self.send(v1::controller_message::Message::Registration(result)).await
    }

    /// Proxies learn first, then the agent may stop the engine: the answer waits, for a bounded time, until every
    /// connected proxy has acknowledged tables without it.
    async fn deregister(&mut self, asked: v1::Deregistration) -> Result<(), Status> {
        let revision = deregister(&self.core, &self.registrant, &asked).await.map_err(ended)?;
        self.core.metrics.deregistrations.inc();
        let (replica_id, generation) = (asked.replica_id, asked.generation);
        tracing::info!(replica_id, generation, revision, "deregistration");
        let result = v1::DeregistrationResult { replica_id, generation };
        if self.waiting.len() >= WAITING_DEREGISTRATIONS {
            return self.send(v1::controller_message::Message::Deregistration(result)).await;
        }
        let core = self.core.clone();
        self.waiting.spawn(async move {
            let patience = Duration::from_millis(core.config.fleet.deregister_ack_wait_ms);
            let everywhere = async {
                let (here, ()) = tokio::join!(
                    core.hub.wait_acknowledged(revision, patience),
                    core.followers.acknowledged_by_all(revision)
                );
                here
            };
            if !tokio::time::timeout(patience, everywhere).await.unwrap_or(false) {
                tracing::warn!(
                    replica_id = result.replica_id,
                    "not every proxy acknowledged a removal in time"
                );
            }
            result
        });
        Ok(())
    }

    /// Sends the node's assignments if they differ from what was sent last.
    async fn push(&mut self, view: &View) -> Result<(), Status> {
        let wishes = wishes(view, &self.node.node_id);
        if wishes != self.wished {
            self.wished.clone_from(&wishes);
            self.send(v1::controller_message::Message::Prefetches(v1::Prefetches { wishes })).await?;
        }
        let present = view.by_node.get(&self.node.node_id).cloned().unwrap_or_default();
        if self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &present) || **seen == *present) {
            return Ok(());
        }
        let active = present.values().filter(|(_, a)| a.phase == Phase::Active);
        let assignments: Vec<_> = active.map(|(model, a)| on_wire(model, a)).collect();
        if self.sent.as_ref() != Some(&assignments) {
            let message = v1::Assignments {
                term: view.published_term(),
                revision: view.revision,
                assignments: assignments.clone(),
            };
            self.send(v1::controller_message::Message::Assignments(message)).await?;
            self.sent = Some(assignments);
        }
        let leaving = present.iter().filter(|(_, (_, a))| a.phase == Phase::Leaving);
        let leaving: Vec<String> = leaving.map(|(id, _)| id.clone()).collect();
        self.core.roster.assigned(&self.node.node_id, &leaving, Instant::now());
        self.seen = Some(present);
        Ok(())
    }

    async fn send(&self, message: v1::controller_message::Message) -> Result<(), Status> {
        let message = v1::ControllerMessage { message: Some(message) };
        match tokio::time::timeout(PATIENCE, self.outbound.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the agent has gone")),
            Err(_) => Err(Status::deadline_exceeded("the agent does not read its messages")),
        }
    }
}

fn on_wire(model: &str, a: &Assignment) -> v1::Assignment {
    v1::Assignment {
        model: model.to_owned(),
        replica_id: a.replica_id.clone(),
        generation: a.generation,
        spec: Some(spec_on_wire(model, &a.spec)),
        gpu_uuids: a.gpu_uuids.clone(),
        asleep: a.asleep,
    }
}

fn spec_on_wire(model: &str, spec: &EngineSpec) -> v1::EngineSpec {
    let mut wire = v1::EngineSpec {
        engine: spec.engine.clone(),
        model_path: spec.model_path.clone(),
        served_model_name: model.to_owned(),
        args: spec.args.clone(),
        env: spec.env.clone().into_iter().collect(),
        lora: spec.lora.iter().map(lora_on_wire).collect(),
        options: (!spec.options.is_default()).then(|| (&spec.options).into()),
        ..v1::EngineSpec::default()
    };
    spec.warm.put_on(&mut wire);
    wire
}

/// The deployed models that operators want on a node's disks.
fn wishes(view: &View, node_id: &str) -> Vec<v1::PrefetchWish> {
    let models = view.node_policies.get(node_id).into_iter().flat_map(|stored| &stored.value.prefetch);
    let wish = |name: &String| {
        let deployment = view.models.get(name)?.deployment.as_ref()?;
        Some(v1::PrefetchWish { model: name.clone(), spec: Some(spec_on_wire(name, &deployment.value.spec)) })
    };
    models.filter_map(wish).collect()
}

fn lora_on_wire(adapter: &LoraAdapter) -> v1::LoraAdapter {
    v1::LoraAdapter { name: adapter.name.clone(), path: adapter.path.clone() }
}

pub(super) fn stopping() -> Status {
    Status::unavailable("the control plane is stopping: connect again")
}

fn ended(error: StoreError) -> Status {
    match error {
        StoreError::LeaseNotFound(_) => Status::aborted("the node's lease ran out: connect again"),
        other => Status::unavailable(other.to_string()),
    }
}
