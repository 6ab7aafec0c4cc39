//! The scripted control plane: a real gRPC server that notes what agents say and sends what the test wants.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use penstock_proto::v1::{
    self,
    agent_message::Message as FromAgent,
    controller_message::Message as ToAgent,
    fleet_server::{Fleet, FleetServer},
};
use tokio::{net::TcpListener, sync::mpsc, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Script {
    assignments: v1::Assignments,
    refuse_registrations: Option<String>,
    answer_deregistrations: bool,
    sessions: Vec<mpsc::Sender<Result<v1::ControllerMessage, Status>>>,
}

/// What agents said, in order, and what they are told.
pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    script: Arc<Mutex<Script>>,
    heard: Arc<watch::Sender<Vec<FromAgent>>>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl ControlPlane {
    pub(crate) async fn start() -> Self {
        Self::start_at(
            "127.0.0.1:0".parse().unwrap(),
            v1::Assignments { term: 1, revision: 1, ..Default::default() },
        )
        .await
    }

    /// A control plane on a known address, as after a restart of its own.
    pub(crate) async fn start_at(address: SocketAddr, assignments: v1::Assignments) -> Self {
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let address = listener.local_addr().unwrap();
        let script = Script { assignments, answer_deregistrations: true, ..Default::default() };
        let script = Arc::new(Mutex::new(script));
        let heard = Arc::new(watch::Sender::new(Vec::new()));
        let stop = CancellationToken::new();
        let service = Service { script: script.clone(), heard: heard.clone(), stop: stop.clone() };
        let server = tonic::transport::Server::builder()
            .add_service(FleetServer::new(service))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        let server = tokio::spawn(async move { server.await.unwrap() });
        Self { address, script, heard, stop, server }
    }

    /// Goes away, closing every session.
    pub(crate) async fn stop(self) {
        self.script.lock().unwrap().sessions.clear();
        self.stop.cancel();
        self.server.await.unwrap();
    }

    /// Sends a new full set to every agent.
    pub(crate) async fn assign(&self, term: u64, revision: u64, assignments: Vec<v1::Assignment>) {
        let assignments = v1::Assignments { term, revision, assignments };
        let sessions = {
            let mut script = self.script.lock().unwrap();
            script.assignments = assignments.clone();
            script.sessions.clone()
        };
        for session in sessions {
            let message = v1::ControllerMessage { message: Some(ToAgent::Assignments(assignments.clone())) };
            session.send(Ok(message)).await.ok();
        }
    }

    /// Says something of a log to every agent.
    pub(crate) async fn say_of_log(&self, request: v1::LogRequest) {
        let sessions = self.script.lock().unwrap().sessions.clone();
        for session in sessions {
            let message = v1::ControllerMessage { message: Some(ToAgent::Log(request.clone())) };
            session.send(Ok(message)).await.ok();
        }
    }

    /// Sends assignments as they are to every agent, whatever they were before; a new session still gets the last ones that
    /// were assigned.
    pub(crate) async fn replay(&self, assignments: &v1::Assignments) {
        let sessions = self.script.lock().unwrap().sessions.clone();
        for session in sessions {
            let message = v1::ControllerMessage { message: Some(ToAgent::Assignments(assignments.clone())) };
            session.send(Ok(message)).await.ok();
        }
    }

    /// Sends the whole set of models that are to be fetched ahead to every agent that is connected.
    pub(crate) async fn wish(&self, wishes: Vec<v1::PrefetchWish>) {
        let sessions = self.script.lock().unwrap().sessions.clone();
        let wishes = v1::Prefetches { wishes };
        for session in sessions {
            let message = v1::ControllerMessage { message: Some(ToAgent::Prefetches(wishes.clone())) };
            session.send(Ok(message)).await.ok();
        }
    }

    pub(crate) fn refuse_registrations(&self, reason: Option<&str>) {
        self.script.lock().unwrap().refuse_registrations = reason.map(str::to_owned);
    }

    pub(crate) fn answer_deregistrations(&self, answer: bool) {
        self.script.lock().unwrap().answer_deregistrations = answer;
    }

    /// Everything heard so far.
    pub(crate) fn heard(&self) -> Vec<FromAgent> {
        self.heard.borrow().clone()
    }

    /// Waits until `find` finds something in what was heard from position `from` on.
    pub(crate) async fn hears<T>(
        &self,
        what: &str,
        from: usize,
        find: impl Fn(&[FromAgent]) -> Option<T>,
    ) -> T {
        let mut heard = self.heard.subscribe();
        let wait = async {
            loop {
                if let Some(found) = find(heard.borrow_and_update().get(from..).unwrap_or_default()) {
                    return found;
                }
                heard.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found,
            Err(_) => panic!("not heard: {what}; last: {:#?}", self.heard().last()),
        }
    }

    /// Waits for a registration of the replica, from position `from` on.
    pub(crate) async fn hears_registration(&self, replica_id: &str, from: usize) -> v1::Registration {
        let wanted = |m: &FromAgent| match m {
            FromAgent::Register(r) if r.replica_id == replica_id => Some(r.clone()),
            _ => None,
        };
        self.hears(&format!("registration of {replica_id}"), from, |heard| heard.iter().find_map(wanted))
            .await
    }

    /// Waits for a report in which the replica's status satisfies `is`, from position `from` on.
    pub(crate) async fn hears_status(
        &self,
        replica_id: &str,
        from: usize,
        is: impl Fn(&v1::EngineStatus) -> bool,
    ) -> v1::EngineStatus {
        let wanted = |m: &FromAgent| match m {
            FromAgent::Report(r) => r.engines.iter().find(|e| e.replica_id == replica_id && is(e)).cloned(),
            _ => None,
        };
        self.hears(&format!("status of {replica_id}"), from, |heard| heard.iter().find_map(wanted)).await
    }

    /// Waits for a report without the replica, from position `from` on.
    pub(crate) async fn hears_of_no(&self, replica_id: &str, from: usize) {
        let gone = |m: &FromAgent| match m {
            FromAgent::Report(r) => r.engines.iter().all(|e| e.replica_id != replica_id),
            _ => false,
        };
        self.hears(&format!("a report without {replica_id}"), from, |heard| {
            heard.iter().any(gone).then_some(())
        })
        .await
    }
}

struct Service {
    script: Arc<Mutex<Script>>,
    heard: Arc<watch::Sender<Vec<FromAgent>>>,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Fleet for Service {
    type SessionStream = ReceiverStream<Result<v1::ControllerMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let (outbox, outbound) = mpsc::channel(64);
        let (script, heard, stop) = (self.script.clone(), self.heard.clone(), self.stop.clone());
        tokio::spawn(async move {
            while let Some(Ok(Some(message))) = stop.run_until_cancelled(inbound.message()).await {
                let message = message.message.unwrap();
                for answer in answers(&script, &message, &outbox) {
                    outbox.send(Ok(v1::ControllerMessage { message: Some(answer) })).await.ok();
                }
                heard.send_modify(|heard| heard.push(message));
            }
            script.lock().unwrap().sessions.retain(|session| !session.same_channel(&outbox));
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

fn answers(
    script: &Mutex<Script>,
    message: &FromAgent,
    outbox: &mpsc::Sender<Result<v1::ControllerMessage, Status>>,
) -> Vec<ToAgent> {
    let mut script = script.lock().unwrap();
    match message {
        FromAgent::Hello(_) => {
            script.sessions.push(outbox.clone());
            let welcome =
                v1::Welcome { term: script.assignments.term, lease_ttl_ms: 5_000, report_interval_ms: 100 };
            vec![ToAgent::Welcome(welcome), ToAgent::Assignments(script.assignments.clone())]
        }
        FromAgent::Register(r) => vec![ToAgent::Registration(v1::RegistrationResult {
            replica_id: r.replica_id.clone(),
            generation: r.generation,
            accepted: script.refuse_registrations.is_none(),
            reason: script.refuse_registrations.clone().unwrap_or_default(),
        })],
        FromAgent::Deregister(d) if script.answer_deregistrations => {
            vec![ToAgent::Deregistration(v1::DeregistrationResult {
                replica_id: d.replica_id.clone(),
                generation: d.generation,
            })]
        }
        _ => vec![],
    }
}
