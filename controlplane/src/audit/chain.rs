//! The chain of records: each holds the hash of the one before, and the head says where the chain begins and ends. Pure.
//!
//! A record that is changed, left out, put in or moved breaks the chain at that place. Who can write to the store can make
//! a whole new chain; that shows as soon as one hash was noted elsewhere (each is also logged, and `verify` takes one).
//! The oldest records go; the hash of the newest that went is the anchor that the first one left must hold.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mask::mask;
use crate::access::{Caller, hash};

/// What the first record holds as the hash of the one before.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Larger states are kept by their hash.
const MAX_STATE_BYTES: usize = 16 << 10;
/// Most old records that go with one new one, so that a lowered `audit.keep` cannot outgrow a transaction.
const MAX_DROPPED: u64 = 16;

/// `/audit/head`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Number of the newest record; 0 before the first.
    pub number: u64,
    /// Its hash.
    pub hash: String,
    /// Number of the newest record that is not kept any more; 0 for none.
    pub anchor_number: u64,
    /// Its hash.
    pub anchor_hash: String,
}

impl Default for Head {
    fn default() -> Self {
        Self { number: 0, hash: GENESIS.into(), anchor_number: 0, anchor_hash: GENESIS.into() }
    }
}

impl Head {
    /// The records that go when one more comes and `keep` may stay: from the first to the last number. None: none.
    pub fn surplus(&self, keep: u64) -> Option<(u64, u64)> {
        let held = (self.number + 1).saturating_sub(self.anchor_number);
        let count = held.saturating_sub(keep.max(1)).min(MAX_DROPPED);
        (count > 0).then(|| (self.anchor_number + 1, self.anchor_number + count))
    }
}

/// What is changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Subject {
    /// "deployment", "route", "node", "endpoint", "token", "backup", ...
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// The model that it is about; empty for none.
    pub model: String,
}

/// A change that somebody makes. Secrets in `before` and `after` are masked when the record is made.
#[derive(Debug, Clone)]
pub struct Change {
    /// Who, and from where.
    pub caller: Caller,
    /// Of what.
    pub subject: Subject,
    /// What it was; None: it was not there.
    pub before: Option<Value>,
    /// What it is now; None: it is gone.
    pub after: Option<Value>,
}

/// One change, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// From 1, without gaps.
    pub number: u64,
    /// Hash of the record before.
    pub prev: String,
    /// When, in Unix milliseconds, by the leader's clock.
    pub unix_ms: u64,
    /// The leader's term.
    pub term: u64,
    /// The caller's token, by name.
    pub actor: String,
    /// Its role.
    pub role: String,
    /// The request's method.
    pub method: String,
    /// The request's path.
    pub path: String,
    /// What kind of thing was changed.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The model that it is about; may be empty.
    pub model: String,
    /// What it was, null if it was not there.
    pub before: Value,
    /// What it became, null if it went.
    pub after: Value,
    /// Address that the request came from.
    pub peer: String,
    /// Address of the client, if another control plane handed the request on.
    pub client: String,
    /// That control plane.
    pub forwarded_by: String,
}

/// A record's text with its hash: what a key of the audit holds. The text is kept as it was hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// SHA-256 of `record`, in hex.
    pub hash: String,
    /// A [`Record`] as JSON.
    pub record: String,
}

/// The record of `change` that follows `head`, and the head afterwards; `anchor` is the record that goes, if one does.
///
/// # Errors
/// A state that cannot be written as JSON.
pub fn append(
    head: &Head,
    change: &Change,
    unix_ms: u64,
    term: u64,
    anchor: Option<(u64, String)>,
) -> Result<(Sealed, Head), serde_json::Error> {
    let Change { caller, subject, before, after } = change;
    let record = Record {
        number: head.number + 1,
        prev: head.hash.clone(),
        unix_ms,
        term,
        actor: caller.name.clone(),
        role: caller.role.to_string(),
        method: caller.method.clone(),
        path: caller.path.clone(),
        kind: subject.kind.to_owned(),
        name: subject.name.clone(),
        model: subject.model.clone(),
        before: kept(before.as_ref()),
        after: kept(after.as_ref()),
        peer: caller.peer.clone(),
        client: caller.client.clone(),
        forwarded_by: caller.forwarded_by.clone(),
    };
    let text = serde_json::to_string(&record)?;
    let sealed = Sealed { hash: hash(text.as_bytes()), record: text };
    let (anchor_number, anchor_hash) =
        anchor.unwrap_or_else(|| (head.anchor_number, head.anchor_hash.clone()));
    let head = Head { number: record.number, hash: sealed.hash.clone(), anchor_number, anchor_hash };
    Ok((sealed, head))
}

