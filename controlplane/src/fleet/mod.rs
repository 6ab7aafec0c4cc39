//! The wire to the agents: sessions, what nodes say, registrations, and who is lost.

pub mod liveness;
pub mod logs;
pub mod registration;
pub(crate) mod relay;
pub mod roster;
pub mod server;
mod session;
pub mod settled;
