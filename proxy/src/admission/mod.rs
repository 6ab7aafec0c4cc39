//! Who may enter: [`auth`] tells a caller by its API key.
//!
//! Limits, queues and fair shares come in at this seam: between a caller that is known and a request that is picked for.

pub mod auth;
