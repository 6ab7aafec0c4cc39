//! `[public]`, `[listeners]` and `[private]`: the sockets.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The name of `[public]` among the listeners, in metrics and logs.
pub const PUBLIC: &str = "public";

/// Most listeners beside `[public]`: each is a task and some series.
const MOST_LISTENERS: usize = 32;

/// `[public]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublicConfig {
    /// host:port for clients, in clear; port 0 takes a free one; empty: none, `[listeners]` names what there is.
    pub listen: String,
    /// Threads that serve requests; 0 means one for each core.
    pub threads: usize,
    /// Whether threads take over each other's work; off costs less per token.
    pub work_stealing: bool,
    /// Whether cleartext HTTP/2 with prior knowledge is spoken beside HTTP/1.1.
    pub h2c: bool,
    /// Seconds an idle connection is kept; 0 closes after each answer.
    pub keepalive_s: u64,
    /// Connections that the kernel holds, for each listener for clients, until they are accepted; 1 to 65535. More than
    /// net.core.somaxconn it does not hold, whatever this says.
    pub backlog: u16,
}

impl Default for PublicConfig {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:8081".into(),
            threads: 0,
            work_stealing: false,
            h2c: true,
            keepalive_s: 75,
            backlog: 4_096,
        }
    }
}

impl PublicConfig {
    /// `[public]` as one of the listeners.
    pub fn listener(&self) -> ListenerConfig {
        ListenerConfig { listen: self.listen.clone(), http2: self.h2c, ..ListenerConfig::default() }
    }
}

/// `[listeners.NAME]`: a further socket for clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenerConfig {
    /// host:port; port 0 takes a free one.
    pub listen: String,
    /// PEM file with the certificate and those between it and the root, in this order; empty: no TLS.
    pub certificate: String,
    /// PEM file with the certificate's private key.
    pub key: String,
    /// PEM file with the authorities of client certificates; every client then has to show one. Empty: none is asked for.
    pub client_ca: String,
    /// Whether each connection begins with a PROXY protocol header, version 2.
    pub proxy_protocol: bool,
    /// Whether its clients are believed what they say about others: X-Forwarded-For and the like.
    pub trusted: bool,
    /// Whether HTTP/2 is spoken beside HTTP/1.1: by ALPN under TLS, with prior knowledge in clear.
    pub http2: bool,
}

impl Default for ListenerConfig {
    fn default() -> Self {
        Self {
            listen: String::new(),
            certificate: String::new(),
            key: String::new(),
            client_ca: String::new(),
            proxy_protocol: false,
            trusted: false,
            http2: true,
        }
    }
}

impl ListenerConfig {
    /// Whether it speaks TLS.
    pub fn tls(&self) -> bool {
        !self.certificate.is_empty()
    }
}

/// The rules of `[public]` and `[listeners]` together. The error names the key and what is accepted.
pub(super) fn validate(
    public: &PublicConfig,
    listeners: &BTreeMap<String, ListenerConfig>,
) -> Result<(), String> {
    if public.backlog == 0 {
        return Err("public.backlog is 0; it must be 1 to 65535".into());
    }
    if public.listen.is_empty() && listeners.is_empty() {
        return Err(
            "public.listen is empty, and there are no [listeners]: name an address for clients".into()
        );
    }
    if listeners.len() > MOST_LISTENERS {
        return Err(format!(
            "listeners: there are {}; at most {MOST_LISTENERS} are accepted",
            listeners.len()
        ));
    }
    let mut taken: BTreeSet<&str> = BTreeSet::from([public.listen.as_str()]);
    for (name, listener) in listeners {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if name.is_empty() || !name.bytes().all(plain) || name == PUBLIC || name == "private" {
            return Err(format!(
                "listeners.{name}: a name is made of letters, digits, - and _, and is not \"public\" or \"private\""
            ));
        }
        if listener.listen.is_empty() {
            return Err(format!("listeners.{name}.listen is empty; expected host:port"));
        }
        if !taken.insert(&listener.listen) && !listener.listen.ends_with(":0") {
            return Err(format!(
                "listeners.{name}.listen is {}, which another listener has",
                listener.listen
            ));
        }
        if listener.tls() == listener.key.is_empty() {
            return Err(format!("listeners.{name}: certificate and key go together; one of them is empty"));
        }
        if !listener.client_ca.is_empty() && !listener.tls() {
            return Err(format!(
                "listeners.{name}.client_ca needs a certificate and a key: it is a part of TLS"
            ));
        }
    }
    Ok(())
}

/// `[private]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrivateConfig {
    /// host:port for probes, metrics and debugging; port 0 takes a free one.
    pub listen: String,
}

impl Default for PrivateConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:18081".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(change: impl FnOnce(&mut PublicConfig, &mut BTreeMap<String, ListenerConfig>)) -> String {
        let mut public = PublicConfig::default();
        let tls = ListenerConfig {
            listen: "0.0.0.0:8443".into(),
            certificate: "c".into(),
            key: "k".into(),
            ..ListenerConfig::default()
        };
        let mut listeners = BTreeMap::from([("tls".into(), tls)]);
        validate(&public, &listeners).expect("valid before the change");
        change(&mut public, &mut listeners);
        validate(&public, &listeners).expect_err("a mistake")
    }

    #[test]
    fn a_mistake_names_the_listener_and_the_key() {
        let tls =
            |change: fn(&mut ListenerConfig)| wrong(|_, listeners| listeners.values_mut().for_each(change));
        assert!(tls(|l| l.listen.clear()).contains("listeners.tls.listen is empty"));
        assert!(tls(|l| l.key.clear()).contains("go together"));
        assert!(tls(|l| l.certificate.clear()).contains("go together"));
        assert!(tls(|l| l.listen = "0.0.0.0:8081".into()).contains("another listener has"));
        let clear = |l: &mut ListenerConfig| {
            (l.certificate, l.key, l.client_ca) = (String::new(), String::new(), "ca".into());
        };
        assert!(tls(clear).contains("listeners.tls.client_ca"));
        let named = |name: &str| wrong(|_, all| drop(all.insert(name.into(), ListenerConfig::default())));
        assert!(named("private").contains("not \"public\""));
        assert!(named("a b").contains("letters"));
        let none = |public: &mut PublicConfig, all: &mut BTreeMap<_, _>| {
            public.listen.clear();
            all.clear();
        };
        assert!(wrong(none).contains("public.listen is empty"));
    }

    #[test]
    fn free_ports_do_not_collide_and_public_may_be_left_out() {
        let any = || ListenerConfig { listen: "127.0.0.1:0".into(), ..ListenerConfig::default() };
        let public = PublicConfig { listen: "127.0.0.1:0".into(), ..PublicConfig::default() };
        validate(&public, &BTreeMap::from([("a".into(), any()), ("b".into(), any())])).expect("valid");
        let public = PublicConfig { listen: String::new(), ..PublicConfig::default() };
        validate(&public, &BTreeMap::from([("a".into(), any())])).expect("valid");
    }
}
