//! `penstock-load`: `penstock load` without the rest of Penstock; see [`penstock_loadtest::load`].

use std::process::ExitCode;

/// As in the other binaries.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_loadtest::load::main(std::env::args_os())
}
