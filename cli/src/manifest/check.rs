//! Whether documents can be applied: by the control plane's own checks, before anything is sent.

use std::collections::BTreeMap;

use penstock_controlplane::model::{
    EngineSpec, route,
    validate::{self, DeploymentBody, FieldError},
};
use serde_json::{Map, Value, json};

use super::{Document, Kind, Manifest, Problem};

/// What `apiVersion` may say.
const API_VERSION: &str = "penstock/v1";
/// The largest `limits.max_replicas` that a control plane can have; its own may be lower.
const MAX_REPLICAS: u32 = 1_000_000;

/// A manifest's spec with every default written out, as the API shows such a thing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) manifest: Manifest,
    pub(crate) body: Value,
}

/// All of them, or everything that is wrong.
pub(crate) fn check(documents: &[Document]) -> Result<Vec<Wanted>, Vec<Problem>> {
    let (mut wanted, mut problems) = (Vec::<Wanted>::new(), Vec::new());
    let mut seen: BTreeMap<(Kind, String), String> = BTreeMap::new();
    for document in documents {
        match one(document) {
            Err(problem) => problems.push(problem),
            Ok(found) => {
                let Manifest { kind, name, at, .. } = &found.manifest;
                let here = format!("{}:{}", at.file, at.line);
                match seen.insert((*kind, name.clone()), here) {
                    None => wanted.push(found),
                    Some(before) => problems.push(document.problem(
                        "name",
                        format!("{} {name:?} is there already, at {before}: leave one out", kind.as_str()),
                    )),
                }
            }
        }
    }
    if problems.is_empty() { Ok(wanted) } else { Err(problems) }
}

fn one(document: &Document) -> Result<Wanted, Problem> {
    let Some(fields) = document.value.as_object() else {
        return Err(document.problem("", "a manifest is an object with kind, name and spec"));
    };
    let known = ["apiVersion", "kind", "name", "spec"];
    if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
        let hint = near(field, &known).unwrap_or_else(|| hint_of_body(field, &known));
        return Err(document.problem(field, format!("unknown field: {hint}")));
    }
    match fields.get("apiVersion") {
        None => {}
        Some(version) if version.as_str() == Some(API_VERSION) => {}
        Some(other) => {
            return Err(document
                .problem("apiVersion", format!("it is {other}; accepted is {API_VERSION:?}, or nothing")));
        }
    }
    let names = Kind::ALL.map(Kind::as_str);
    let Some(kind) = fields.get("kind") else {
        return Err(document.problem("kind", format!("it is missing: one of {}", names.join(", "))));
    };
    let exact = Kind::ALL.into_iter().find(|known| kind.as_str() == Some(known.as_str()));
    let Some(kind) = exact else {
        let said = kind.as_str().unwrap_or_default();
        let meant = Kind::named(said).map(|kind| format!("did you mean {:?}?", kind.as_str()));
        let hint = meant
            .or_else(|| near(said, &names))
            .unwrap_or_else(|| format!("accepted are {}", names.join(", ")));
        return Err(document.problem("kind", format!("it is {kind}: {hint}")));
    };
    let Some(name) = fields.get("name").and_then(Value::as_str) else {
        return Err(document.problem("name", format!("give the name of the {} as a string", kind.as_str())));
    };
    checked_name(kind, name).map_err(|message| document.problem("name", message))?;
    let empty = json!({});
    let spec = match fields.get("spec") {
        None | Some(Value::Null) => &empty,
        Some(spec) => spec,
    };
    let body = normal(kind, name, spec).map_err(|error| {
        let field = if error.field.is_empty() { "spec".into() } else { format!("spec.{}", error.field) };
        document
            .problem(&field, error.message.replace("the body must be a JSON object", "it must be an object"))
    })?;
    let manifest = Manifest { at: document.at.clone(), kind, name: name.to_owned(), spec: spec.clone() };
    Ok(Wanted { manifest, body })
}

fn checked_name(kind: Kind, name: &str) -> Result<(), String> {
    match kind {
        Kind::NodePolicy => validate::node_id(name),
        Kind::Deployment | Kind::Route => validate::model_name(name).map_err(|error| error.message),
    }
}

/// A field of a body that stands one level too high.
fn hint_of_body(field: &str, known: &[&str]) -> String {
    let body =
        ["replicas", "engine", "targets", "taints", "cordoned", "args", "model_path", "labels", "metadata"];
    match body.contains(&field) {
        true if field == "metadata" => "the name stands at the top: name: NAME".into(),
        true => format!("it belongs into spec: spec.{field}"),
        false => format!("known are {}", known.join(", ")),
    }
}

