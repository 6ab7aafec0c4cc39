//! `penstock-bench-resume`: see [`penstock_loadtest::resume`].

use std::process::ExitCode;

/// As in the other binaries.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::resume::main(std::env::args_os())
}
