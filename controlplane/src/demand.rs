//! Models that somebody waits for while they have no replica, in memory only: who waits repeats it.
//!
//! Bounded by the deployments there are: only those are asked for, and a word that is not repeated runs out.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::plan::Demand;

/// How long a word counts: longer than the pause between two of them, short enough that a client that gave up does not
/// keep a model awake.
const LASTS: Duration = Duration::from_secs(60);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Demands {
    asked: Mutex<BTreeMap<String, Asked>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    demand: Demand,
    at: Instant,
}

impl Demands {
    fn asked(&self) -> MutexGuard<'_, BTreeMap<String, Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in that `queued` requests wait for a model; 0 takes it back.
    pub fn ask(&self, model: &str, queued: u32, now: Instant) {
        let mut asked = self.asked();
        if queued == 0 {
            asked.remove(model);
        } else {
            let before = asked.get(model).filter(|asked| now.saturating_duration_since(asked.at) < LASTS);
            let since = before.map_or(now, |before| before.demand.since);
            asked.insert(model.to_owned(), Asked { demand: Demand { queued, since }, at: now });
        }
        drop(asked);
        self.changed.send_modify(|count| *count += 1);
    }

    /// What is asked for now.
    pub fn now(&self, now: Instant) -> BTreeMap<String, Demand> {
        let mut asked = self.asked();
        asked.retain(|_, asked| now.saturating_duration_since(asked.at) < LASTS);
        asked.iter().map(|(model, asked)| (model.clone(), asked.demand)).collect()
    }

    /// Wakes when something was asked for.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_runs_out_unless_it_is_repeated() {
        let (demands, start) = (Demands::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        demands.ask("m", 2, start);
        demands.ask("m", 3, at(50));
        assert_eq!(demands.now(at(100)).get("m"), Some(&Demand { queued: 3, since: start }));
        assert!(demands.now(at(110)).is_empty());
        demands.ask("m", 1, at(200));
        demands.ask("m", 0, at(201));
        assert!(demands.now(at(201)).is_empty());
    }
}
