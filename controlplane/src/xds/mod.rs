//! The wire to the proxies: delta xDS over one stream per proxy.
//!
//! [`snapshot`] projects the view into resources, [`hub`] publishes one immutable snapshot to every subscriber,
//! [`routes`] says where names lead, [`session`] is one subscriber's protocol state, [`server`] the gRPC around it.
//! [`loads`] brings news of engines' loads on the same stream, in a lane of their own.
//!
//! Order is kept without the client's help: tables are sent before the routes that name them and withdrawn after them,
//! and the next response goes out when the last one was acknowledged or refused. So nothing queues for a slow
//! subscriber: it gets the newest snapshot when it is ready for it, and skips those between.
//!
//! Resource versions are hashes of the content, equal on every control plane and across restarts: a proxy that
//! reconnects and says what it has is sent only what differs. Absent: state-of-the-world streams.

pub mod hub;
pub mod loads;
pub mod routes;
pub mod server;
pub mod session;
pub mod snapshot;
