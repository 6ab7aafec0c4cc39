//! An engine asks to be routed to: accepted only for the present generation of its assignment, on its own node.
//!
//! The endpoint is written in one transaction that compares the placement it was judged by, so that an assignment which
//! is withdrawn at the same moment cannot gain an endpoint. The placement also changes with other replicas of the model;
//! then the judgement is simply made again.

use std::collections::BTreeSet;

use penstock_proto::v1;

use crate::{
    core::Core,
    model::{Assignment, Phase, Placement, RegisteredEndpoint, validate},
    store::{Compare, LeaseId, StoreError, Txn, TxnOutcome, keys},
};

/// Judgements before giving up: a placement that changes this often during one registration is under heavy rollout,
/// and the agent asks again anyway.
const ATTEMPTS: usize = 16;

/// Who asks.
#[derive(Debug, Clone)]
pub struct Node {
    /// The session's node.
    pub node_id: String,
    /// Its zone.
    pub zone: String,
    /// The lease its endpoints hang on.
    pub lease: LeaseId,
}

/// Why a registration was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its metric label.
    pub outcome: &'static str,
    /// A sentence for the agent's log.
    pub reason: String,
}

impl Refusal {
    fn new(outcome: &'static str, reason: impl Into<String>) -> Self {
        Self { outcome, reason: reason.into() }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::new("store_error", format!("not registered: {error}; ask again"))
    }
}

/// Decides, from the placement as it stands. Pure.
pub fn judge<'a>(
    placement: Option<&'a Placement>,
    node_id: &str,
    asked: &v1::Registration,
) -> Result<&'a Assignment, Refusal> {
    let id = &asked.replica_id;
    validate::address(&asked.address).map_err(|reason| Refusal::new("bad_address", reason))?;
    let unknown =
        || Refusal::new("unknown_assignment", format!("there is no assignment of {id} ({})", asked.model));
    let assignment = placement.and_then(|p| p.find(id)).ok_or_else(unknown)?;
    let (present, given) = (assignment.generation, asked.generation);
    if given < present {
        let reason =
            format!("{id} is registered with generation {given}, its assignment has {present} by now");
        return Err(Refusal::new("stale_generation", reason));
    }
    if given > present {
        let reason =
            format!("{id} is registered with generation {given}, which was never given out ({present} is)");
        return Err(Refusal::new("future_generation", reason));
    }
    if assignment.node_id != node_id {
        let reason = format!("{id} is assigned to node {}, not to {node_id}", assignment.node_id);
        return Err(Refusal::new("wrong_node", reason));
    }
    if assignment.phase == Phase::Leaving {
        return Err(Refusal::new("withdrawn", format!("the assignment of {id} was withdrawn: it shall end")));
    }
    if assignment.asleep {
        return Err(Refusal::new("withdrawn", format!("{id} shall sleep: it is not routed to")));
    }
    Ok(assignment)
}

/// Registers; Ok tells the metric label: newly, or as it already was.
pub async fn register(core: &Core, node: &Node, asked: &v1::Registration) -> Result<&'static str, Refusal> {
    let (placement_key, key) =
        (keys::placement(&asked.model), keys::endpoint(&asked.model, &asked.replica_id));
    for _ in 0..ATTEMPTS {
        let stored = core.store.get(&placement_key).await?;
        let placement: Option<Placement> =
            stored.as_ref().and_then(|entry| serde_json::from_slice(&entry.value).ok());
        judge(placement.as_ref(), &node.node_id, asked)?;
        let endpoint = RegisteredEndpoint {
            model: asked.model.clone(),
            replica_id: asked.replica_id.clone(),
            generation: asked.generation,
            address: asked.address.clone(),
            pid: asked.pid,
            node_id: node.node_id.clone(),
            zone: node.zone.clone(),
            adapters: adapters(&asked.adapters),
            weight_percent: asked
                .weight_percent
                .filter(|percent| *percent < 100)
                .map(|percent| percent.max(1)),
            drain_ms: asked.drain_ms,
        };
        let value = serde_json::to_vec(&endpoint)
            .map_err(|e| Refusal::new("store_error", format!("not registered: {e}")))?;
        let before = core.store.get(&key).await?;
        if before.is_some_and(|entry| entry.lease == node.lease && entry.value == value) {
            return Ok("repeated");
        }
        let judged_by = stored.map_or(0, |entry| entry.mod_revision);
        let txn = Txn::new().when(Compare::ModRevision(placement_key.clone(), judged_by)).put_leased(
            key.clone(),
            value,
            node.lease,
        );
        if let TxnOutcome::Committed { .. } = core.commit(txn).await? {
            return Ok("accepted");
        }
    }
    Err(Refusal::new("store_error", "not registered: the placement changes too fast; ask again"))
}

