//! Settings of Penstock's processes: one struct per process, one commented TOML file per struct.
//!
//! A process reads its settings once, at start, in [`load`]: built-in defaults, then the file, then the environment.
//! `config/*.toml` hold every key with its default and its meaning; a test keeps them equal to the structs.
//! A setting that is off is an empty string or a zero, never an absent key, so that every key can be seen.
//!
//! Two things that every process does at start live here too, because they are told by settings: how it logs
//! ([`logging::init`]) and how it says where it listens ([`announce`]).

mod access;
pub mod agent;
mod announce;
pub mod controlplane;
mod gpus;
mod load;
pub mod logging;
mod programs;
pub mod proxy;
pub mod storage;
mod store;
mod tls;
mod tree;
pub mod warm;

pub use announce::announce;
pub use load::{ConfigError, environment, load};
pub use tls::TlsConfig;
