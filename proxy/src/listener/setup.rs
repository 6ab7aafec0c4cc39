//! A connection from `accept` to the first byte of its first request: PROXY protocol, TLS, which HTTP. Every step has a
//! deadline, and a connection that does not make it is closed and counted by why.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    HeadClock, Listener,
    connection::{Connection, Protocol, Transport},
    proxy_protocol, tls,
};
use crate::downstream::peer::Peer;

/// Why a connection was closed before it brought a request; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There are `limits.connections` already.
    Limit,
    /// It does not begin with a PROXY protocol header.
    ProxyHeader,
    /// The TLS handshake failed.
    Tls,
    /// No acceptable client certificate was shown.
    ClientCertificate,
    /// PROXY protocol and TLS took longer than `limits.handshake_ms`.
    HandshakeTimeout,
    /// Not enough came within `limits.head_ms` to tell what it speaks.
    Silent,
    /// It was given up, or broke, before it said anything.
    Abandoned,
    /// The system could not give us the connection: too many open files.
    Accept,
}

impl Refusal {
    /// Every variant, for metrics that exist at zero.
    pub const ALL: [Self; 8] = [
        Self::Limit,
        Self::ProxyHeader,
        Self::Tls,
        Self::ClientCertificate,
        Self::HandshakeTimeout,
        Self::Silent,
        Self::Abandoned,
        Self::Accept,
    ];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::ProxyHeader => "proxy_header",
            Self::Tls => "tls",
            Self::ClientCertificate => "client_certificate",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::Silent => "silent",
            Self::Abandoned => "abandoned",
            Self::Accept => "accept",
        }
    }
}

/// How long the steps may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    pub(super) handshake: Duration,
    pub(super) head: Duration,
}

/// A connection that has begun to say something, who is behind it, and the clock of its heads.
pub(super) struct Ready {
    pub(super) connection: Connection,
    pub(super) peer: Peer,
    pub(super) clock: Arc<HeadClock>,
}

/// Brings a connection up. `hurry` resolves when silent connections have to end.
///
/// # Errors
/// It is not wanted; dropping it has closed it.
pub(super) async fn ready(
    stream: TcpStream,
    from: SocketAddr,
    listener: &Listener,
    deadlines: Deadlines,
    hurry: impl Future<Output = ()>,
) -> Result<Ready, Refusal> {
    let secured = timeout(deadlines.handshake, secure(stream, from, listener)).await;
    let (transport, peer) = secured.unwrap_or(Err(Refusal::HandshakeTimeout))?;
    let began = Instant::now();
    let clock = Arc::new(HeadClock::new(began));
    let mut connection = Connection::new(transport, Arc::clone(&clock));
    let protocol = tokio::select! {
        biased;
        protocol = timeout_at(began + deadlines.head, connection.protocol(listener.config.http2)) => protocol,
        () = hurry => return Err(Refusal::Abandoned),
    };
    match protocol {
        Err(_) => Err(Refusal::Silent),
        Ok(Err(_) | Ok(Protocol::Closed)) => Err(Refusal::Abandoned),
        Ok(Ok(Protocol::Http1 | Protocol::Http2)) => Ok(Ready { connection, peer, clock }),
    }
}

async fn secure(
    mut stream: TcpStream,
    from: SocketAddr,
    listener: &Listener,
) -> Result<(Transport, Peer), Refusal> {
    let mut peer = Peer {
        address: from,
        tls: false,
        trusted: listener.config.trusted,
        client_subject: None,
        listener: Arc::clone(&listener.name),
    };
    if listener.config.proxy_protocol {
        match proxy_protocol::read(&mut stream).await {
            Ok(client) => peer.address = client.unwrap_or(from),
            Err(proxy_protocol::HeaderError::Ended) => return Err(Refusal::Abandoned),
            Err(e) => {
                tracing::debug!(%from, listener = &*listener.name, error = %e, "closed");
                return Err(Refusal::ProxyHeader);
            }
        }
    }
    let Some(tls) = &listener.tls else { return Ok((Transport::Tcp(stream), peer)) };
    match TlsAcceptor::from(tls.config.load_full()).accept(stream).await {
        Ok(stream) => {
            peer.tls = true;
            peer.client_subject = client_subject(&stream);
            Ok((Transport::Tls(Box::new(stream)), peer))
        }
        Err(e) => {
            tracing::debug!(client = %peer.address, listener = &*listener.name, error = %e, "no TLS");
            Err(handshake_failure(&e))
        }
    }
}

fn client_subject(stream: &TlsStream<TcpStream>) -> Option<Arc<str>> {
    let shown = stream.get_ref().1.peer_certificates()?;
    tls::subject(shown.first()?)
}

fn handshake_failure(error: &std::io::Error) -> Refusal {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::NoCertificatesPresented | rustls::Error::InvalidCertificate(_)) => {
            Refusal::ClientCertificate
        }
        Some(_) => Refusal::Tls,
        None => Refusal::Abandoned, // the network's, or the client left
    }
}

#[cfg(test)]
mod tests {
    use penstock_config::proxy::ListenerConfig;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const DEADLINES: Deadlines =
        Deadlines { handshake: Duration::from_secs(10), head: Duration::from_secs(10) };

    /// What becomes of a connection that brings `bytes`, and its own address.
    async fn tried(config: ListenerConfig, bytes: &[u8]) -> (Result<Peer, Refusal>, SocketAddr) {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (listener, _) = Listener::open("edge", config, &socket).expect("a listener");
        let socket = tokio::net::TcpListener::from_std(socket).expect("a socket");
        let mut client = TcpStream::connect(listener.address).await.expect("connected");
        let (stream, from) = socket.accept().await.expect("accepted");
        client.write_all(bytes).await.expect("written");
        let ready = ready(stream, from, &listener, DEADLINES, std::future::pending()).await;
        (ready.map(|ready| ready.peer), from)
    }

    #[tokio::test]
    async fn the_peer_is_who_the_balancer_says_where_the_listener_believes_it() {
        let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x30\x39\0\x50GET / HTTP/1.1\r\n\r\n";
        let believes = ListenerConfig { proxy_protocol: true, trusted: true, ..ListenerConfig::default() };
        let (peer, _) = tried(believes.clone(), header).await;
        let peer = peer.expect("a connection");
        assert_eq!(peer.address.to_string(), "192.0.2.7:12345");
        assert_eq!((peer.trusted, peer.tls, &*peer.listener), (true, false, "edge"));
        assert_eq!(tried(believes, &header[28..]).await.0.expect_err("no header"), Refusal::ProxyHeader);
        let (peer, from) = tried(ListenerConfig::default(), b"GET / HTTP/1.1\r\n\r\n").await;
        let peer = peer.expect("a connection");
        assert_eq!((peer.address, peer.trusted), (from, false));
    }
}
