//! The control planes that are linked to this one, and how their proxies are.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use penstock_proto::v1;
use tokio::sync::watch;

/// One that follows this control plane.
#[derive(Debug, Clone, PartialEq)]
pub struct Follower {
    /// Its name in the election.
    pub id: String,
    /// Its zone; may be empty.
    pub zone: String,
    /// Its release.
    pub version: String,
    /// All its proxies have acknowledged what was published up to this revision of the store; None: it has not said.
    pub acknowledged: Option<u64>,
    /// Its proxies, and when it said so; None: it has not said.
    pub proxies: Option<(Arc<[v1::ProxyState]>, Instant)>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Followers {
    linked: Mutex<BTreeMap<u64, Follower>>,
    /// Counts changes; also numbers links.
    changes: watch::Sender<u64>,
}

impl Followers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Follower>> {
        self.linked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters one. An older link of the same name is out of date and forgotten. The number is the link's own.
    pub fn enter(&self, follower: Follower) -> u64 {
        let mut number = 0;
        self.changes.send_modify(|count| {
            *count += 1;
            number = *count;
            let mut linked = self.lock();
            linked.retain(|_, other| other.id != follower.id);
            linked.insert(number, follower);
        });
        number
    }

    /// Notes how far a follower's proxies are.
    pub fn acknowledged(&self, number: u64, revision: u64) {
        if let Some(follower) = self.lock().get_mut(&number) {
            follower.acknowledged = Some(revision);
        }
        self.changes.send_modify(|count| *count += 1);
    }

    /// Notes which proxies a follower has.
    pub fn has(&self, number: u64, proxies: Vec<v1::ProxyState>, now: Instant) {
        if let Some(follower) = self.lock().get_mut(&number) {
            follower.proxies = Some((proxies.into(), now));
        }
    }

    /// Takes one away.
    pub fn leave(&self, number: u64) {
        self.lock().remove(&number);
        self.changes.send_modify(|count| *count += 1);
    }

    /// All of them, by when they linked.
    pub fn linked(&self) -> Vec<Follower> {
        self.lock().values().cloned().collect()
    }

    /// Until the proxies of every linked follower have acknowledged a store revision. Never, if one does not.
    pub async fn acknowledged_by_all(&self, revision: u64) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            if self.lock().values().all(|f| f.acknowledged.is_some_and(|at| at >= revision)) {
                return;
            }
            // The sender is this very value.
            drop(changes.changed().await);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn follower(id: &str) -> Follower {
        Follower {
            id: id.into(),
            zone: String::new(),
            version: "1".into(),
            acknowledged: None,
            proxies: None,
        }
    }

    #[test]
    fn everybody_linked_is_waited_for_and_nobody_else() {
        let followers = Followers::default();
        assert!(followers.acknowledged_by_all(9).now_or_never().is_some(), "nobody is linked");
        let a = followers.enter(follower("a"));
        let b = followers.enter(follower("b"));
        followers.acknowledged(a, 9);
        assert!(followers.acknowledged_by_all(9).now_or_never().is_none(), "b has said nothing yet");
        followers.acknowledged(b, 8);
        assert!(followers.acknowledged_by_all(9).now_or_never().is_none());
        followers.leave(b);
        assert!(followers.acknowledged_by_all(9).now_or_never().is_some());
    }

    #[test]
    fn a_new_link_takes_the_place_of_an_older_one() {
        let followers = Followers::default();
        let old = followers.enter(follower("a"));
        let new = followers.enter(follower("a"));
        followers.acknowledged(old, 99);
        assert_eq!(followers.linked(), [follower("a")]);
        followers.leave(old);
        followers.acknowledged(new, 5);
        assert_eq!(followers.linked()[0].acknowledged, Some(5));
    }
}
