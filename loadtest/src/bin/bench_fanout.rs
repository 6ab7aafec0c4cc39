//! `penstock-bench-fanout`: see [`penstock_loadtest::fanout`].

use std::process::ExitCode;

/// As in the other binaries.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::fanout::main(std::env::args_os())
}
