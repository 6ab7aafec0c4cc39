//! temporary
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
fn main() -> std::process::ExitCode { penstock_loadtest::load::main(std::env::args_os()) }
