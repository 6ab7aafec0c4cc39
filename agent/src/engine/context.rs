//! What all supervisors share: settings, paths, and the handles through which they act.

use std::time::Duration;

use penstock_config::{
    agent::{EnginesConfig, GpuConfig},
    warm::WarmConfig,
};
use tokio_util::sync::CancellationToken;

use super::{
    cgroup::Cgroups, logs::Logs, ports::Ports, probe::Probe, process::Tree, programs::Programs,
    records::Records, stop, verdict::Memories, verify,
};
use crate::{
    assignment::Assignment, board::Board, foreign::Foreign, gpu, metrics::Metrics, registrations::Registry,
    state::StateDir, warm::prefetch::Prefetcher,
};

/// One per agent.
pub(crate) struct Context {
    /// `[engines]`
    pub(crate) config: EnginesConfig,
    /// `[warm]`
    pub(crate) warm: WarmConfig,
    /// Models that are fetched.
    pub(crate) prefetch: Prefetcher,
    /// `[gpus]`
    pub(crate) gpu_config: GpuConfig,
    /// Longest wait for the answer to a deregistration.
    pub(crate) deregister: Duration,
    /// Paths.
    pub(crate) state: StateDir,
    /// Records of engines.
    pub(crate) records: Records,
    /// This boot of the machine.
    pub(crate) boot_id: String,
    /// What is known of engines.
    pub(crate) board: Board,
    /// Who is to be routed to.
    pub(crate) registry: Registry,
    /// What the node's programs are.
    pub(crate) programs: Programs,
    /// Ports in use.
    pub(crate) ports: Ports,
    /// Engines' cgroups.
    pub(crate) cgroups: Cgroups,
    /// Engines' logs.
    pub(crate) logs: Logs,
    /// What the kernel ended for want of memory lately.
    pub(crate) memories: Memories,
    /// Processes that look like vLLM and belong to no engine of this agent.
    pub(crate) foreign: Foreign,
    /// Asks engines.
    pub(crate) probe: Probe,
    /// The node's GPUs.
    pub(crate) gpus: gpu::Handle,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// Cancelled when the operator asks a second time: drains are cut short.
    pub(crate) hurry: CancellationToken,
}

impl Context {
    /// Takes the replica out of routing: at once in what this agent wants, as soon as it hears in the control plane.
    pub(crate) fn deregister(&self, assignment: &Assignment) {
        let Assignment { model, replica_id, generation, .. } = assignment;
        self.registry.change(|r| r.leave(replica_id, model, *generation));
    }

    /// Ends every process of the replica and forgets its record; SIGKILL follows SIGTERM after `term`. Returns when the
    /// memory of its GPUs is given back, or that was waited for long enough.
    pub(crate) async fn put_down(&self, replica_id: &str, tree: &mut Tree, term: Duration) {
        let give_up = Duration::from_millis(self.config.kill_ms);
        let pids = verify::pids(tree);
        let stuck = |left: String| {
            tracing::error!(replica = replica_id, "{left}");
            self.board.update(replica_id, |view| view.reason = left);
        };
        stop::put_down(tree, term, give_up, &self.hurry, &self.metrics, stuck).await;
        let strays_term = self.orphan_term();
        stop::end_strays(&self.state, &self.cgroups, replica_id, strays_term, give_up).await;
        verify::released(self, replica_id, &pids).await;
        if let Some(cgroup) = tree.cgroup()
            && let Err(error) = cgroup.remove()
        {
            tracing::warn!(replica = replica_id, %error, "an engine's cgroup cannot be removed");
        }
        self.forget(replica_id);
    }

    /// Removes the replica's record.
    pub(crate) fn forget(&self, replica_id: &str) {
        if let Err(error) = self.records.remove(replica_id) {
            tracing::error!(replica = replica_id, %error, "cannot remove the engine's record");
        }
    }

    /// Time from SIGTERM to SIGKILL in a stop.
    pub(crate) fn term(&self) -> Duration {
        Duration::from_millis(self.config.term_ms)
    }

    /// The same for what a dead main process has left.
    pub(crate) fn orphan_term(&self) -> Duration {
        Duration::from_millis(self.config.orphan_term_ms)
    }
}
