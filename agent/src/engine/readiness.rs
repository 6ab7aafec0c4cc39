//! When an engine is ready: not before a real completion, for the name it is to be asked by, came out of *its* server.
//!
//! Steps, each repeated from the first until all pass in one go: `/health` answers, the port is listened on by the
//! engine's own processes, `/v1/models` lists the name, a completion of one token succeeds. The port is checked because
//! another program may have taken it between our choice and the engine's bind; a stranger that happens to serve the same
//! model name must not be registered in the engine's place.

use std::time::Duration;

use super::{
    probe::{Probe, Target},
    procfs::{self, Listener},
};

/// Deadline for `/health` while loading: the port is closed then, so any answer is quick.
const HEALTH_DEADLINE: Duration = Duration::from_secs(10);

/// What is asked for readiness.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    /// The engine's server.
    pub(crate) target: Target,
    /// Its port.
    pub(crate) port: u16,
    /// Its process group.
    pub(crate) pgid: i32,
    /// The name it is asked by.
    pub(crate) model: String,
    /// Pause between tries.
    pub(crate) poll: Duration,
    /// Longest wait for the completion.
    pub(crate) completion: Duration,
}

/// Why waiting is pointless.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("port {port} is listened on by another program (pid {pid}); the next start takes another port")]
pub(crate) struct PortLost {
    port: u16,
    pid: i32,
}

/// Returns when the engine is ready; `tell` gets what it is waiting for whenever that changes.
///
/// # Errors
/// [`PortLost`]. Everything else may still come right and is waited for; the caller has the deadline.
pub(crate) async fn until_ready(
    probe: &Probe,
    question: &Question,
    tell: impl Fn(&str),
) -> Result<(), PortLost> {
    let mut told = String::new();
    loop {
        let Err(waiting_for) = attempt(probe, question).await? else { return Ok(()) };
        if waiting_for != told {
            tell(&waiting_for);
            told = waiting_for;
        }
        tokio::time::sleep(question.poll).await;
    }
}

async fn attempt(probe: &Probe, question: &Question) -> Result<Result<(), String>, PortLost> {
    let Question { target, model, .. } = question;
    if let Err(reason) = probe.health(target, HEALTH_DEADLINE).await {
        return Ok(Err(reason));
    }
    owns_port(question).await?;
    if let Err(reason) = probe.serves(target, model).await {
        return Ok(Err(reason));
    }
    Ok(probe.completes(target, model, question.completion).await)
}

async fn owns_port(question: &Question) -> Result<(), PortLost> {
    let (port, pgid) = (question.port, question.pgid);
    let look = move || {
        let own = |p: &procfs::Proc| p.pgrp == pgid || p.session == pgid;
        let pids: Vec<i32> = procfs::all().into_iter().filter(own).map(|p| p.pid).collect();
        procfs::listener(port, &pids)
    };
    match tokio::task::spawn_blocking(look).await {
        Ok(Listener::Other(pid)) => Err(PortLost { port, pid }),
        _ => Ok(()),
    }
}
