//! Tells the control plane which sleeping models requests are held for, so that it wakes them.
//!
//! A word is a unary call, repeated every second while anything is wanted, at whichever control plane answers: one that
//! follows hands it on. When nothing is wanted any more that is said once. Nobody waits for the answer: the request is held
//! until an engine is there, or its time is over.

use std::{sync::Arc, time::Duration};

use penstock_proto::{
    tls::in_words,
    v1::{self, gateways_client::GatewaysClient},
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::client::{XdsSettings, XdsSettingsError, endpoint, peers, status_in_words};
use crate::gateway::Gateway;

/// Pause between two words. The control plane believes one for a minute, and wakes a model at the first.
const REPEAT: Duration = Duration::from_secs(1);
/// Longest time for a word to be taken.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whoever is told.
pub struct Wants {
    settings: XdsSettings,
    /// Control planes, by name. Never empty.
    peers: Vec<String>,
    /// The one that is told now.
    turn: usize,
    open: Option<GatewaysClient<Channel>>,
}

impl Wants {
    /// Checks the settings.
    ///
    /// # Errors
    /// As of the subscription.
    pub fn new(settings: &XdsSettings) -> Result<Self, XdsSettingsError> {
        let peers = peers(settings)?;
        let turn = fastrand::usize(..peers.len());
        Ok(Self { settings: settings.clone(), peers, turn, open: None })
    }

    /// Tells what `gateway` wants until `stop`.
    pub async fn run(mut self, gateway: Arc<Gateway>, stop: CancellationToken) {
        stop.run_until_cancelled_owned(async {
            loop {
                gateway.wanted.notified().await;
                self.while_wanted(&gateway).await;
            }
        })
        .await;
    }

    async fn while_wanted(&mut self, gateway: &Gateway) {
        loop {
            let models = gateway.table.wanted(gateway.now_ms());
            let done = models.is_empty();
            let began = Instant::now();
            match self.say(models).await {
                Ok(()) if done => return,
                Ok(()) => gateway.metrics.wakes_asked.with_label_values(&["taken"]).inc(),
                Err(error) => {
                    gateway.metrics.wakes_asked.with_label_values(&["failed"]).inc();
                    tracing::warn!(
                        error,
                        "the control plane could not be told that requests wait for a model"
                    );
                    if done {
                        return; // What was said runs out by itself.
                    }
                }
            }
            tokio::time::sleep_until(began + REPEAT).await;
        }
    }

    /// Says it to the present control plane; after a failure the next one is the present one.
    async fn say(&mut self, models: Vec<v1::Wanted>) -> Result<(), String> {
        let said = timeout(PATIENCE, self.try_say(models)).await;
        let outcome = said.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
        if outcome.is_err() {
            self.open = None;
            self.turn = (self.turn + 1) % self.peers.len();
        }
        outcome
    }

    async fn try_say(&mut self, models: Vec<v1::Wanted>) -> Result<(), String> {
        let Some(name) = self.peers.get(self.turn) else { return Ok(()) };
        let mut client = match self.open.take() {
            Some(client) => client,
            None => {
                let named = |error: String| format!("{name}: {error}");
                let endpoint = endpoint(name, &self.settings).map_err(named)?;
                let channel = endpoint.connect().await.map_err(|error| named(in_words(&error)))?;
                GatewaysClient::new(channel)
            }
        };
        let demand = v1::Demand { source: self.settings.node_id.clone(), models };
        let said = client.want(demand).await;
        said.map_err(|status| format!("{name}: {}", status_in_words(&status)))?;
        self.open = Some(client);
        Ok(())
    }
}
