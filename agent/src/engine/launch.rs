//! How a life begins: with a new process, or with one that an earlier agent left running.

use std::{io, time::Duration};

use penstock_proto::engine::secret::masked_args;
use tokio::time::Instant;

use super::{
    causes::Cause,
    cgroup::Cgroup,
    command::{self, ExtraPorts, Place, extra_ports},
    context::Context,
    logs,
    ports::PortLease,
    probe::Target,
    process::Tree,
    records::{Origin, Record},
    verdict, verify, versions,
};
use crate::{
    assignment::Assignment,
    state::stem,
    warm::{
        Way,
        restore::{self, Hook},
    },
};

/// What an engine listens on when it listens on every address.
const EVERYWHERE: &str = "0.0.0.0";

/// A running engine.
pub(crate) struct Engine {
    /// Its processes.
    pub(crate) tree: Tree,
    /// Its port.
    pub(crate) lease: PortLease,
    /// Its other ports.
    pub(crate) _extra: Vec<PortLease>,
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
    /// Starts after the first.
    pub(crate) restarts: u32,
    /// When this agent began to start it, found it, or began to wake it.
    pub(crate) since: Instant,
    /// What was executed, without secrets.
    pub(crate) command: Vec<String>,
    /// What it was started from.
    pub(crate) origin: Origin,
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

/// How a running engine came about.
struct Begun {
    since: Instant,
    way: Way,
    note: String,
    /// None: `engines.ready_s`.
    within: Option<Duration>,
}

/// Why an engine does not run, and whether starting it again can help.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For the operator.
    pub(crate) reason: String,
    /// Another try would fail the same way: there is none.
    pub(crate) permanent: bool,
    /// Another try here will hardly go better: it is given up here at once, and tried now and then.
    pub(crate) hopeless: bool,
}

impl Failure {
    /// One that another try may overcome.
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), permanent: false, hopeless: false }
    }
}

/// The record and processes of the replica's engine, if one runs.
pub(crate) fn living(cx: &Context, replica_id: &str) -> Option<(Record, Tree)> {
    let record = cx.records.read(replica_id).filter(|r| r.boot_id == cx.boot_id)?;
    let mut tree = Tree::find(record.pid, record.start_ticks)?;
    tree.found_in(Cgroup::find(&record.cgroup));
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
    let Origin { kv_events: (first, count), rpc_port, .. } = record.origin;
    let extra = [(first, count), (rpc_port, 1)].into_iter().filter(|(port, count)| *port > 0 && *count > 0);
    let extra = extra.map(|(port, count)| cx.ports.hold(port, count)).collect();
    let lease = cx.ports.hold(record.port, 1);
    // One that was being restored is given the hook's time, and what follows a hook that fails.
    let way = if record.way == Way::Restored && !record.ready { Way::Restored } else { Way::Adopted };
    let within = restore::timeout(cx, assignment).filter(|_| way == Way::Restored);
    let begun = Begun { since: Instant::now(), way, note: String::new(), within };
    Some(engine(cx, tree, lease, extra, record, begun))
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
    let spec = &assignment.spec;
    let version = cx.programs.version(&spec.engine).await;
    let ports =
        Taken::new(cx, assignment).map_err(|e| Failure::passing(format!("no port for the engine: {e}")))?;
    let state_dir = cx.state.root().to_string_lossy();
    let place = Place {
        host: &cx.config.bind_host,
        port: ports.lease.port(),
        kv_events_port: ports.kv_events.as_ref().map(PortLease::port),
        rpc_port: ports.rpc.as_ref().map(PortLease::port),
        gpus,
        state_dir: &state_dir,
        longest_shutdown_s: longest_shutdown_s(cx.config.term_ms),
        version: versions::released(&version),
    };
    let (launch, notes) = command::launch(&cx.config.programs, assignment, place).map_err(|e| Failure {
        permanent: e.permanent,
        ..verdict::not_started(cx, id, Cause::Arguments, e.to_string())
    })?;
    if let Some(reason) = verify::lacks(cx, assignment, &launch.argv).await {
        return Err(verdict::not_started(cx, id, Cause::GpuMemory, reason));
    }
    for note in &notes {
        tracing::warn!(replica = id, note, "an engine is started otherwise than it was asked for");
    }
    let Beginning { since, way, note, hook } = beginning;
    let within = hook.as_ref().map(|hook| hook.timeout);
    let launch = match hook {
        Some(hook) => hook.instead_of(launch, assignment, &cx.config.bind_host, ports.lease.port()),
        None => launch,
    };
    let shown = masked_args(&launch.argv);
    let (lease, extra, origin) = ports.with_origin(cx, version, notes);

    let path = cx.state.log(id);
    let log = logs::open(&path, id, &shown.join(" "))
        .map_err(|e| Failure::passing(format!("cannot open the log {}: {e}", path.display())))?;
    let mut record = Record {
        assignment: assignment.clone(),
        port: lease.port(),
        pid: 0,
        start_ticks: 0,
        boot_id: cx.boot_id.clone(),
        restarts,
        ready: false,
        cgroup: String::new(),
        asleep: false,
        way,
        command: shown,
        origin,
    };
    let unrecorded = |e: std::io::Error| Failure::passing(format!("cannot write the engine's record: {e}"));
    cx.records.write(&record).map_err(unrecorded)?;
    // Made first, so that the process is in it a moment after it has begun.
    let cgroup = cx.cgroups.make(&stem(id));
    let spawned = Tree::spawn(&launch, log);
    let mut tree = spawned.map_err(|e| verdict::not_started(cx, id, Cause::Program, e.to_string()))?;
    if let Some(cgroup) = cgroup {
        record.cgroup = cgroup.path().to_string_lossy().into_owned();
        tree.enter(cgroup);
    }
    cx.metrics.starts.inc();
    (record.pid, record.start_ticks) = (tree.pid(), tree.start_ticks());
    if let Err(error) = cx.records.write(&record) {
        // The next agent could only end it: better none now.
        cx.put_down(id, &mut tree, cx.orphan_term()).await;
        return Err(unrecorded(error));
    }
    tracing::info!(replica = id, pid = record.pid, port = record.port, "engine started");
    Ok(engine(cx, tree, lease, extra, record, Begun { since, way, note, within }))
}

