//! The vocabulary: what is wanted ([`desired`]), what is seen ([`observed`]), what is accepted ([`validate`]).
//! Plain types and pure functions; no I/O, no clock.

pub mod desired;
pub mod observed;
pub mod route;
pub mod validate;

pub use desired::{
    Assignment, Deployment, EngineSpec, Gpu, LoraAdapter, Node, Phase, Placement, RegisteredEndpoint,
};
pub use observed::{EngineObserved, EngineState, NodeObserved};
pub use route::{Route, RouteTarget};