/// Adapters' names that can be served: those that no client could name are left out, and so is what is beyond the bound.
fn adapters(asked: &[String]) -> Vec<String> {
    let fine: BTreeSet<&String> = asked.iter().filter(|name| validate::model_name(name).is_ok()).collect();
    fine.into_iter().take(validate::MAX_ADAPTERS).cloned().collect()
}

/// Takes an endpoint away. Returns the revision at which it was surely gone; one that is not there, or that is another
/// generation's or node's, is left alone.
pub async fn deregister(core: &Core, node: &Node, asked: &v1::Deregistration) -> Result<u64, StoreError> {
    let key = keys::endpoint(&asked.model, &asked.replica_id);
    for _ in 0..ATTEMPTS {
        let Some(entry) = core.store.get(&key).await? else { break };
        let endpoint: Option<RegisteredEndpoint> = serde_json::from_slice(&entry.value).ok();
        let own = |e: RegisteredEndpoint| e.generation == asked.generation && e.node_id == node.node_id;
        if !endpoint.is_none_or(own) {
            break;
        }
        let txn = Txn::new().when(Compare::ModRevision(key.clone(), entry.mod_revision)).delete(key.clone());
        if let TxnOutcome::Committed { revision } = core.commit(txn).await? {
            return Ok(revision);
        }
    }
    Ok(core.view().revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::EngineSpec;

    #[test]
    fn adapters_are_names_each_once_and_not_too_many() {
        let asked = |names: &[&str]| adapters(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(asked(&["b", "a", "", "a b", "b"]), ["a", "b"]);
        let many: Vec<String> = (0..300).map(|n| format!("a{n}")).collect();
        assert_eq!(adapters(&many).len(), validate::MAX_ADAPTERS);
    }

    #[test]
    fn each_mismatch_has_its_own_word() {
        let spec = EngineSpec {
            engine: "sim".into(),
            model_path: "m".into(),
            args: vec![],
            env: Default::default(),
            gpus_per_replica: 1,
            resources: Default::default(),
            lora: vec![],
            warm: Default::default(),
            options: Default::default(),
        };
        let assignment = |id: &str, phase| Assignment {
            replica_id: id.into(),
            generation: 5,
            node_id: "n".into(),
            gpu_uuids: vec![],
            spec: spec.clone(),
            phase,
            moving: false,
            asleep: false,
        };
        let placement = Placement {
            model: "m".into(),
            slug: "m".into(),
            next_ordinal: 2,
            assignments: vec![assignment("m-0", Phase::Active), assignment("m-1", Phase::Leaving)],
            scaled_to: None,
            failures: None,
        };
        for (id, generation, node, address, expected) in [
            ("m-0", 5, "n", "h:1", "ok"),
            ("m-9", 5, "n", "h:1", "unknown_assignment"),
            ("m-0", 4, "n", "h:1", "stale_generation"),
            ("m-0", 6, "n", "h:1", "future_generation"),
            ("m-0", 5, "x", "h:1", "wrong_node"),
            ("m-1", 5, "n", "h:1", "withdrawn"),
            ("m-0", 5, "n", "h", "bad_address"),
        ] {
            let asked = v1::Registration {
                model: "m".into(),
                replica_id: id.into(),
                generation,
                address: address.into(),
                pid: 1,
                ..Default::default()
            };
            let outcome = judge(Some(&placement), node, &asked).map_or_else(|r| r.outcome, |_| "ok");
            assert_eq!(outcome, expected, "{id} {generation} {node} {address}");
            assert!(judge(None, node, &asked).is_err());
        }
    }
}