/// What is left of the time between SIGTERM and SIGKILL when the engine has a second to end itself in.
fn longest_shutdown_s(term_ms: u64) -> u32 {
    u32::try_from((term_ms / 1_000).saturating_sub(1)).unwrap_or(u32::MAX)
}

/// The ports of a new engine.
struct Taken {
    lease: PortLease,
    kv_events: Option<PortLease>,
    ranks: u16,
    rpc: Option<PortLease>,
}

impl Taken {
    fn new(cx: &Context, assignment: &Assignment) -> io::Result<Self> {
        let (host, base) = (cx.config.bind_host.as_str(), cx.config.port_base);
        let spec = &assignment.spec;
        let ExtraPorts { kv_events, rpc } = extra_ports(cx.config.programs.get(&spec.engine), spec);
        let lease = cx.ports.take(host, base)?;
        // vLLM publishes on every address.
        let row = || cx.ports.take_row(EVERYWHERE, base, kv_events);
        let kv_events_lease = (kv_events > 0).then(row).transpose()?;
        let rpc = rpc.then(|| cx.ports.take(host, base)).transpose()?;
        Ok(Self { lease, kv_events: kv_events_lease, ranks: kv_events, rpc })
    }

    fn with_origin(
        self,
        cx: &Context,
        version: String,
        notes: Vec<String>,
    ) -> (PortLease, Vec<PortLease>, Origin) {
        let first = self.kv_events.as_ref().map(PortLease::port);
        let origin = Origin {
            version,
            notes,
            kv_events: (first.unwrap_or_default(), self.ranks),
            kv_events_address: first
                .map(|port| advertised(&cx.config.advertise_host, port))
                .unwrap_or_default(),
            rpc_port: self.rpc.as_ref().map(PortLease::port).unwrap_or_default(),
        };
        (self.lease, self.kv_events.into_iter().chain(self.rpc).collect(), origin)
    }
}

/// Notes for the next agent that the replica's engine has been ready.
pub(crate) fn note_ready(cx: &Context, replica_id: &str) {
    let Some(record) = cx.records.read(replica_id).filter(|record| !record.ready) else { return };
    if let Err(error) = cx.records.write(&Record { ready: true, ..record }) {
        tracing::error!(replica = replica_id, %error, "cannot write the engine's record");
    }
}

fn engine(
    cx: &Context,
    tree: Tree,
    lease: PortLease,
    extra: Vec<PortLease>,
    record: Record,
    begun: Begun,
) -> Engine {
    let program = cx.config.programs.get(&record.assignment.spec.engine);
    Engine {
        target: Target::new(&cx.config.bind_host, lease.port()).of(program),
        address: advertised(&cx.config.advertise_host, lease.port()),
        tree,
        lease,
        _extra: extra,
        asleep: record.asleep,
        way: begun.way,
        note: begun.note,
        ready_within: begun.within.unwrap_or(Duration::from_secs(cx.config.ready_s)),
        was_ready: record.ready && !record.asleep,
        restarts: record.restarts,
        since: begun.since,
        command: record.command,
        origin: record.origin,
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
