//! The agent as a process of its own, with real child processes, against a scripted control plane.
//!
//! The engines are this very test program, run again as [`engine::stand_in_engine`]: a server that speaks just enough of
//! vLLM's interface and misbehaves on demand. Nothing else needs to be installed, and nothing of it is shipped.

#![allow(clippy::unwrap_used)]

mod adoption;
mod controlplane;
mod engine;
mod exits;
mod foreign;
mod gpus;
mod life;
mod liveness;
mod logs;
mod node;
mod nvml;
mod prefetch;
mod process;
mod replay;
mod restore;
mod simulated_gpus;
mod sleep;
mod spec;
mod stop;
mod trees;
