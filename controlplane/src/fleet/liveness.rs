//! Since when a node is lost: absent from the store while a placement still names it.
//!
//! Presence itself is the node's lease and needs no judgement here. The time is counted by this process, so a restart
//! counts anew: that postpones replacement and never hastens it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

/// Remembers since when nodes are absent.
#[derive(Debug, Default)]
pub struct Liveness {
    absent_since: BTreeMap<String, Instant>,
}

impl Liveness {
    /// Takes in which nodes are `named` by placements and which of them are present; what is neither is forgotten.
    pub fn update<'a>(
        &mut self,
        named: &BTreeSet<&'a str>,
        is_present: impl Fn(&str) -> bool,
        now: Instant,
    ) -> BTreeMap<&'a str, Instant> {
        self.absent_since.retain(|node, _| named.contains(node.as_str()) && !is_present(node));
        let absent = named.iter().filter(|node| !is_present(node));
        absent.map(|node| (*node, *self.absent_since.entry((*node).to_owned()).or_insert(now))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_node_that_returns_starts_anew() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        let later = |s| start + Duration::from_secs(s);
        let named = BTreeSet::from(["a", "b"]);
        assert!(liveness.update(&named, |_| true, start).is_empty());
        assert_eq!(liveness.update(&named, |n| n == "b", later(1)), BTreeMap::from([("a", later(1))]));
        assert_eq!(liveness.update(&named, |n| n == "b", later(5))["a"], later(1));
        assert!(liveness.update(&named, |_| true, later(6)).is_empty());
        assert_eq!(liveness.update(&named, |n| n == "b", later(9))["a"], later(9));
        assert!(liveness.update(&BTreeSet::new(), |_| false, later(10)).is_empty());
    }
}