fn near(said: &str, known: &[&str]) -> Option<String> {
    let nearest = known.iter().map(|name| (strsim::damerau_levenshtein(said, name), name)).min();
    nearest.filter(|(distance, _)| *distance <= 3).map(|(_, name)| format!("did you mean {name:?}?"))
}

/// A spec, or what the API shows, with every default written out.
pub(crate) fn normal(kind: Kind, name: &str, spec: &Value) -> Result<Value, FieldError> {
    match kind {
        Kind::Deployment => validate::deployment_body(name, spec, MAX_REPLICAS).map(|body| deployment(&body)),
        Kind::Route => {
            let body = route::route_body(name, spec)?;
            Ok(json!({ "targets": body.targets, "fallbacks": body.fallbacks }))
        }
        Kind::NodePolicy => {
            let policy = validate::node_policy_body(name, spec)?;
            let mut shown = serde_json::to_value(policy).unwrap_or_default();
            if let Some(fields) = shown.as_object_mut() {
                fields.remove("node_id");
            }
            Ok(shown)
        }
    }
}

fn deployment(DeploymentBody { replicas, spec, policy }: &DeploymentBody) -> Value {
    let EngineSpec { engine, model_path, args, env, gpus_per_replica, resources, lora, options, warm } = spec;
    let mut body = json!({
        "replicas": replicas, "engine": engine, "model_path": model_path, "args": args, "env": env,
        "gpus_per_replica": gpus_per_replica, "resources": resources, "lora": lora, "warm": warm,
        "placement": policy.placement, "rollout": policy.rollout, "disruption": policy.disruption,
        "autoscaling": policy.autoscaling,
    });
    // Those that are set: one that is not has no value that could be written out.
    if let (Value::Object(body), Ok(Value::Object(options))) = (&mut body, serde_json::to_value(options)) {
        body.extend(options);
    }
    body
}

/// The part of what the API shows of a thing that its spec could say; None: it is there by itself, nobody made it.
pub(crate) fn shown_spec(kind: Kind, shown: &Value) -> Option<Value> {
    let shown = match kind {
        Kind::NodePolicy => shown.get("policy").filter(|policy| !policy.is_null())?,
        Kind::Route if shown.get("implicit") == Some(&Value::Bool(true)) => return None,
        Kind::Route | Kind::Deployment => shown,
    };
    let own = match kind {
        Kind::Route => vec!["targets", "fallbacks"],
        Kind::NodePolicy => vec!["cordoned", "maintenance", "reason", "taints", "labels", "role", "prefetch"],
        Kind::Deployment => validate::deployment_fields(),
    };
    let fields = shown.as_object()?.iter().filter(|(field, _)| own.contains(&field.as_str()));
    Some(Value::Object(fields.map(|(field, value)| (field.clone(), bare(value))).collect()))
}

