//! The `penstock-agent` program; `penstock agent` is the same code.

use std::process::ExitCode;

fn main() -> ExitCode {
    penstock_agent::main(std::env::args_os())
}
