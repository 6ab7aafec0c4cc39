//! The control plane: what is wanted, where it runs, and who is told.
//!
//! How a PUT becomes a running engine: [`admin`] checks it and writes `/deployments/{model}` into the [`store`]; the
//! [`view`] follows the store; [`reconcile`] wakes, [`plan`] decides, and the placement is committed by compare-and-swap
//! under this process's term ([`leadership`]); the [`fleet`] session of the chosen node sends the assignment; the agent
//! starts the engine and registers it, by compare-and-swap on the assignment's generation; the view changes again, and
//! [`xds`] publishes the table and the route to every proxy.
//!
//! And how it ends: the assignment turns to leaving, proxies see the endpoint draining, the agent deregisters; the
//! answer waits until proxies have acknowledged tables without it; then the engine stops, and once a report no longer
//! has it, its GPUs are free.
//!
//! Invariants: decisions are pure functions of one view. Every write compares the term and what it was decided by.
//! What is published was read whole and is consistent; a store that cannot be read changes nothing that was published.
//! Proxies serve without this process; agents keep engines running without it.

pub mod access;
pub mod admin;
pub mod audit;
pub mod backup;
pub mod core;
pub mod demand;
pub mod fleet;
mod forward;
pub mod leadership;
pub mod metrics;
pub mod model;
pub mod peers;
pub mod plan;
mod process;
pub mod reconcile;
pub mod store;
pub mod tls;
pub mod view;
pub mod xds;

pub use process::{Error, main, run};
