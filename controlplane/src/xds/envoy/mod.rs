//! The same state for a stock Envoy: its listener, routes, clusters and endpoints. Pure.
//!
//! A pool is a cluster (`pool`), its endpoints are the cluster's assignment. One listener and one table of routes (`front`)
//! lead to them by the model that a request's JSON body names: Envoy's own filters read it, nothing has to be added to Envoy
//! or to a client.
//!
//! What a stock Envoy cannot do is left to our proxy: rewriting a body (so a name whose engines know the model by another one is
//! answered in words, and fallbacks, which are other names, are none), forms (audio), WebSockets, queues, load reports.
//!
//! Cost: a changed pool costs its own two resources. A changed name costs all routes, since an Envoy takes them as one resource;
//! endpoints that come and go change no route.

mod front;
mod pool;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use penstock_config::controlplane::EnvoyConfig;
use penstock_proto::{
    v1,
    xds::{
        Any,
        envoy::{
            config::core::v3::{
                Address, AggregatedConfigSource, ApiVersion, ConfigSource, HttpProtocolOptions,
                SocketAddress, address, config_source, socket_address,
            },
            r#type::v3::Percent,
        },
        google::{self, UInt32Value},
    },
};
use prost::Name;

use super::{
    kind::Kind,
    snapshot::{Resource, Snapshot},
};

/// The name of the listener, of its routes, and of the metadata between filters.
pub const NAME: &str = "penstock";

/// Makes Envoy's resources.
#[derive(Debug)]
pub struct Envoy {
    listen: SocketAddr,
    max_body_bytes: u32,
    idle: Duration,
    connect: Duration,
    /// What became of each name, and whether it differs from what was last put.
    names: BTreeMap<String, front::Entry>,
    changed: bool,
}

impl Envoy {
    /// None: `listen` is empty, nobody is to have them.
    pub fn new(config: &EnvoyConfig) -> Option<Self> {
        Some(Self {
            listen: config.listen.parse().ok()?,
            max_body_bytes: config.max_body_bytes,
            idle: Duration::from_secs(config.idle_timeout_s),
            connect: Duration::from_millis(config.connect_timeout_ms),
            names: BTreeMap::new(),
            changed: true,
        })
    }

    /// Puts the cluster and the assignment of a pool, or takes them away with its table.
    pub(super) fn put_pool(
        &self,
        name: &str,
        table: Option<&v1::EndpointTable>,
        next: &mut Snapshot,
        changed: &mut Vec<(Kind, Arc<str>)>,
    ) {
        let cluster = table.map(|_| Resource::of(&pool::cluster(name, self.connect), Vec::new()));
        next.put(Kind::Cluster, name, cluster, changed);
        let assignment = table.map(|table| Resource::of(&pool::assignment(table), Vec::new()));
        next.put(Kind::Assignment, name, assignment, changed);
    }

    /// Takes in where a name leads by now.
    pub(super) fn note_route(&mut self, name: &str, route: Option<&v1::ModelRoute>) {
        let entry = route.map(front::Entry::new);
        if self.names.get(name) == entry.as_ref() {
            return;
        }
        self.changed = true;
        match entry {
            Some(entry) => self.names.insert(name.to_owned(), entry),
            None => self.names.remove(name),
        };
    }

    /// Puts the listener and its routes, if they are others.
    pub(super) fn put_front(&mut self, next: &mut Snapshot, changed: &mut Vec<(Kind, Arc<str>)>) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let listener = Resource::of(&front::listener(self), Vec::new());
        next.put(Kind::Listener, NAME, Some(listener), changed);
        let pools = self.names.values().flat_map(front::Entry::pools).map(Arc::from);
        let routes = Resource::of(&front::routes(&self.names, self.idle), pools.collect());
        next.put(Kind::RouteConfig, NAME, Some(routes), changed);
    }
}

fn any<T: prost::Message + Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

fn common(idle: Duration) -> HttpProtocolOptions {
    HttpProtocolOptions { idle_timeout: duration(idle), ..Default::default() }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn percent(value: f64) -> Option<Percent> {
    Some(Percent { value })
}

fn duration(duration: Duration) -> Option<google::Duration> {
    Some(google::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    })
}

/// "Over the stream that this came by."
fn by_ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    })
}

fn address(host: &str, port: u16) -> Option<Address> {
    Some(Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: host.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    })
}
