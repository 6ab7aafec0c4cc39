//! Routes: names for clients that lead to one or more deployments. What is stored, and what is accepted.
//!
//! A deployment without a route of its name has an implicit one, to itself. A route of a deployment's name replaces that one
//! and must keep the deployment among its targets (with weight 0 if need be): whoever asks for a deployed model never gets
//! something else only because two people chose the same name. Any other name is an alias.
//!
//! A route refers by name to what may be deleted later. It then stays as it is, and what is gone is reported as missing and
//! left out of what proxies are told; its share falls to the other targets.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::validate::{FieldError, model_name, object, string, whole_in};

/// Most targets of one route.
pub const MAX_TARGETS: usize = 16;
/// Most fallbacks of one route.
pub const MAX_FALLBACKS: usize = 16;
/// Largest weight of a target.
pub const MAX_WEIGHT: u32 = 1_000;
/// The weight of a target that is given none.
pub const DEFAULT_WEIGHT: u32 = 100;

/// `/routes/{name}`: where a name leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The name clients ask for.
    pub name: String,
    /// Who answers.
    pub targets: Vec<RouteTarget>,
    /// Other names, tried in this order when no target can answer.
    #[serde(default)]
    pub fallbacks: Vec<String>,
    /// Unix seconds at which it was first put.
    pub created_unix_s: i64,
}

/// One of a route's targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTarget {
    /// A deployment, or an adapter of one.
    pub model: String,
    /// Its share, as a part of the sum of weights; at most [`MAX_WEIGHT`].
    pub weight: u32,
}

/// A checked body of PUT /api/v2/routes/{name}.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteBody {
    /// Who answers.
    pub targets: Vec<RouteTarget>,
    /// Other names, in order.
    pub fallbacks: Vec<String>,
}

/// Checks the form of a PUT's body; [`check`] then looks at what it refers to.
pub fn route_body(name: &str, body: &Value) -> Result<RouteBody, FieldError> {
    let fields = object(body, &["targets", "fallbacks"])?;
    let wanted = format!("targets must be an array of 1 to {MAX_TARGETS} objects {{\"model\", \"weight\"}}");
    let items = fields.get("targets").and_then(Value::as_array);
    let items = items.filter(|items| (1..=MAX_TARGETS).contains(&items.len()));
    let items = items.ok_or_else(|| FieldError::new("targets", wanted))?;
    let mut targets: Vec<RouteTarget> = Vec::with_capacity(items.len());
    for (n, item) in items.iter().enumerate() {
        let at = format!("targets[{n}]");
        let target = target(item).map_err(|error| error.inside(&at))?;
        if targets.iter().any(|before| before.model == target.model) {
            let message = format!("{at}.model {:?} is there twice: give it one weight", target.model);
            return Err(FieldError::new(&format!("{at}.model"), message));
        }
        targets.push(target);
    }
    if targets.iter().all(|target| target.weight == 0) {
        return Err(FieldError::new("targets", "the weights must not all be 0: nobody would get a request"));
    }
    let fallbacks = fallbacks(name, fields.get("fallbacks"))?;
    Ok(RouteBody { targets, fallbacks })
}

fn target(item: &Value) -> Result<RouteTarget, FieldError> {
    let fields = object(item, &["model", "weight"])?;
    let model = fields.get("model").ok_or_else(|| FieldError::new("model", "model is missing"))?;
    let model = string("model", model)?;
    model_name(model)?;
    let weight = whole_in(fields, "weight", 0, u64::from(MAX_WEIGHT))?.unwrap_or(DEFAULT_WEIGHT);
    Ok(RouteTarget { model: model.to_owned(), weight })
}

fn fallbacks(name: &str, value: Option<&Value>) -> Result<Vec<String>, FieldError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let Some(items) = value.as_array().filter(|items| items.len() <= MAX_FALLBACKS) else {
        let wanted = format!("fallbacks must be an array of at most {MAX_FALLBACKS} names");
        return Err(FieldError::new("fallbacks", wanted));
    };
    let mut names: Vec<String> = Vec::with_capacity(items.len());
    for (n, item) in items.iter().enumerate() {
        let at = format!("fallbacks[{n}]");
        let fallback = string(&at, item)?;
        model_name(fallback).map_err(|error| FieldError::new(&at, error.message))?;
        if fallback == name || names.iter().any(|before| before == fallback) {
            let what = if fallback == name { "the route itself" } else { "there twice" };
            return Err(FieldError::new(&at, format!("{at} is {fallback:?}, which is {what}: leave it out")));
        }
        names.push(fallback.to_owned());
    }
    Ok(names)
}

/// Everything that a route may refer to.
#[derive(Debug, Clone, Default)]
pub struct Known<'a> {
    /// Names of deployments.
    pub deployed: BTreeSet<&'a str>,
    /// Names of deployments' adapters.
    pub adapters: BTreeSet<&'a str>,
    /// The fallbacks of each route.
    pub routes: BTreeMap<&'a str, &'a [String]>,
}

impl Known<'_> {
    /// Whether a target of this name can be served.
    pub fn is_target(&self, name: &str) -> bool {
        self.deployed.contains(name) || self.adapters.contains(name)
    }

    /// Whether a fallback of this name leads anywhere.
    pub fn is_name(&self, name: &str) -> bool {
        self.is_target(name) || self.routes.contains_key(name)
    }
}

