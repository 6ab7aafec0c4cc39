//! `penstock-engine-sim`: the engine simulator as a process of its own.

use std::process::ExitCode;

/// Chosen for its behaviour with thousands of small buffers per second; libraries leave the choice to the binary.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::engine::main(std::env::args_os())
}
