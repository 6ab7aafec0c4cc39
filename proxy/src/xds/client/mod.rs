//! The delta ADS subscription to the control plane: one stream, for as long as the process lives: tables and routes, and once
//! those are complete, news of engines' loads (`loads`).
//!
//! A session: connect, subscribe to all tables and all routes (naming the versions already held, so that only the
//! difference is sent), then answer every response with an ACK or with a NACK that gives the reasons. Whatever ends a
//! session (the peer is gone, silent, or speaks nonsense) is followed by the next one, at the next of the
//! configured control planes, after a jittered exponential pause; the pause grows per round through the list, so
//! that a second control plane is tried at once. It never gives up.
//!
//! After a NACK the proxy lacks what was refused, and must not stay without it. Our control plane offers it again; as a
//! net below that, a session with a NACK is ended after a while and begun anew: the versions it names then make any
//! server send what is missing.
//!
//! A peer that is gone without a word (host down, cable out) is found by HTTP/2 pings within seconds.
//!
//! Invariants: one session at a time; the state in the cell is complete and only ever replaced by what
//! [`XdsState::apply`] gave; requests waiting to be sent are bounded.

mod loads;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::{
    MAX_GRPC_MESSAGE_BYTES,
    tls::{ClientTls, dial, in_words},
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, ENDPOINT_TABLE_TYPE, ENGINE_LOAD_TYPE,
        MODEL_ROUTE_TYPE, Node, PROTOCOL_KEY, Status, XDS_PROTOCOL_VERSION,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        google::{Struct, Value, value},
    },
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Endpoint};

pub use self::loads::LoadSink;
use crate::xds::{state::XdsState, status::XdsStatus};

/// ACKs that may wait for the connection; a server that takes none of so many is not reading.
const MAX_UNSENT_REQUESTS: usize = 64;

/// Longest NACK message, in bytes: it travels in a gRPC message and is shown to operators.
const MAX_NACK_BYTES: usize = 4096;

/// Where the control plane is and how patiently it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XdsSettings {
    /// Control planes to try in turn, `host:port` or `http://host:port`; a random one comes first.
    pub endpoints: Vec<String>,
    /// Towards them; None: in clear.
    pub tls: Option<ClientTls>,
    /// This proxy's name, unique among the proxies.
    pub node_id: String,
    /// The zone this proxy is in; may be empty.
    pub zone: String,
    /// Time to connect, and again for the stream to open.
    pub connect_timeout: Duration,
    /// Time between pings on the connection.
    pub keepalive_interval: Duration,
    /// Time a ping may go unanswered.
    pub keepalive_timeout: Duration,
    /// Pause after the first failure; doubled with each round of failures.
    pub backoff_min: Duration,
    /// Longest pause. A session that lasted as long counts as success.
    pub backoff_max: Duration,
    /// Time from a NACK to a new session that asks for what was refused; doubled while NACKs go on.
    pub resync_after: Duration,
}

impl Default for XdsSettings {
    /// No endpoints and no name. A dead peer is noticed within 6 s; a control plane that comes back is found
    /// within 5 s.
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            tls: None,
            node_id: String::new(),
            zone: String::new(),
            connect_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(3),
            keepalive_timeout: Duration::from_secs(3),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            resync_after: Duration::from_secs(60),
        }
    }
}

/// Settings that no session could be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XdsSettingsError {
    /// The list is empty.
    #[error("no control-plane endpoint is configured; give at least one as host:port")]
    NoEndpoints,
    /// One of the list is not an address.
    #[error("control-plane endpoint {0:?} is not host:port, http://host:port, or with TLS https://host:port")]
    BadEndpoint(String),
    /// There is no node id.
    #[error("the proxy's node id is empty; the control plane tells its proxies apart by it")]
    NoNodeId,
}

/// A subscription that can be run.
pub struct XdsClient {
    settings: XdsSettings,
    /// As they were configured. Never empty.
    peers: Vec<String>,
    /// Where news of loads go; without it none are asked for.
    loads: Option<LoadSink>,
}

impl std::fmt::Debug for XdsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XdsClient").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Why a session ended.
#[derive(Debug)]
enum SessionEnd {
    /// The peer is gone or unusable.
    Lost(String),
    /// Something was refused a while ago; ask for it again.
    Resync,
    /// The peer is of before there were loads; ask it again, not for those.
    WithoutLoads,
}

/// What a session leaves to the next.
struct Progress {
    state: Arc<XdsState>,
    /// Whether the present session got any response.
    heard: bool,
    /// Whether it refused any.
    refused: bool,
    /// Whether loads are to be asked for, once the state is complete.
    ask_loads: bool,
}

impl XdsClient {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first setting that cannot be used, with what it should be.
    pub fn new(settings: XdsSettings) -> Result<Self, XdsSettingsError> {
        if settings.node_id.is_empty() {
            return Err(XdsSettingsError::NoNodeId);
        }
        let peers = peers(&settings)?;
        Ok(Self { settings, peers, loads: None })
    }

