//! The xDS transport: Envoy's discovery messages and services, and the type URLs of our own resources.

pub use envoy_types::pb::{
    envoy::{config::core::v3::Node, service::discovery::v3::*},
    google::{protobuf::Any, rpc::Status},
};

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
