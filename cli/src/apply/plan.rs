//! What applying manifests would do, decided from what the API shows before anything is sent. Pure.

use std::collections::{BTreeMap, BTreeSet};

use penstock_controlplane::model::{
    revisions::{Difference, json_differences},
    route::{self, Known},
};
use serde_json::{Value, json};

use crate::manifest::{
    Kind, Manifest, Place, Problem, Wanted,
    check::{adapters, normal, shown_spec},
};

/// What becomes of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Create,
    Change,
    Unchanged,
    Delete,
}

impl Action {
    /// Once it is done.
    pub(crate) fn done(self) -> &'static str {
        match self {
            Self::Create => "created",
            Self::Change => "changed",
            Self::Unchanged => "unchanged",
            Self::Delete => "deleted",
        }
    }
}

/// One thing, and the way to it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// The document; None: no document names it, and it is pruned.
    pub(crate) at: Option<Place>,
    pub(crate) action: Action,
    pub(crate) differences: Vec<Difference>,
    /// What is put.
    pub(crate) body: Value,
    /// The revision that the decision was made by; None: the API shows none.
    pub(crate) revision: Option<u64>,
    /// It refers to something that another step makes.
    pub(crate) needs_others: bool,
}

/// What the API shows, by kind and name.
pub(crate) type Live = BTreeMap<(Kind, String), Value>;

/// What may be deleted because no document names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prune {
    pub(crate) kind: Kind,
    /// Names, with `*` for anything.
    pub(crate) pattern: String,
}

impl Prune {
    fn takes(&self, kind: Kind, name: &str) -> bool {
        self.kind == kind && matches(&self.pattern, name)
    }
}

/// Reads "deployments" or "deployments:team-*".
pub(crate) fn prune(text: &str) -> Result<Prune, String> {
    let (kind, pattern) = text.split_once(':').unwrap_or((text, "*"));
    let wanted =
        || "accepted is KIND or KIND:PATTERN with KIND one of deployments, routes, nodepolicies".to_owned();
    let kind = Kind::named(kind).ok_or_else(wanted)?;
    if pattern.is_empty() {
        return Err(wanted());
    }
    Ok(Prune { kind, pattern: pattern.to_owned() })
}

