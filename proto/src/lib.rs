//! The wires between Penstock's processes: messages, services and the ids that travel on them.
//!
//! - [`v1`]: `penstock.v1`, generated from `proto/penstock/v1/*.proto`: the resources a proxy subscribes to and the
//!   fleet session between agents and the control plane, the link between control planes.
//! - [`xds`]: the xDS transport (`envoy.service.discovery.v3`) those resources travel on, and its type URLs.
//! - [`engine`]: what a deployment may say of its engines: typed options, and what is refused of the rest.
//! - [`Version`]: the (term, revision) pair that orders everything the control plane publishes.
//!
//! Depends on nothing else of Penstock.

pub mod engine;
pub mod tls;
mod version;
pub mod xds;

pub use version::{ParseVersionError, Version};

/// Generated from `penstock/v1/*.proto`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("penstock.v1");
}

/// Version of the fleet protocol that this build speaks; sent in [`v1::Hello`].
pub const FLEET_PROTOCOL_VERSION: u32 = 1;

/// Version of the link between control planes that this build speaks; sent in [`v1::PlaneHello`].
pub const PEERS_PROTOCOL_VERSION: u32 = 1;

/// Largest message, in bytes, that our gRPC peers accept: a table of 10,000 endpoints is about 1 MB.
pub const MAX_GRPC_MESSAGE_BYTES: usize = 64 << 20;
