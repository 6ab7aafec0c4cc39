//! What is counted by model, resolved once a request: [`ModelSeries`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use prometheus::{Histogram, IntCounter, IntGauge};

/// Most model names that become labels in the life of a process.
pub const MAX_MODELS: usize = 1_000;

/// The label of models beyond [`MAX_MODELS`].
pub const OTHER: &str = "(other)";

/// The series of one model.
#[derive(Debug)]
pub struct ModelSeries {
    /// The label.
    pub name: Arc<str>,
    /// Requests under way.
    pub inflight: IntGauge,
    /// Seconds to the first byte.
    pub ttft: Histogram,
    /// Mean gap of each stream, in seconds.
    pub itl: Histogram,
    /// Longest gap of each stream, in seconds.
    pub itl_max: Histogram,
    /// Tokens of prompts.
    pub prompt_tokens: IntCounter,
    /// Tokens generated.
    pub completion_tokens: IntCounter,
}

/// Resolved series by model: a look-up takes no lock and allocates nothing; a new name copies the map.
#[derive(Debug, Default)]
pub(super) struct Models {
    known: ArcSwap<HashMap<String, Arc<ModelSeries>>>,
    adding: Mutex<()>,
}

impl Models {
    pub(super) fn get(&self, model: &str, resolve: impl FnOnce(&str) -> ModelSeries) -> Arc<ModelSeries> {
        {
            let known = self.known.load();
            let full = || known.get(OTHER).filter(|_| known.len() > MAX_MODELS);
            if let Some(series) = known.get(model).or_else(full) {
                return Arc::clone(series);
            }
        }
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.load();
        let label = if known.len() < MAX_MODELS { model } else { OTHER };
        if let Some(series) = known.get(label) {
            return Arc::clone(series);
        }
        let series = Arc::new(resolve(label));
        let mut next = HashMap::clone(&known);
        next.insert(label.to_owned(), Arc::clone(&series));
        self.known.store(Arc::new(next));
        series
    }
}
