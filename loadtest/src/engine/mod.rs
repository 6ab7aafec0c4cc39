//! The engine simulator: `vllm serve` without a model.
//!
//! Made so that gateway, agent and control plane can be built, tested and measured on any machine against something that
//! behaves as vLLM does from outside, down to its processes, and that says provable things ([`tokens`]).
//!
//! One process per engine, on one thread: a fleet of simulators shares a machine, and nothing here is long enough to
//! need more. Beside it, the second process that stands for EngineCore (`core_process`).
//!
//! A request, file by file: `server` accepts → `http` reads → `routes` decides, strikes early faults →
//! `request`, then `chat`, `completions`, `responses` or `messages` make a job → `run` takes a place in the `scheduler`
//! (over the pure `batch`, `kv`) → each granted token: `generation` makes it, the API renders it, `http` writes it.
//!
//! Beside it: `other_routes` (embeddings, tokens, health ...), [`audio`], and the WebSocket of `realtime`.
//!
//! Pure: [`tokens`], [`generation`], [`template`], [`batch`], [`kv`], [`faults`], `args`, `request`, `render`, `logprobs`,
//! `parser`. Absent: templates with tools, multimodal inputs, beam search, LoRA beyond names, HTTP/2, TLS.

mod args;
pub mod audio;
pub mod batch;
mod chat;
mod completions;
mod control;
mod core_process;
mod error;
pub mod faults;
pub mod generation;
mod http;
pub mod kv;
mod logprobs;
mod messages;
mod metrics;
mod other_routes;
mod parser;
mod realtime;
mod record;
pub(crate) mod render;
mod request;
mod responses;
mod routes;
mod run;
mod scheduler;
mod server;
mod sim_flags;
mod state;
pub mod template;
pub mod tokens;
mod vllm_flags;

use std::{ffi::OsString, io::Write, process::ExitCode, time::Duration};

use self::args::Command;

/// The version of vLLM that this imitates.
pub const VLLM_VERSION: &str = "0.32.0";

/// How long blocking work (the parsing of a large body) may hold up the end of the process.
const BLOCKING_GRACE: Duration = Duration::from_millis(100);

/// Runs the command line `argv`, program name first, and returns the exit code: 0 clean stop, 1 failure, 2 usage.
///
/// If this program is more than the simulator, the name says how to reach it: with `argv[0]` "penstock engine-sim" the
/// EngineCore process is started as `PROGRAM engine-sim engine-core`.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let program = argv.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let subcommand: Vec<String> = match program.strip_prefix("penstock ") {
        Some(words) => words.split_whitespace().map(String::from).collect(),
        None => Vec::new(),
    };
    match args::parse(argv) {
        Ok(Command::Print(text)) => {
            let mut out = std::io::stdout().lock();
            if out.write_all(text.as_bytes()).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(Command::EngineCore) => core_process::main(),
        Ok(Command::Serve(options)) => serve(*options, &subcommand),
        Err(e) => {
            log(&e.to_string());
            ExitCode::from(2)
        }
    }
}

fn serve(mut options: args::Options, subcommand: &[String]) -> ExitCode {
    options.sim.dev_mode |= std::env::var("VLLM_SERVER_DEV_MODE").is_ok_and(|v| v == "1");
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            log(&format!("cannot start the runtime: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let served = runtime.block_on(server::serve(options, subcommand));
    runtime.shutdown_timeout(BLOCKING_GRACE);
    served.unwrap_or_else(|e| {
        log(&e.to_string());
        ExitCode::FAILURE
    })
}

/// A line on standard error, which may be closed: an engine outlives the agent that reads its log.
fn log(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
