//! The session with the control plane: dial, Hello, then reports out and assignments in, for ever.
//!
//! Everything told here is level-triggered: a report is the whole state, registrations are told until they are answered,
//! so a session that breaks at any point loses nothing. While there is no session, engines go on; nothing is stopped
//! because the control plane is away.
//!
//! Absent here: what to do about assignments (`reconcile`), and which engines want to be routed to (`registrations`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use penstock_config::agent::FleetConfig;
use penstock_proto::{
    FLEET_PROTOCOL_VERSION, MAX_GRPC_MESSAGE_BYTES,
    tls::{ClientTls, dial, in_words},
    v1::{self, agent_message::Message as Out, controller_message::Message as In, fleet_client::FleetClient},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    backoff::Backoff, board::Told, directory::Directory, engine::context::Context, intake::Intake,
    log_requests::LogRequests,
};

/// Messages that wait to be sent. A control plane that does not read is given up after [`SEND_DEADLINE`].
const OUTBOX: usize = 64;
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// A peer that is gone without a word is noticed within the sum of these two.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_DEADLINE: Duration = Duration::from_secs(5);
/// Bounds of the report interval that a control plane may ask for.
const REPORT_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// Changes closer together than this go out in one report.
const COALESCE: Duration = Duration::from_millis(10);
/// How often loads that changed are told: as often as they are read, and less time than that passes in between.
const LOADS: Duration = Duration::from_millis(100);
/// How long a closing session waits for the control plane to have read the last report.
const FAREWELL: Duration = Duration::from_millis(500);

/// Who this node is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Unique in the fleet.
    pub(crate) node_id: String,
    /// Host under which proxies reach its engines.
    pub(crate) advertise_host: String,
    /// Fault domain; may be empty.
    pub(crate) zone: String,
    /// Group of zones; may be empty.
    pub(crate) region: String,
    /// Free-form properties.
    pub(crate) labels: HashMap<String, String>,
}

/// How the session stands, for `/readyz`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SessionStatus {
    /// The control plane's address while a session stands; else empty.
    pub(crate) connected_to: String,
    /// A control plane has welcomed this agent at least once.
    pub(crate) was_welcomed: bool,
    /// Why the last try failed; empty while a session stands.
    pub(crate) last_error: String,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Address(String),
    #[error("{0}")]
    Directory(String),
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("refused: {0}")]
    Refused(String),
    #[error("no answer to our Hello within {0} ms")]
    Silent(u64),
    #[error("the first message was no Welcome")]
    NotWelcomed,
    #[error("closed by the control plane")]
    Closed,
    #[error("broken: {0}")]
    Broken(String),
    #[error("the control plane does not read")]
    Stalled,
}

/// Keeps a session with one of the control planes.
pub(crate) struct Fleet {
    /// Shared with the supervisors.
    pub(crate) cx: Arc<Context>,
    /// `[controlplane]`
    pub(crate) config: FleetConfig,
    /// Towards the control planes; None: in clear.
    pub(crate) tls: Option<ClientTls>,
    /// Said in Hello.
    pub(crate) identity: Identity,
    /// Where the control planes are.
    pub(crate) directory: Directory,
    /// Where assignments go.
    pub(crate) intake: Intake,
    /// Shown by `/readyz`.
    pub(crate) status: Arc<Mutex<SessionStatus>>,
}

