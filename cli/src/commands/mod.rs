//! The operator's commands: each is one call of the REST API, printed. [`simulate`] alone calls nobody.

mod deployments;
mod routes;
pub(crate) mod simulate;
mod views;
mod wait;

use std::process::ExitCode;

use clap::CommandFactory;

use crate::{
    api::{ApiError, ControlPlane},
    args::{Cli, Command, Remote},
    output,
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
        Command::Status(remote) => views::status(&remote).await,
        Command::Models(remote) => views::models(&remote).await,
        Command::Endpoints(args) => views::endpoints(&args).await,
        Command::Nodes(remote) => views::nodes(&remote).await,
        Command::Proxies(remote) => views::proxies(&remote).await,
        Command::Version(remote) => views::version(&remote).await,
        Command::Deploy(args) => deployments::deploy(&args).await,
        Command::Routes(remote) => routes::list(&remote).await,
        Command::Route { command } => routes::change(&command).await,
        Command::Scale(args) => deployments::scale(&args).await,
        Command::Delete(args) => deployments::delete(&args).await,
        Command::Drain(args) => deployments::drain(&args, true).await,
        Command::Undrain(args) => deployments::drain(&args, false).await,
        Command::Simulate(args) => simulate::run(&args),
        Command::Completions { shell } => completions(shell),
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
fn connect(remote: &Remote) -> Result<ControlPlane, ApiError> {
    if let Some(address) = &remote.controlplane {
        return ControlPlane::new(address, "--controlplane or PENSTOCK_CONTROLPLANE");
    }
    match last_controlplane(remote.data_dir.as_deref()) {
        Some((address, file)) => ControlPlane::new(&address, &file),
        None => ControlPlane::new("http://127.0.0.1:18090", "the default"),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<(), ApiError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "penstock", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}
