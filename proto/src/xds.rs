//! The xDS transport: Envoy's discovery messages and services, and the type URLs of our own resources.

pub use envoy_types::pb::{
    envoy::{config::core::v3::Node, service::discovery::v3::*},
    google::{protobuf::Any, rpc::Status},
};

/// Envoy's own resources.
pub use envoy_types::pb::envoy;

/// Google's well-known types that Envoy's resources are made of.
pub mod google {
    pub use envoy_types::pb::google::protobuf::{BoolValue, Duration, Struct, UInt32Value, Value, value};
}

/// Version of what our proxies and control planes say to each other over xDS. A proxy names the one it speaks in its node's
/// metadata, under [`PROTOCOL_KEY`]; without, it is 1. Raised when an older proxy would misunderstand what it is told.
pub const XDS_PROTOCOL_VERSION: u32 = 1;

/// See [`XDS_PROTOCOL_VERSION`].
pub const PROTOCOL_KEY: &str = "penstock.xds_protocol";

/// Type URL of [`crate::v1::EndpointTable`]. Sent before the routes that name it.
pub const ENDPOINT_TABLE_TYPE: &str = "type.googleapis.com/penstock.v1.EndpointTable";

/// Type URL of [`crate::v1::ModelRoute`].
pub const MODEL_ROUTE_TYPE: &str = "type.googleapis.com/penstock.v1.ModelRoute";

/// Type URL of [`crate::v1::EngineLoad`]; resources are named by [`load_name`].
pub const ENGINE_LOAD_TYPE: &str = "type.googleapis.com/penstock.v1.EngineLoad";

/// The name of an endpoint's load: `POOL/ENDPOINT_ID`.
#[must_use]
pub fn load_name(pool: &str, endpoint_id: &str) -> String {
    format!("{pool}/{endpoint_id}")
}

/// Pool and endpoint in a load's name. Pools may hold slashes, ids of endpoints do not.
#[must_use]
pub fn split_load_name(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('/')
}