impl Fleet {
    /// Until `stop`; the last report then says how things were left.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let backoff = Backoff::new(self.config.backoff_min_ms, self.config.backoff_max_ms);
        let mut rng = fastrand::Rng::new();
        let mut failures = 0_u32;
        loop {
            let Some(found) = stop.run_until_cancelled(self.directory.next()).await else { return };
            let (address, ended) = match found {
                Ok(address) => {
                    let ended = self.session(&address, &stop).await;
                    (address, ended)
                }
                Err(why) => (String::new(), Err((SessionError::Directory(why), false))),
            };
            let Err((error, was_welcomed)) = ended else { return };
            self.note_end(&address, &error);
            failures = if was_welcomed { 1 } else { failures.saturating_add(1) };
            if stop.run_until_cancelled(sleep(backoff.pause(failures, &mut rng))).await.is_none() {
                return;
            }
        }
    }

    /// One session. `Ok` when it was closed because of `stop`; with an error, whether it had been welcomed.
    async fn session(&self, address: &str, stop: &CancellationToken) -> Result<(), (SessionError, bool)> {
        let Some(opened) = stop.run_until_cancelled(self.open(address)).await else { return Ok(()) };
        let (outbox, welcome, inbound) = opened.map_err(|e| (e, false))?;
        self.note_start(address, &welcome);
        let result = self.exchange(outbox, inbound, &welcome, stop).await;
        self.cx.registry.set_connected(false);
        self.cx.metrics.session_connected.set(0);
        result.map_err(|e| (e, true))
    }

    /// Connects and says Hello; everything until Welcome within one deadline.
    async fn open(
        &self,
        address: &str,
    ) -> Result<(mpsc::Sender<v1::AgentMessage>, v1::Welcome, Streaming<v1::ControllerMessage>), SessionError>
    {
        let deadline = Duration::from_millis(self.config.connect_ms);
        let endpoint = dial(address, self.tls.as_ref())
            .map_err(SessionError::Address)?
            .connect_timeout(deadline)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_DEADLINE)
            .keep_alive_while_idle(true);
        let opening = async {
            let channel = endpoint.connect().await.map_err(|e| SessionError::Connect(in_words(&e)))?;
            let mut client = FleetClient::new(channel).max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES);
            let (outbox, messages) = mpsc::channel(OUTBOX);
            send(&outbox, Out::Hello(self.hello())).await?;
            let answer = client.session(ReceiverStream::new(messages)).await;
            let mut inbound = answer.map_err(|s| SessionError::Refused(status_text(&s)))?.into_inner();
            let first = inbound.message().await.map_err(|s| SessionError::Refused(status_text(&s)))?;
            match first.and_then(|m| m.message) {
                Some(In::Welcome(welcome)) => Ok((outbox, welcome, inbound)),
                _ => Err(SessionError::NotWelcomed),
            }
        };
        timeout(deadline, opening).await.unwrap_or(Err(SessionError::Silent(self.config.connect_ms)))
    }

    async fn exchange(
        &self,
        outbox: mpsc::Sender<v1::AgentMessage>,
        mut inbound: Streaming<v1::ControllerMessage>,
        welcome: &v1::Welcome,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let retry = Duration::from_millis(self.config.register_retry_ms);
        let mut reports = interval(
            Duration::from_millis(welcome.report_interval_ms).clamp(REPORT_BOUNDS.0, REPORT_BOUNDS.1),
        );
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut loads = interval(LOADS);
        loads.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = Told::new();
        let mut logs = LogRequests::new(self.cx.clone(), outbox.clone());
        let (mut board, mut registry) = (self.cx.board.changes(), self.cx.registry.changes());
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                message = inbound.message() => {
                    let message = message.map_err(|s| SessionError::Broken(status_text(&s)))?;
                    match message.ok_or(SessionError::Closed)? {
                        v1::ControllerMessage { message: Some(In::Log(request)) } => logs.take(request),
                        message => self.receive(message).await,
                    }
                    continue;
                }
                _ = loads.tick() => {
                    let loads = self.cx.board.load_changes(&mut told, Instant::now());
                    if !loads.is_empty() {
                        send(&outbox, Out::Load(v1::LoadReport { loads })).await?;
                    }
                    continue;
                }
                _ = reports.tick() => {}
                _ = board.changed() => sleep(COALESCE).await,
                _ = registry.changed() => {}
            }
            board.mark_unchanged();
            registry.mark_unchanged();
            send(&outbox, Out::Report(self.report())).await?;
            for message in self.cx.registry.due(Instant::now(), retry) {
                send(&outbox, message).await?;
            }
        }
        logs.end().await;
        send(&outbox, Out::Report(self.report())).await?;
        drop(outbox);
        // The stream is read to its end, so that what was just sent is not cut off with the connection.
        let closed = async { while let Ok(Some(_)) = inbound.message().await {} };
        timeout(FAREWELL, closed).await.ok();
        Ok(())
    }

    async fn receive(&self, message: v1::ControllerMessage) {
        let (registry, metrics) = (&self.cx.registry, &self.cx.metrics);
        match message.message {
            Some(In::Assignments(assignments)) => match self.intake.accept(assignments, metrics).await {
                Ok(()) => registry.change(|r| r.assignments_arrived()),
                Err(stale) => tracing::error!("{stale}"),
            },
            Some(In::Registration(result)) => {
                let counted = registry.change(|r| r.answered(&result, Instant::now()));
                let v1::RegistrationResult { replica_id, generation, accepted, reason } = result;
                match (counted, accepted) {
                    (false, _) => tracing::debug!(replica_id, generation, "a late answer to a registration"),
                    (true, true) => {
                        metrics.registrations_accepted.inc();
                        self.log_registered(&replica_id, generation);
                    }
                    (true, false) => {
                        metrics.registrations_refused.inc();
                        tracing::warn!(replica_id, generation, reason, "registration refused");
                    }
                }
            }
            Some(In::Deregistration(result)) => {
                registry.change(|r| r.left(&result));
            }
            Some(In::Prefetches(wishes)) => self.cx.prefetch.wish(wishes),
            Some(In::Welcome(_) | In::Log(_)) | None => {
                tracing::warn!("the control plane sent a message that has no place here")
            }
        }
    }

    fn log_registered(&self, replica_id: &str, generation: u64) {
        let view = self.cx.board.all().into_iter().find(|v| v.assignment.replica_id == replica_id);
        let Some(view) = view else { return };
        let model = view.assignment.model;
        tracing::info!(
            "registered endpoint model={model} replica_id={replica_id} generation={generation} base_url=http://{}",
            view.address
        );
    }

    fn hello(&self) -> v1::Hello {
        let Identity { node_id, advertise_host, zone, region, labels } = self.identity.clone();
        v1::Hello {
            node_id,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            protocol_version: FLEET_PROTOCOL_VERSION,
            advertise_host,
            zone,
            region,
            labels,
            gpus: self.cx.gpus.borrow().gpus.clone(),
            programs: self.cx.programs.shown(),
        }
    }

    fn report(&self) -> v1::NodeReport {
        let now = Instant::now();
        let gpus = self.cx.gpus.borrow().clone();
        v1::NodeReport {
            engines: self.cx.board.statuses(now),
            gpu_source: Some(gpus.source(now)),
            gpus: gpus.gpus,
            foreign: self.cx.foreign.all(),
            programs: self.cx.programs.shown(),
            disk: self.cx.prefetch.disk().map(|disk| v1::Disk {
                folder: disk.folder,
                free_bytes: disk.free_bytes,
                total_bytes: disk.total_bytes,
            }),
            prefetches: self.cx.prefetch.statuses(),
        }
    }

    fn note_start(&self, address: &str, welcome: &v1::Welcome) {
        tracing::info!(
            address,
            term = welcome.term,
            lease_ttl_ms = welcome.lease_ttl_ms,
            "session with the control plane"
        );
        self.cx.metrics.sessions.inc();
        self.cx.metrics.session_connected.set(1);
        self.cx.registry.change(|r| r.session_started());
        self.cx.registry.set_connected(true);
        let status =
            SessionStatus { connected_to: address.into(), was_welcomed: true, last_error: String::new() };
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    /// Warns of the first end of its kind only, so that a control plane that is away for an hour is one line.
    fn note_end(&self, address: &str, error: &SessionError) {
        self.cx.metrics.session_failures.inc();
        let text = error.to_string();
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if status.last_error == text {
            tracing::debug!(address, %error, "still no session with the control plane");
        } else {
            tracing::warn!(address, %error, "no session with the control plane; engines go on, trying again");
        }
        status.connected_to.clear();
        status.last_error = text;
    }
}

async fn send(outbox: &mpsc::Sender<v1::AgentMessage>, message: Out) -> Result<(), SessionError> {
    let message = v1::AgentMessage { message: Some(message) };
    match outbox.send_timeout(message, SEND_DEADLINE).await {
        Ok(()) => Ok(()),
        Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(SessionError::Stalled),
        Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(SessionError::Closed),
    }
}

/// With what is behind it: a refused certificate is told by the stream's end.
fn status_text(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => in_words(cause),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}
