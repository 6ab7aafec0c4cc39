//! Who is compared.

use super::cell::Cell;

/// A gateway, or what stands for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    /// No gateway: the generator talks to the engines.
    Direct,
    /// [`crate::relay`].
    Relay,
    Penstock,
    /// With everything optional on.
    PenstockOn,
    /// With everything optional off.
    PenstockOff,
    Nginx,
    Haproxy,
    Envoy,
    VllmRouter,
    Smg,
    Litellm,
}

impl Peer {
    pub(super) const ALL: [Self; 11] = [
        Self::Direct,
        Self::Relay,
        Self::Penstock,
        Self::PenstockOn,
        Self::PenstockOff,
        Self::Nginx,
        Self::Haproxy,
        Self::Envoy,
        Self::VllmRouter,
        Self::Smg,
        Self::Litellm,
    ];

    /// As the command line, the results and the cache folder call it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
            Self::Penstock => "penstock",
            Self::PenstockOn => "penstock-on",
            Self::PenstockOff => "penstock-off",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::VllmRouter => "vllm-router",
            Self::Smg => "smg",
            Self::Litellm => "litellm",
        }
    }

    /// The peer called `name`.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|peer| peer.name() == name)
    }

    /// As the tables call it.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Direct => "no gateway",
            Self::Relay => "raw TCP relay",
            Self::Penstock => "**Penstock**",
            Self::PenstockOn => "Penstock, all on",
            Self::PenstockOff => "Penstock, all off",
            Self::Nginx => "nginx",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy",
            Self::VllmRouter => "vllm-router",
            Self::Smg => "SMG",
            Self::Litellm => "LiteLLM",
        }
    }

    /// Whether it is Penstock, however it is set.
    pub(super) const fn is_penstock(self) -> bool {
        matches!(self, Self::Penstock | Self::PenstockOn | Self::PenstockOff)
    }

    /// Whether `scripts/bench_peers.sh` brings it.
    pub(super) const fn is_installed_on_demand(self) -> bool {
        !matches!(self, Self::Direct | Self::Relay) && !self.is_penstock()
    }

    /// What its streams are divided by where many are open at once.
    pub(super) const fn streams_divisor(self) -> u32 {
        // Some 600 µs for an event: two cores carry fifty streams of forty a second.
        if matches!(self, Self::Litellm) { 20 } else { 1 }
    }

    /// Whether it takes part in one round only: its start takes longer than a window.
    pub(super) const fn runs_once(self) -> bool {
        matches!(self, Self::Litellm)
    }

    /// Whether it takes part in `cell`; if not, why, or `None` where nobody would miss it.
    pub(super) fn takes_part(self, cell: Cell) -> Result<(), Option<&'static str>> {
        match (self, cell) {
            // What the options cost shows in two kinds of load.
            (Self::PenstockOn | Self::PenstockOff, Cell::Unary | Cell::Paced) => Ok(()),
            (Self::PenstockOn | Self::PenstockOff, _) => Err(None),
            (Self::Direct, Cell::TlsH2) => Err(Some("the engines do not speak TLS")),
            (Self::Relay, Cell::TlsH2) => Err(Some("it copies bytes, and the engines do not speak TLS")),
            (Self::VllmRouter, Cell::TlsH2) => Err(Some("it does not speak TLS to clients")),
            (Self::Direct, Cell::Idle) => Err(None),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again() {
        for peer in Peer::ALL {
            assert_eq!(Peer::named(peer.name()), Some(peer));
        }
        assert_eq!(Peer::named("x"), None);
    }

    #[test]
    fn whoever_does_not_take_part_has_a_reason_or_is_a_variant() {
        for (peer, cell) in Peer::ALL.into_iter().flat_map(|peer| Cell::ALL.map(|cell| (peer, cell))) {
            match peer.takes_part(cell) {
                Err(None) => assert!(peer.is_penstock() || peer == Peer::Direct),
                Err(Some(why)) => assert!(cell == Cell::TlsH2 && !why.is_empty()),
                Ok(()) => {}
            }
        }
        assert_eq!(Peer::Penstock.takes_part(Cell::TlsH2), Ok(()));
    }
}
