//! Does what [`Machine`] asks for, and tells everybody how it stands.
//!
//! Whether the election key is free is seen in the view; should that be stuck, the key is read every lease time. An
//! answer that does not come in time counts as none, and a campaign whose outcome is unknown is settled by reading whose
//! lease the key hangs on.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Leader, Leadership, Standing,
    machine::{Answer, Ask, Machine, Rules, State},
    take,
};
use crate::{
    metrics::Metrics,
    store::{Compare, Store, StoreError, TxnOutcome, keys, schema},
    view::View,
};

/// A leader that goes gives its lease back, if the store answers within this time.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module's text.
pub struct Elector {
    store: Arc<dyn Store>,
    views: watch::Receiver<Arc<View>>,
    leader: Leader,
    ttl: Duration,
    machine: Machine,
    standing: watch::Sender<Standing>,
    fenced: mpsc::Receiver<u64>,
    metrics: Arc<Metrics>,
    /// Zero of the machine's clock.
    epoch: Instant,
    /// When the election key was last looked for in the store.
    looked: Instant,
    /// Said once, not at every try.
    complaint: String,
}

impl Elector {
    /// A candidate, and the right to write that it will keep up. One that may not lead is never elected.
    pub fn new(
        store: Arc<dyn Store>,
        views: watch::Receiver<Arc<View>>,
        leader: Leader,
        ttl: Duration,
        may_lead: bool,
        metrics: Arc<Metrics>,
    ) -> (Self, Leadership) {
        let (standing, standings) = watch::channel(Standing::default());
        let (fences, fenced) = mpsc::channel(1);
        let rules = Rules::new(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        let (machine, now) = (Machine::new(rules, may_lead), Instant::now());
        let elector = Self {
            store,
            views,
            leader,
            ttl,
            machine,
            standing,
            fenced,
            metrics,
            epoch: now,
            looked: now,
            complaint: String::new(),
        };
        (elector, Leadership { standing: standings, fenced: fences })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Stands for election, leads and follows until `stop`, then gives the term back.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let vacant = self.vacant().await;
            match self.machine.ask(self.now(), vacant) {
                Ask::Wait(until) => self.wait(until, &stop).await,
                ask => self.act(ask).await,
            }
        }
        self.machine.resign();
        self.publish();
        if let Ask::Revoke(lease) = self.machine.ask(self.now(), false) {
            let revoked = tokio::time::timeout(FAREWELL, self.store.lease_revoke(lease)).await;
            tracing::info!(given_back = matches!(revoked, Ok(Ok(()))), "this control plane leads no more");
        }
    }

    /// Whether nobody holds the election key, as far as is known.
    async fn vacant(&mut self) -> bool {
        let seen = {
            let view = self.views.borrow_and_update();
            // The first view is empty because nothing was read yet.
            (view.revision > 0).then(|| view.leader.is_none())
        };
        let following = matches!(self.machine.state(), State::Following { .. });
        if !following || seen == Some(true) || self.looked.elapsed() < self.ttl {
            return seen == Some(true);
        }
        self.looked = Instant::now();
        matches!(self.store.get(keys::LEADER).await, Ok(None))
    }

    async fn wait(&mut self, until: Option<u64>, stop: &CancellationToken) {
        let until = until.map(|until| self.epoch + Duration::from_millis(until));
        let until = until.unwrap_or(self.looked + self.ttl).max(Instant::now() + Duration::from_millis(1));
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep_until(until) => {}
            // The view's keeper has gone: so do we, with the process.
            changed = self.views.changed() => if changed.is_err() { stop.cancelled().await },
            Some(term) = self.fenced.recv() => {
                let now = self.now();
                self.machine.fenced(term, now);
                self.publish();
            }
        }
    }

    async fn act(&mut self, ask: Ask) {
        let sent = self.now();
        let answer = match ask {
            Ask::Wait(_) => return,
            Ask::Grant => match self.store.lease_grant(self.ttl).await {
                Ok(lease) => Answer::Granted(lease),
                Err(error) => self.answer_of(&error),
            },
            Ask::Campaign(lease) => match self.campaign(lease).await {
                Ok(answer) => answer,
                Err(error) => self.answer_of(&error),
            },
            Ask::Renew(lease) => match self.renew(lease).await {
                Ok(()) => Answer::Done,
                Err(error) => self.answer_of(&error),
            },
            Ask::Revoke(lease) => match self.store.lease_revoke(lease).await {
                Ok(()) => Answer::Done,
                Err(error) => self.answer_of(&error),
            },
        };
        let now = self.now();
        self.machine.hear(ask, answer, sent, now);
        self.publish();
    }

    /// A renewal is worth waiting for as long as half of the lease: then it is asked for anew, at another member.
    async fn renew(&self, lease: u64) -> Result<(), StoreError> {
        let limit = self.ttl / 2;
        tokio::time::timeout(limit, self.store.lease_keep_alive(lease)).await.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(format!("the lease was not renewed within {limit:?}")))
        })
    }

    async fn campaign(&self, lease: u64) -> Result<Answer, StoreError> {
        let txn = take(&self.leader, lease)?.when(Compare::Absent(keys::LEADER.into()));
        let txn = schema::prepare(&*self.store, txn).await?;
        if let TxnOutcome::Committed { revision } = self.store.txn(txn).await? {
            return Ok(Answer::Elected(revision));
        }
        // An earlier try of ours, whose answer was lost, may have won.
        Ok(match self.store.get(keys::LEADER).await? {
            Some(entry) if entry.lease == lease => Answer::Elected(entry.mod_revision),
            Some(_) => Answer::Beaten,
            None => Answer::Failed,
        })
    }

    fn answer_of(&mut self, error: &StoreError) -> Answer {
        if let StoreError::LeaseNotFound(_) = error {
            return Answer::Gone;
        }
        let complaint = error.to_string();
        if complaint != self.complaint {
            tracing::warn!(error = complaint, "the election waits for the store");
            self.complaint = complaint;
        }
        // A store that was written by a newer build stays as it is, and stays without us.
        if matches!(error, StoreError::Open(_)) { Answer::Beaten } else { Answer::Failed }
    }

    fn publish(&mut self) {
        let elected = match self.machine.state() {
            State::Leading { term, until, .. } => {
                Some((term, Some(self.epoch + Duration::from_millis(until))))
            }
            _ => None,
        };
        let before = self.standing.send_replace(Standing { elected }).elected.map(|(term, _)| term);
        let term = elected.map(|(term, _)| term);
        if before == term {
            return;
        }
        self.complaint.clear();
        self.metrics.leading.set(i64::from(term.is_some()));
        match (before, term) {
            (_, Some(term)) => {
                self.metrics.elections_won.inc();
                tracing::info!(term, id = self.leader.id, "this control plane leads");
            }
            (Some(term), None) => tracing::warn!(term, "this control plane leads no more"),
            (None, None) => {}
        }
    }
}
