//! The vocabulary: what is wanted ([`desired`]) and how ([`policy`]), what was wanted ([`revisions`]), what is seen
//! ([`observed`]), what is accepted ([`validate`]); how engines start other than from nothing ([`warm`]).
//! Plain types and pure functions; no I/O, no clock.

pub mod desired;
pub mod observed;
pub mod policy;
pub mod revisions;
pub mod route;
pub mod validate;
pub mod warm;

pub use desired::{
    Assignment, Deployment, EngineSpec, Failures, Gpu, LoraAdapter, Node, Phase, Placement,
    RegisteredEndpoint,
};
pub use observed::{EngineObserved, EngineState, NodeObserved};
pub use policy::{NodePolicy, Policy};
pub use route::{Route, RouteTarget};
