//! What the control plane tells this proxy, and how the proxy outlives the control plane.
//!
//! - [`state`]: the tables and routes as last accepted; `apply` decides on each response (pure).
//! - [`client`]: the delta ADS subscription: connect, subscribe, ACK or NACK, come back.
//! - [`cache`]: the last accepted state on disk, for a start without a control plane.
//! - [`wants`]: which sleeping models requests are held for: the one thing that is told in the other direction.
//! - [`status`]: how the subscription is doing, for metrics and `/readyz`.
//!
//! Why the last good state outlives its source: a fleet of engines does not stop serving because the process that
//! plans it is down, and a proxy that forgot its endpoints whenever a connection broke would turn an outage of the
//! control plane into one of the service. So a lost session changes nothing but [`status`]; there is no expiry and
//! no "disconnected" state of the tables. What has died meanwhile is found out by the proxy's own health checks.
//!
//! Invariants:
//! - A response is applied as a whole or not at all. What was refused is answered with all reasons, and the state
//!   before it stays.
//! - A state never holds a route without its table: a table that is withdrawn while a route still names it stays
//!   until the route goes.
//! - Versions only grow: a lower term, or an older revision of the same type, is refused. What a deposed leader
//!   still sends cannot undo what its successor said.
//! - Only complete states (tables and routes both heard of) leave the client or reach the disk.
//!
//! Deliberately absent: a guard against pushes that shrink a table by much (the control plane holds those back), and
//! uniqueness of endpoint ids across tables (one table is one pool; ids are unique in each).

pub mod cache;
pub mod client;
pub mod state;
pub mod status;
pub mod wants;
