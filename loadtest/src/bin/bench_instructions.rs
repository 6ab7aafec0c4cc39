//! `penstock-bench-instructions`: see [`penstock_loadtest::instructions`].

use std::process::ExitCode;

/// As in the other binaries.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::instructions::main(std::env::args_os())
}
