//! The accepted state of the control plane's resources, and the decision on each response to it.
//!
//! [`XdsState`] is immutable: [`XdsState::apply`] gives a new one, which shares every resource that did not change
//! with the old one (`Arc::ptr_eq` tells which did), so that a push to one of many pools costs that pool alone.
//!
//! A response is refused with *all* that is wrong with it: whoever reads the NACK sees the whole picture at once.

mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use penstock_proto::{
    Version, v1,
    xds::{self, DeltaDiscoveryResponse},
};
use prost::Message;

pub use self::table::{Table, Told};

/// Reasons given in one NACK; the rest are counted.
const MAX_REASONS: usize = 20;

/// Targets of one route: more than anybody splits by hand, fewer than a pick would notice.
const MAX_TARGETS: usize = 64;

/// Fallbacks of one route.
const MAX_FALLBACKS: usize = 64;

/// One accepted resource.
#[derive(Debug, PartialEq)]
pub struct Resource<T> {
    /// Its version as the control plane names it; opaque.
    pub version: String,
    /// What it says.
    pub value: Arc<T>,
}

impl<T> Clone for Resource<T> {
    fn clone(&self) -> Self {
        Self { version: self.version.clone(), value: Arc::clone(&self.value) }
    }
}

/// Resources of one type.
#[derive(Debug, Clone, PartialEq)]
struct Family<T> {
    /// Version of the last response of this type; `None` until there was one.
    version: Option<Version>,
    resources: BTreeMap<String, Resource<T>>,
}

impl<T> Default for Family<T> {
    fn default() -> Self {
        Self { version: None, resources: BTreeMap::new() }
    }
}

/// Everything accepted from the control plane so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct XdsState {
    tables: Family<Table>,
    routes: Family<v1::ModelRoute>,
    /// Tables that were withdrawn while a route still names them.
    withdrawn: BTreeSet<String>,
}

