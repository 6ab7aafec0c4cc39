//! Are the ports free? Asked before anything is started, so that the answer is one line and not a stack of failures.

use std::{
    io::ErrorKind,
    net::{TcpListener, ToSocketAddrs},
};

use super::error::UpError;

/// An address that a child will listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) address: String,
    /// Who needs it: "proxy, for clients".
    pub(crate) purpose: &'static str,
    /// The variable that moves it.
    pub(crate) variable: &'static str,
}

/// Binds each address and lets it go again. Only a child's own bind decides; this is for the clear word beforehand.
pub(crate) fn check(wanted: &[Wanted]) -> Result<(), UpError> {
    wanted.iter().try_for_each(Wanted::check)
}

impl Wanted {
    fn check(&self) -> Result<(), UpError> {
        let Self { address, purpose, variable } = self;
        let resolved: Vec<_> = address
            .to_socket_addrs()
            .map_err(|e| {
                UpError::Usage(format!("{variable}: {address:?} is no host:port to listen on: {e}"))
            })?
            .collect();
        match TcpListener::bind(&resolved[..]) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::AddrInUse => Err(UpError::Failed(format!(
                "{address} is taken, and the {purpose} needs it; stop what listens there, \
                 or use --ports auto, or set {variable}=HOST:PORT"
            ))),
            Err(e) => Err(UpError::Failed(format!(
                "cannot listen on {address}, which the {purpose} needs: {e}; \
                 use --ports auto, or set {variable}=HOST:PORT"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(address: &str) -> Wanted {
        Wanted {
            address: address.into(),
            purpose: "proxy, for clients,",
            variable: "PENSTOCK_PROXY__PUBLIC__LISTEN",
        }
    }

    #[test]
    fn a_taken_port_names_the_address_who_needs_it_and_how_to_change_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let error = check(&[wanted("127.0.0.1:0"), wanted(&address)]).unwrap_err().to_string();
        for part in [&address, "proxy, for clients", "--ports auto", "PENSTOCK_PROXY__PUBLIC__LISTEN="] {
            assert!(error.contains(part), "{error}");
        }
        drop(listener);
        check(&[wanted(&address)]).unwrap();
    }

    #[test]
    fn an_address_that_is_none_is_a_matter_of_usage() {
        assert!(matches!(check(&[wanted("nonsense")]), Err(UpError::Usage(_))));
        assert!(matches!(check(&[wanted("203.0.113.1:80")]), Err(UpError::Failed(_))));
    }
}
