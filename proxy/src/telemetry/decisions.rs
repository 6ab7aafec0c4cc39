//! How requests were routed, kept in memory for `penstock explain`.
//!
//! A request gathers its attempts as it goes ([`Attempt`]: a few words each, no allocation before the first failure). When
//! it ends, those facts are kept if something went wrong, if the client asked (`x-penstock-explain: 1`), or if the dice
//! said so; the candidates of each pick are written down only in the last two cases, since they must be looked at before
//! anybody knows how the request will end.
//!
//! Two rings of fixed length: one for requests that engines failed or that were retried, one for the others. So neither a
//! flood of bad or shed requests nor one of `x-penstock-explain` pushes out what an operator looks for. Keeping is
//! one atomic add and one pointer swap; readers take no lock either and cost requests nothing.
//!
//! Bounds of a record: [`MAX_ATTEMPTS`] attempts, [`crate::routing::considered::SHOWN`] candidates each, texts of
//! [`super::facts::MAX_TEXT`] bytes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::facts::{Facts, Millis, text};
use crate::routing::considered::{Candidate, Considered};

/// Most attempts of one request that are kept; the first ones.
pub const MAX_ATTEMPTS: usize = 16;

/// One request's routing.
#[derive(Debug, Serialize)]
pub struct Decision {
    /// Counts up with each decision kept.
    #[serde(skip)]
    order: u64,
    /// Why it was kept.
    pub why: Why,
    /// The request.
    pub request: Facts,
    /// Engines asked, in order.
    pub attempts: Vec<Attempt>,
}

/// Why a decision was kept; the first that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The request failed.
    Failed,
    /// Its stream lost its engine and went on at another.
    Resumed,
    /// An attempt failed; the client did not see it.
    Retried,
    /// The client asked for it.
    Asked,
    /// By chance.
    Sampled,
}

impl Why {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Failed, Self::Resumed, Self::Retried, Self::Asked, Self::Sampled];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Resumed => "resumed",
            Self::Retried => "retried",
            Self::Asked => "asked",
            Self::Sampled => "sampled",
        }
    }
}

/// One engine asked, or one pick that found none to ask. Times are since the attempt began, `began` since the request's
/// head was read.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Attempt {
    /// When the pick was made.
    #[serde(rename = "began_ms")]
    pub began: Millis,
    /// The chosen endpoint; empty where none was left.
    #[serde(serialize_with = "text")]
    pub endpoint: Arc<str>,
    /// The policy that chose it.
    pub policy: &'static str,
    /// How: balanced, affine, spilled.
    pub how: &'static str,
    /// Its connection: "new", "reused", or empty if there came to be none.
    pub connection: &'static str,
    /// Time to the connection.
    #[serde(rename = "connected_ms")]
    pub connected: Option<Millis>,
    /// Time to the answer's first byte.
    #[serde(rename = "first_byte_ms")]
    pub first_byte: Option<Millis>,
    /// Time to the failure, if it failed.
    #[serde(rename = "failed_ms")]
    pub failed: Option<Millis>,
    /// What failed; empty if nothing did.
    pub failure: &'static str,
    /// More about it.
    pub detail: String,
    /// What followed the failure: "retry", "resend", "resume", "give_up".
    pub next: &'static str,
    /// What the pick looked at; only for sampled and asked requests.
    #[serde(serialize_with = "considered")]
    pub considered: Option<Box<Considered>>,
}

impl Attempt {
    /// Time from the attempt's beginning to `at`, both since the head was read.
    pub fn since(&self, at: Duration) -> Millis {
        Millis(at.saturating_sub(self.began.0))
    }
}

fn considered<S: Serializer>(seen: &Option<Box<Considered>>, to: S) -> Result<S::Ok, S::Error> {
    let Some(seen) = seen else { return to.serialize_none() };
    let show = |c: &Candidate| {
        serde_json::json!({
            "id": &*c.id,
            "local": c.local,
            "load": c.load,
            "weight": c.weight,
            "near": c.near,
            "reported": c.reported.map(|reported| serde_json::json!({
                "running": reported.running,
                "waiting": reported.waiting,
                "kv_used_ratio": f64::from(reported.kv_used_permille) / 1e3,
                "age_ms": reported.age_ms,
            })),
            "health": c.health,
        })
    };
    let out: serde_json::Map<_, _> =
        seen.out.iter().map(|(filter, count)| ((*filter).to_owned(), (*count).into())).collect();
    let mut map = to.serialize_map(Some(5))?;
    map.serialize_entry("endpoints", &seen.endpoints)?;
    map.serialize_entry("candidates", &seen.candidates)?;
    map.serialize_entry("out", &out)?;
    map.serialize_entry("panic", &seen.panic)?;
    map.serialize_entry("shown", &seen.shown.iter().map(show).collect::<Vec<_>>())?;
    map.end()
}

/// The decisions kept.
#[derive(Debug)]
pub struct Decisions {
    trouble: Ring,
    others: Ring,
    order: AtomicU64,
    /// One in so many; 0: none.
    sample: u32,
}

impl Decisions {
    /// Room for `kept`, half of it for trouble; one request in `sample` is recorded without a cause.
    pub fn new(kept: usize, sample: u32) -> Self {
        Self {
            trouble: Ring::new(kept.div_ceil(2)),
            others: Ring::new(kept / 2),
            order: AtomicU64::new(0),
            sample: if kept == 0 { 0 } else { sample },
        }
    }

