//! Agents that run nothing: each registers what it is assigned and reports it as ready.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use penstock_proto::{
    FLEET_PROTOCOL_VERSION, MAX_GRPC_MESSAGE_BYTES,
    v1::{self, agent_message::Message as Out, controller_message::Message as In, fleet_client::FleetClient},
};
use tokio::{sync::mpsc, task::JoinSet, time::interval};
use tokio_stream::wrappers::ReceiverStream;

use super::{Options, plane::Plane, until};

/// How often each reports: less often than real agents, so that what is measured is the telling of changes.
const REPORT: Duration = Duration::from_secs(2);

/// Registered endpoints: pool and id.
type Registered = Arc<Mutex<Vec<(String, String)>>>;

pub(super) struct Fleet {
    /// Every endpoint's pool and id.
    pub(super) ids: Vec<(String, String)>,
}

impl Fleet {
    /// Until everything is registered.
    pub(super) async fn start(
        options: &Options,
        plane: &Plane,
        tasks: &mut JoinSet<Result<(), String>>,
    ) -> Result<Self, String> {
        let registered = Registered::default();
        let gpus = options.endpoints.div_ceil(options.nodes) + 1;
        for node in 0..options.nodes {
            tasks.spawn(agent(plane.grpc.clone(), node, gpus, Arc::clone(&registered)));
        }
        for pool in 0..options.pools {
            plane.deploy(&Options::pool(pool), options.replicas(pool)).await?;
        }
        let count = || registered.lock().unwrap_or_else(PoisonError::into_inner).len();
        until("every endpoint to be registered", tasks, || count() >= options.endpoints as usize).await?;
        let ids = registered.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Self { ids })
    }
}

/// One agent's session, for as long as the benchmark runs.
async fn agent(grpc: String, node: u32, gpus: u32, registered: Registered) -> Result<(), String> {
    let node_id = format!("node-{node}");
    let gpu = |n| v1::Gpu { uuid: format!("{node_id}-g{n}"), ..Default::default() };
    let gpus: Vec<v1::Gpu> = (0..gpus).map(gpu).collect();
    let hello = v1::Hello {
        node_id: node_id.clone(),
        agent_version: "bench".into(),
        protocol_version: FLEET_PROTOCOL_VERSION,
        advertise_host: "127.0.0.1".into(),
        zone: format!("z{}", node % 3),
        gpus: gpus.clone(),
        ..Default::default()
    };
    let (outbox, messages) = mpsc::channel(1_024);
    let say = async |message| {
        outbox.send(v1::AgentMessage { message: Some(message) }).await.map_err(|e| e.to_string())
    };
    say(Out::Hello(hello)).await?;
    let client = FleetClient::connect(format!("http://{grpc}")).await.map_err(|e| e.to_string())?;
    let mut client = client.max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let session = client.session(ReceiverStream::new(messages)).await;
    let mut inbound = session.map_err(|s| s.to_string())?.into_inner();
    let mut engines: BTreeMap<String, v1::EngineStatus> = BTreeMap::new();
    let mut ticks = interval(REPORT.mul_f64(0.75 + fastrand::f64() / 2.0));
    loop {
        let message = tokio::select! {
            _ = ticks.tick() => {
                let engines = engines.values().cloned().collect();
                say(Out::Report(v1::NodeReport { engines, gpus: gpus.clone(), ..Default::default() })).await?;
                continue;
            }
            message = inbound.message() => message.map_err(|s| s.to_string())?,
        };
        match message.ok_or("the control plane closed an agent's session")?.message {
            Some(In::Assignments(all)) => {
                for assignment in all.assignments {
                    if engines.contains_key(&assignment.replica_id) {
                        continue;
                    }
                    let (registration, status) = registered_as(&assignment, node, engines.len());
                    engines.insert(assignment.replica_id, status);
                    say(Out::Register(registration)).await?;
                }
            }
            Some(In::Registration(result)) if result.accepted => {
                let pool =
                    engines.get(&result.replica_id).map(|engine| engine.model.clone()).unwrap_or_default();
                let mut all = registered.lock().unwrap_or_else(PoisonError::into_inner);
                all.push((pool, result.replica_id));
            }
            Some(In::Registration(result)) => {
                return Err(format!("a registration was refused: {}", result.reason));
            }
            _ => {}
        }
    }
}

fn registered_as(a: &v1::Assignment, node: u32, number: usize) -> (v1::Registration, v1::EngineStatus) {
    let address = format!("10.{}.{}.1:{}", node / 256, node % 256, 10_000 + number);
    let registration = v1::Registration {
        model: a.model.clone(),
        replica_id: a.replica_id.clone(),
        generation: a.generation,
        address: address.clone(),
        pid: 1,
        ..Default::default()
    };
    let status = v1::EngineStatus {
        model: a.model.clone(),
        replica_id: a.replica_id.clone(),
        generation: a.generation,
        state: v1::EngineState::Ready.into(),
        address,
        pid: 1,
        ..Default::default()
    };
    (registration, status)
}
