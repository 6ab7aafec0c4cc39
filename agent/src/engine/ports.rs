//! Which ports an engine gets.
//!
//! Asked of the system by binding, since a list of our own could not know what else runs on the machine; and kept by it,
//! since an engine binds its port only when it has loaded its model, a minute later. The socket that found a port free stays
//! bound, without listening, for as long as the engine lives, so that neither another agent on this machine, nor a program that
//! takes any free port, is given it meanwhile. It is bound without address reuse, which fails wherever anybody has the port, and
//! allows reuse from then on, so that the engine itself can bind beside it: servers ask for reuse. One that does not, or that was
//! told a fixed port and takes it from us, is found by the readiness check; the next life gets another port.
//!
//! An engine of an earlier agent holds its port by itself; only our own list is told.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, ToSocketAddrs},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::net::TcpSocket;

/// The ports that our engines hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ports {
    held: Arc<Mutex<BTreeSet<u16>>>,
}

/// Ports in a row, held for one engine until this is dropped.
#[derive(Debug)]
pub(crate) struct PortLease {
    held: Arc<Mutex<BTreeSet<u16>>>,
    ports: RangeInclusive<u16>,
    /// Keep them from others; none where an engine has them already.
    _sockets: Vec<TcpSocket>,
}

impl PortLease {
    /// The port; the first of several.
    pub(crate) fn port(&self) -> u16 {
        *self.ports.start()
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        for port in self.ports.clone() {
            held.remove(&port);
        }
    }
}

impl Ports {
    /// The first port from `base` up that none of our engines holds and that can be bound on `host`; any free one for 0.
    ///
    /// # Errors
    /// When the host cannot be bound at all, or every port is taken.
    pub(crate) fn take(&self, host: &str, base: u16) -> io::Result<PortLease> {
        self.take_row(host, base, 1)
    }

    /// The same of `count` ports in a row.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn take_row(&self, host: &str, base: u16, count: u16) -> io::Result<PortLease> {
        let address = (host, 0).to_socket_addrs()?.next();
        let address = address
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no address for {host:?}")))?;
        let mut held = lock(&self.held);
        let sockets = match base {
            0 => any_row(address, count, &held)?,
            _ => first_row(address, base, count, &held)?,
        };
        let first =
            sockets.first().map_or(Ok(0), |socket| Ok::<_, io::Error>(socket.local_addr()?.port()))?;
        let ports = first..=first.saturating_add(count.saturating_sub(1));
        held.extend(ports.clone());
        Ok(PortLease { held: self.held.clone(), ports, _sockets: sockets })
    }

    /// Holds the ports, `count` from `port` on, of an engine that runs already.
    pub(crate) fn hold(&self, port: u16, count: u16) -> PortLease {
        let ports = port..=port.saturating_add(count.saturating_sub(1));
        lock(&self.held).extend(ports.clone());
        PortLease { held: self.held.clone(), ports, _sockets: Vec::new() }
    }
}

fn lock(held: &Mutex<BTreeSet<u16>>) -> MutexGuard<'_, BTreeSet<u16>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that has the port to itself, until one that asks for reuse comes beside it.
fn bind(mut address: SocketAddr, port: u16) -> io::Result<TcpSocket> {
    address.set_port(port);
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(address)?;
    socket.set_reuseaddr(true)?;
    // For servers that ask for this kind of reuse alone; only ones of the same user get beside us by it.
    socket.set_reuseport(true)?;
    Ok(socket)
}

/// The row that begins with `port`; None: somebody has one of its ports.
fn row(
    address: SocketAddr,
    port: u16,
    count: u16,
    held: &BTreeSet<u16>,
) -> io::Result<Option<Vec<TcpSocket>>> {
    let Some(last) = port.checked_add(count.saturating_sub(1)) else { return Ok(None) };
    if held.range(port..=last).next().is_some() {
        return Ok(None);
    }
    match (port..=last).map(|port| bind(address, port)).collect() {
        Ok(sockets) => Ok(Some(sockets)),
        Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => Ok(None),
        Err(e) => Err(unusable(address, &e)),
    }
}

fn first_row(address: SocketAddr, base: u16, count: u16, held: &BTreeSet<u16>) -> io::Result<Vec<TcpSocket>> {
    for port in base..=u16::MAX {
        if let Some(sockets) = row(address, port, count, held)? {
            return Ok(sockets);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!("no {count} free in a row from {base} up (engines.port_base)"),
    ))
}

