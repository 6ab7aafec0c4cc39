//! The control plane as a binary of its own; `penstock controlplane` is the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    penstock_controlplane::main(std::env::args_os())
}
