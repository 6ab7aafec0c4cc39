//! What waits on what, in sentences for the operator: shown in a deployment's status.

use std::time::Instant;

use super::{Observed, Rules, is_given_up, rollout::Outcome};
use crate::model::{Assignment, EngineState, Phase};

/// Sentences about single replicas before the rest is only counted: a page, not a flood.
const MAX_SENTENCES: usize = 20;

/// Everything about one model that is not as wanted yet.
pub(super) fn sentences(
    outcome: &Outcome<'_>,
    observed: &Observed<'_>,
    rules: &Rules,
    now: Instant,
) -> Vec<String> {
    let mut out = Vec::new();
    let placement = outcome.placement;
    if let Some(shortage) = outcome.shortage.filter(|_| outcome.unplaced > 0) {
        let first = format!("{}-{}", placement.slug, placement.next_ordinal);
        out.push(format!("{first} {}", shortage.sentence()));
        match outcome.unplaced - 1 {
            0 => {}
            1 => out.push("1 more replica waits for the same".into()),
            more => out.push(format!("{more} more replicas wait for the same")),
        }
    }
    let about = placement.assignments.iter().filter_map(|a| about_replica(a, outcome, observed, rules, now));
    let about: Vec<String> = about.collect();
    let rest = about.len().saturating_sub(MAX_SENTENCES);
    out.extend(about.into_iter().take(MAX_SENTENCES));
    if rest > 0 {
        out.push(format!("{rest} more replicas are not settled either"));
    }
    out
}

fn about_replica(
    a: &Assignment,
    outcome: &Outcome<'_>,
    observed: &Observed<'_>,
    rules: &Rules,
    now: Instant,
) -> Option<String> {
    let (id, node) = (&a.replica_id, &a.node_id);
    let lost = observed.nodes.get(node.as_str()).and_then(|n| n.lost_since);
    if a.phase == Phase::Leaving {
        return Some(match lost {
            Some(_) => format!("{id} shall end, but its node {node} is lost"),
            None => format!("{id} drains on {node}"),
        });
    }
    if let Some(since) = lost {
        let grace = rules.lost_grace.as_secs_f64();
        return Some(if is_given_up(observed, node, rules, now) {
            let why = outcome.shortage.map_or_else(String::new, |s| format!(" and {}", s.sentence()));
            format!("{id} is on the lost node {node}{why}")
        } else {
            let lost_s = now.saturating_duration_since(since).as_secs();
            format!(
                "{id} waits for node {node}, lost for {lost_s} s; after {grace:.0} s it is placed elsewhere"
            )
        });
    }
    let registered = observed.registered.get(id.as_str()) == Some(&a.generation);
    if registered {
        let outdated = outcome.deployment.is_some_and(|d| d.spec != a.spec);
        return outdated.then(|| match outcome.surge_blocked {
            true => {
                format!("{id} runs the former spec and waits for its turn: there is no room for a second one")
            }
            false => format!("{id} runs the former spec and waits until a replacement is ready"),
        });
    }
    let engine = observed.engines.get(id.as_str()).filter(|e| e.generation == a.generation);
    Some(match engine {
        None => format!("{id} waits for {node} to start its engine"),
        Some(engine) => {
            let reason =
                if engine.reason.is_empty() { String::new() } else { format!(": {}", engine.reason) };
            match engine.state {
                EngineState::Failed => format!("{id} failed on {node}{reason}"),
                EngineState::Ready => format!("{id} is ready on {node} and waits to be registered"),
                state => format!("{id} is {} on {node}{reason}", state.as_str()),
            }
        }
    })
}
