//! What waits on what, in sentences for the operator: shown in a deployment's status.

use super::{
    Context,
    rollout::{Blocked, Outcome},
    standing::{Member, Standing, Why},
};
use crate::model::{Assignment, EngineState, Phase};

/// Sentences about single replicas before the rest is only counted: a page, not a flood.
const MAX_SENTENCES: usize = 20;

/// Nodes that are named before the rest is only counted.
const MAX_NODES: usize = 5;

/// Everything about one model that is not as wanted yet.
pub(super) fn sentences(outcome: &Outcome<'_>, context: Context<'_>, name: &str) -> Vec<String> {
    let mut out = Vec::new();
    let placement = outcome.placement;
    if is_stalled(outcome, context, name) {
        let since = context.observed.models.get(name).and_then(|seen| seen.unmoved_since);
        let unmoved_s = since.map_or(0, |since| context.now.saturating_duration_since(since).as_secs());
        out.push(format!("is stalled: nothing got nearer to what is wanted for {unmoved_s} s"));
    }
    if let Some(failures) = placement.failures.as_ref().filter(|_| outcome.is_held) {
        let (first, rest) = failures.nodes.split_at(failures.nodes.len().min(MAX_NODES));
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        out.push(format!(
            "is held: its engines failed over and over on {}{more} and are ready nowhere; what serves stays, and no further \
             node is tried: change the deployment or roll it back",
            first.join(", ")
        ));
    }
    out.extend(outcome.scaling.map(|waits| {
        let replicas =
            if outcome.wanted == 1 { "1 replica".into() } else { format!("{} replicas", outcome.wanted) };
        match outcome.wanted {
            0 => waits.to_owned(),
            _ => format!("has {replicas}; {waits}"),
        }
    }));
    if let Some(shortage) = outcome.shortage.filter(|_| outcome.unplaced > 0) {
        let first = format!("{}-{}", placement.slug, placement.next_ordinal);
        out.push(format!("{first} {}", shortage.sentence()));
        match outcome.unplaced - 1 {
            0 => {}
            1 => out.push("1 more replica waits for the same".into()),
            more => out.push(format!("{more} more replicas wait for the same")),
        }
    }
    let mut rest = 0;
    for (at, a) in placement.assignments.iter().enumerate() {
        let found = outcome.members.binary_search_by_key(&at, |member| member.at);
        let member = found.ok().and_then(|n| outcome.members.get(n));
        let Some(sentence) = about_replica(a, member, outcome, context) else { continue };
        if out.len() < MAX_SENTENCES { out.push(sentence) } else { rest += 1 }
    }
    if rest > 0 {
        out.push(format!("{rest} more replicas are not settled either"));
    }
    if !outcome.uneven.is_empty() {
        let zones = outcome.uneven.iter().map(|(zone, count)| match zone.as_str() {
            "" => format!("no zone {count}"),
            zone => format!("{zone} {count}"),
        });
        out.push(format!("is spread unevenly: {}", zones.collect::<Vec<_>>().join(", ")));
    }
    if outcome.held_back > 0 {
        let count = outcome.held_back;
        out.push(match count {
            1 => "1 more start or stop follows in the next round: a round has its caps".to_owned(),
            _ => format!("{count} more starts and stops follow in the next rounds: a round has its caps"),
        });
    }
    out
}

/// Nothing got nearer to what is wanted for as long as the deployment allows.
pub(super) fn is_stalled(outcome: &Outcome<'_>, context: Context<'_>, name: &str) -> bool {
    let Some(rollout) = outcome.deployment.map(|d| &d.policy.rollout) else { return false };
    let since = context.observed.models.get(name).and_then(|seen| seen.unmoved_since);
    let unmoved = since.map(|since| context.now.saturating_duration_since(since).as_secs());
    rollout.progress_deadline_s > 0
        && unmoved.is_some_and(|unmoved| unmoved >= u64::from(rollout.progress_deadline_s))
}

fn about_replica(
    a: &Assignment,
    member: Option<&Member>,
    outcome: &Outcome<'_>,
    context: Context<'_>,
) -> Option<String> {
    let (id, node) = (&a.replica_id, &a.node_id);
    let lost = context.observed.nodes.get(node.as_str()).and_then(|n| n.lost_since);
    if a.phase == Phase::Leaving {
        return Some(match lost {
            Some(_) => format!("{id} shall end, but its node {node} is lost"),
            None => format!("{id} drains on {node}"),
        });
    }
    if let Some(since) = lost {
        let grace = context.rules.lost_grace.as_secs_f64();
        return Some(if context.is_given_up(node) {
            let why = outcome.shortage.map_or_else(String::new, |s| format!(" and {}", s.sentence()));
            format!("{id} is on the lost node {node}{why}")
        } else {
            let lost_s = context.now.saturating_duration_since(since).as_secs();
            format!(
                "{id} waits for node {node}, lost for {lost_s} s; after {grace:.0} s it is placed elsewhere"
            )
        });
    }
    let member = member?;
    if member.asleep {
        let engine = context.observed.engines.get(id.as_str());
        let sleeps = engine.is_some_and(|e| e.generation == a.generation && e.state == EngineState::Asleep);
        return Some(if sleeps {
            format!("{id} sleeps on {node}")
        } else {
            format!("{id} falls asleep on {node}")
        });
    }
    if member.ready {
        return about_old(a, member.why()?, outcome);
    }
    let engine = context.observed.engines.get(id.as_str()).filter(|e| e.generation == a.generation);
    Some(match engine {
        None => format!("{id} waits for {node} to start its engine"),
        Some(engine) => {
            let reason =
                if engine.reason.is_empty() { String::new() } else { format!(": {}", engine.reason) };
            if member.standing == Standing::Failing {
                let why =
                    outcome.shortage.map_or_else(String::new, |s| format!("; another {}", s.sentence()));
                return Some(format!("{id} fails over and over on {node}{reason}{why}"));
            }
            match engine.state {
                EngineState::Failed => format!("{id} failed on {node}{reason}"),
                EngineState::Asleep => format!("{id} wakes on {node}"),
                EngineState::Ready => format!("{id} is ready on {node} and waits to be registered"),
                state => format!("{id} is {} on {node}{reason}", state.as_str()),
            }
        }
    })
}

/// A replica that serves until another has its place.
fn about_old(a: &Assignment, why: Why, outcome: &Outcome<'_>) -> Option<String> {
    let (id, node) = (&a.replica_id, &a.node_id);
    let who = match why {
        Why::Spec => format!("{id} runs the former spec"),
        Why::Gpu => format!("{id} has a GPU on {node} that is not usable"),
        Why::Evicted(why) => format!("{id} shall leave {node} ({why})"),
        Why::Moving => format!("{id} moves away from {node}"),
        Why::Ended => format!("{id} should sleep on {node} and has ended"),
    };
    let waits = match outcome.blocked {
        None => "and waits until a replacement is ready".to_owned(),
        Some(Blocked::Room) => "and waits for its turn: there is no room for a second one".to_owned(),
        Some(Blocked::Budget(shortage)) => {
            let disruption = outcome.deployment.map(|d| &d.policy.disruption);
            let budget = match disruption.and_then(|d| d.min_available) {
                Some(n) => format!("min_available is {n}"),
                None => "no replica may be missing".to_owned(),
            };
            match shortage {
                Some(shortage) => format!("but stays: {budget}, and a replacement {}", shortage.sentence()),
                None => format!("but stays: {budget}"),
            }
        }
    };
    Some(format!("{who} {waits}"))
}
