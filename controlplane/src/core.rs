//! What the parts of the process share: the store and the right to write to it, the view, and who is connected.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_config::controlplane::ControlPlaneConfig;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Gate,
    demand::Demands,
    fleet::{logs::Logs, roster::Roster},
    leadership::{Leader, Leadership},
    metrics::Metrics,
    peers::Followers,
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
    /// Who may use the REST API.
    pub gate: Gate,
    /// The store, typed.
    pub views: watch::Receiver<Arc<View>>,
    /// What nodes say.
    pub roster: Roster,
    /// Engines' logs that are being read.
    pub logs: Arc<Logs>,
    /// Models that somebody waits for.
    pub demands: Demands,
    /// What proxies get.
    pub hub: Hub,
    /// The control planes that follow this one.
    pub followers: Followers,
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

    /// Commits under this process's term: the first condition is that no later term has begun.
    ///
    /// # Errors
    /// The store's, and [`StoreError::NotLeading`] if this control plane does not lead, or another has led since.
    pub async fn commit(&self, mut txn: Txn) -> Result<TxnOutcome, StoreError> {
        let Some((term, guard)) = self.leadership.guard() else {
            return Err(StoreError::NotLeading(self.who_leads()));
        };
        txn.compares.insert(0, guard.clone());
        let outcome = self.store.txn(txn).await?;
        match &outcome {
            TxnOutcome::Conflict { failed, .. } if *failed == guard => {
                self.metrics.fenced_writes.inc();
                self.leadership.fenced(term);
                Err(StoreError::NotLeading(format!("its term {term} has passed")))
            }
            _ => Ok(outcome),
        }
    }

    /// Until `leader` is not the leader any more, as far as this control plane sees.
    pub async fn another_leads(&self, leader: &Leader) {
        let mut views = self.views.clone();
        // An error means that nobody keeps the view any more: the process ends.
        drop(views.wait_for(|view| view.leader.as_ref().is_none_or(|l| l.value != *leader)).await);
    }

    /// For a sentence on why this control plane does not write.
    pub fn who_leads(&self) -> String {
        let view = self.view();
        match (&view.leader, self.leadership.elected()) {
            (_, Some(term)) => format!("it cannot renew its lease for term {term} at the moment"),
            (Some(leader), None) => format!("{} leads", leader.value.id),
            (None, None) => "nobody leads at the moment".to_owned(),
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
