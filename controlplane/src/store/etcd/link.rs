//! The way to etcd: one connection to one member at a time, and what happens when that member does not answer.
//!
//! Not the client's own balancing over all members: it keeps sending a share of the requests to a member that hangs, and
//! cannot tell a request that never left from one that was sent. Here each connection is made before anything is
//! sent on it, so a member that is gone costs nothing but time; and a member that fails is left for the next one.
//!
//! Every operation has a deadline (`store.request_timeout_ms`), and each member a part of it (`member_timeout_ms`).
//! Between tries there is a pause that doubles, with jitter, so that control planes do not knock in step. An operation
//! that may have taken place is repeated only if doing it twice does no harm.
//!
//! Every request asks for a member that sees a leader (`hasleader`): a member that is cut off from the others refuses at
//! once, and ends its watches, in place of serving old state in silence.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Certificate, Channel, Client, ConnectOptions, Identity, TlsOptions};
use penstock_config::controlplane::StoreConfig;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use super::failure::{Cause, Failure, Verdict, innermost};
use crate::store::StoreError;

/// A member that does not answer a ping of HTTP/2 for this long, after as long without a word, is gone.
const PING: Duration = Duration::from_secs(2);
/// First pause between two rounds of tries.
const PAUSE: Duration = Duration::from_millis(25);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Whether an operation may be sent twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Twice is as good as once.
    Harmless,
    /// Only if the first one surely did nothing.
    OnlyIfUnsent,
}

/// A connection, and its number: a failure on an old connection must not close a newer one.
#[derive(Clone)]
struct Connection {
    client: Client,
    number: u64,
}

#[derive(Default)]
struct State {
    open: Option<Connection>,
    /// Index of the member to connect to next.
    next: usize,
    connections: u64,
}

/// See the module's text.
pub(super) struct Link {
    settings: StoreConfig,
    state: Mutex<State>,
    /// Held while connecting, so that many callers make one connection.
    connecting: tokio::sync::Mutex<()>,
    closed: CancellationToken,
}

