//! Control planes among themselves, and what proxies ask of any of them besides tables.
//!
//! One that follows keeps a [`link`] to the one that leads. Up go how far its proxies are, so that a deregistration waits
//! for every proxy of the fleet and not only for the leader's own, and which sleeping models requests are held for; down
//! come news of engines' loads, so that a proxy may subscribe anywhere. Nothing of that is state: a link that breaks
//! begins anew with all of it, and without one a follower's proxies go on with what they have.
//!
//! A follower without a link is not waited for: it may be gone for good, and the wait is bounded anyway.

mod followers;
pub mod link;
pub mod server;

pub use followers::{Follower, Followers};