/// Checks what the body of `name` refers to.
pub fn check(name: &str, body: &RouteBody, known: &Known<'_>) -> Result<(), FieldError> {
    for (n, target) in body.targets.iter().enumerate().filter(|(_, t)| !known.is_target(&t.model)) {
        let at = format!("targets[{n}].model");
        let message = format!(
            "{at} is {:?}: there is neither a deployment nor an adapter of that name (GET /api/v2/deployments \
             lists deployments; a route can be a fallback, not a target)",
            target.model
        );
        return Err(FieldError::new(&at, message));
    }
    if known.deployed.contains(name) && !body.targets.iter().any(|target| target.model == name) {
        let message = format!(
            "{name:?} is a deployment: a route of its name must keep it among its targets, with weight 0 if it \
             shall get nothing; for another name choose one that is not deployed"
        );
        return Err(FieldError::new("targets", message));
    }
    for (n, fallback) in body.fallbacks.iter().enumerate() {
        let at = format!("fallbacks[{n}]");
        if !known.is_name(fallback) {
            let message =
                format!("{at} is {fallback:?}: there is no deployment, adapter or route of that name");
            return Err(FieldError::new(&at, message));
        }
        let mut way = vec![name, fallback.as_str()];
        if leads_to(name, fallback, &known.routes, &mut way) {
            let message = format!("{at} would close a circle: {}", way.join(" -> "));
            return Err(FieldError::new(&at, message));
        }
    }
    Ok(())
}

/// Whether the fallbacks of `from` come back to `name`; `way` is then how. What is stored has no circles but through
/// `name`, so this ends; a bound on the way's length makes that certain.
fn leads_to<'a>(
    name: &str,
    from: &str,
    routes: &BTreeMap<&str, &'a [String]>,
    way: &mut Vec<&'a str>,
) -> bool {
    for next in routes.get(from).into_iter().flat_map(|fallbacks| fallbacks.iter()) {
        if next == name {
            way.push(next);
            return true;
        }
        if way.len() <= routes.len() + 1 && !way.contains(&next.as_str()) {
            way.push(next);
            if leads_to(name, next, routes, way) {
                return true;
            }
            way.pop();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_weight_left_out_is_the_same_for_all() {
        let body = route_body("m", &json!({"targets": [{"model": "a"}, {"model": "b", "weight": 0}]}));
        let weights: Vec<_> = body.expect("valid").targets.into_iter().map(|t| t.weight).collect();
        assert_eq!(weights, [DEFAULT_WEIGHT, 0]);
    }

    #[test]
    fn every_refusal_of_a_form_names_its_field() {
        let one = json!([{"model": "a"}]);
        for (body, field, part) in [
            (json!([]), "", "a JSON object"),
            (json!({}), "targets", "1 to 16"),
            (json!({"targets": []}), "targets", "1 to 16"),
            (json!({"targets": {}}), "targets", "array"),
            (json!({"target": one}), "target", "did you mean \"targets\"?"),
            (json!({"targets": ["a"]}), "targets[0]", "a JSON object"),
            (json!({"targets": [{}]}), "targets[0].model", "missing"),
            (json!({"targets": [{"model": "a b"}]}), "targets[0].model", "1 to 256 characters"),
            (
                json!({"targets": [{"model": "a", "weight": 1001}]}),
                "targets[0].weight",
                "0 to 1000, not 1001",
            ),
            (json!({"targets": [{"model": "a", "weight": -1}]}), "targets[0].weight", "not -1"),
            (json!({"targets": [{"model": "a", "weight": 0}]}), "targets", "must not all be 0"),
            (json!({"targets": [{"model": "a"}, {"model": "a"}]}), "targets[1].model", "twice"),
            (json!({"targets": one, "fallbacks": "b"}), "fallbacks", "array"),
            (json!({"targets": one, "fallbacks": [1]}), "fallbacks[0]", "a string"),
            (json!({"targets": one, "fallbacks": ["m"]}), "fallbacks[0]", "the route itself"),
            (json!({"targets": one, "fallbacks": ["b", "b"]}), "fallbacks[1]", "there twice"),
        ] {
            let error = route_body("m", &body).expect_err(&body.to_string());
            assert_eq!(error.field, field, "{body}: {}", error.message);
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
    }

    #[test]
    fn what_it_refers_to_must_be_there_and_lead_to_an_end() {
        let (alias, deeper) = (["deeper".to_owned()], ["chat".to_owned(), "big".to_owned()]);
        let known = Known {
            deployed: BTreeSet::from(["big", "small"]),
            adapters: BTreeSet::from(["sql"]),
            routes: BTreeMap::from([("alias", &alias[..]), ("deeper", &deeper[..])]),
        };
        let refused = |name: &str, targets: &[&str], fallbacks: &[&str]| {
            let target = |model: &&str| RouteTarget { model: (*model).into(), weight: 1 };
            let body = RouteBody {
                targets: targets.iter().map(target).collect(),
                fallbacks: fallbacks.iter().map(|name| (*name).into()).collect(),
            };
            check(name, &body, &known).err().map(|error| (error.field, error.message))
        };
        assert_eq!(refused("new", &["big", "sql"], &["small", "alias"]), None);
        assert_eq!(refused("big", &["small", "big"], &[]), None, "a deployment may be split");
        for (name, targets, fallbacks, field, part) in [
            ("new", &["gone"][..], &[][..], "targets[0].model", "neither a deployment nor an adapter"),
            ("new", &["alias"], &[], "targets[0].model", "not a target"),
            ("new", &["big"], &["gone"], "fallbacks[0]", "no deployment, adapter or route"),
            ("big", &["small"], &[], "targets", "must keep it among its targets"),
            ("chat", &["big"], &["small", "alias"], "fallbacks[1]", "chat -> alias -> deeper -> chat"),
        ] {
            let (at, message) = refused(name, targets, fallbacks).expect(part);
            assert_eq!(at, field, "{message}");
            assert!(message.contains(part), "{message}");
        }
    }
}
