//! Load and engines for Penstock: the engine simulator and the load generator that checks every token.
//!
//! - [`engine`]: a stand-in for `vllm serve`, a product of its own: the same command line, routes, JSON, headers,
//!   metrics and failures, over tokens that are a pure function of what came before them.
//! - [`load`]: a client of many concurrent streams that computes what each stream must say and compares.
//!
//! - [`updates`]: a benchmark of one proxy whose tables change all the time while it carries streams.
//! - [`fanout`]: a benchmark of a control plane that tells many proxies of changes in a large fleet.
//! - [`resume`]: a benchmark of what it costs a proxy to be ready to continue streams.
//! - [`scale`]: how the cost of a proxy grows, and the line that it follows.
//! - [`relay`]: a raw TCP relay, the floor that gateways are compared with.
//! - [`mod@bench`]: a benchmark of Penstock and its peers side by side.
//! - [`instructions`]: how many instructions an event and a request cost the proxy, compared with what they did.
//!
//! The first two meet in [`engine::tokens`] and [`engine::generation`] only: what the engine will answer can be computed by
//! anyone who has the request, so a lost, doubled, reordered or foreign token is found by comparison, not by trust.

mod ask;
pub mod bench;
mod clock;
pub mod engine;
pub mod fanout;
pub mod instructions;
mod limits;
pub mod load;
pub mod relay;
pub mod resume;
pub mod scale;
pub mod updates;
mod usage;
