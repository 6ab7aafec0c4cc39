//! The engine's side of a request: one attempt ([`client`]), the HTTP that it is made in ([`connection`]), the request as the
//! engine gets it ([`request`], [`headers`], [`trace`]), what its answer really is ([`answers`]), and what follows a failed attempt
//! ([`retry`]).

pub mod answers;
pub mod client;
pub mod connection;
pub mod headers;
pub mod request;
pub mod retry;
pub mod trace;
