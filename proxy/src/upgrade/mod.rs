//! Giving way to a new binary without refusing a connection or losing a stream.
//!
//! 1. SIGUSR2 (`penstock proxy upgrade` sends it): this process starts its own command line again ([`successor`]); what lies
//!    there now may be a new version. The child's standard input is one end of a socket pair.
//! 2. Every listening socket goes over it, by name, with [`channel`]. The kernel's queues are shared from then on: whoever
//!    connects is served by the one or the other, and by nobody's absence refused.
//! 3. The successor ([`predecessor`]) reads its settings, takes the sockets (or binds where settings have changed), loads its
//!    tables, accepts, announces itself, and says so on the pair.
//! 4. Only then this process stops accepting, and finishes what it has ([`crate::drain::Lifecycle::hand_over`]).
//!
//! A successor that fails in any way before step 4 is ended, and this process goes on as if nothing had been. There is no
//! moment in which a mistake in the new binary or its settings can cost a request.
//!
//! Descriptors go by `SCM_RIGHTS` rather than by inheritance: none has to be made inheritable, their receiver owns them
//! without `unsafe`, and the same pair tells each side of the other's end.

pub mod channel;
pub mod command;
pub mod predecessor;
pub mod successor;

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

/// The environment variable that tells a process that its standard input leads to its predecessor.
pub const VARIABLE: &str = "PENSTOCK_PROXY_SUCCESSOR";

/// What a process says of itself as a version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A listening socket's place in the settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The listener's name; "private" for the private port.
    pub name: String,
    /// The address as the settings had it, port 0 included.
    pub listen: String,
    /// The address that it has.
    pub address: SocketAddr,
}

/// A socket and its place.
#[derive(Debug)]
pub struct Socket {
    /// Where it belongs.
    pub place: Place,
    /// The socket.
    pub socket: TcpListener,
}

/// What goes to a successor, with one descriptor for each of `sockets`, in this order.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The process that makes it.
    pub pid: u32,
    /// Whether that has tables: its successor must not take over without.
    pub has_tables: bool,
    /// The sockets' places.
    pub sockets: Vec<Place>,
}

/// What comes back.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The successor.
    pub pid: u32,
    /// Its version.
    pub version: String,
}

/// How upgrades went, for those who ask.
#[derive(Debug, Default)]
pub struct Status(Mutex<Tries>);

/// What [`Status`] knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tries {
    /// Upgrades that failed since the start.
    pub failed: u32,
    /// Why the last of them did.
    pub last_error: String,
}

impl Status {
    /// Notes a failure.
    pub fn failed(&self, why: &str) {
        let mut tries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tries.failed += 1;
        why.clone_into(&mut tries.last_error);
    }

    /// What is known.
    pub fn view(&self) -> Tries {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Which of `offered` belongs to the listener `name` at `listen`: the one of that name and setting, else any of that setting
/// or with that address (a listener that was renamed, a port that was free and has a number now), else none. Port 0 is a
/// different port for each name.
pub fn choose(offered: &[Place], name: &str, listen: &str) -> Option<usize> {
    let exact = |offer: &Place| offer.name == name && offer.listen == listen;
    let same = |offer: &Place| offer.listen == listen && !listen.ends_with(":0");
    let found = |rule: &dyn Fn(&Place) -> bool| offered.iter().position(rule);
    found(&exact).or_else(|| found(&same)).or_else(|| found(&|offer| offer.address.to_string() == listen))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str, listen: &str, port: u16) -> Place {
        Place { name: name.into(), listen: listen.into(), address: ([127, 0, 0, 1], port).into() }
    }

    #[test]
    fn a_socket_goes_to_the_listener_of_its_name_and_address() {
        let offered = [
            place("public", "localhost:8081", 8081),
            place("private", "127.0.0.1:1", 1),
            place("a", "127.0.0.1:0", 4001),
            place("b", "127.0.0.1:0", 4002),
        ];
        assert_eq!(choose(&offered, "private", "127.0.0.1:1"), Some(1));
        assert_eq!(choose(&offered, "b", "127.0.0.1:0"), Some(3));
        assert_eq!(choose(&offered, "edge", "localhost:8081"), Some(0), "renamed");
        assert_eq!(choose(&offered, "b", "127.0.0.1:4002"), Some(3), "its port is in the settings now");
        assert_eq!(choose(&offered, "public", "127.0.0.1:8081"), Some(0), "spelt another way");
        assert_eq!(choose(&offered, "c", "127.0.0.1:0"), None, "any free port is not anyone's port");
        assert_eq!(choose(&offered, "public", "localhost:8082"), None, "moved");
    }

    #[test]
    fn failures_are_counted_and_the_last_is_told() {
        let status = Status::default();
        assert_eq!(status.view(), Tries::default());
        status.failed("no such file");
        status.failed("too slow");
        assert_eq!(status.view(), Tries { failed: 2, last_error: "too slow".into() });
    }
}
