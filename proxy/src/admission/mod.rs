//! Who may enter, and when: [`auth`] tells a caller by its API key; [`queue`] lets requests wait, in order, while every
//! engine of their model is at its limit, which [`saturation`] tells.
//!
//! Limits of tenants and fair shares come in at the same seam: between a caller that is known and a request that is
//! picked for.

pub mod auth;
pub mod queue;
pub mod saturation;
