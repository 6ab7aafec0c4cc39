//! The public socket and the threads behind it.
//!
//! The socket is bound here rather than by pingora, which retries an occupied port for half a minute and keeps the port it
//! got to itself; pingora takes it over as it would take one over from a predecessor.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::IntoRawFd,
    sync::Arc,
    thread::available_parallelism,
};

use penstock_config::proxy::PublicConfig;
use pingora_core::{
    server::{Fds, ListenFds, ShutdownWatch},
    services::{Service as _, listening::Service},
};
use pingora_runtime::Runtime;

use crate::gateway::{Gateway, Host};

/// Binds `listen`.
///
/// # Errors
/// A line for the operator that names the address and the setting.
pub fn bind(setting: &str, listen: &str) -> Result<TcpListener, String> {
    TcpListener::bind(listen).map_err(|e| format!("cannot listen on {listen} ({setting}): {e}"))
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

/// Serves `gateway` on `socket` until `shutdown` becomes true; requests under way then live on in the runtime.
pub async fn serve(gateway: Arc<Gateway>, socket: TcpListener, address: SocketAddr, shutdown: ShutdownWatch) {
    let address = address.to_string();
    let fds = ListenFds::new(Fds::new().into());
    fds.lock().add(address.clone(), socket.into_raw_fd());
    let mut service = Service::new("public".into(), Host(gateway));
    service.add_tcp(&address);
    service.start_service(Some(fds), shutdown, 1).await;
}
