//! Which port an engine gets.
//!
//! Asked of the system by binding, since a list of our own could not know what else runs on the machine. Between the
//! question and the engine's own bind another program may take the port: the engine then fails, and its next life gets
//! another one (see `readiness`).

use std::{
    collections::BTreeSet,
    io,
    net::{TcpListener, ToSocketAddrs},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The ports that our engines hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ports {
    held: Arc<Mutex<BTreeSet<u16>>>,
}

/// A port held for one engine until this is dropped.
#[derive(Debug)]
pub(crate) struct PortLease {
    held: Arc<Mutex<BTreeSet<u16>>>,
    port: u16,
}

impl PortLease {
    /// The port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        lock(&self.held).remove(&self.port);
    }
}

impl Ports {
    /// The first port from `base` up that none of our engines holds and that can be bound on `host`; any free one for 0.
    ///
    /// # Errors
    /// When the host cannot be bound at all, or every port is taken.
    pub(crate) fn take(&self, host: &str, base: u16) -> io::Result<PortLease> {
        let mut held = lock(&self.held);
        let port = if base == 0 { any(host, &held)? } else { first(host, base, &held)? };
        held.insert(port);
        Ok(PortLease { held: self.held.clone(), port })
    }

    /// Holds the port of an engine that runs already.
    pub(crate) fn hold(&self, port: u16) -> PortLease {
        lock(&self.held).insert(port);
        PortLease { held: self.held.clone(), port }
    }
}

fn lock(held: &Mutex<BTreeSet<u16>>) -> MutexGuard<'_, BTreeSet<u16>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(host: &str, port: u16) -> io::Result<u16> {
    let address = (host, port).to_socket_addrs()?.next();
    let address =
        address.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no address for {host:?}")))?;
    Ok(TcpListener::bind(address)?.local_addr()?.port())
}

fn first(host: &str, base: u16, held: &BTreeSet<u16>) -> io::Result<u16> {
    for port in (base..=u16::MAX).filter(|port| !held.contains(port)) {
        match bind(host, port) {
            Ok(port) => return Ok(port),
            Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {}
            Err(e) => {
                return Err(io::Error::new(
                    e.kind(),
                    format!("cannot listen on {host:?} (engines.bind_host): {e}"),
                ));
            }
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!("every port from {base} (engines.port_base) up is taken"),
    ))
}

fn any(host: &str, held: &BTreeSet<u16>) -> io::Result<u16> {
    // A free port may still be one that an engine of ours holds and does not listen on yet.
    for _ in 0..64 {
        let port = bind(host, 0).map_err(|e| {
            io::Error::new(e.kind(), format!("cannot listen on {host:?} (engines.bind_host): {e}"))
        })?;
        if !held.contains(&port) {
            return Ok(port);
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "no free port was found"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once_and_comes_back_on_drop() {
        let ports = Ports::default();
        let base = bind("127.0.0.1", 0).unwrap();
        let first = ports.take("127.0.0.1", base).unwrap();
        let second = ports.take("127.0.0.1", base).unwrap();
        assert!(first.port() >= base && second.port() > first.port());
        let freed = first.port();
        drop(first);
        assert_eq!(ports.take("127.0.0.1", freed).unwrap().port(), freed);
    }

    #[test]
    fn a_port_that_another_program_listens_on_is_passed_over() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = other.local_addr().unwrap().port();
        assert_ne!(Ports::default().take("127.0.0.1", taken).unwrap().port(), taken);
    }

    #[test]
    fn zero_takes_any_and_a_foreign_host_is_an_error_that_names_the_setting() {
        let ports = Ports::default();
        let lease = ports.take("127.0.0.1", 0).unwrap();
        assert!(lease.port() > 0);
        let error = ports.take("203.0.113.7", 0).unwrap_err().to_string();
        assert!(error.contains("engines.bind_host"), "{error}");
    }
}
