//! `penstock-proxy`: see [`penstock_proxy::main`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    penstock_proxy::main(std::env::args_os())
}
