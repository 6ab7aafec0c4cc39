//! What to do next: a pure function of what is wanted and what runs.
//!
//! Called anew after every change and on a tick; it never remembers a step, so a step that was lost is simply planned
//! again. A replica is keyed by its id: a new generation of a replica that still runs means "stop the old one"; when that
//! one has gone, the next call starts the new one.
//!
//! Invariant: an engine is not started on a GPU while an engine that is being stopped still has processes there, since
//! its memory is not free before. Two *wanted* engines on one GPU are the control plane's business and are both started.
//! On a GPU that must not be used nothing runs: what runs there is stopped, and what is wanted there waits.

use std::collections::BTreeMap;

use crate::{
    assignment::{Assignment, Desired},
    gpu::unusable,
};

/// An engine that has a supervisor, as far as the plan cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    /// What it was started for.
    pub(crate) assignment: Assignment,
    /// It has been told to stop and is not gone yet.
    pub(crate) stopping: bool,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Supervise an engine for this assignment.
    Start(Assignment),
    /// Tell the replica's supervisor to drain and end its engine.
    Stop {
        /// Which.
        replica_id: String,
        /// Why, for the operator.
        reason: String,
    },
    /// Tell the replica's supervisor to put its engine to sleep, or to wake it.
    Rest {
        /// Which.
        replica_id: String,
        /// To sleep.
        asleep: bool,
    },
    /// Nothing yet: the assignment waits.
    Wait {
        /// Which.
        assignment: Assignment,
        /// On what, for the operator.
        reason: String,
    },
}

/// The steps from `running` (by replica id) to `desired`, given the `faults` of GPUs that must not be used. Stops come first.
pub(crate) fn plan(
    desired: &Desired,
    running: &BTreeMap<String, Running>,
    faults: &BTreeMap<String, String>,
) -> Vec<Step> {
    let stops =
        running.values().filter(|r| !r.stopping).filter_map(|r| change(desired, &r.assignment, faults));
    let starts = desired.assignments.iter().filter_map(|wanted| start(desired, wanted, running, faults));
    stops.chain(starts).collect()
}

fn change(desired: &Desired, running: &Assignment, faults: &BTreeMap<String, String>) -> Option<Step> {
    let reason = match desired.get(&running.replica_id) {
        Some(wanted) if wanted.same_engine(running) => match unusable(faults, &running.gpu_uuids) {
            Some(reason) => reason,
            None => {
                let (replica_id, asleep) = (running.replica_id.clone(), wanted.asleep);
                return (asleep != running.asleep).then_some(Step::Rest { replica_id, asleep });
            }
        },
        Some(wanted) if wanted.generation == running.generation => "its assignment has changed".to_owned(),
        Some(wanted) => format!("generation {} replaces {}", wanted.generation, running.generation),
        None => "it is no longer assigned to this node".to_owned(),
    };
    Some(Step::Stop { replica_id: running.replica_id.clone(), reason })
}

