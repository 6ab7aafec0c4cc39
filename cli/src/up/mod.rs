//! `penstock up`: a whole Penstock on one machine, in one process tree.
//!
//! ```text
//! up ── controlplane          each line a process; `up` restarts the three, the agent its engines
//!    ├─ agent ── engine ...
//!    └─ proxy
//! ```
//!
//! [`up`] is the story; [`system::System`] has its chapters: start, supervise, stop. The parts are the real processes,
//! started with settings files that anyone could have written: `up` has no way into them but their flags, their announce
//! files, the REST API and signals, so that what works here works when they are started by hand or by systemd.
//!
//! Invariants: one `up` per data directory (a lock that the kernel holds). Whatever `up` starts is found again by a mark
//! in its environment, and is gone when `up` has stopped, and if `up` was killed, when the next one has started.
//!
//! Deliberately absent: TLS, keys, several nodes. It listens on loopback only.

mod banner;
mod children;
mod datadir;
mod error;
mod leftovers;
mod plan;
mod ports;
mod restart;
mod settings;
mod signals;
mod supervise;
mod system;
mod wait;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use self::{banner::Summary, datadir::DataDir, error::UpError, plan::Plan, signals::Signals, system::System};
use crate::{args::UpArgs, output};

/// Runs `penstock up` until a signal or a failure ends it.
pub(crate) async fn main(options: UpArgs) -> ExitCode {
    match up(&options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, UpError::Said(_) | UpError::Interrupted) {
                output::say(&error.to_string());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

async fn up(options: &UpArgs) -> Result<(), UpError> {
    let plan = Plan::new(options)?;
    let data = DataDir::open(&datadir::default_or(options.data_dir.as_deref())?)?;
    leftovers::clear(data.root())?;
    children::raise_file_limit();
    let mut signals = Signals::new()?;
    let mut system = System::new(plan, data, options)?;

    let started = tokio::select! {
        started = system.start() => started,
        () = signals.next() => Err(UpError::Interrupted),
    };
    let outcome = match started {
        Ok(text) => match output::print(&text) {
            Ok(()) => system.supervise(&mut signals).await,
            Err(error) => Err(UpError::Failed(format!("cannot print where all runs: {error}"))),
        },
        Err(error) => Err(error),
    };
    if !system.has_started() {
        return outcome;
    }
    if let Err(error @ (UpError::Failed(_) | UpError::Usage(_))) = &outcome {
        output::say(&error.to_string()); // now: the stop may take a while
    }
    let stopped = system.stop(&mut signals).await;
    match outcome {
        Ok(()) | Err(UpError::Interrupted) => stopped,
        Err(error) => stopped.and(Err(UpError::Said(error.exit_code()))),
    }
}

/// The control plane's address of the `up` on that data directory (else the default one), and the file that says so.
pub(crate) fn last_controlplane(data_dir: Option<&Path>) -> Option<(String, String)> {
    let (summary, file) = last_summary(data_dir)?;
    Some((format!("http://{}", summary.controlplane), file))
}

/// The same for its API for clients.
pub(crate) fn last_public(data_dir: Option<&Path>) -> Option<(String, String)> {
    let (summary, file) = last_summary(data_dir)?;
    Some((format!("http://{}", summary.public), file))
}

/// The same for its proxy's private port.
pub(crate) fn last_proxy(data_dir: Option<&Path>) -> Option<(String, String)> {
    let (summary, file) = last_summary(data_dir)?;
    Some((format!("http://{}", summary.proxy_private), file))
}

/// The same for its agent's private port.
pub(crate) fn last_agent(data_dir: Option<&Path>) -> Option<(String, String)> {
    let (summary, file) = last_summary(data_dir)?;
    Some((format!("http://{}", summary.agent_private), file))
}

fn last_summary(data_dir: Option<&Path>) -> Option<(Summary, String)> {
    let root: PathBuf = datadir::default_or(data_dir).ok()?;
    let file = datadir::summary(&root);
    Some((serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?, file.display().to_string()))
}