/// Without nulls: what is shown as null was not said.
fn bare(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = fields.iter().filter(|(_, value)| !value.is_null());
            Value::Object(said.map(|(field, value)| (field.clone(), bare(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.iter().map(bare).collect()),
        other => other.clone(),
    }
}

/// Names that deployments' bodies make known: the deployment's own and its adapters'.
pub(crate) fn adapters(body: &Value) -> impl Iterator<Item = &str> {
    let adapters = body.get("lora").and_then(Value::as_array).into_iter().flatten();
    adapters.filter_map(|adapter| adapter.get("name")?.as_str())
}

#[cfg(test)]
mod tests {
    use penstock_controlplane::model::Deployment;

    use super::*;
    use crate::manifest::{Place, yaml};

    /// As the API shows it.
    fn stored(deployment: &Deployment) -> Value {
        let mut shown = serde_json::to_value(deployment).unwrap();
        let policy = serde_json::to_value(&deployment.policy).unwrap();
        let fields = shown.as_object_mut().unwrap();
        fields.remove("policy");
        fields.extend(policy.as_object().unwrap().clone());
        shown
    }

    fn documents(text: &str) -> Vec<Document> {
        let read = yaml::documents(text).unwrap();
        let place = |n, line| Place { file: "fleet.yaml".into(), document: n + 1, line };
        let each = read.into_iter().enumerate();
        each.map(|(n, d)| Document { at: place(n, d.line), value: d.value, lines: d.lines }).collect()
    }

    fn refused(text: &str) -> String {
        let problems = check(&documents(text)).unwrap_err();
        problems.iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn every_refusal_names_file_line_document_and_field() {
        for (text, part) in [
            (
                "kind: Deployment\nname: m\nspec:\n  replcas: 3\n",
                "fleet.yaml:4 (document 1): spec.replcas: unknown field \"replcas\": did you mean \"replicas\"?",
            ),
            (
                "kind: Deployment\nname: m\nspec:\n  rollout:\n    paused: yes\n",
                "fleet.yaml:5 (document 1): spec.rollout.paused: rollout: paused must be true or false, not a string",
            ),
            (
                "kind: Route\nname: r\n---\nkind: Deployment\nname: m\nspec: [1]\n",
                "fleet.yaml:6 (document 2): spec: it must be an object, not an array",
            ),
            ("kind: Route\nname: r\nspec: {}\n", "fleet.yaml:3 (document 1): spec.targets: targets must be"),
            (
                "kind: Deploymnet\nname: m\n",
                ":1 (document 1): kind: it is \"Deploymnet\": did you mean \"Deployment\"?",
            ),
            ("kind: node-policies\nname: m\n", "did you mean \"NodePolicy\"?"),
            ("kind: Pod\nname: m\n", "accepted are NodePolicy, Deployment, Route"),
            ("name: m\n", "kind: it is missing"),
            ("kind: Route\n", "name: give the name of the Route as a string"),
            ("kind: Deployment\nname: a b\n", "name: a model name has 1 to 256 characters"),
            ("kind: NodePolicy\nname: a/b\n", "name: a node id has"),
            (
                "kind: Deployment\nname: m\nreplicas: 3\n",
                ":3 (document 1): replicas: unknown field: it belongs into spec",
            ),
            ("kind: Deployment\nmetadata: {name: m}\n", "the name stands at the top"),
            (
                "apiVersion: v1\nkind: Route\nname: m\n",
                "apiVersion: it is \"v1\"; accepted is \"penstock/v1\"",
            ),
            ("- 1\n", "a manifest is an object"),
            (
                "kind: Deployment\nname: m\n---\nkind: Deployment\nname: m\n",
                "fleet.yaml:5 (document 2): name: Deployment \"m\" is there already, at fleet.yaml:1",
            ),
        ] {
            let told = refused(text);
            assert!(told.contains(part), "{part}\nin\n{told}");
        }
        let both = refused("kind: Route\n---\nkind: Pod\nname: x\n");
        assert_eq!(both.lines().count(), 2, "all of it at once: {both}");
    }

    #[test]
    fn what_the_api_shows_reads_as_the_spec_it_came_from() {
        let spec = json!({"replicas": 2, "engine": "sim", "resources": {"tensor_parallel": 2},
            "max_model_len": 8192, "gpu_memory_utilization": 0.85, "seed": -1, "kv_events": true,
            "placement": {"tolerations": [{"key": "spot"}]}, "disruption": {"min_available": 1},
            "autoscaling": {"max": 4}, "lora": [{"name": "sql", "path": "/l"}],
            "warm": {"sleep": {"level": 1}, "restore": "off"}});
        let body = validate::deployment_body("m", &spec, MAX_REPLICAS).unwrap();
        let model = "m".to_owned();
        let DeploymentBody { replicas, spec: engine, policy } = body;
        let deployment = Deployment { model, replicas, spec: engine, created_unix_s: 1, policy };
        let shown = shown_spec(Kind::Deployment, &stored(&deployment)).unwrap();
        let wanted = normal(Kind::Deployment, "m", &spec).unwrap();
        assert_eq!(normal(Kind::Deployment, "m", &shown).unwrap(), wanted);
        // Every field of the types is one that a manifest can say.
        for field in stored(&deployment).as_object().unwrap().keys() {
            let own = ["model", "created_unix_s"].contains(&field.as_str());
            assert!(own || wanted.get(field).is_some(), "{field} is not compared");
        }
        let policy = json!({"policy": {"node_id": "n", "cordoned": true, "role": null}});
        let shown = shown_spec(Kind::NodePolicy, &policy).unwrap();
        assert_eq!(
            normal(Kind::NodePolicy, "n", &shown),
            normal(Kind::NodePolicy, "n", &json!({"cordoned": true}))
        );
        assert_eq!(shown_spec(Kind::NodePolicy, &json!({"policy": null})), None);
        assert_eq!(shown_spec(Kind::Route, &json!({"implicit": true, "targets": []})), None);
    }
}