fn start(
    desired: &Desired,
    wanted: &Assignment,
    running: &BTreeMap<String, Running>,
    faults: &BTreeMap<String, String>,
) -> Option<Step> {
    if running.contains_key(&wanted.replica_id) {
        return None;
    }
    let leaving = |r: &&Running| {
        let wanted = desired.get(&r.assignment.replica_id);
        r.stopping || !wanted.is_some_and(|wanted| wanted.same_engine(&r.assignment))
    };
    let shares_a_gpu = |r: &&Running| r.assignment.gpu_uuids.iter().any(|gpu| wanted.gpu_uuids.contains(gpu));
    let holder = running.values().filter(leaving).find(shares_a_gpu);
    let leaves = holder.map(|r| format!("waits for {} to leave its GPU", r.assignment.replica_id));
    Some(match unusable(faults, &wanted.gpu_uuids).or(leaves) {
        Some(reason) => Step::Wait { assignment: wanted.clone(), reason },
        None => Step::Start(wanted.clone()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::assignment::EngineSpec;

    fn assignment(id: &str, generation: u64, gpu: &str) -> Assignment {
        Assignment {
            model: "m".into(),
            replica_id: id.into(),
            generation,
            spec: EngineSpec::default(),
            gpu_uuids: vec![gpu.into()],
            asleep: false,
        }
    }

    fn desired(assignments: &[Assignment]) -> Desired {
        Desired { assignments: assignments.to_vec(), ..Desired::default() }
    }

    fn running(engines: &[(Assignment, bool)]) -> BTreeMap<String, Running> {
        let entry = |(a, stopping): &(Assignment, bool)| {
            (a.replica_id.clone(), Running { assignment: a.clone(), stopping: *stopping })
        };
        engines.iter().map(entry).collect()
    }

    fn healthy() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    #[test]
    fn nothing_runs_on_a_gpu_that_must_not_be_used_and_what_waited_starts_once_it_may() {
        let (a, b) = (assignment("a", 1, "g0"), assignment("b", 1, "g1"));
        let wanted = desired(&[a.clone(), b.clone()]);
        let faults = BTreeMap::from([("g0".to_owned(), "XID 79".to_owned())]);
        let reason = "GPU g0 must not be used: XID 79".to_owned();
        let both = running(&[(a.clone(), false), (b.clone(), false)]);
        let stop = Step::Stop { replica_id: "a".into(), reason: reason.clone() };
        assert_eq!(plan(&wanted, &both, &faults), [stop]);
        let stopping = running(&[(a.clone(), true), (b.clone(), false)]);
        assert_eq!(plan(&wanted, &stopping, &faults), []);
        let left = running(&[(b, false)]);
        assert_eq!(plan(&wanted, &left, &faults), [Step::Wait { assignment: a.clone(), reason }]);
        assert_eq!(plan(&wanted, &left, &healthy()), [Step::Start(a)]);
    }

    #[test]
    fn what_is_wanted_and_runs_is_left_alone() {
        let a = assignment("a", 1, "g0");
        assert_eq!(plan(&desired(std::slice::from_ref(&a)), &running(&[(a.clone(), false)]), &healthy()), []);
    }

    #[test]
    fn a_new_generation_stops_the_old_one_and_starts_only_when_it_has_gone() {
        let (old, new) = (assignment("a", 1, "g0"), assignment("a", 2, "g0"));
        let wanted = desired(std::slice::from_ref(&new));
        let reason = "generation 2 replaces 1".to_owned();
        let stop = Step::Stop { replica_id: "a".into(), reason };
        assert_eq!(plan(&wanted, &running(&[(old.clone(), false)]), &healthy()), [stop]);
        assert_eq!(plan(&wanted, &running(&[(old, true)]), &healthy()), []);
        assert_eq!(plan(&wanted, &BTreeMap::new(), &healthy()), [Step::Start(new)]);
    }

    #[test]
    fn an_engine_waits_for_the_gpu_of_one_that_leaves() {
        let (old, new) = (assignment("a", 1, "g0"), assignment("b", 1, "g0"));
        let wanted = desired(std::slice::from_ref(&new));
        for stopping in [false, true] {
            let steps = plan(&wanted, &running(&[(old.clone(), stopping)]), &healthy());
            let reason = "waits for a to leave its GPU".to_owned();
            assert_eq!(steps.last(), Some(&Step::Wait { assignment: new.clone(), reason }));
        }
        let elsewhere = assignment("b", 1, "g1");
        let steps = plan(&desired(std::slice::from_ref(&elsewhere)), &running(&[(old, true)]), &healthy());
        assert_eq!(steps, [Step::Start(elsewhere)]);
    }

    #[test]
    fn a_changed_spec_under_the_same_generation_is_a_restart_too() {
        let old = assignment("a", 1, "g0");
        let mut new = old.clone();
        new.spec.args.push("--x".into());
        assert!(matches!(
            plan(&desired(&[new]), &running(&[(old, false)]), &healthy()).as_slice(),
            [Step::Stop { .. }]
        ));
    }

    #[test]
    fn sleep_and_wake_are_orders_and_no_restarts() {
        let awake = assignment("a", 1, "g0");
        let asleep = Assignment { asleep: true, ..awake.clone() };
        let rest = |asleep| Step::Rest { replica_id: "a".into(), asleep };
        let steps = |wanted: &Assignment, now: &Assignment| {
            plan(&desired(std::slice::from_ref(wanted)), &running(&[(now.clone(), false)]), &BTreeMap::new())
        };
        assert_eq!(steps(&asleep, &awake), [rest(true)]);
        assert_eq!(steps(&awake, &asleep), [rest(false)]);
        assert_eq!(steps(&asleep, &asleep), []);
        let newer = Assignment { generation: 2, ..awake };
        assert!(matches!(steps(&newer, &asleep).as_slice(), [Step::Stop { .. }]), "a rollout ends a sleeper");
    }

    /// Applies steps as the reconciler would; a stopping engine goes away between two rounds.
    fn apply(steps: Vec<Step>, running: &mut BTreeMap<String, Running>) {
        running.retain(|_, r| !r.stopping);
        for step in steps {
            match step {
                Step::Start(a) => {
                    let before =
                        running.insert(a.replica_id.clone(), Running { assignment: a, stopping: false });
                    assert!(before.is_none(), "two engines for one replica");
                }
                Step::Stop { replica_id, .. } => {
                    if let Some(engine) = running.get_mut(&replica_id) {
                        engine.stopping = true;
                    }
                }
                Step::Rest { replica_id, asleep } => {
                    if let Some(engine) = running.get_mut(&replica_id) {
                        engine.assignment.asleep = asleep;
                    }
                }
                Step::Wait { .. } => {}
            }
        }
    }

    proptest! {
        #[test]
        fn any_change_settles_in_three_rounds_on_exactly_what_is_wanted(
            before in proptest::collection::btree_map("[a-e]", (0u64..3, "[g-i]", any::<bool>()), 0..5),
            after in proptest::collection::btree_map("[a-e]", (0u64..3, "[g-i]", any::<bool>()), 0..5),
        ) {
            let engines: Vec<_> =
                before.iter().map(|(id, (generation, gpu, stopping))| (assignment(id, *generation, gpu), *stopping)).collect();
            let mut now = running(&engines);
            let wanted: Vec<_> =
                after.iter().map(|(id, (generation, gpu, asleep))| Assignment {
                    asleep: *asleep,
                    ..assignment(id, *generation, gpu)
                }).collect();
            let wanted = desired(&wanted);
            for _ in 0..3 {
                apply(plan(&wanted, &now, &healthy()), &mut now);
            }
            prop_assert_eq!(plan(&wanted, &now, &healthy()), vec![]);
            let have: Vec<_> = now.into_values().map(|r| r.assignment).collect();
            prop_assert_eq!(have, wanted.assignments);
        }
    }
}
