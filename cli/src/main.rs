//! `penstock`: every process of Penstock in one binary, and the operator's command line.
//!
//! Three kinds of subcommand, told apart in [`args`]:
//! 1. processes (`proxy`, `controlplane`, `agent`, `engine-sim`, `load`): the rest of the command line is theirs, see
//!    [`processes`]. The thin binaries of those crates run the same code.
//! 2. `up`: a whole Penstock on this machine, whose parts are this binary executed again, see [`up`].
//! 3. everything else: calls of the control plane's REST API, see [`commands`] and [`api`]. [`apply`] makes a site what
//!    [`manifest`]s say; [`checks`] look at a site, a machine or a plan, and say what to do.
//!
//! Exit codes: 0 done; 1 failed (the server said no, a port is taken, not ready in time); 2 wrong usage or settings;
//! 3 the control plane, or a proxy, cannot be reached; 4 it knows no such thing; 5 what was compared differs.
//!
//! Deliberately absent: any access to the store or to the fleet's gRPC; what this binary can do, the REST API can do. The
//! exception is `backup` and `restore` with `--offline`, for a control plane that cannot be up.

mod api;
mod apply;
mod args;
mod checks;
mod commands;
mod manifest;
mod output;
mod processes;
mod up;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use crate::args::{Cli, Command};

/// Spares the data plane the system allocator's lock and its fragmentation under many short-lived buffers.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    if let Some(code) = processes::run(&argv) {
        return code;
    }
    let cli = match Cli::try_parse_from(&argv) {
        Ok(cli) => cli,
        Err(error) => {
            // Also how clap delivers --help and --version, which are no failure. Nobody reads a closed stderr.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(output::USAGE) } else { ExitCode::SUCCESS };
        }
    };
    // One thread: `up` must spawn its children from a thread that lives as long as itself (see `up::children`).
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::say(&format!("cannot start the async runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match cli.command {
            Command::Up(options) => up::main(options).await,
            command => commands::main(command).await,
        }
    })
}