impl Link {
    pub(super) fn new(settings: StoreConfig, closed: CancellationToken) -> Arc<Self> {
        // Each process begins elsewhere, so that members share the load.
        let next = fastrand::usize(..settings.endpoints.len().max(1));
        let state = Mutex::new(State { next, ..State::default() });
        Arc::new(Self { settings, state, connecting: tokio::sync::Mutex::new(()), closed })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn member_timeout(&self) -> Duration {
        Duration::from_millis(self.settings.member_timeout_ms)
    }

    /// Runs an operation to its end, at one member or several.
    pub(super) async fn call<T, F>(
        &self,
        repeat: Repeat,
        operation: impl Fn(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + Duration::from_millis(self.settings.request_timeout_ms);
        let closed = || Failure::new(Verdict::Final, Cause::Unreachable, "the store was closed");
        let tries = self.tries(repeat, operation, deadline);
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(closed()),
            outcome = tries => outcome,
        }
    }

    async fn tries<T, F>(
        &self,
        repeat: Repeat,
        operation: impl Fn(Client) -> F,
        deadline: Instant,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut pause = PAUSE;
        let mut tried = 0;
        loop {
            let failure = match self.once(&operation, deadline).await {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            };
            tried += 1;
            let again = match failure.verdict {
                Verdict::Elsewhere => true,
                Verdict::Unknown => repeat == Repeat::Harmless,
                Verdict::Final => false,
            };
            // A round over all members goes on at once.
            let wait = if tried % self.settings.endpoints.len().max(1) == 0 {
                jittered(pause)
            } else {
                Duration::ZERO
            };
            if !again || Instant::now() + wait >= deadline {
                return Err(failure);
            }
            tracing::debug!(?failure, "etcd: trying again");
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// One try at one member.
    async fn once<T, F>(&self, operation: &impl Fn(Client) -> F, deadline: Instant) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let connection = self.connection(deadline).await?;
        let started = Instant::now();
        let limit = deadline.min(started + self.member_timeout());
        let outcome = tokio::time::timeout_at(limit, operation(connection.client)).await;
        let failure = match outcome {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => Failure::of(&error),
            Err(_) => Failure::silent(started.elapsed().as_millis()),
        };
        if failure.verdict != Verdict::Final || failure.cause == Cause::Auth {
            self.leave(connection.number);
        }
        Err(failure)
    }

    /// A client on a live connection, and the connection's number for [`Link::leave`].
    pub(super) async fn client(&self) -> Result<(Client, u64), Failure> {
        let connection = self.connection(Instant::now() + self.member_timeout()).await?;
        Ok((connection.client, connection.number))
    }

    /// Gives up a connection; the next one goes to the next member.
    pub(super) fn leave(&self, number: u64) {
        let mut state = self.state();
        if state.open.as_ref().is_some_and(|open| open.number == number) {
            state.open = None;
            state.next = state.next.wrapping_add(1);
        }
    }

    async fn connection(&self, deadline: Instant) -> Result<Connection, Failure> {
        let open = || self.state().open.clone();
        if let Some(open) = open() {
            return Ok(open);
        }
        let Ok(_connecting) = tokio::time::timeout_at(deadline, self.connecting.lock()).await else {
            return Err(Failure::unconnected("no connection in time".into()));
        };
        if let Some(open) = open() {
            return Ok(open);
        }
        let endpoints = &self.settings.endpoints;
        let next = self.state().next % endpoints.len().max(1);
        let endpoint = endpoints.get(next).cloned().unwrap_or_default();
        let limit = deadline.min(Instant::now() + self.member_timeout());
        let connected = tokio::time::timeout_at(limit, connect(&self.settings, &endpoint)).await;
        let connected = connected.unwrap_or_else(|_| Err(Failure::unconnected("no answer".into())));
        let mut state = self.state();
        match connected {
            Ok(client) => {
                state.connections += 1;
                let connection = Connection { client, number: state.connections };
                state.open = Some(connection.clone());
                tracing::debug!(endpoint, "connected to etcd");
                Ok(connection)
            }
            Err(mut failure) => {
                state.next = state.next.wrapping_add(1);
                failure.sentence = format!("{endpoint}: {}", failure.sentence);
                Err(failure)
            }
        }
    }
}

/// Half to one and a half of it.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64())
}

/// Connects to one member; certificates and the password file are read each time.
pub(super) async fn connect(settings: &StoreConfig, endpoint: &str) -> Result<Client, Failure> {
    let timeout = Duration::from_millis(settings.member_timeout_ms);
    let address = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let unusable = |e: &dyn std::fmt::Display| {
        Failure::new(Verdict::Final, Cause::Refused, format!("store.endpoints: {e}"))
    };
    let mut channel = Endpoint::from_shared(address)
        .map_err(|e| unusable(&e))?
        .connect_timeout(timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true);
    if let Some(tls) = tls(settings).await? {
        channel = channel.tls_config(tls).map_err(|e| {
            Failure::new(Verdict::Final, Cause::Auth, format!("TLS settings: {}", innermost(&e)))
        })?;
    }
    let channel = channel.connect().await.map_err(|e| Failure::unconnected(innermost(&e)))?;
    let mut options = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
    if !settings.username.is_empty() {
        let password = match settings.password_file.as_str() {
            "" => settings.password.clone(),
            file => read(file, "store.password_file").await?.trim_end().to_owned(),
        };
        options = options.with_user(settings.username.clone(), password);
    }
    // With a user this asks for a token, which is the first request on the connection.
    Client::from_channel(Channel::Tonic(channel), Some(options)).await.map_err(|error| {
        let failure = Failure::of(&error);
        let verdict = if failure.verdict == Verdict::Final { Verdict::Final } else { Verdict::Elsewhere };
        Failure { verdict, ..failure }
    })
}

async fn tls(settings: &StoreConfig) -> Result<Option<TlsOptions>, Failure> {
    if settings.ca_file.is_empty() {
        return Ok(None);
    }
    let authorities = Certificate::from_pem(read(&settings.ca_file, "store.ca_file").await?);
    let mut tls = TlsOptions::new().ca_certificate(authorities);
    if !settings.cert_file.is_empty() {
        let certificate = read(&settings.cert_file, "store.cert_file").await?;
        let key = read(&settings.key_file, "store.key_file").await?;
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Ok(Some(tls))
}

/// A file that is missing now may be there in a moment: certificates are replaced while we run.
async fn read(file: &str, setting: &str) -> Result<String, Failure> {
    tokio::fs::read_to_string(file).await.map_err(|error| {
        Failure::new(Verdict::Elsewhere, Cause::Auth, format!("cannot read {file} ({setting}): {error}"))
    })
}

impl Link {
    /// As [`Link::call`], with the failure in the store's words. `lease` is the one asked with, or 0.
    pub(super) async fn ask<T, F>(
        &self,
        repeat: Repeat,
        lease: u64,
        operation: impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.call(repeat, operation).await.map_err(|failure| failure.into_store_error(lease))
    }
}
