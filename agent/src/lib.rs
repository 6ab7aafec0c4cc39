//! The agent: owns the engines of one GPU node.
//!
//! The control plane assigns, the agent starts, watches, registers, drains and ends. It owns process *trees*, not pids:
//! no process of an engine may outlive the engine unseen, and no other process on the machine is ever touched. It never
//! ends an engine because the control plane is away, nor because it is itself restarted with `on_shutdown = "keep"` or
//! killed: the next agent takes over what runs.
//!
//! A way through: `process` (start and stop in order) → `fleet` (the session) → `intake` (assignments in) → `reconcile`
//! around `plan` (what to do) → `engine::supervisor` (one engine's life) → `registrations` (who is routed to) → back to
//! `fleet`. Pure: `assignment`, `plan`, `backoff`, `registrations`, `engine` (the states), `engine::command`,
//! `engine::load`, `engine::adopt::survey`, `engine::causes`. Beside the way: `tail` and `log_requests` (engines' logs for
//! whoever asks), `janitor` and `foreign` (what has to be looked at now and then), `directory` (where control planes are).

mod assignment;
mod backoff;
mod board;
mod directory;
mod engine;
mod fleet;
mod foreign;
mod gpu;
mod intake;
mod janitor;
mod log_requests;
mod metrics;
mod plan;
mod private;
mod process;
mod reconcile;
mod registrations;
mod state;
mod tail;
mod warm;

pub use process::{Error, main, run};
pub use warm::preflight::{Check, preflight};
