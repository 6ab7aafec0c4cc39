//! The operator's commands: each is one call of the REST API, or a few, printed. [`explain`] and [`chat`] ask proxies instead,
//! [`simulate`] nobody.

mod backup;
mod chat;
mod deployments;
mod describe;
mod explain;
mod get;
mod gpus;
mod logs;
mod nodes;
mod place;
mod prefetch;
mod revisions;
mod routes;
pub(crate) mod simulate;
mod story;
mod tokens;
mod views;
pub(crate) mod wait;

use std::process::ExitCode;

use clap::CommandFactory;

use crate::{
    api::{ApiError, ControlPlane},
    apply,
    args::{Cli, Command, Remote, Server},
    checks, manifest, output,
    up::last_controlplane,
};

/// Runs `command` and gives the exit code of the module doc in `main.rs`.
pub(crate) async fn main(command: Command) -> ExitCode {
    match run(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failed(&error),
    }
}

async fn run(command: Command) -> Result<(), ApiError> {
    match command {
        Command::Apply(args) => apply::apply(&args).await,
        Command::Schema => Ok(output::print(manifest::SCHEMA)?),
        Command::Get(args) => get::run(&args).await,
        Command::Describe(args) => describe::run(&args).await,
        Command::WaitReady(args) => wait::ready(&args).await,
        Command::VerifyChat(args) => chat::verify(&args).await,
        Command::Doctor(args) => checks::doctor(&args).await,
        Command::Preflight(args) => checks::preflight(&args).await,
        Command::EtcdTopology { command } => checks::etcd_topology(&command),
        Command::Token { command } => tokens::run(&command).await,
        Command::Audit(args) => tokens::audit(&args).await,
        Command::Logs(args) => logs::run(&args).await,
        Command::Cluster { command } => views::cluster(&command).await,
        Command::Place(args) => place::run(&args).await,
        Command::Backup(args) => backup::backup(&args).await,
        Command::Restore(args) => backup::restore(&args).await,
        Command::Status(remote) => views::status(&remote).await,
        Command::Models(remote) => views::models(&remote).await,
        Command::Endpoints(args) => views::endpoints(&args).await,
        Command::Nodes(remote) => views::nodes(&remote).await,
        Command::Gpus(remote) => gpus::list(&remote).await,
        Command::Gpu { command } => gpus::run(&command).await,
        Command::Proxies(remote) => views::proxies(&remote).await,
        Command::Version(remote) => views::version(&remote).await,
        Command::Deploy(args) => deployments::deploy(&args).await,
        Command::Routes(remote) => routes::list(&remote).await,
        Command::Route { command } => routes::change(&command).await,
        Command::Scale(args) => deployments::scale(&args).await,
        Command::Delete(args) => deployments::delete(&args).await,
        Command::History(args) => revisions::history(&args).await,
        Command::Diff(args) if args.files.is_empty() => revisions::diff(&args).await,
        Command::Diff(args) => {
            let server = connect(&args.remote)?;
            apply::diff(&server, &args.files, &args.prune, args.exit_code, args.remote.output).await
        }
        Command::Rollback(args) => revisions::rollback(&args).await,
        Command::Cordon(args) => nodes::speak(&args, "cordon").await,
        Command::Prefetch(args) => prefetch::run(&args).await,
        Command::Maintenance(args) => nodes::speak(&args, "maintenance").await,
        Command::Uncordon(args) => nodes::speak(&args, "uncordon").await,
        Command::Drain(args) => nodes::drain(&args).await,
        Command::Undrain(args) => nodes::undrain(&args).await,
        Command::Explain(args) => explain::run(&args).await,
        Command::Simulate(args) => simulate::run(&args),
        Command::Completions { shell } => completions(shell),
        Command::Man => man(),
        Command::Up(_)
        | Command::Proxy(_)
        | Command::Controlplane(_)
        | Command::Agent(_)
        | Command::EngineSim(_)
        | Command::Load(_) => {
            Err(ApiError::Usage("this subcommand must come first on the command line".into()))
        }
    }
}

/// The control plane that the flags, the environment or the last `penstock up` name, else the one on the default port.
pub(crate) fn connect(remote: &Remote) -> Result<ControlPlane, ApiError> {
    reach(&remote.server)
}

/// The same without a way to print.
pub(crate) fn reach(server: &Server) -> Result<ControlPlane, ApiError> {
    let token = server.token.clone().filter(|token| !token.is_empty());
    if let Some(address) = &server.controlplane {
        return ControlPlane::new(address, "--controlplane or PENSTOCK_CONTROLPLANE", token);
    }
    match last_controlplane(server.data_dir.as_deref()) {
        Some((address, file)) => ControlPlane::new(&address, &file, token),
        None => ControlPlane::new("http://127.0.0.1:18090", "the default", token),
    }
}

fn man() -> Result<(), ApiError> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    Ok(output::print(&String::from_utf8_lossy(&page))?)
}

fn completions(shell: clap_complete::Shell) -> Result<(), ApiError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "penstock", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}
