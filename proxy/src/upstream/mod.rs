//! The engine's side of a request: one attempt ([`client`]), the request as the engine gets it ([`request`]), and what
//! follows a failed attempt ([`retry`]).

pub mod client;
pub mod request;
pub mod retry;
