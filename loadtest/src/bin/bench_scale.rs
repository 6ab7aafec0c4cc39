//! `penstock-bench-scale`: see [`penstock_loadtest::scale`].

use std::process::ExitCode;

/// As in the other binaries.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::scale::main(std::env::args_os())
}
