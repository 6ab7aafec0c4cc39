//! The wire to the agents: sessions, what nodes say, registrations, and who is lost.

pub mod liveness;
pub mod registration;
mod relay;
pub mod roster;
pub mod server;
mod session;
