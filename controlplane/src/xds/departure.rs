//! What becomes of the streams of endpoints that take nothing new, as proxies are told. Pure.
//!
//! Without a word they end where they are. They are moved to others when an operator drains the endpoint so, and when the plan
//! lets its replica leave (a rollout, scaling down, a node's maintenance, an eviction), after the time that the deployment's
//! [`RolloutPolicy`] gives them to end by themselves. An endpoint without an assignment is nobody's: its streams leave at once.
//!
//! A replica that leaves is deregistered before its engine is stopped, and with that it is out of the table, while its agent
//! still waits for its streams. So the table names it until its engine is known to be gone: what was ordered stands, and the
//! proxies, which know how long the agent waits, take what is left away in time.
//!
//! Of a model that is not deployed any more nothing is said: there is nobody to take its streams.

use penstock_proto::v1;

use crate::{
    model::{Assignment, Phase, RegisteredEndpoint, policy::RolloutPolicy},
    view::ModelView,
};

fn rollout(model: &ModelView) -> Option<&RolloutPolicy> {
    model.deployment.as_ref().map(|deployment| &deployment.value.policy.rollout)
}

fn assignments(model: &ModelView) -> impl Iterator<Item = &Assignment> {
    model.placement.iter().flat_map(|placement| &placement.value.assignments)
}

/// When the streams of a replica are moved, whoever asks for that.
fn moves(
    model: &ModelView,
    rollout: &RolloutPolicy,
    replica_id: &str,
    leaves: bool,
) -> Option<v1::Departure> {
    let drained = model.drains.get(replica_id).is_some_and(|drain| drain.move_streams).then_some(0);
    let leaving =
        (leaves && rollout.move_streams).then(|| rollout.move_streams_after_s.saturating_mul(1_000));
    let move_after_ms = drained.or(leaving)?;
    Some(v1::Departure { move_after_ms: Some(move_after_ms), fenced: false })
}

/// Of one that is registered.
pub(super) fn of(model: &ModelView, endpoint: &RegisteredEndpoint) -> Option<v1::Departure> {
    let rollout = rollout(model)?;
    let own = |a: &&Assignment| a.replica_id == endpoint.replica_id && a.generation == endpoint.generation;
    match assignments(model).find(own) {
        Some(a) => moves(model, rollout, &a.replica_id, a.phase == Phase::Leaving),
        None => Some(v1::Departure { move_after_ms: None, fenced: true }),
    }
}

/// Those that are not, and about to be stopped, in the order of their ids.
pub(super) fn departing(model: &ModelView) -> Vec<v1::Departing> {
    let Some(rollout) = rollout(model) else { return Vec::new() };
    let registered = |a: &Assignment| {
        model.endpoints.get(&a.replica_id).is_some_and(|endpoint| endpoint.generation == a.generation)
    };
    let leaving = assignments(model).filter(|a| a.phase == Phase::Leaving && !registered(a));
    let mut departing: Vec<v1::Departing> = leaving
        .map(|a| v1::Departing {
            id: a.replica_id.clone(),
            generation: a.generation,
            departure: moves(model, rollout, &a.replica_id, true),
        })
        .collect();
    departing.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    departing
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Placement, desired::Drain},
        view::Stored,
        xds::project::tests::model,
    };

    /// Replicas "m-0" and so on, registered and in these phases.
    fn fleet(phases: &[Phase]) -> ModelView {
        let ids: Vec<String> = (0..phases.len()).map(|n| format!("m-{n}")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut model = Arc::unwrap_or_clone(model("m", true, &ids));
        let spec = model.deployment.as_ref().expect("deployed").value.spec.clone();
        let assignments = ids.iter().zip(phases).map(|(id, phase)| Assignment {
            replica_id: (*id).into(),
            generation: 1,
            node_id: "n".into(),
            gpu_uuids: vec![],
            spec: spec.clone(),
            phase: *phase,
            moving: false,
            asleep: false,
        });
        let placement = Placement {
            model: "m".into(),
            slug: "m".into(),
            next_ordinal: 9,
            assignments: assignments.collect(),
            scaled_to: None,
            failures: None,
        };
        model.placement = Some(Stored { value: placement, mod_revision: 1, lease: 0 });
        model
    }

    fn drain(model: &mut ModelView, id: &str, move_streams: bool) {
        let drain = Drain { model: "m".into(), replica_id: id.into(), move_streams };
        model.drains.insert(id.into(), drain);
    }

    fn told(model: &ModelView, id: &str) -> Option<v1::Departure> {
        of(model, &model.endpoints[id])
    }

    fn moved(move_after_ms: u32) -> Option<v1::Departure> {
        Some(v1::Departure { move_after_ms: Some(move_after_ms), fenced: false })
    }

    #[test]
    fn a_drain_keeps_streams_unless_it_says_otherwise() {
        let mut model = fleet(&[Phase::Active, Phase::Active]);
        assert_eq!(told(&model, "m-0"), None);
        drain(&mut model, "m-0", false);
        drain(&mut model, "m-1", true);
        assert_eq!((told(&model, "m-0"), told(&model, "m-1")), (None, moved(0)));
    }

    #[test]
    fn a_replica_that_leaves_has_its_streams_moved_as_its_deployment_says() {
        let mut model = fleet(&[Phase::Leaving, Phase::Leaving]);
        drain(&mut model, "m-1", true);
        assert_eq!((told(&model, "m-0"), told(&model, "m-1")), (moved(10_000), moved(0)));
        let rollout = |model: &mut ModelView, move_streams, move_streams_after_s| {
            let deployment = &mut model.deployment.as_mut().expect("deployed").value;
            deployment.policy.rollout =
                RolloutPolicy { move_streams, move_streams_after_s, ..RolloutPolicy::default() };
        };
        rollout(&mut model, true, 3);
        assert_eq!(told(&model, "m-0"), moved(3_000));
        rollout(&mut model, false, 3);
        assert_eq!((told(&model, "m-0"), told(&model, "m-1")), (None, moved(0)));
    }

    #[test]
    fn one_that_was_deregistered_is_named_until_its_engine_is_gone() {
        let mut model = fleet(&[Phase::Leaving, Phase::Active, Phase::Leaving]);
        assert!(departing(&model).is_empty(), "all are in the table");
        model.endpoints.clear();
        let named = departing(&model);
        let named: Vec<_> = named.iter().map(|d| (d.id.as_str(), d.generation, d.departure)).collect();
        assert_eq!(named, [("m-0", 1, moved(10_000)), ("m-2", 1, moved(10_000))]);
        model.placement.as_mut().expect("placed").value.assignments.clear();
        assert!(departing(&model).is_empty());
    }

    #[test]
    fn one_without_an_assignment_is_fenced_and_of_a_model_that_was_deleted_nothing_is_said() {
        let mut model = fleet(&[Phase::Active, Phase::Leaving]);
        model.placement.as_mut().expect("placed").value.assignments[0].generation = 2;
        let fenced = Some(v1::Departure { move_after_ms: None, fenced: true });
        assert_eq!(told(&model, "m-0"), fenced);
        model.deployment = None;
        assert_eq!((told(&model, "m-0"), told(&model, "m-1")), (None, None));
        model.endpoints.clear();
        assert!(departing(&model).is_empty());
    }
}
