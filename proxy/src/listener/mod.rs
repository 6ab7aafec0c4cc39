//! The sockets for clients, and the threads behind them.
//!
//! 1. [`bind`] takes an address, or [`crate::upgrade`] a socket from the process before this one.
//! 2. [`Listener::open`] adds what the settings say: certificates ([`tls`]), PROXY protocol, HTTP/2.
//! 3. [`accept::serve`] accepts until the process stops; each connection is a task on one of the data threads.
//! 4. `setup` brings a connection up to the first byte of its first request, under deadlines.
//! 5. From there on it is pingora's: [`connection::Connection`] is what it reads from and writes to.
//!
//! The loop is ours because pingora's has no limit on connections, no PROXY protocol in clear, no certificates that change,
//! and reads the first 24 bytes of a connection without a deadline. It registers each accepted socket with the thread that
//! will serve it, where pingora leaves it with the accepting one: a wake-up less for each event.

pub mod accept;
mod clock;
pub mod connection;
pub mod proxy_protocol;
pub mod reload;
mod setup;
pub mod tls;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::available_parallelism,
};

use arc_swap::ArcSwap;
use penstock_config::proxy::{ListenerConfig, PublicConfig};
use pingora_runtime::Runtime;
use rustls::ServerConfig;

pub use self::{accept::serve, clock::HeadClock, setup::Refusal};
use self::{reload::Watched, tls::TlsFiles};

/// Binds `listen`.
///
/// # Errors
/// A line for the operator that names the address and the setting.
pub fn bind(setting: &str, listen: &str) -> Result<TcpListener, String> {
    TcpListener::bind(listen).map_err(|e| format!("cannot listen on {listen} ({setting}): {e}"))
}

/// Has the kernel hold that many connections on `socket` until they are accepted; the standard library's 128 are a burst of
/// a tenth of a second. A socket that listens already is changed.
///
/// # Errors
/// A sentence for the operator.
pub fn widen(socket: &TcpListener, backlog: u16) -> Result<(), String> {
    rustix::net::listen(socket, i32::from(backlog))
        .map_err(|e| format!("cannot have {backlog} connections wait on a socket (public.backlog): {e}"))
}

/// What the kernel's own limit makes of `public.backlog`, if that is less; `somaxconn` is the file's text.
pub fn narrowed(backlog: u16, somaxconn: &str) -> Option<u16> {
    somaxconn.trim().parse().ok().filter(|limit| *limit < backlog)
}

/// The runtime that serves requests. Without stealing a connection stays on its thread, which saves a wake-up in three.
pub fn runtime(config: &PublicConfig) -> Runtime {
    let cores = || available_parallelism().map_or(1, usize::from);
    let threads = if config.threads == 0 { cores() } else { config.threads };
    if config.work_stealing {
        Runtime::new_steal(threads, "data")
    } else {
        Runtime::new_no_steal(threads, "data")
    }
}

/// How to speak on a socket for clients. The socket itself belongs to [`serve`]: connections outlive it.
#[derive(Debug)]
pub struct Listener {
    /// Its name in settings, metrics and logs.
    pub name: Arc<str>,
    /// Its settings.
    pub config: ListenerConfig,
    /// Where it listens, with the port that was taken.
    pub address: SocketAddr,
    tls: Option<Tls>,
}

/// What a listener's connections are encrypted with, now.
#[derive(Debug)]
struct Tls {
    files: TlsFiles,
    config: ArcSwap<ServerConfig>,
}

impl Listener {
    /// A listener for a bound socket, and its certificates, to be watched, if it speaks TLS.
    ///
    /// # Errors
    /// A sentence about the socket, or about the file that cannot be used.
    pub fn open(
        name: &str,
        config: ListenerConfig,
        socket: &TcpListener,
    ) -> Result<(Arc<Self>, Option<Watched>), String> {
        let usable = socket.set_nonblocking(true).and_then(|()| socket.local_addr());
        let address = usable.map_err(|e| format!("listener {name}: {e}"))?;
        if !config.tls() {
            return Ok((Arc::new(Self { name: name.into(), config, address, tls: None }), None));
        }
        let files = TlsFiles::new(&config);
        let contents = files.read()?;
        let (server, certificates) = tls::load(&contents, &files, config.http2)?;
        let tls = Some(Tls { files, config: ArcSwap::from(server) });
        let listener = Arc::new(Self { name: name.into(), config, address, tls });
        Ok((Arc::clone(&listener), Some(Watched::new(listener, contents, certificates))))
    }

    /// Whether it speaks TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpStream, time::Duration};

    use super::*;

    #[test]
    fn a_burst_waits_to_be_accepted() {
        let socket = bind("public.listen", "127.0.0.1:0").expect("a free port");
        widen(&socket, 512).expect("wider");
        let address = socket.local_addr().expect("an address");
        let connect =
            |_| TcpStream::connect_timeout(&address, Duration::from_secs(5)).expect("held by the kernel");
        let burst: Vec<TcpStream> = (0..400).map(connect).collect();
        assert_eq!(burst.len(), 400);
    }

    #[test]
    fn a_kernel_that_holds_less_is_noticed() {
        assert_eq!(narrowed(4_096, "128\n"), Some(128));
        assert_eq!(narrowed(4_096, "4096\n"), None);
        assert_eq!(narrowed(4_096, "what"), None);
    }
}