    /// Whether the request that begins now is a sampled one. `chance` gives a number in `0..n`.
    pub fn sampled(&self, chance: impl FnOnce(u32) -> u32) -> bool {
        self.sample > 0 && chance(self.sample) == 0
    }

    /// Whether any decision is ever kept.
    pub fn is_on(&self) -> bool {
        !self.trouble.slots.is_empty()
    }

    /// Keeps a decision; the oldest of its kind gives way.
    pub fn keep(&self, why: Why, request: Facts, attempts: Vec<Attempt>) {
        let engines = why == Why::Failed && request.blame != "client" && !attempts.is_empty();
        let ours = matches!(why, Why::Resumed | Why::Retried) || engines;
        let ring = if ours { &self.trouble } else { &self.others };
        let order = self.order.fetch_add(1, Relaxed);
        ring.push(Arc::new(Decision { order, why, request, attempts }));
    }

    /// The decision about a request, if it is still there.
    pub fn find(&self, request_id: &str) -> Option<Arc<Decision>> {
        self.iter().find(|decision| decision.request.request_id == request_id)
    }

    /// The latest first, at most `limit`, of `model` if one is named.
    pub fn latest(&self, model: Option<&str>, limit: usize) -> Vec<Arc<Decision>> {
        let wanted = |decision: &Arc<Decision>| model.is_none_or(|model| &*decision.request.model == model);
        let mut found: Vec<_> = self.iter().filter(wanted).collect();
        found.sort_unstable_by_key(|decision| std::cmp::Reverse(decision.order));
        found.truncate(limit);
        found
    }

    fn iter(&self) -> impl Iterator<Item = Arc<Decision>> {
        self.trouble.slots.iter().chain(&self.others.slots).filter_map(ArcSwapOption::load_full)
    }
}

/// The last so many, without a lock.
#[derive(Debug)]
struct Ring {
    slots: Box<[ArcSwapOption<Decision>]>,
    pushed: AtomicU64,
}

impl Ring {
    fn new(length: usize) -> Self {
        Self { slots: (0..length).map(|_| ArcSwapOption::empty()).collect(), pushed: AtomicU64::new(0) }
    }

    fn push(&self, decision: Arc<Decision>) {
        let Some(at) = self.pushed.fetch_add(1, Relaxed).checked_rem(self.slots.len() as u64) else { return };
        if let Some(slot) = usize::try_from(at).ok().and_then(|at| self.slots.get(at)) {
            slot.store(Some(decision));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(decisions: &Decisions, id: &str, why: Why, blame: &'static str) {
        let mut facts = Facts::new(id.into());
        (facts.blame, facts.model) = (blame, "m".into());
        let attempts = if blame == "upstream" { vec![Attempt::default()] } else { vec![] };
        decisions.keep(why, facts, attempts);
    }

    #[test]
    fn a_flood_of_clients_errors_pushes_out_no_failure_of_ours() {
        let decisions = Decisions::new(8, 0);
        keep(&decisions, "ours", Why::Failed, "upstream");
        keep(&decisions, "retried", Why::Retried, "none");
        for n in 0..100 {
            keep(&decisions, &format!("shed-{n}"), Why::Failed, "gateway");
            keep(&decisions, &format!("bad-{n}"), Why::Failed, "client");
            keep(&decisions, &format!("asked-{n}"), Why::Asked, "none");
        }
        assert!(decisions.find("ours").is_some() && decisions.find("retried").is_some());
        assert!(decisions.find("asked-99").is_some() && decisions.find("bad-99").is_some());
        assert!(decisions.find("bad-1").is_none(), "memory is bounded");
        let latest: Vec<_> =
            decisions.latest(Some("m"), 3).iter().map(|d| d.request.request_id.clone()).collect();
        assert_eq!(latest, ["asked-99", "bad-99", "shed-99"]);
        assert_eq!(decisions.latest(None, 100).len(), 6);
        assert!(decisions.latest(Some("other"), 9).is_empty());
    }

    #[test]
    fn no_room_keeps_nothing_and_samples_nothing() {
        let decisions = Decisions::new(0, 1);
        keep(&decisions, "a", Why::Failed, "upstream");
        assert!(!decisions.is_on() && !decisions.sampled(|_| 0) && decisions.find("a").is_none());
        assert!(!Decisions::new(8, 0).sampled(|_| 0));
        assert!(Decisions::new(8, 5).sampled(|n| n - 5) && !Decisions::new(8, 5).sampled(|_| 1));
    }

    #[test]
    fn a_decision_is_told_with_what_was_considered() {
        let seen = Considered {
            endpoints: 3,
            candidates: 1,
            out: vec![("draining", 2)],
            panic: false,
            shown: vec![Candidate {
                id: "e1".into(),
                local: 2,
                load: 3,
                weight: 1_000,
                reported: None,
                near: true,
                health: "admitted",
            }],
        };
        let attempt = Attempt { considered: Some(Box::new(seen)), ..Attempt::default() };
        let decision =
            Decision { order: 0, why: Why::Asked, request: Facts::new("a".into()), attempts: vec![attempt] };
        let json = serde_json::to_value(decision).expect("plain data");
        assert_eq!(json["why"], "asked");
        let seen = &json["attempts"][0]["considered"];
        assert_eq!((&seen["out"]["draining"], &seen["shown"][0]["load"]), (&2.into(), &3.into()));
    }
}
