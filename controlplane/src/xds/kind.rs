//! The types of resources: our own for our proxies, Envoy's for a stock Envoy. Pure.

use penstock_proto::xds::{ENDPOINT_TABLE_TYPE, MODEL_ROUTE_TYPE, envoy};
use prost::Name;

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `penstock.v1.EndpointTable`.
    Table,
    /// `penstock.v1.ModelRoute`.
    Route,
    /// Envoy's `Cluster` (CDS).
    Cluster,
    /// Envoy's `ClusterLoadAssignment` (EDS).
    Assignment,
    /// Envoy's `Listener` (LDS).
    Listener,
    /// Envoy's `RouteConfiguration` (RDS).
    RouteConfig,
}

/// A part of what is to be said, in the order in which it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Of what.
    pub kind: Kind,
    /// Whether removals belong to it; what is new or changed does anyhow.
    pub removals: bool,
}

const fn step(kind: Kind, removals: bool) -> Step {
    Step { kind, removals }
}

impl Step {
    /// Whether it takes away what an Envoy's routes may lead to.
    pub const fn breaks_envoys(self) -> bool {
        self.removals && self.kind.is_envoys() && !matches!(self.kind, Kind::RouteConfig)
    }

    /// Of which kinds nothing may be unanswered when it is taken. An Envoy acknowledges a new cluster only once it has the
    /// cluster's endpoints, so these do not wait for that; its routes do.
    pub const fn after(self) -> &'static [Kind] {
        match (self.kind, self.removals) {
            (Kind::Table | Kind::Route, _) => &[Kind::Table, Kind::Route],
            (Kind::Cluster, false) => &[Kind::Cluster],
            (Kind::Assignment, false) => &[Kind::Assignment],
            (Kind::Listener, false) => &[Kind::Listener],
            (Kind::RouteConfig, _) => &[Kind::Cluster, Kind::Assignment, Kind::RouteConfig],
            (Kind::Listener, true) => &[Kind::RouteConfig, Kind::Listener],
            (Kind::Cluster, true) => &[Kind::RouteConfig, Kind::Cluster],
            (Kind::Assignment, true) => &[Kind::Cluster, Kind::Assignment],
        }
    }
}

impl Kind {
    /// All of them; [`Kind::index`] is the place in it.
    pub const ALL: [Self; 6] =
        [Self::Table, Self::Route, Self::Cluster, Self::Assignment, Self::Listener, Self::RouteConfig];

    /// Make before break: what is referred to comes first and goes last. Assignments go after their clusters, since an Envoy
    /// that lost the cluster has given them up by itself, and one that has it should not lose its endpoints.
    pub const STEPS: [Step; 10] = [
        step(Self::Table, false),
        step(Self::Route, true),
        step(Self::Table, true),
        step(Self::Cluster, false),
        step(Self::Assignment, false),
        step(Self::Listener, false),
        step(Self::RouteConfig, true),
        step(Self::Listener, true),
        step(Self::Cluster, true),
        step(Self::Assignment, true),
    ];

    /// Its place in arrays.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// From its type URL.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }

    /// Its type URL.
    pub fn url(self) -> String {
        match self {
            Self::Table => ENDPOINT_TABLE_TYPE.to_owned(),
            Self::Route => MODEL_ROUTE_TYPE.to_owned(),
            Self::Cluster => envoy::config::cluster::v3::Cluster::type_url(),
            Self::Assignment => envoy::config::endpoint::v3::ClusterLoadAssignment::type_url(),
            Self::Listener => envoy::config::listener::v3::Listener::type_url(),
            Self::RouteConfig => envoy::config::route::v3::RouteConfiguration::type_url(),
        }
    }

    /// Its name in metrics and in the API.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Table => "endpoint_table",
            Self::Route => "model_route",
            Self::Cluster => "cluster",
            Self::Assignment => "endpoint_assignment",
            Self::Listener => "listener",
            Self::RouteConfig => "route_configuration",
        }
    }

    /// Whether it is of a stock Envoy.
    pub const fn is_envoys(self) -> bool {
        !matches!(self, Self::Table | Self::Route)
    }

    /// State of the world: whether a response holds all that there is, so that what is missing in it has gone. For the others
    /// it holds what changed, and what goes does so with what referred to it.
    pub const fn is_told_whole(self) -> bool {
        !matches!(self, Self::Assignment | Self::RouteConfig)
    }

    /// What a resource of this kind refers to by [`super::snapshot::Resource::pools`]: the subscriber must have it first.
    pub const fn needs(self) -> &'static [Self] {
        match self {
            Self::Route => &[Self::Table],
            Self::RouteConfig => &[Self::Cluster, Self::Assignment],
            _ => &[],
        }
    }

    /// What an Envoy waits for anew, under the same name, once it was sent a changed resource of this kind.
    pub const fn renews(self) -> Option<Self> {
        match self {
            Self::Cluster => Some(Self::Assignment),
            Self::Listener => Some(Self::RouteConfig),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_place_its_url_and_its_steps() {
        for (at, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!((kind.index(), Kind::from_url(&kind.url())), (at, Some(kind)));
            assert!(Kind::STEPS.iter().any(|step| step.kind == kind && step.removals));
            assert!(Kind::STEPS.iter().all(|step| step.after().contains(&step.kind)));
            let first = Kind::STEPS.iter().position(|step| step.kind == kind);
            for needed in kind.needs() {
                assert!(Kind::STEPS.iter().position(|step| step.kind == *needed) < first);
            }
        }
        assert_eq!(Kind::Cluster.url(), "type.googleapis.com/envoy.config.cluster.v3.Cluster");
        assert_eq!(Kind::from_url("type.googleapis.com/x"), None);
    }
}
