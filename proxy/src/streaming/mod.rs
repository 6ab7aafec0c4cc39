//! Handing on an answer that goes on: [`relay`].

pub mod relay;
