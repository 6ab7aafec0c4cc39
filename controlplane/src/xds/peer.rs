//! Who subscribes, and whether we understand each other. Pure.
//!
//! Our proxies name the version of the protocol that they speak in their node's metadata. One that is newer than ours is refused
//! in words: it would take what we do not say for "there is none". Older ones are served, as far back as there are any. What
//! else subscribes (an Envoy) speaks xDS as it is specified.

use penstock_proto::xds::{Node, PROTOCOL_KEY, XDS_PROTOCOL_VERSION, google::value};

/// How our proxies begin their user agent's name.
const OUR_PROXY: &str = "penstock-proxy";
/// Longest name of a node, in bytes.
const MAX_ID: usize = 256;
/// Longest user agent shown, in characters.
const MAX_AGENT: usize = 100;

/// A subscriber, as it presents itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub node_id: String,
    /// What it is, as `envoy/1.40.0`; may be empty.
    pub agent: String,
    /// Its zone; may be empty.
    pub zone: String,
}

/// Why a subscriber is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It does not say who it is.
    Unnamed(String),
    /// It speaks a version that we do not know.
    Unknown(String),
}

impl Peer {
    /// From what the first request says.
    ///
    /// # Errors
    /// Words for the subscriber.
    pub fn of(node: Option<&Node>) -> Result<Self, Refusal> {
        let unnamed =
            || Refusal::Unnamed(format!("the first request must carry a node.id of 1 to {MAX_ID} bytes"));
        let node = node.filter(|node| (1..=MAX_ID).contains(&node.id.len())).ok_or_else(unnamed)?;
        let mut agent: String = node.user_agent_name.chars().take(MAX_AGENT).collect();
        if let Some(version) = version(node).filter(|_| !agent.contains('/')) {
            agent = format!("{agent}/{version}");
        }
        if agent.starts_with(OUR_PROXY) {
            let theirs = protocol(node);
            if theirs != XDS_PROTOCOL_VERSION {
                return Err(Refusal::Unknown(format!(
                    "{agent} speaks version {theirs} of the xDS protocol, this control plane ({}) version \
                     {XDS_PROTOCOL_VERSION}: update the control planes before the proxies",
                    env!("CARGO_PKG_VERSION")
                )));
            }
        }
        let zone = node.locality.as_ref().map(|locality| locality.zone.clone()).unwrap_or_default();
        Ok(Self { node_id: node.id.clone(), agent, zone })
    }
}

fn version(node: &Node) -> Option<String> {
    use penstock_proto::xds::envoy::config::core::v3::node::UserAgentVersionType::{
        UserAgentBuildVersion, UserAgentVersion,
    };
    match node.user_agent_version_type.as_ref()? {
        UserAgentVersion(version) => Some(version.chars().take(MAX_AGENT).collect()),
        UserAgentBuildVersion(build) => {
            let version = build.version.as_ref()?;
            Some(format!("{}.{}.{}", version.major_number, version.minor_number, version.patch))
        }
    }
}

/// Proxies of before there were versions do not say any.
fn protocol(node: &Node) -> u32 {
    let said = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(PROTOCOL_KEY)?.kind.as_ref());
    match said {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        Some(value::Kind::NumberValue(number)) => number.clamp(0.0, f64::from(u32::MAX)) as u32,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use penstock_proto::xds::google::{Struct, Value};

    use super::*;

    fn proxy(protocol: Option<f64>) -> Node {
        let value = |number| Value { kind: Some(value::Kind::NumberValue(number)) };
        let fields = protocol.map(|number| (PROTOCOL_KEY.to_owned(), value(number))).into_iter().collect();
        Node {
            id: "p-1".into(),
            user_agent_name: "penstock-proxy/9.9.9".into(),
            metadata: Some(Struct { fields }),
            ..Default::default()
        }
    }

    #[test]
    fn versions_that_are_not_known_are_refused_in_words() {
        assert_eq!(Peer::of(Some(&proxy(None))).expect("of before").agent, "penstock-proxy/9.9.9");
        assert!(Peer::of(Some(&proxy(Some(1.0)))).is_ok());
        let Err(Refusal::Unknown(words)) = Peer::of(Some(&proxy(Some(7.0)))) else { panic!("taken") };
        assert!(words.starts_with("penstock-proxy/9.9.9 speaks version 7 of the xDS protocol"), "{words}");
        assert!(words.ends_with("update the control planes before the proxies"), "{words}");
        assert!(Peer::of(Some(&Node { user_agent_name: "envoy".into(), ..proxy(Some(7.0)) })).is_ok());
    }

    #[test]
    fn a_node_says_who_it_is() {
        for node in [None, Some(Node::default()), Some(Node { id: "x".repeat(257), ..Default::default() })] {
            assert!(
                matches!(Peer::of(node.as_ref()), Err(Refusal::Unnamed(words)) if words.contains("node.id"))
            );
        }
    }
}