fn kept(state: Option<&Value>) -> Value {
    let Some(state) = state else { return Value::Null };
    let masked = mask(state);
    let text = masked.to_string();
    if text.len() <= MAX_STATE_BYTES {
        return masked;
    }
    json!({ "too_large_to_keep": { "bytes": text.len(), "sha256": hash(text.as_bytes()) } })
}

/// Where and why a chain is broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Broken {
    /// The record at which it shows.
    pub number: u64,
    /// What does not fit.
    pub reason: String,
}

/// A walk along the chain, from its anchor to its head.
#[derive(Debug)]
pub struct Walk {
    number: u64,
    hash: String,
}

impl Walk {
    /// At the anchor.
    pub fn new(head: &Head) -> Self {
        Self { number: head.anchor_number, hash: head.anchor_hash.clone() }
    }

    /// The next record, as it was found (None: it was not).
    ///
    /// # Errors
    /// What does not fit.
    pub fn step(&mut self, found: Option<&[u8]>) -> Result<&str, Broken> {
        let number = self.number + 1;
        let broken = |reason: String| Broken { number, reason };
        let value = found.ok_or_else(|| broken("it is missing".into()))?;
        let sealed: Sealed =
            serde_json::from_slice(value).map_err(|e| broken(format!("it cannot be read: {e}")))?;
        if hash(sealed.record.as_bytes()) != sealed.hash {
            return Err(broken("its text does not have its hash: it was changed".into()));
        }
        let record: Record =
            serde_json::from_str(&sealed.record).map_err(|e| broken(format!("it cannot be read: {e}")))?;
        if record.number != number {
            return Err(broken(format!("in its place stands record {}", record.number)));
        }
        if record.prev != self.hash {
            return Err(broken("it does not follow the one before: one of them was replaced".into()));
        }
        (self.number, self.hash) = (number, sealed.hash);
        Ok(&self.hash)
    }

    /// After the last record.
    ///
    /// # Errors
    /// The head names another hash.
    pub fn finish(&self, head: &Head) -> Result<(), Broken> {
        if self.number == head.number && self.hash == head.hash {
            return Ok(());
        }
        Err(Broken { number: head.number, reason: "the head does not have the last record's hash".into() })
    }
}

#[cfg(test)]
mod tests {
    use penstock_config::controlplane::Role;

    use super::*;

    fn change(name: &str) -> Change {
        let text = |s: &str| s.to_owned();
        let caller = Caller {
            name: text("ci"),
            role: Role::Operator,
            method: text("PUT"),
            path: text("/x"),
            peer: text("127.0.0.1:9"),
            client: String::new(),
            forwarded_by: String::new(),
            marker: None,
        };
        let subject = Subject { kind: "deployment", name: name.into(), model: name.into() };
        Change {
            caller,
            subject,
            before: None,
            after: Some(json!({"env": {"HF_TOKEN": "s3cret"}, "share": 0.1})),
        }
    }

    fn chain(count: u64, keep: u64) -> (Head, Vec<(u64, Vec<u8>)>) {
        let (mut head, mut kept) = (Head::default(), Vec::<(u64, Vec<u8>)>::new());
        for n in 0..count {
            let mut anchor = None;
            if let Some((first, last)) = head.surplus(keep) {
                let at = kept.iter().find(|(number, _)| *number == last).expect("kept until now");
                let sealed: Sealed = serde_json::from_slice(&at.1).expect("sealed");
                anchor = Some((last, sealed.hash));
                kept.retain(|(number, _)| !(first..=last).contains(number));
            }
            let (sealed, next) = append(&head, &change(&format!("m{n}")), n, 3, anchor).expect("JSON");
            head = next;
            kept.push((head.number, serde_json::to_vec(&sealed).expect("JSON")));
        }
        (head, kept)
    }

