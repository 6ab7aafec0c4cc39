//! How a life begins: with a new process, or with one that an earlier agent left running.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    command::{self, Place},
    context::Context,
    logs,
    ports::PortLease,
    probe::Target,
    process::Tree,
    records::Record,
};
use crate::{
    assignment::Assignment,
    warm::{
        Way,
        restore::{self, Hook},
    },
};

/// A running engine.
pub(crate) struct Engine {
    /// Its processes.
    pub(crate) tree: Tree,
    /// Its port.
    pub(crate) lease: PortLease,
    /// Its server, as the agent asks it.
    pub(crate) target: Target,
    /// Its server, as proxies reach it: host:port.
    pub(crate) address: String,
    /// It sleeps, or was told to.
    pub(crate) asleep: bool,
    /// How it is started.
    pub(crate) way: Way,
    /// Why not in a warmer way.
    pub(crate) note: String,
    /// Longest time from now to its first completion.
    pub(crate) ready_within: Duration,
    /// It has been ready under an earlier agent.
    pub(crate) was_ready: bool,
    /// Where this life's output begins in its log.
    pub(crate) log_from: u64,
    /// Starts after the first.
    pub(crate) restarts: u32,
    /// When this agent began to start it, found it, or began to wake it.
    pub(crate) since: Instant,
    /// What was executed.
    pub(crate) command: Vec<String>,
}

/// What a start has besides its assignment.
#[derive(Debug)]
pub(crate) struct Beginning {
    /// When it began.
    pub(crate) since: Instant,
    /// How it is started.
    pub(crate) way: Way,
    /// Why not in a warmer way; may be empty.
    pub(crate) note: String,
    /// Starts it in place of the engine's own command.
    pub(crate) hook: Option<Hook>,
}

/// Why an engine does not run, and whether starting it again can help.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For the operator.
    pub(crate) reason: String,
    /// Another try would fail the same way.
    pub(crate) permanent: bool,
}

impl Failure {
    /// One that another try may overcome.
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), permanent: false }
    }
}

/// The record and processes of the replica's engine, if one runs.
pub(crate) fn living(cx: &Context, replica_id: &str) -> Option<(Record, Tree)> {
    let record = cx.records.read(replica_id).filter(|r| r.boot_id == cx.boot_id)?;
    let tree = Tree::find(record.pid, record.start_ticks)?;
    Some((record, tree))
}

/// The engine that already runs for exactly this assignment. One that runs for another is ended first.
pub(crate) async fn take_over(cx: &Context, assignment: &Assignment) -> Option<Engine> {
    let id = &assignment.replica_id;
    let Some((record, mut tree)) = living(cx, id) else {
        // It died while no agent looked: what the control plane knows of it is out of date.
        if cx.records.read(id).is_some() {
            cx.deregister(assignment);
            cx.forget(id);
        }
        return None;
    };
    if !record.assignment.same_engine(assignment) {
        tracing::warn!(replica = id, pid = record.pid, "ending an engine of another assignment");
        cx.deregister(&record.assignment);
        cx.put_down(id, &mut tree, cx.term()).await;
        return None;
    }
    tracing::info!(replica = id, pid = record.pid, port = record.port, "engine taken over");
    cx.metrics.adoptions.inc();
    let lease = cx.ports.hold(record.port);
    // One that was being restored is given the hook's time, and what follows a hook that fails.
    let way = if record.way == Way::Restored && !record.ready { Way::Restored } else { Way::Adopted };
    let hook = restore::timeout(cx, assignment).filter(|_| way == Way::Restored);
    let begun = Begun { since: Instant::now(), way, note: String::new(), within: hook };
    Some(engine(cx, tree, lease, record, begun))
}

