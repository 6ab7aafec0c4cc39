//! When an engine is ready: not before a real completion, for the name it is to be asked by, came out of *its* server.
//!
//! Steps, each repeated from the first until all pass in one go: `/health` answers, the port is listened on by the
//! engine's own processes, `/v1/models` lists the name, a completion of one token succeeds. The port is checked because
//! another program may have taken it between our choice and the engine's bind; a stranger that happens to serve the same
//! model name must not be registered in the engine's place.

use std::time::Duration;

use tokio::time::Instant;

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
pub(crate) enum Lost {
    /// Somebody else has the port.
    #[error("port {port} is listened on by another program (pid {pid}); the next start takes another port")]
    Port { port: u16, pid: i32 },
    /// Its server took questions, as no engine does that still loads, and answered none of them.
    #[error("its port is open and for {} ms nothing was answered: {last}", .waited.as_millis())]
    Silent { waited: Duration, last: String },
}

/// Returns when the engine is ready; `tell` gets what it is waiting for whenever that changes.
///
/// # Errors
/// [`Lost`]. Everything else may still come right and is waited for; the caller has the deadline.
pub(crate) async fn until_ready(probe: &Probe, question: &Question, tell: impl Fn(&str)) -> Result<(), Lost> {
    let mut told = String::new();
    let mut silent_since = None;
    loop {
        let began = Instant::now();
        let Err(waiting) = attempt(probe, question).await? else { return Ok(()) };
        if waiting.reason != told {
            tell(&waiting.reason);
            told = waiting.reason;
        }
        silent_since = waiting.silent.then(|| silent_since.unwrap_or(began));
        if let Some(waited) = silent_since.map(|since| since.elapsed()).filter(|w| *w >= question.completion)
        {
            return Err(Lost::Silent { waited, last: told });
        }
        tokio::time::sleep(question.poll).await;
    }
}

/// It is not ready.
struct Waiting {
    reason: String,
    /// Whether that took the whole deadline: nothing was refused, nothing was answered.
    silent: bool,
}

async fn attempt(probe: &Probe, question: &Question) -> Result<Result<(), Waiting>, Lost> {
    let Question { target, model, .. } = question;
    let began = Instant::now();
    if let Err(reason) = probe.health(target, HEALTH_DEADLINE).await {
        return Ok(Err(Waiting { reason, silent: began.elapsed() >= HEALTH_DEADLINE }));
    }
    owns_port(question).await?;
    if let Err(reason) = probe.serves(target, model).await {
        return Ok(Err(Waiting { reason, silent: false }));
    }
    let began = Instant::now();
    let completed = probe.completes(target, model, question.completion).await;
    Ok(completed.map_err(|reason| Waiting { reason, silent: began.elapsed() >= question.completion }))
}

async fn owns_port(question: &Question) -> Result<(), Lost> {
    let (port, pgid) = (question.port, question.pgid);
    let look = move || {
        let own = |p: &procfs::Proc| p.pgrp == pgid || p.session == pgid;
        let pids: Vec<i32> = procfs::all().into_iter().filter(own).map(|p| p.pid).collect();
        procfs::listener(port, &pids)
    };
    match tokio::task::spawn_blocking(look).await {
        Ok(Listener::Other(pid)) => Err(Lost::Port { port, pid }),
        _ => Ok(()),
    }
}
