//! What the parts of the process share: the store and the right to write to it, the view, and who is connected.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_config::controlplane::ControlPlaneConfig;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    demand::Demands,
    fleet::roster::Roster,
    leadership::Leadership,
    metrics::Metrics,
    reconcile::Reports,
    store::{Revision, Store, StoreError, Txn, TxnOutcome},
    view::{View, reached},
    xds::{hub::Hub, loads::Loads},
};

/// See the module's text.
pub struct Core {
    /// The settings.
    pub config: ControlPlaneConfig,
    /// Where state lives.
    pub store: Arc<dyn Store>,
    /// The right to write to it.
    pub leadership: Leadership,
    /// The store, typed.
    pub views: watch::Receiver<Arc<View>>,
    /// What nodes say.
    pub roster: Roster,
    /// Models that somebody waits for.
    pub demands: Demands,
    /// What proxies get.
    pub hub: Hub,
    /// What engines last said of their load.
    pub loads: Loads,
    /// What waits on what, from the last pass of reconcile.
    pub reports: watch::Sender<Arc<Reports>>,
    /// Every series.
    pub metrics: Arc<Metrics>,
    /// Cancelled once the process shall stop.
    pub stop: CancellationToken,
    /// Every task of the process.
    pub tasks: TaskTracker,
    /// When it started.
    pub started: Instant,
}

impl Core {
    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    /// Commits under this process's term.
    ///
    /// # Errors
    /// The store's, and [`StoreError::Unavailable`] if the term has passed.
    pub async fn commit(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let outcome = self.store.txn(txn.when(self.leadership.guard())).await?;
        match &outcome {
            TxnOutcome::Conflict { failed, .. } if *failed == self.leadership.guard() => {
                Err(StoreError::Unavailable("this control plane's term has passed".into()))
            }
            _ => Ok(outcome),
        }
    }

    /// Waits until what was written at `revision` can be read in [`Core::view`].
    pub async fn seen(&self, revision: Revision) {
        reached(&self.views, revision).await;
    }

    /// How long a node is present after its last report.
    pub fn lease_ttl(&self) -> Duration {
        Duration::from_millis(self.config.fleet.lease_ttl_ms)
    }

    /// How often nodes report.
    pub fn report_interval(&self) -> Duration {
        Duration::from_millis(self.config.fleet.report_interval_ms)
    }
}
