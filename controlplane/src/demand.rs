//! Models that somebody waits for while they have no replica, in memory only: who waits repeats it.
//!
//! Each proxy speaks for the requests that it holds, and what they say of a model is added up. Bounded by the deployments and
//! the proxies there are, and by time: only deployments are asked for, and a word that is not repeated runs out.

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

/// Who asks through the REST API.
const REST: &str = "rest";

/// See the module's text.
#[derive(Debug, Default)]
pub struct Demands {
    /// By model, by who says so.
    asked: Mutex<BTreeMap<String, BTreeMap<String, Asked>>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    demand: Demand,
    at: Instant,
}

type Sources = BTreeMap<String, Asked>;

impl Demands {
    fn asked(&self) -> MutexGuard<'_, BTreeMap<String, Sources>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in that `queued` requests wait for a model, by REST; 0 takes it back.
    pub fn ask(&self, model: &str, queued: u32, now: Instant) {
        note(&mut self.asked(), REST, model, queued, now);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Takes in all that `source` waits for: models with the number of requests. The others it does not wait for any more.
    pub fn says(&self, source: &str, models: impl Iterator<Item = (String, u32)>, now: Instant) {
        let mut asked = self.asked();
        let named: BTreeMap<String, u32> = models.collect();
        let mut is_new = false;
        for (model, sources) in asked.iter_mut() {
            is_new |= !named.contains_key(model) && sources.remove(source).is_some();
        }
        for (model, queued) in named {
            is_new |= note(&mut asked, source, &model, queued, now);
        }
        asked.retain(|_, sources| !sources.is_empty());
        drop(asked);
        if is_new {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// What is asked for now.
    pub fn now(&self, now: Instant) -> BTreeMap<String, Demand> {
        let mut asked = self.asked();
        asked.retain(|_, sources| {
            sources.retain(|_, asked| lasts(asked, now));
            !sources.is_empty()
        });
        let sum = |sources: &Sources| {
            let demands = sources.values().map(|asked| asked.demand);
            demands.reduce(|a, b| Demand {
                queued: a.queued.saturating_add(b.queued),
                since: a.since.min(b.since),
            })
        };
        asked.iter().filter_map(|(model, sources)| Some((model.clone(), sum(sources)?))).collect()
    }

    /// Wakes when something was asked for.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// Whether it differs from what the source said before.
fn note(asked: &mut BTreeMap<String, Sources>, source: &str, model: &str, queued: u32, now: Instant) -> bool {
    let sources = asked.entry(model.to_owned()).or_default();
    if queued == 0 {
        return sources.remove(source).is_some();
    }
    let before = sources.get(source).filter(|asked| lasts(asked, now)).map(|asked| asked.demand);
    let since = before.map_or(now, |before| before.since);
    sources.insert(source.to_owned(), Asked { demand: Demand { queued, since }, at: now });
    before.is_none_or(|before| before.queued != queued)
}

fn lasts(asked: &Asked, now: Instant) -> bool {
    now.saturating_duration_since(asked.at) < LASTS
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

    #[test]
    fn what_several_wait_for_is_added_up_and_each_takes_back_his_own() {
        let (demands, now) = (Demands::default(), Instant::now());
        let one = |model: &str, queued| [(model.to_owned(), queued)].into_iter();
        let mut changes = demands.changes();
        demands.says("p1", one("m", 2), now);
        demands.says("p2", one("m", 3), now + Duration::from_secs(1));
        assert_eq!(demands.now(now).get("m"), Some(&Demand { queued: 5, since: now }));
        changes.mark_unchanged();
        demands.says("p1", one("m", 2), now + Duration::from_secs(2));
        assert!(!changes.has_changed().expect("its sender"), "a repeated word is no news");
        demands.says("p1", one("other", 1), now);
        assert!(changes.has_changed().expect("its sender"));
        let asked: Vec<_> =
            demands.now(now).into_iter().map(|(model, demand)| (model, demand.queued)).collect();
        assert_eq!(asked, [("m".to_owned(), 3), ("other".to_owned(), 1)]);
    }
}