/// `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(first) else { return false };
    let parts: Vec<&str> = rest.split('*').collect();
    let Some((last, middle)) = parts.split_last() else { return true };
    for part in middle {
        match left.find(part) {
            Some(at) => left = left.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    left.len() >= last.len() && left.ends_with(last)
}

/// Every step in an order in which each finds what it refers to.
pub(crate) fn plan(wanted: &[Wanted], live: &Live, prunes: &[Prune]) -> Result<Vec<Step>, Vec<Problem>> {
    let mut steps: Vec<Step> = wanted.iter().map(|wanted| step(wanted, live)).collect();
    let pruned = pruned(wanted, live, prunes)?;
    check_routes(wanted, live, &pruned)?;
    let new: BTreeSet<String> = steps
        .iter()
        .filter(|step| {
            matches!(step.action, Action::Create | Action::Change) && step.kind != Kind::NodePolicy
        })
        .flat_map(|step| {
            std::iter::once(step.name.clone())
                .chain(adapters(&step.body).map(str::to_owned))
                .collect::<Vec<_>>()
        })
        .collect();
    for step in steps.iter_mut().filter(|step| step.kind == Kind::Route) {
        step.needs_others = referred(&step.body).any(|name| name != step.name && new.contains(name));
    }
    ordered(&mut steps);
    // What leads somewhere goes before what it leads to.
    let mut deletions = pruned;
    deletions.sort_by(|a, b| (b.kind, &a.name).cmp(&(a.kind, &b.name)));
    steps.extend(deletions);
    Ok(steps)
}

fn step(wanted: &Wanted, live: &Live) -> Step {
    let Manifest { at, kind, name, spec } = &wanted.manifest;
    let shown = live.get(&(*kind, name.clone()));
    let now = shown.and_then(|shown| shown_spec(*kind, shown));
    // A server that is newer may show what this program cannot read: it differs, then, and is shown as it came.
    let now = now.map(|spec| normal(*kind, name, &spec).unwrap_or(spec));
    let (mut body, mut target) = (spec.clone(), wanted.body.clone());
    if let Some(now) = now.as_ref().filter(|_| *kind == Kind::Deployment) {
        for path in [&["replicas"][..], &["rollout", "paused"]] {
            keep_unsaid(spec, now, path, &mut body, &mut target);
        }
    }
    let differences = match &now {
        Some(now) => json_differences(now, &target),
        None => json_differences(&json!({}), spec),
    };
    let action = match (&now, differences.is_empty()) {
        (None, _) => Action::Create,
        (Some(_), true) => Action::Unchanged,
        (Some(_), false) => Action::Change,
    };
    let revision = now.is_some().then(|| shown?.get("revision")?.as_u64()).flatten();
    let (at, name) = (Some(at.clone()), name.clone());
    Step { kind: *kind, name, at, action, differences, body, revision, needs_others: false }
}

/// The number of replicas, and whether a rollout is paused, are changed by other commands: a manifest that does not speak
/// of them leaves them as they are.
fn keep_unsaid(spec: &Value, now: &Value, path: &[&str], body: &mut Value, target: &mut Value) {
    let find = |value: &Value| path.iter().try_fold(value.clone(), |value, key| value.get(*key).cloned());
    let (None, Some(kept)) = (find(spec), find(now)) else { return };
    if find(target).as_ref() == Some(&kept) {
        return;
    }
    for value in [body, target] {
        let mut inner = value;
        for key in path {
            if !inner.is_object() {
                *inner = json!({});
            }
            let Some(fields) = inner.as_object_mut() else { return };
            inner = fields.entry(*key).or_insert(Value::Null);
        }
        *inner = kept.clone();
    }
}

fn pruned(wanted: &[Wanted], live: &Live, prunes: &[Prune]) -> Result<Vec<Step>, Vec<Problem>> {
    let named: BTreeSet<(Kind, &str)> =
        wanted.iter().map(|wanted| (wanted.manifest.kind, wanted.manifest.name.as_str())).collect();
    for prune in prunes {
        if !named.iter().any(|(kind, name)| prune.takes(*kind, name)) {
            let message = format!(
                "--prune: no document is a {} whose name fits {:?}, so all of them would be deleted; that is done one by \
                 one",
                prune.kind.as_str(),
                prune.pattern
            );
            let at = Place { file: "command line".into(), ..Place::default() };
            return Err(vec![Problem { at, field: String::new(), message }]);
        }
    }
    let mut steps = Vec::new();
    for ((kind, name), shown) in live {
        let gone =
            prunes.iter().any(|prune| prune.takes(*kind, name)) && !named.contains(&(*kind, name.as_str()));
        let Some(now) = shown_spec(*kind, shown).filter(|_| gone) else { continue };
        let now = normal(*kind, name, &now).unwrap_or(now);
        steps.push(Step {
            kind: *kind,
            name: name.clone(),
            at: None,
            action: Action::Delete,
            differences: json_differences(&now, &json!({})),
            body: json!({}),
            revision: shown.get("revision").and_then(Value::as_u64),
            needs_others: false,
        });
    }
    Ok(steps)
}

/// What a route's body refers to.
fn referred(body: &Value) -> impl Iterator<Item = &str> {
    let targets = body.get("targets").and_then(Value::as_array).into_iter().flatten();
    let targets = targets.filter_map(|target| target.get("model")?.as_str());
    targets.chain(fallbacks(body))
}

fn fallbacks(body: &Value) -> impl Iterator<Item = &str> {
    body.get("fallbacks").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// Checks every route of the manifests against the site as it will be: with the control plane's own check.
fn check_routes(wanted: &[Wanted], live: &Live, pruned: &[Step]) -> Result<(), Vec<Problem>> {
    let gone: BTreeSet<(Kind, &str)> = pruned.iter().map(|step| (step.kind, step.name.as_str())).collect();
    let mut bodies: BTreeMap<(Kind, &str), Value> = BTreeMap::new();
    for ((kind, name), shown) in
        live.iter().filter(|((kind, name), _)| !gone.contains(&(*kind, name.as_str())))
    {
        bodies.extend(shown_spec(*kind, shown).map(|spec| ((*kind, name.as_str()), spec)));
    }
    bodies.extend(wanted.iter().map(|w| ((w.manifest.kind, w.manifest.name.as_str()), w.body.clone())));
    let of = |kind: Kind| {
        bodies.iter().filter(move |((k, _), _)| *k == kind).map(|((_, name), body)| (*name, body))
    };
    let names: Vec<(&str, Vec<String>)> =
        of(Kind::Route).map(|(name, body)| (name, fallbacks(body).map(str::to_owned).collect())).collect();
    // Adapters that engines loaded by themselves are known to the API alone: it lists their implicit routes.
    let implicit = live.iter().filter(|((kind, name), shown)| {
        let own = shown_spec(*kind, shown).is_none() && !gone.contains(&(Kind::Deployment, name.as_str()));
        *kind == Kind::Route && own
    });
    let known = Known {
        deployed: of(Kind::Deployment).map(|(name, _)| name).collect(),
        adapters: of(Kind::Deployment)
            .flat_map(|(_, body)| adapters(body))
            .chain(implicit.map(|((_, name), _)| name.as_str()))
            .collect(),
        routes: names.iter().map(|(name, fallbacks)| (*name, fallbacks.as_slice())).collect(),
    };
    let mut problems = Vec::new();
    for wanted in wanted.iter().filter(|wanted| wanted.manifest.kind == Kind::Route) {
        let Manifest { at, name, spec, .. } = &wanted.manifest;
        let body = route::route_body(name, spec);
        if let Err(error) = body.and_then(|body| route::check(name, &body, &known)) {
            let message = format!("Route {name:?}: {}", error.message);
            problems.push(Problem { at: at.clone(), field: format!("spec.{}", error.field), message });
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// By kind; a route after those that it falls back to; else as they were written.
fn ordered(steps: &mut Vec<Step>) {
    steps.sort_by_key(|step| step.kind);
    let (mut rest, mut out): (Vec<Step>, Vec<Step>) =
        steps.drain(..).partition(|step| step.kind == Kind::Route);
    while !rest.is_empty() {
        let waits =
            |step: &Step| fallbacks(&step.body).any(|name| rest.iter().any(|other| other.name == name));
        // A circle was refused before; if there were one, its first goes first.
        let next = rest.iter().position(|step| !waits(step)).unwrap_or(0);
        out.push(rest.remove(next));
    }
    *steps = out;
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
