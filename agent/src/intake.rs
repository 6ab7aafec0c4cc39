//! Assignments as they arrive: refused when older than what is known, stored, then handed to the reconciler.

use std::sync::Arc;

use penstock_proto::{Version, v1};
use tokio::sync::watch;

use crate::{assignment::Desired, metrics::Metrics, reconcile::Known, state::StateDir};

/// An older set than the one that is known. The sentence is for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "assignments of version {offered} are refused: {known} is known already (term, then revision; if the control plane's \
     store was put back on purpose, stop the agent and remove assignments.json in its state folder)"
)]
pub(crate) struct Stale {
    offered: Version,
    known: Version,
}

/// The one way in for assignments.
pub(crate) struct Intake {
    state: StateDir,
    known: watch::Sender<Known>,
}

impl Intake {
    /// Starts from `stored`, what an earlier agent knew.
    pub(crate) fn new(state: StateDir, stored: Desired) -> Self {
        let known = Known { desired: Arc::new(stored), fresh: false };
        Self { state, known: watch::Sender::new(known) }
    }

    /// What is wanted, now and after each change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// Takes a message over. A set that cannot be stored is used all the same: only a restart would miss it.
    ///
    /// # Errors
    /// [`Stale`]; nothing changes.
    pub(crate) async fn accept(&self, message: v1::Assignments, metrics: &Metrics) -> Result<(), Stale> {
        let (desired, left_out) = Desired::from_message(message);
        for sentence in left_out {
            tracing::error!("the control plane's assignments: {sentence}");
        }
        let known = self.known.borrow().desired.clone();
        if desired.version < known.version {
            metrics.assignments_stale.inc();
            return Err(Stale { offered: desired.version, known: known.version });
        }
        metrics.assignments_accepted.inc();
        let desired = Arc::new(desired);
        if *desired != *known {
            let (state, stored) = (self.state.clone(), desired.clone());
            match tokio::task::spawn_blocking(move || state.store_assignments(&stored)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "cannot store the assignments"),
                Err(error) => tracing::error!(%error, "storing the assignments broke"),
            }
            tracing::info!(version = %desired.version, engines = desired.assignments.len(), "assignments accepted");
        }
        self.known.send_replace(Known { desired, fresh: true });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(term: u64, revision: u64, id: &str) -> v1::Assignments {
        let assignment = v1::Assignment { replica_id: id.into(), ..Default::default() };
        v1::Assignments { term, revision, assignments: vec![assignment] }
    }

    #[tokio::test]
    async fn an_older_set_changes_nothing_and_an_equal_or_newer_one_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let (state, _lock) = StateDir::open(dir.path(), std::time::Duration::ZERO).await.unwrap();
        let metrics = Metrics::new().unwrap();
        let intake = Intake::new(state.clone(), Desired::default());
        let known = intake.subscribe();
        assert!(!known.borrow().fresh);

        intake.accept(message(2, 5, "a"), &metrics).await.unwrap();
        assert!(known.borrow().fresh);
        for (term, revision) in [(2, 4), (1, 900)] {
            let stale = intake.accept(message(term, revision, "b"), &metrics).await.unwrap_err().to_string();
            assert!(stale.contains("2.5 is known already"), "{stale}");
        }
        assert!(known.borrow().desired.get("a").is_some());
        assert_eq!(metrics.assignments_stale.get(), 2);

        intake.accept(message(2, 5, "c"), &metrics).await.unwrap();
        intake.accept(message(3, 1, "d"), &metrics).await.unwrap();
        assert!(state.load_assignments().unwrap().get("d").is_some());
    }
}
