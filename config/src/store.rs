//! Where the control plane's state lives, and who may write to it: `[store]` and `[election]` of its settings.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// `[store]`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// "embedded": one file, one process. "etcd": shared by several control planes.
    pub kind: String,
    /// The embedded store's file; its folder is made if missing.
    pub path: String,
    /// Events the embedded store keeps for watchers that fall behind; 100 to 10,000,000.
    pub history_events: usize,
    /// etcd's members, as "http://HOST:PORT" or "https://HOST:PORT"; HOST:PORT alone means the former.
    pub endpoints: Vec<String>,
    /// Put before every key in etcd; empty for none.
    pub prefix: String,
    /// etcd's user; empty: no authentication.
    pub username: String,
    /// Its password.
    pub password: String,
    /// A file that holds the password, instead of `password`.
    pub password_file: String,
    /// PEM file of the authorities that sign etcd's certificates; empty: the connection is not encrypted.
    pub ca_file: String,
    /// PEM file of our certificate for etcd; empty: none is shown.
    pub cert_file: String,
    /// PEM file of its key.
    pub key_file: String,
    /// Longest time an operation may take, retries at other members included, in milliseconds.
    pub request_timeout_ms: u64,
    /// Longest time one member is given, to connect or to answer, before the next is tried, in milliseconds.
    pub member_timeout_ms: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            kind: "embedded".into(),
            path: "/var/lib/penstock/controlplane.redb".into(),
            history_events: 20_000,
            endpoints: vec!["http://127.0.0.1:2379".into()],
            prefix: String::new(),
            username: String::new(),
            password: String::new(),
            password_file: String::new(),
            ca_file: String::new(),
            cert_file: String::new(),
            key_file: String::new(),
            request_timeout_ms: 5_000,
            member_timeout_ms: 1_500,
        }
    }
}

/// Leaves the password out: settings are logged.
impl std::fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreConfig")
            .field("kind", &self.kind)
            .field("path", &self.path)
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("username", &self.username)
            .field("ca_file", &self.ca_file)
            .finish_non_exhaustive()
    }
}

/// The longest prefix: keys stay readable, and far below what etcd accepts.
const MAX_PREFIX: usize = 200;

impl StoreConfig {
    /// Whether state is shared through etcd.
    pub fn is_etcd(&self) -> bool {
        self.kind == "etcd"
    }

    pub(crate) fn validate(&self) -> Result<(), String> {
        match self.kind.as_str() {
            "embedded" if self.path.is_empty() => {
                Err("store.path is empty: name the file that holds the state".into())
            }
            "embedded" => Ok(()),
            "etcd" => self.validate_etcd(),
            other => Err(format!("store.kind is {other:?}: accepted are \"embedded\" and \"etcd\"")),
        }
    }

    fn validate_etcd(&self) -> Result<(), String> {
        if self.endpoints.is_empty() {
            return Err(
                "store.endpoints is empty: name etcd's members, as [\"http://HOST:2379\", ...]".into()
            );
        }
        let encrypted = !self.ca_file.is_empty();
        for endpoint in &self.endpoints {
            let (scheme, rest) = endpoint.split_once("://").unwrap_or(("http", endpoint));
            let has_port = rest.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|p| p != 0)
            });
            if !has_port || !["http", "https"].contains(&scheme) {
                return Err(format!(
                    "store.endpoints has {endpoint:?}: accepted is \"http://HOST:PORT\" or \"https://HOST:PORT\""
                ));
            }
            if encrypted != (scheme == "https") {
                return Err(format!(
                    "store.endpoints has {endpoint:?} and store.ca_file is {:?}: https needs the file that names the \
                     authorities, http must not have one",
                    self.ca_file
                ));
            }
        }
        if self.cert_file.is_empty() != self.key_file.is_empty() {
            return Err("store.cert_file and store.key_file go together: set both or neither".into());
        }
        if !self.cert_file.is_empty() && !encrypted {
            return Err(
                "store.cert_file is set and store.ca_file is not: a certificate is shown over TLS only"
                    .into(),
            );
        }
        if !self.password.is_empty() && !self.password_file.is_empty() {
            return Err("store.password and store.password_file are both set: set one".into());
        }
        let has_password = !self.password.is_empty() || !self.password_file.is_empty();
        if self.username.is_empty() == has_password {
            return Err(
                "store.username and a password (store.password or store.password_file) go together".into()
            );
        }
        if self.prefix.len() > MAX_PREFIX || self.prefix.ends_with('/') || self.prefix.contains('\0') {
            return Err(format!(
                "store.prefix is {:?}: accepted are up to {MAX_PREFIX} bytes without a slash at the end, such as \
                 \"/penstock\"",
                self.prefix
            ));
        }
        Ok(())
    }
}