/// Starts a process for the assignment. The record is written before it and after it, so that none is lost.
///
/// # Errors
/// Why there is no process.
pub(crate) async fn launch(
    cx: &Context,
    assignment: &Assignment,
    restarts: u32,
    beginning: Beginning,
) -> Result<Engine, Failure> {
    let id = &assignment.replica_id;
    let gpus = {
        let gpus = cx.gpus.borrow();
        if let Some(refusal) = gpus.refuses(&assignment.gpu_uuids) {
            return Err(Failure::passing(refusal));
        }
        gpus.kind
    };
    let (host, base) = (cx.config.bind_host.as_str(), cx.config.port_base);
    let lease =
        cx.ports.take(host, base).map_err(|e| Failure::passing(format!("no port for the engine: {e}")))?;
    let state_dir = cx.state.root().to_string_lossy();
    let place = Place { host, port: lease.port(), gpus, state_dir: &state_dir };
    let launch = command::launch(&cx.config.programs, assignment, place)
        .map_err(|e| Failure { reason: e.to_string(), permanent: true })?;
    let Beginning { since, way, note, hook } = beginning;
    let within = hook.as_ref().map(|hook| hook.timeout);
    let launch = match hook {
        Some(hook) => hook.instead_of(launch, assignment, host, lease.port()),
        None => launch,
    };

    let path = cx.state.log(id);
    let (log, log_from) = logs::open(&path, &format!("# penstock starts {id}: {}", launch.argv.join(" ")))
        .map_err(|e| Failure::passing(format!("cannot open the log {}: {e}", path.display())))?;
    let mut record = Record {
        assignment: assignment.clone(),
        port: lease.port(),
        pid: 0,
        start_ticks: 0,
        boot_id: cx.boot_id.clone(),
        restarts,
        ready: false,
        asleep: false,
        way,
        log_from,
        command: launch.argv.clone(),
    };
    let unrecorded = |e: std::io::Error| Failure::passing(format!("cannot write the engine's record: {e}"));
    cx.records.write(&record).map_err(unrecorded)?;
    let mut tree = Tree::spawn(&launch, log).map_err(|e| Failure::passing(e.to_string()))?;
    cx.metrics.starts.inc();
    (record.pid, record.start_ticks) = (tree.pid(), tree.start_ticks());
    if let Err(error) = cx.records.write(&record) {
        // The next agent could only end it: better none now.
        cx.put_down(id, &mut tree, cx.orphan_term()).await;
        return Err(unrecorded(error));
    }
    tracing::info!(replica = id, pid = record.pid, port = record.port, "engine started");
    Ok(engine(cx, tree, lease, record, Begun { since, way, note, within }))
}

/// Notes for the next agent that the replica's engine has been ready.
pub(crate) fn note_ready(cx: &Context, replica_id: &str) {
    let Some(record) = cx.records.read(replica_id).filter(|record| !record.ready) else { return };
    if let Err(error) = cx.records.write(&Record { ready: true, ..record }) {
        tracing::error!(replica = replica_id, %error, "cannot write the engine's record");
    }
}

/// How a running engine came about.
struct Begun {
    since: Instant,
    way: Way,
    note: String,
    /// None: `engines.ready_s`.
    within: Option<Duration>,
}

fn engine(cx: &Context, tree: Tree, lease: PortLease, record: Record, begun: Begun) -> Engine {
    Engine {
        asleep: record.asleep,
        way: begun.way,
        note: begun.note,
        ready_within: begun.within.unwrap_or(Duration::from_secs(cx.config.ready_s)),
        target: Target::new(&cx.config.bind_host, lease.port()),
        address: advertised(&cx.config.advertise_host, lease.port()),
        tree,
        lease,
        was_ready: record.ready && !record.asleep,
        log_from: record.log_from,
        restarts: record.restarts,
        since: begun.since,
        command: record.command,
    }
}

/// host:port, with brackets where the host needs them.
fn advertised(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_host_is_advertised_in_brackets() {
        assert_eq!(advertised("10.0.0.1", 7), "10.0.0.1:7");
        assert_eq!(advertised("fd00::1", 7), "[fd00::1]:7");
        assert_eq!(advertised("[fd00::1]", 7), "[fd00::1]:7");
    }
}
