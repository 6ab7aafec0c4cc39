//! The accept loop of a listener, and the life of a connection.
//!
//! At `limits.connections` a new connection is accepted and closed at once. Left in the kernel's queue instead it would hang
//! until its client's patience ends, and nobody could tell why; closed, the client or the balancer turns elsewhere at once,
//! and it is counted.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use pingora_core::{apps::ServerApp, server::ShutdownWatch};
use pingora_runtime::current_handle;
use tokio::net::TcpListener;

use super::{
    Listener,
    setup::{self, Deadlines, Ready, Refusal},
};
use crate::{drain, gateway::Gateway};

/// Pause after the system could not give us a connection (too many open files): trying again at once would only spin.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Accepts on `socket` until the process stops, and closes it. Requests under way then live on in the runtime.
pub async fn serve(gateway: Arc<Gateway>, listener: Arc<Listener>, socket: std::net::TcpListener) {
    gateway.metrics.listeners.exists(&listener.name);
    let stop = gateway.lifecycle.watch();
    let socket = match TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(e) => {
            tracing::error!(listener = &*listener.name, error = %e, "cannot accept connections");
            return;
        }
    };
    let mut stopped = stop.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stopped.wait_for(|stop| *stop) => break,
            accepted = accept(&socket) => accepted,
        };
        match accepted {
            Ok((stream, from)) => admit(&gateway, &listener, &stop, stream, from),
            Err(e) if is_the_connections(&e) => {}
            Err(e) => {
                gateway.metrics.listeners.refused(&listener.name, Refusal::Accept);
                tracing::warn!(listener = &*listener.name, error = %e, "a connection could not be accepted");
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
    }
    // Whoever the kernel has let in already would see a reset when the socket closes.
    let Ok(socket) = socket.into_std() else { return };
    while let Ok((stream, from)) = socket.accept() {
        admit(&gateway, &listener, &stop, stream, from);
    }
}

/// The next connection, taken off this thread's poll: the one that serves it registers it with its own.
async fn accept(socket: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (stream, from) = socket.accept().await?;
    Ok((stream.into_std()?, from))
}

/// Whether only the connection that was to be accepted is at fault: it ended in the queue.
fn is_the_connections(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// Starts the task of a connection, on any of the data threads, unless there are too many.
fn admit(
    gateway: &Arc<Gateway>,
    listener: &Arc<Listener>,
    stop: &ShutdownWatch,
    stream: TcpStream,
    from: SocketAddr,
) {
    let most = gateway.limits().connections;
    if most > 0 && gateway.lifecycle.connections() >= most {
        gateway.metrics.listeners.refused(&listener.name, Refusal::Limit);
        return;
    }
    let counted = gateway.lifecycle.connection();
    // Not looked at: whether the process is stopping is news to the connection, however late it comes.
    let (gateway, listener, stop) = (Arc::clone(gateway), Arc::clone(listener), stop.clone());
    // Not waited for by its handle: the drain waits for what is counted, and the runtime's end ends the rest.
    drop(current_handle().spawn(async move {
        let _open = gateway.metrics.listeners.opened(&listener.name);
        if let Err(refusal) = converse(&gateway, &listener, &stop, stream, from).await {
            gateway.metrics.listeners.refused(&listener.name, refusal);
        }
        drop(counted);
    }));
}

/// A connection's whole life. From here on its socket belongs to this thread.
async fn converse(
    gateway: &Arc<Gateway>,
    listener: &Listener,
    stop: &ShutdownWatch,
    stream: TcpStream,
    from: SocketAddr,
) -> Result<(), Refusal> {
    let stream = stream
        .set_nonblocking(true)
        .and_then(|()| stream.set_nodelay(true))
        .and_then(|()| tokio::net::TcpStream::from_std(stream))
        .map_err(|_| Refusal::Abandoned)?;
    let limits = gateway.limits();
    let deadlines = Deadlines {
        handshake: Duration::from_millis(limits.handshake_ms),
        head: Duration::from_millis(limits.head_ms),
    };
    let hurry = async {
        gateway.lifecycle.close_idle().cancelled().await;
        tokio::time::sleep(drain::LAST_REQUEST).await;
    };
    let Ready { connection, peer, clock } = setup::ready(stream, from, listener, deadlines, hurry).await?;
    let host = Arc::new(crate::gateway::Host { gateway: Arc::clone(gateway), peer, clock });
    // Pingora gives back a connection that could take another protocol's turn; ours are done.
    drop(host.process_new(Box::new(connection), stop).await);
    Ok(())
}