/// `[election]`: which control plane writes, where several share an etcd. Without meaning for the embedded store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ElectionConfig {
    /// This control plane's name; empty: its gRPC address.
    pub id: String,
    /// Whether it may lead. One that may not serves all the same.
    pub candidate: bool,
    /// Where it runs.
    pub zone: String,
    /// Zones whose control planes never lead, whatever `candidate` says.
    pub arbitration_zones: Vec<String>,
    /// How long a leader that vanished keeps the others waiting, in milliseconds; whole seconds, 2,000 to 60,000.
    pub lease_ttl_ms: u64,
    /// HOST:PORT at which the other control planes reach our REST API; empty: `listen.http`.
    pub advertise_http: String,
    /// HOST:PORT at which they reach our gRPC; empty: `listen.grpc`.
    pub advertise_grpc: String,
    /// Longest time that a request forwarded to the leader may take, in milliseconds.
    pub forward_timeout_ms: u64,
}

impl Default for ElectionConfig {
    fn default() -> Self {
        Self {
            id: String::new(),
            candidate: true,
            zone: String::new(),
            arbitration_zones: vec!["reserved-arbitration".into()],
            lease_ttl_ms: 3_000,
            advertise_http: String::new(),
            advertise_grpc: String::new(),
            forward_timeout_ms: 10_000,
        }
    }
}

impl ElectionConfig {
    /// Whether this control plane may lead.
    pub fn may_lead(&self) -> bool {
        self.candidate && !self.arbitration_zones.contains(&self.zone)
    }

    /// `listen` holds the two listen addresses, by setting.
    pub(crate) fn validate(&self, listen: [(&str, &str); 2]) -> Result<(), String> {
        if !(2_000..=60_000).contains(&self.lease_ttl_ms) || !self.lease_ttl_ms.is_multiple_of(1_000) {
            return Err(format!(
                "election.lease_ttl_ms is {}: accepted are 2000 to 60000, in whole seconds (etcd counts leases in them)",
                self.lease_ttl_ms
            ));
        }
        if !(100..=600_000).contains(&self.forward_timeout_ms) {
            return Err(format!(
                "election.forward_timeout_ms is {}: accepted is 100 to 600000",
                self.forward_timeout_ms
            ));
        }
        let advertised = [("advertise_http", &self.advertise_http), ("advertise_grpc", &self.advertise_grpc)];
        for ((key, advertised), (listen_key, listen)) in advertised.into_iter().zip(listen) {
            let listens = listen.parse::<SocketAddr>().ok();
            if advertised.is_empty() && listens.is_some_and(|address| address.ip().is_unspecified()) {
                return Err(format!(
                    "election.{key} is empty and {listen_key} is {listen}: say at which HOST:PORT the other control \
                     planes reach this one"
                ));
            }
            let valid = advertised.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|p| p != 0)
            });
            if !advertised.is_empty() && !valid {
                return Err(format!("election.{key} is {advertised:?}: accepted is HOST:PORT"));
            }
        }
        if self.id.len() > 256 || self.id.chars().any(char::is_control) {
            return Err("election.id has more than 256 bytes or control characters".into());
        }
        Ok(())
    }
}
