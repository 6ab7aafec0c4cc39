//! Penstock's data plane: OpenAI traffic in, a fleet of engines behind it.
//!
//! # The life of a request
//!
//! 1. [`listener`] accepts, speaks TLS and the PROXY protocol where told to; pingora parses the head (HTTP/1.1 or HTTP/2).
//! 2. [`gateway`]'s `handle` checks the head, finds the route in [`openai`], and asks [`admission`] who is calling.
//! 3. [`downstream::body`] takes the body whole, within its limits.
//! 4. [`openai::request`] reads `model` and `stream` out of it in one pass ([`openai::multipart`] out of a form), and the hashes
//!    of the prompt's prefixes where a routing policy wants them; the bytes stay as they are, less what
//!    an untrusted caller may not tell an engine.
//! 5. [`endpoints`]: one immutable snapshot says where the model can go; [`routing::resolve`] in which order: the targets of
//!    its route, then its fallbacks.
//! 6. [`routing`] picks an endpoint by its policy and reserves a place: the ticket, held to the end of the answer.
//! 7. [`upstream::client`] connects, sends, and waits for the answer's beginning ([`upstream::connection`] speaks HTTP). A failure here is invisible to the
//!    client: [`health`] hears of it, [`upstream::retry`] decides, and 6 comes again.
//! 8. [`streaming::relay`] hands the answer on, event by event, watching for a client that leaves.
//!    An engine that is lost in the middle costs the client nothing where [`resume`] knows how another can go on.
//! 9. [`record`] counts the request when it is dropped, however it ended; every guard gives back what it held.
//!
//! Beside it: [`xds`] follows the control plane and keeps its last good word on disk, [`private`] serves probes and metrics,
//! [`drain`] stops without losing anybody, [`upgrade`] gives way to a new binary, [`error`] renders every failure, [`process`] is `main`.
//! [`simulator`] runs the policies of [`routing`] on a model of a fleet; no request comes by there.
//!
//! # Invariants
//!
//! - A request reads one snapshot an attempt and no lock that an update takes.
//! - Nothing is written to the client before an engine's answer has begun; nothing is retried after. A stream whose engine is
//!   lost then goes on where it was, at another, or not at all.
//! - A stream that breaks ends with an error event, never as if it were whole.
//! - The engine's connection closes when the client leaves, in every phase: it is dropped with the future that waits on it.
//! - The data plane needs neither the control plane nor its store to serve a request.

// The fuzz targets' properties name the crate as its users do; its own tests check them, too.
#[cfg(test)]
extern crate self as penstock_proxy;

pub mod admission;
pub mod downstream;
pub mod drain;
pub mod endpoints;
pub mod error;
pub mod gateway;
pub mod health;
pub mod listener;
pub mod openai;
pub mod private;
pub mod process;
pub mod record;
pub mod resume;
pub mod routing;
mod signals;
pub mod simulator;
pub mod streaming;
pub mod telemetry;
pub mod upgrade;
pub mod upstream;
pub mod xds;

pub use process::main;