    fn verify(head: &Head, kept: &[(u64, Vec<u8>)]) -> Result<(), Broken> {
        let mut walk = Walk::new(head);
        for number in head.anchor_number + 1..=head.number {
            walk.step(kept.iter().find(|(at, _)| *at == number).map(|(_, value)| &value[..]))?;
        }
        walk.finish(head)
    }

    #[test]
    fn a_chain_holds_and_its_beginning_can_go() {
        for (count, keep) in [(0, 5), (1, 5), (5, 5), (37, 5), (200, 1)] {
            let (head, kept) = chain(count, keep);
            assert_eq!(verify(&head, &kept), Ok(()), "{count} {keep}");
            assert_eq!(kept.len() as u64, count.min(keep));
        }
    }

    #[test]
    fn a_lowered_bound_is_reached_step_by_step() {
        let (head, _) = chain(100, 100);
        assert_eq!(head.surplus(10), Some((1, MAX_DROPPED)));
        assert_eq!(head.surplus(101), None);
        assert_eq!(head.surplus(100), Some((1, 1)));
    }

    #[test]
    fn secrets_are_not_in_it() {
        let (_, kept) = chain(1, 5);
        let text = String::from_utf8(kept[0].1.clone()).expect("UTF-8");
        assert!(text.contains("HF_TOKEN") && !text.contains("s3cret"), "{text}");
    }

    #[test]
    fn whatever_is_done_to_it_shows() {
        let (head, kept) = chain(20, 10);
        let broken = |head: &Head, kept: &[(u64, Vec<u8>)]| verify(head, kept).expect_err("tampered");
        let rewritten = |from: &str, to: &str| {
            let mut other = kept.clone();
            let text = String::from_utf8(other[4].1.clone()).expect("UTF-8");
            assert!(text.contains(from));
            other[4].1 = text.replace(from, to).into_bytes();
            other
        };
        assert_eq!(
            broken(&head, &rewritten("ci", "me")),
            Broken { number: 15, reason: "its text does not have its hash: it was changed".into() }
        );
        // With its hash made anew the next one does not follow.
        let mut resealed = kept.clone();
        let sealed: Sealed = serde_json::from_slice(&kept[4].1).expect("sealed");
        let record = sealed.record.replace("ci", "me");
        resealed[4].1 = serde_json::to_vec(&Sealed { hash: hash(record.as_bytes()), record }).expect("JSON");
        assert_eq!(broken(&head, &resealed).number, 16);
        let mut without = kept.clone();
        without.remove(4);
        assert_eq!(broken(&head, &without), Broken { number: 15, reason: "it is missing".into() });
        let mut swapped = kept.clone();
        (swapped[4].1, swapped[5].1) = (kept[5].1.clone(), kept[4].1.clone());
        assert!(broken(&head, &swapped).reason.contains("stands record 16"));
        let shorter = Head { number: 19, ..head.clone() };
        assert!(broken(&shorter, &kept).reason.contains("head"));
        let moved = Head { anchor_hash: GENESIS.into(), ..head.clone() };
        assert_eq!(broken(&moved, &kept).number, 11);
        let garbled = kept.iter().map(|(n, _)| (*n, b"{".to_vec())).collect::<Vec<_>>();
        assert!(broken(&head, &garbled).reason.contains("cannot be read"));
    }

    #[test]
    fn what_is_too_large_is_kept_by_its_hash() {
        let large = json!({ "args": vec!["x"; 20_000] });
        assert!(kept(Some(&large))["too_large_to_keep"]["bytes"].as_u64() > Some(16_384));
        assert_eq!(kept(None), Value::Null);
    }
}
