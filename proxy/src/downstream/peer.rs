//! Who is at the other end of a client's connection. Known once the connection is up, the same for all its requests.

use std::{net::SocketAddr, sync::Arc};

/// The client of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address: what the PROXY protocol says where the listener speaks it, else the socket's.
    pub address: SocketAddr,
    /// Whether it came over TLS.
    pub tls: bool,
    /// Whether the listener is marked as one for trusted clients (`trusted`): their headers about others are believed.
    pub trusted: bool,
    /// The subject of its certificate, as `CN=name,O=...`, where the listener asks for one (`client_ca`).
    pub client_subject: Option<Arc<str>>,
    /// The listener's name.
    pub listener: Arc<str>,
}