    /// The same, with news of engines' loads handed to `sink` as they come.
    #[must_use]
    pub fn with_loads(self, sink: LoadSink) -> Self {
        Self { loads: Some(sink), ..self }
    }

    /// Keeps `cell` up to date until `shutdown`. The state that is in `cell` at the start (from disk, or empty) is what
    /// the first session resumes from. Run it off the threads that relay: decoding a large table takes milliseconds.
    pub async fn run(
        self,
        cell: watch::Sender<Arc<XdsState>>,
        status: Arc<XdsStatus>,
        shutdown: CancellationToken,
    ) {
        let state = Arc::clone(&cell.borrow());
        let mut progress = Progress { state, heard: false, refused: false, ask_loads: false };
        let mut without_loads = false;
        let mut turn = fastrand::usize(..self.peers.len());
        let (mut failures, mut refusals) = (0u32, 0u32);
        loop {
            let Some(name) = self.peers.get(turn % self.peers.len()) else { return };
            status.connecting(name);
            (progress.heard, progress.refused) = (false, false);
            progress.ask_loads = self.loads.is_some() && !std::mem::take(&mut without_loads);
            let started = Instant::now();
            let resync_after =
                self.settings.resync_after.max(self.settings.backoff_min) * 2u32.pow(refusals.min(5));
            let end = tokio::select! {
                () = shutdown.cancelled() => return,
                end = self.session(name, resync_after, &mut progress, &cell, &status) => end,
            };
            refusals = if progress.refused { refusals.saturating_add(1) } else { 0 };
            let error = match end {
                SessionEnd::Lost(error) => error,
                SessionEnd::Resync => continue,
                SessionEnd::WithoutLoads => {
                    tracing::info!(control_plane = %name, "the control plane tells no loads: it is of an older release");
                    without_loads = true;
                    continue;
                }
            };
            if status.lost(&error) {
                tracing::warn!(control_plane = %name, error, "lost the control plane; serving the last good state");
            }
            let lasted = progress.heard && started.elapsed() >= self.settings.backoff_max;
            let rounds =
                if lasted { 0 } else { failures / u32::try_from(self.peers.len()).unwrap_or(u32::MAX) };
            failures = if lasted { 1 } else { failures.saturating_add(1) };
            turn += 1;
            let pause =
                backoff(rounds, self.settings.backoff_min, self.settings.backoff_max, fastrand::f64());
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn session(
        &self,
        name: &str,
        resync_after: Duration,
        progress: &mut Progress,
        cell: &watch::Sender<Arc<XdsState>>,
        status: &XdsStatus,
    ) -> SessionEnd {
        let (requests, outbound) = mpsc::channel(MAX_UNSENT_REQUESTS);
        for type_url in [ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE] {
            if requests.try_send(self.subscription(type_url, &progress.state)).is_err() {
                return SessionEnd::Lost("the subscription did not fit into the request queue".to_owned());
            }
        }
        let opening = async {
            let channel =
                endpoint(name, &self.settings)?.connect().await.map_err(|error| in_words(&error))?;
            let mut client = AggregatedDiscoveryServiceClient::new(channel)
                .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
            let responses = client.delta_aggregated_resources(ReceiverStream::new(outbound)).await;
            responses.map(tonic::Response::into_inner).map_err(|status| status_in_words(&status))
        };
        let mut responses = match tokio::time::timeout(2 * self.settings.connect_timeout, opening).await {
            Ok(Ok(responses)) => responses,
            Ok(Err(error)) => return SessionEnd::Lost(error),
            Err(_) => return SessionEnd::Lost("the stream did not open in time".to_owned()),
        };
        let mut resync_at = None;
        loop {
            let resync = async {
                match resync_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let response = tokio::select! {
                response = responses.message() => response,
                () = resync => return SessionEnd::Resync,
            };
            let response = match response {
                Ok(Some(response)) => response,
                Ok(None) => return SessionEnd::Lost("the control plane closed the stream".to_owned()),
                Err(status) if loads::is_refusal(&status) => return SessionEnd::WithoutLoads,
                Err(status) => return SessionEnd::Lost(status_in_words(&status)),
            };
            progress.heard = true;
            if status.responded(Instant::now()) {
                tracing::info!(control_plane = name, "connected to the control plane");
            }
            let answer = match &self.loads {
                Some(sink) if response.type_url == ENGINE_LOAD_TYPE => {
                    let taken = loads::take(&response, &progress.state, sink);
                    answer(&response, taken, status)
                }
                _ => take(&response, progress, cell, status),
            };
            if answer.error_detail.is_some() && answer.type_url != ENGINE_LOAD_TYPE {
                progress.refused = true;
                resync_at.get_or_insert_with(|| tokio::time::Instant::now() + resync_after);
            }
            if requests.try_send(answer).is_err() {
                return SessionEnd::Lost("the control plane takes no answers".to_owned());
            }
            if progress.ask_loads && progress.state.is_complete() {
                progress.ask_loads = false;
                if requests.try_send(self.subscription(ENGINE_LOAD_TYPE, &progress.state)).is_err() {
                    return SessionEnd::Lost("the control plane takes no subscriptions".to_owned());
                }
            }
        }
    }

    /// Asks for all resources of a type, less those already held.
    fn subscription(&self, type_url: &str, state: &XdsState) -> DeltaDiscoveryRequest {
        let mut node = Node {
            id: self.settings.node_id.clone(),
            cluster: "penstock-proxy".to_owned(),
            user_agent_name: concat!("penstock-proxy/", env!("CARGO_PKG_VERSION")).to_owned(),
            ..Default::default()
        };
        self.settings.zone.clone_into(&mut node.locality.get_or_insert_default().zone);
        let version = value::Kind::NumberValue(XDS_PROTOCOL_VERSION.into());
        let fields = [(PROTOCOL_KEY.to_owned(), Value { kind: Some(version) })].into();
        node.metadata = Some(Struct { fields });
        DeltaDiscoveryRequest {
            node: Some(node),
            type_url: type_url.to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            initial_resource_versions: state.resource_versions(type_url),
            ..Default::default()
        }
    }
}

/// Applies a response, publishes what came of it, and gives the answer to send.
fn take(
    response: &DeltaDiscoveryResponse,
    progress: &mut Progress,
    cell: &watch::Sender<Arc<XdsState>>,
    status: &XdsStatus,
) -> DeltaDiscoveryRequest {
    let taken = progress.state.apply(response).map(|next| {
        status.accepted(next.version());
        progress.state = Arc::new(next);
        if progress.state.is_complete() {
            cell.send_replace(Arc::clone(&progress.state));
        }
    });
    answer(response, taken, status)
}

/// The ACK, or the NACK with its reasons.
fn answer(
    response: &DeltaDiscoveryResponse,
    taken: Result<(), Vec<String>>,
    status: &XdsStatus,
) -> DeltaDiscoveryRequest {
    let mut answer = DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    };
    if let Err(reasons) = taken {
        let message = cut(reasons.join("; "), MAX_NACK_BYTES);
        if status.refused(&message) {
            tracing::warn!(
                version = response.system_version_info,
                reasons = message,
                "refused what the control plane sent; keeping the last good state"
            );
        }
        answer.error_detail =
            Some(Status { code: Code::InvalidArgument as i32, message, details: Vec::new() });
    }
    answer
}

/// The control planes, as they were configured. Never empty.
pub(super) fn peers(settings: &XdsSettings) -> Result<Vec<String>, XdsSettingsError> {
    let scheme = if settings.tls.is_some() { "https" } else { "http" };
    if let Some(bad) = settings.endpoints.iter().find(|name| !is_peer(name, scheme)) {
        return Err(XdsSettingsError::BadEndpoint(bad.clone()));
    }
    if settings.endpoints.is_empty() {
        Err(XdsSettingsError::NoEndpoints)
    } else {
        Ok(settings.endpoints.clone())
    }
}

/// What to connect to; reads the certificates, if there are any.
pub(super) fn endpoint(name: &str, settings: &XdsSettings) -> Result<Endpoint, String> {
    let endpoint = dial(name, settings.tls.as_ref())?
        .connect_timeout(settings.connect_timeout)
        .http2_keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(settings.keepalive_timeout)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    Ok(endpoint)
}

fn is_peer(name: &str, scheme: &str) -> bool {
    let url = if name.contains("://") { name.to_owned() } else { format!("{scheme}://{name}") };
    let Ok(endpoint) = Endpoint::from_shared(url) else { return false };
    let uri = endpoint.uri();
    let plain = uri.path_and_query().is_none_or(|path| path == "/");
    uri.scheme_str() == Some(scheme) && uri.port_u16().is_some_and(|port| port > 0) && plain
}

/// The pause after a failure in the given round through the list. `chance`, from 0 to 1, spreads proxies that lost
/// the same control plane over half the pause.
fn backoff(rounds: u32, min: Duration, max: Duration, chance: f64) -> Duration {
    let pause = min.saturating_mul(2u32.saturating_pow(rounds)).min(max);
    pause / 2 + (pause / 2).mul_f64(chance.clamp(0.0, 1.0))
}

pub(super) fn status_in_words(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => in_words(cause),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// `text`, or as much of it as fits into `limit` bytes.
fn cut(mut text: String, limit: usize) -> String {
    let end = (0..=limit.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    text.truncate(end.unwrap_or_default());
    text
}