impl XdsState {
    /// A state that was accepted earlier, checked again as if it came over the wire.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub(in crate::xds) fn restore(
        tables: (Option<Version>, Vec<xds::Resource>),
        routes: (Option<Version>, Vec<xds::Resource>),
    ) -> Result<Self, Vec<String>> {
        let versions = (tables.0, routes.0);
        // One family may be a term behind the other, when the file was written between two responses. Read as one
        // version they pass; each then gets its own back.
        let newest = versions.0.max(versions.1).unwrap_or_default();
        let mut state = Self::default();
        for (type_url, resources) in [(xds::ENDPOINT_TABLE_TYPE, tables.1), (xds::MODEL_ROUTE_TYPE, routes.1)]
        {
            state = state.apply(&DeltaDiscoveryResponse {
                system_version_info: newest.to_string(),
                type_url: type_url.to_owned(),
                resources,
                ..Default::default()
            })?;
        }
        (state.tables.version, state.routes.version) = versions;
        Ok(state)
    }

    /// The newest version of either type; zero before the first response.
    #[must_use]
    pub fn version(&self) -> Version {
        self.tables.version.max(self.routes.version).unwrap_or_default()
    }

    /// Version of the last response about tables.
    #[must_use]
    pub const fn tables_version(&self) -> Option<Version> {
        self.tables.version
    }

    /// Version of the last response about routes.
    #[must_use]
    pub const fn routes_version(&self) -> Option<Version> {
        self.routes.version
    }

    /// Whether both tables and routes have been heard of: an empty fleet is complete, a half-told one is not.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.tables.version.is_some() && self.routes.version.is_some()
    }

    /// The endpoint tables by pool.
    #[must_use]
    pub const fn tables(&self) -> &BTreeMap<String, Resource<Table>> {
        &self.tables.resources
    }

    /// The routes by the model that clients ask for. The tables of all their targets exist, and no `served_model` is empty.
    /// What came without targets, from a control plane of before there were any, has the one that it names.
    #[must_use]
    pub const fn routes(&self) -> &BTreeMap<String, Resource<v1::ModelRoute>> {
        &self.routes.resources
    }

    /// The table of `pool`.
    #[must_use]
    pub fn table(&self, pool: &str) -> Option<&Arc<Table>> {
        self.tables.resources.get(pool).map(|resource| &resource.value)
    }

    /// The route of `model`.
    #[must_use]
    pub fn route(&self, model: &str) -> Option<&Arc<v1::ModelRoute>> {
        self.routes.resources.get(model).map(|resource| &resource.value)
    }

    /// What is held of one type, by name: what a new session tells the server, so that it sends only the difference.
    /// A withdrawn table is left out: if the server has it after all, it is sent again.
    #[must_use]
    pub fn resource_versions(&self, type_url: &str) -> HashMap<String, String> {
        fn versions<T>(family: &Family<T>) -> impl Iterator<Item = (String, String)> {
            family.resources.iter().map(|(name, resource)| (name.clone(), resource.version.clone()))
        }
        match type_url {
            xds::ENDPOINT_TABLE_TYPE => {
                versions(&self.tables).filter(|(name, _)| !self.withdrawn.contains(name)).collect()
            }
            xds::MODEL_ROUTE_TYPE => versions(&self.routes).collect(),
            _ => HashMap::new(),
        }
    }

    /// The state after `response`.
    ///
    /// # Errors
    /// Every reason why the response as a whole is refused, as sentences for the operator; at
    /// most 20, and a count of the rest.
    pub fn apply(&self, response: &DeltaDiscoveryResponse) -> Result<Self, Vec<String>> {
        let mut next = self.clone();
        let mut reasons = Vec::new();
        match response.type_url.as_str() {
            xds::ENDPOINT_TABLE_TYPE => next.tables.take(response, self.version(), read_table, &mut reasons),
            xds::MODEL_ROUTE_TYPE => next.routes.take(response, self.version(), read_route, &mut reasons),
            other => reasons.push(format!(
                "type URL {other:?} is not one this proxy subscribes to; it takes {} and {}",
                xds::ENDPOINT_TABLE_TYPE,
                xds::MODEL_ROUTE_TYPE
            )),
        }
        if reasons.is_empty() {
            next.settle_withdrawn(self, response);
            next.check_references(&mut reasons);
        }
        if reasons.is_empty() {
            return Ok(next);
        }
        if reasons.len() > MAX_REASONS {
            let more = reasons.len() - MAX_REASONS;
            reasons.truncate(MAX_REASONS);
            reasons.push(format!("and {more} more"));
        }
        Err(reasons)
    }

    /// Keeps withdrawn tables that a route still names, and lets go of those that none names any more.
    fn settle_withdrawn(&mut self, before: &Self, response: &DeltaDiscoveryResponse) {
        if response.type_url == xds::ENDPOINT_TABLE_TYPE {
            for resource in &response.resources {
                self.withdrawn.remove(&resource.name);
            }
            for name in &response.removed_resources {
                if let Some(table) = before.tables.resources.get(name) {
                    self.tables.resources.insert(name.clone(), table.clone());
                    self.withdrawn.insert(name.clone());
                }
            }
        }
        if self.withdrawn.is_empty() {
            return;
        }
        let named: HashSet<&str> =
            self.routes.resources.values().flat_map(|route| pools(&route.value)).collect();
        let tables = &mut self.tables.resources;
        self.withdrawn.retain(|pool| {
            let kept = named.contains(pool.as_str());
            if !kept {
                tables.remove(pool);
            }
            kept
        });
    }

    fn check_references(&self, reasons: &mut Vec<String>) {
        for (model, route) in &self.routes.resources {
            for pool in pools(&route.value).filter(|pool| !self.tables.resources.contains_key(*pool)) {
                reasons.push(format!(
                    "route {model:?} names pool {pool:?}, of which there is no endpoint table"
                ));
            }
        }
    }
}

/// Reads a resource, given what is held under its name. What is wrong with it goes to the reasons; `None` if it cannot be read.
type Read<T> = fn(&xds::Resource, Option<&T>, &mut Vec<String>) -> Option<T>;

impl<T: PartialEq> Family<T> {
    /// Takes a response of this family in, or says what is wrong with it. `newest` is the newest version of any type.
    fn take(
        &mut self,
        response: &DeltaDiscoveryResponse,
        newest: Version,
        read: Read<T>,
        reasons: &mut Vec<String>,
    ) {
        match response.system_version_info.parse::<Version>() {
            Err(error) => reasons.push(error.to_string()),
            Ok(version) if version.term < newest.term => reasons.push(format!(
                "version {version} is of an older term than {newest}, which this proxy already has"
            )),
            Ok(version) if Some(version) < self.version => reasons.push(format!(
                "version {version} is older than {}, which this proxy already has",
                self.version.unwrap_or_default()
            )),
            Ok(version) => self.version = Some(version),
        }
        for name in &response.removed_resources {
            self.resources.remove(name);
        }
        let mut names = HashSet::new();
        for resource in &response.resources {
            let name = &resource.name;
            if !names.insert(name) {
                reasons.push(format!("resource {name:?} is there twice"));
            }
            if response.removed_resources.contains(name) {
                reasons.push(format!("resource {name:?} is both sent and removed"));
            }
            let held = self.resources.get(name).map(|held| &*held.value);
            if let Some(value) = read(resource, held, reasons) {
                self.put(resource, value);
            }
        }
    }

