//! What a deployment may say of its engines, as far as control plane and agent must agree on it. Pure.
//!
//! - [`EngineOptions`]: the typed fields, each absent unless it was given; [`FIELDS`] says which of vLLM's options they are.
//! - [`refused`]: arguments and environment variables that no deployment may give, each with its reason.
//! - [`secret`]: which values are never shown.
//!
//! It is here, and not in either process, so that what is accepted when a deployment is applied is what is accepted where
//! its engine is started: one table, one wording.

mod fields;
mod options;
pub mod refused;
pub mod secret;

pub use fields::{FIELDS, Field, Form, field, option_of, repeated};
pub use options::{EngineOptions, Share, gpus_needed};
