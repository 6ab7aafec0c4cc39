//! Drills on a small fleet, process by process: what kills it, and what must not even disturb it.

#![allow(clippy::unwrap_used)]

mod clock_skew;
mod outage;
mod processes;
#[path = "../support/mod.rs"]
mod support;
