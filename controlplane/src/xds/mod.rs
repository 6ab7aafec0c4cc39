//! The wire to the proxies: xDS over one stream per proxy, delta or state of the world, to our own proxies and to Envoys.
//!
//! [`project`] makes resources of the view ([`routes`]: where names lead, `departure`: what becomes of streams, [`envoy`]: the
//! same for a stock Envoy, [`guard`]: what is held back), [`hub`] publishes one immutable [`snapshot`] to every subscriber, [`session`] is one subscriber's protocol
//! state ([`sotw`]: in the other protocol's words), [`server`] the gRPC around it, [`peer`] who may subscribe. [`loads`] brings
//! news of engines' loads on the same stream, in a lane of their own.
//!
//! Order is kept without the client's help ([`kind::Kind::STEPS`]), and the next response of a kind goes out when the last one
//! was acknowledged or refused. So nothing queues for a slow subscriber: it gets the newest snapshot when it is ready for it, and
//! skips those between.
//!
//! Resource versions are hashes of the content, equal on every control plane and across restarts: a proxy that
//! reconnects and says what it has is sent only what differs. docs/xds.md is the operator's side of this.

mod departure;
pub mod envoy;
pub mod guard;
pub mod hub;
pub mod kind;
pub mod loads;
pub mod peer;
pub mod project;
pub mod routes;
pub mod server;
pub mod session;
pub mod snapshot;
pub mod sotw;
pub mod states;
