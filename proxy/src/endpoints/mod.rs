//! Where requests can go. An *endpoint* is one registered engine, a *pool* the endpoints that serve one model, a
//! *snapshot* everything routable at one moment.
//!
//! - [`table`]: the one swap: a request loads one [`Snapshot`] and reads nothing else.
//! - [`endpoint`]: identity (immutable) and live figures (shared across swaps), the in-flight [`Ticket`].
//! - [`departure`]: streams that go on at another engine though theirs still serves: whose turn it is.
//! - [`gone`]: what is remembered of endpoints that left the tables, for a while.
//! - [`reported`]: what engines say of their load, and how old that is.
//!
//! Whether an endpoint is to be picked is [`crate::health`]'s business.

pub mod departure;
pub mod endpoint;
pub mod gone;
pub mod reported;
pub mod table;

pub use departure::Leave;
pub use endpoint::{Endpoint, Ticket};
pub use table::{EndpointTable, Pool, Route, Snapshot};