fn any_row(address: SocketAddr, count: u16, held: &BTreeSet<u16>) -> io::Result<Vec<TcpSocket>> {
    /// Tries; the system gives another port each time.
    const TRIES: usize = 64;
    for _ in 0..TRIES {
        let socket = bind(address, 0).map_err(|e| unusable(address, &e))?;
        let first = socket.local_addr()?.port();
        if held.contains(&first) {
            continue;
        }
        let Some(next) = first.checked_add(1).filter(|_| count > 1) else {
            if count <= 1 {
                return Ok(vec![socket]);
            }
            continue;
        };
        if let Some(rest) = row(address, next, count - 1, held)? {
            return Ok(std::iter::once(socket).chain(rest).collect());
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no {count} free ports in a row")))
}

fn unusable(address: SocketAddr, error: &io::Error) -> io::Error {
    let host = address.ip();
    io::Error::new(error.kind(), format!("cannot listen on {host} (engines.bind_host): {error}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const HOME: &str = "127.0.0.1";

    fn free() -> u16 {
        TcpListener::bind((HOME, 0)).unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_port_is_held_until_its_lease_ends() {
        let ports = Ports::default();
        let base = free();
        let first = ports.take(HOME, base).unwrap();
        let second = ports.take(HOME, base).unwrap();
        assert_ne!(first.port(), second.port());
        let freed = first.port();
        drop(first);
        assert_eq!(ports.take(HOME, freed).unwrap().port(), freed);
    }

    #[test]
    fn an_engine_binds_its_port_beside_the_lease_and_nobody_is_given_it_meanwhile() {
        let (here, other_agent) = (Ports::default(), Ports::default());
        let lease = here.take(HOME, free()).unwrap();
        assert_ne!(
            other_agent.take(HOME, lease.port()).unwrap().port(),
            lease.port(),
            "bound, not listening"
        );
        // As servers do: with address reuse.
        let engine = TcpListener::bind((HOME, lease.port())).unwrap();
        assert_ne!(other_agent.take(HOME, lease.port()).unwrap().port(), lease.port(), "listening");
        let client = std::net::TcpStream::connect((HOME, lease.port())).unwrap();
        assert_eq!(engine.accept().unwrap().1, client.local_addr().unwrap());
        drop((engine, lease));
    }

    #[test]
    fn a_port_that_another_program_listens_on_is_passed_over() {
        let other = TcpListener::bind((HOME, 0)).unwrap();
        let taken = other.local_addr().unwrap().port();
        assert_ne!(Ports::default().take(HOME, taken).unwrap().port(), taken);
    }

    #[test]
    fn a_row_has_no_port_of_others_in_it() {
        let ports = Ports::default();
        let other = TcpListener::bind((HOME, 0)).unwrap();
        let taken = other.local_addr().unwrap().port();
        for base in [0, taken.saturating_sub(2).max(1_024)] {
            let row = ports.take_row(HOME, base, 4).unwrap();
            assert!(!(row.port()..row.port() + 4).contains(&taken));
            for port in row.port()..row.port() + 4 {
                assert_ne!(ports.take(HOME, port).unwrap().port(), port, "the whole row is held");
            }
        }
    }

    #[test]
    fn adopted_ports_are_held_though_the_engine_has_them() {
        let ports = Ports::default();
        let engine = TcpListener::bind((HOME, 0)).unwrap();
        let port = engine.local_addr().unwrap().port();
        let lease = ports.hold(port, 1);
        drop(engine);
        assert_ne!(ports.take(HOME, port).unwrap().port(), port, "between two lives it is still ours");
        drop(lease);
    }

    /// Two agents on one machine, each with many supervisors, all beginning at one port and engines that come and go.
    #[test]
    fn leases_of_many_at_once_never_meet() {
        let base = free();
        let taken = Mutex::new(BTreeSet::new());
        let agents = [Ports::default(), Ports::default()];
        std::thread::scope(|scope| {
            for worker in 0..8_u64 {
                let (ports, taken) = (&agents[usize::try_from(worker % 2).unwrap()], &taken);
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(worker);
                    let mut leases = Vec::new();
                    for _ in 0..60 {
                        let lease = ports.take_row(HOME, base, rng.u16(1..4)).unwrap();
                        for port in lease.ports.clone() {
                            assert!(taken.lock().unwrap().insert(port), "port {port} was given twice");
                        }
                        leases.push(lease);
                        if rng.bool() {
                            let lease: PortLease = leases.swap_remove(rng.usize(..leases.len()));
                            let mut taken = taken.lock().unwrap();
                            for port in lease.ports.clone() {
                                taken.remove(&port);
                            }
                        }
                    }
                    // Dropped only after they are off the list, or another could be given one that is still on it.
                    for lease in leases.drain(..) {
                        let mut taken = taken.lock().unwrap();
                        taken.retain(|port| !lease.ports.contains(port));
                    }
                });
            }
        });
    }

    #[test]
    fn zero_takes_any_and_a_foreign_host_is_an_error_that_names_the_setting() {
        let ports = Ports::default();
        let lease = ports.take(HOME, 0).unwrap();
        assert!(lease.port() > 0);
        let error = ports.take("203.0.113.7", 0).unwrap_err().to_string();
        assert!(error.contains("engines.bind_host"), "{error}");
    }
}
