//! Whether a control plane that has just started may publish: not before the fleet has had time to be there again.
//!
//! Endpoints hang on the leases of their nodes. When every control plane was away for longer than a lease lasts while the
//! store ran, they are gone from it though the engines serve, and proxies still route to them. Agents connect within
//! seconds and register all of them again; a snapshot from before that would tell proxies to forget engines that are well.
//! So the first snapshot of a process waits for every replica that is placed: until it is registered, or its node says that
//! it is not ready, or [`longest`] has passed. What was published before stays in use at the proxies meanwhile.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    core::Core,
    model::{EngineState, NodeObserved, Phase},
    view::View,
};

/// Longest wait for nodes whose lease lasts `lease`: an agent that is well reports within one.
pub fn longest(lease: Duration) -> Duration {
    lease * 2
}

/// The first replica that is waited for. Pure.
pub fn missing<'a>(view: &'a View, nodes: &BTreeMap<String, Arc<NodeObserved>>) -> Option<&'a str> {
    view.models.values().find_map(|model| {
        model.deployment.as_ref()?;
        let active = model.placement.iter().flat_map(|stored| &stored.value.assignments);
        let mut active = active.filter(|assignment| assignment.phase == Phase::Active && !assignment.asleep);
        let waited_for = active.find(|assignment| {
            let id = &assignment.replica_id;
            let registered = model.endpoints.get(id).is_some_and(|e| e.generation == assignment.generation);
            let said = nodes.get(&assignment.node_id).and_then(|node| node.engines.get(id));
            let not_ready = said.is_some_and(|engine| engine.state != EngineState::Ready);
            !registered && !not_ready
        });
        waited_for.map(|assignment| assignment.replica_id.as_str())
    })
}

/// Waits until the fleet is there again, or has had its time.
pub async fn wait(core: &Core) {
    let deadline = tokio::time::Instant::now() + longest(core.lease_ttl());
    let (mut views, mut roster) = (core.views.clone(), core.roster.changes());
    let mut told = false;
    loop {
        roster.mark_unchanged();
        let view = views.borrow_and_update().clone();
        // The first view is empty because nothing was read yet.
        let waits = if view.revision == 0 { Some("the store") } else { missing(&view, &core.roster.nodes()) };
        let Some(waits) = waits else { return };
        if !told && view.revision > 0 {
            tracing::info!(
                waits,
                "nothing is published before the engines that are placed are registered again"
            );
            told = true;
        }
        let timed_out = async {
            if view.revision == 0 {
                std::future::pending().await
            } else {
                tokio::time::sleep_until(deadline).await
            }
        };
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            _ = roster.changed() => {}
            () = timed_out => {
                tracing::warn!(waits, "not every engine that is placed is registered; publishing what there is");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use penstock_proto::v1;

    use super::*;
    use crate::{
        model::{Assignment, EngineObserved, Placement},
        view::{ModelView, Stored},
        xds::project::tests::{model, view},
    };

    fn placed(endpoints: &[&str], phase: Phase) -> Arc<ModelView> {
        let mut placed = (*model("m", true, endpoints)).clone();
        let spec = placed.deployment.as_ref().expect("deployed").value.spec.clone();
        let assignment = Assignment {
            replica_id: "m-0".into(),
            node_id: "n".into(),
            generation: 1,
            gpu_uuids: Vec::new(),
            spec,
            phase,
            moving: false,
            asleep: false,
        };
        let value = Placement {
            model: "m".into(),
            slug: "m".into(),
            next_ordinal: 1,
            scaled_to: None,
            failures: None,
            assignments: vec![assignment],
        };
        placed.placement = Some(Stored { value, mod_revision: 1, lease: 0 });
        Arc::new(placed)
    }

    fn says(state: v1::EngineState) -> BTreeMap<String, Arc<NodeObserved>> {
        let engine = EngineObserved::from(v1::EngineStatus {
            generation: 1,
            state: state.into(),
            ..Default::default()
        });
        let engines = [("m-0".to_owned(), engine)].into();
        [("n".to_owned(), Arc::new(NodeObserved { engines, ..NodeObserved::default() }))].into()
    }

    #[test]
    fn a_placed_replica_is_waited_for_until_it_is_registered_or_said_not_to_be_ready() {
        let waits = |model: &Arc<ModelView>, nodes: &BTreeMap<_, _>| {
            missing(&view(1, &[("m", model)]), nodes).map(str::to_owned)
        };
        let (absent, silent) = (placed(&[], Phase::Active), BTreeMap::new());
        assert_eq!(waits(&absent, &silent).as_deref(), Some("m-0"));
        assert_eq!(waits(&absent, &says(v1::EngineState::Ready)).as_deref(), Some("m-0"), "it will register");
        assert_eq!(waits(&absent, &says(v1::EngineState::Loading)), None);
        assert_eq!(waits(&placed(&["m-0"], Phase::Active), &silent), None);
        assert_eq!(waits(&model("m", true, &[]), &silent), None, "nothing is placed");
        assert_eq!(waits(&placed(&[], Phase::Leaving), &silent), None);
    }
}