    /// A value that did not change keeps its `Arc`: servers may send what we have, after a reconnection above all.
    fn put(&mut self, resource: &xds::Resource, value: T) {
        let version = resource.version.clone();
        match self.resources.get_mut(&resource.name) {
            Some(known) if *known.value == value => known.version = version,
            _ => {
                self.resources.insert(resource.name.clone(), Resource { version, value: Arc::new(value) });
            }
        }
    }
}

/// The content, which must be of the type.
fn content<'a>(resource: &'a xds::Resource, type_url: &str) -> Result<&'a [u8], String> {
    let name = &resource.name;
    match &resource.resource {
        None => Err(format!("resource {name:?} has no content")),
        Some(any) if any.type_url != type_url => {
            Err(format!("resource {name:?} is of type {:?} in a response about {type_url:?}", any.type_url))
        }
        Some(any) => Ok(&any.value),
    }
}

fn undecodable(resource: &xds::Resource, error: &prost::DecodeError) -> String {
    format!("resource {:?} cannot be decoded: {error}", resource.name)
}

fn read_table(resource: &xds::Resource, held: Option<&Table>, reasons: &mut Vec<String>) -> Option<Table> {
    let name = &resource.name;
    let read = content(resource, xds::ENDPOINT_TABLE_TYPE).and_then(|bytes| {
        Table::read(name, bytes, held, reasons).map_err(|error| undecodable(resource, &error))
    });
    match read {
        Ok(table) => {
            check_name(name, "table", "pool", &table.pool, reasons);
            Some(table)
        }
        Err(reason) => {
            reasons.push(reason);
            None
        }
    }
}

fn read_route(
    resource: &xds::Resource,
    _held: Option<&v1::ModelRoute>,
    reasons: &mut Vec<String>,
) -> Option<v1::ModelRoute> {
    let read = content(resource, xds::MODEL_ROUTE_TYPE)
        .and_then(|bytes| v1::ModelRoute::decode(bytes).map_err(|error| undecodable(resource, &error)));
    match read {
        Ok(mut route) => {
            check_route(&resource.name, &mut route, reasons);
            Some(route)
        }
        Err(reason) => {
            reasons.push(reason);
            None
        }
    }
}

fn pools(route: &v1::ModelRoute) -> impl Iterator<Item = &str> {
    route.targets.iter().map(|target| target.pool.as_str())
}

/// An empty `served_model` is filled in: the engines then know the model by the name clients use. So is the one target of a
/// route without any that names a pool.
fn check_route(name: &str, route: &mut v1::ModelRoute, reasons: &mut Vec<String>) {
    check_name(name, "route", "model", &route.model, reasons);
    if route.served_model.is_empty() {
        route.served_model.clone_from(&route.model);
    }
    if route.targets.is_empty() && !route.pool.is_empty() {
        let (pool, served_model) = (route.pool.clone(), route.served_model.clone());
        route.targets.push(v1::RouteTarget { pool, served_model, weight: 1, adapter: String::new() });
    }
    for target in route.targets.iter_mut().filter(|target| target.served_model.is_empty()) {
        target.served_model.clone_from(&route.model);
    }
    if route.targets.is_empty() && route.fallbacks.is_empty() {
        reasons.push(format!("route {name:?} has neither a target nor a fallback"));
    }
    for (what, count, most) in
        [("targets", route.targets.len(), MAX_TARGETS), ("fallbacks", route.fallbacks.len(), MAX_FALLBACKS)]
    {
        if count > most {
            reasons.push(format!("route {name:?} has {count} {what}; at most {most} are accepted"));
        }
    }
}

fn check_name(name: &str, what: &str, field: &str, content: &str, reasons: &mut Vec<String>) {
    if name.is_empty() {
        reasons.push(format!("a {what} has no name"));
    } else if name != content {
        reasons.push(format!("{what} {name:?} says it is of {field} {content:?}"));
    }
}

/// `host:port`: an IP address (IPv6 in brackets) or a host name, and a port from 1 to 65535.
fn check_address(address: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("address {address:?} is not host:port: {why}"));
    if let Ok(socket) = address.parse::<SocketAddr>() {
        return if socket.port() == 0 { wrong("port 0 cannot be connected to") } else { Ok(()) };
    }
    let Some((host, port)) = address.rsplit_once(':') else { return wrong("there is no port") };
    let port_is_fine =
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    if !port_is_fine {
        return wrong("the port is not a number from 1 to 65535");
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if host.len() > 253 || !host.trim_end_matches('.').split('.').all(label) {
        return wrong("the host is neither an IP address (IPv6 in brackets) nor a host name");
    }
    Ok(())
}
