//! The xDS transport: Envoy's discovery messages and services, and the type URLs of our own resources.

pub use envoy_types::pb::{
    envoy::{config::core::v3::Node, service::discovery::v3::*},
    google::{protobuf::Any, rpc::Status},
};

/// Type URL of [`crate::v1::EndpointTable`]. Sent before the routes that name it.
pub const ENDPOINT_TABLE_TYPE: &str = "type.googleapis.com/penstock.v1.EndpointTable";

/// Type URL of [`crate::v1::ModelRoute`].
pub const MODEL_ROUTE_TYPE: &str = "type.googleapis.com/penstock.v1.ModelRoute";
