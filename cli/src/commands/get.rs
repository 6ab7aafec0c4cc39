//! `penstock get`: lists of one kind, or some of it by name.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    connect, routes,
    tokens::{audit_table, cell, records, token_table},
    views,
};
use crate::{
    api::{ApiError, ControlPlane, Model},
    args::{GetArgs, Things},
    output::{print, show, table},
};

/// Where the API has a kind, and the fields that names are looked for in.
fn place(kind: Things) -> (&'static str, &'static [&'static str]) {
    match kind {
        Things::Deployments => ("deployments", &["model"]),
        Things::Models => ("models", &["model"]),
        Things::Placements => ("placements", &["model"]),
        Things::Nodes => ("nodes", &["node_id"]),
        Things::Endpoints => ("endpoints", &["id", "model"]),
        Things::Proxies => ("proxies", &["node_id"]),
        Things::Routes => ("routes", &["name"]),
        Things::Revisions => ("revisions", &["number"]),
        Things::Audit => ("audit", &["seq"]),
        Things::Tokens => ("tokens", &["name"]),
    }
}

pub(super) async fn run(args: &GetArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let (key, named_by) = place(args.kind);
    let items = match args.kind {
        Things::Revisions => revisions(&server, &args.names).await?,
        Things::Audit => records(&server.get(&["api", "v2", "audit"]).await?),
        _ => chosen(server.list(key).await?, named_by, &args.names, key)?,
    };
    if args.names_only {
        let first = named_by.first().copied().unwrap_or_default();
        let names: Vec<String> = items.iter().map(|item| cell(item, first) + "\n").collect();
        return Ok(print(&names.concat())?);
    }
    show(args.remote.output, &json!({ key: items }), || text(args.kind, &items))?;
    Ok(())
}

/// Those that are named, in the order of the list; every name must fit something.
fn chosen(items: Vec<Value>, fields: &[&str], names: &[String], kind: &str) -> Result<Vec<Value>, ApiError> {
    let fits = |item: &Value, name: &str| {
        fields.iter().any(|field| item.get(*field).and_then(Value::as_str) == Some(name))
    };
    if let Some(name) = names.iter().find(|name| !items.iter().any(|item| fits(item, name))) {
        return Err(ApiError::NotFound(format!("there is no {name:?} among the {} {kind}", items.len())));
    }
    let wanted = |item: &Value| names.is_empty() || names.iter().any(|name| fits(item, name));
    Ok(items.into_iter().filter(wanted).collect())
}

/// Of each model, with its name; of every deployment if none is named.
async fn revisions(server: &ControlPlane, models: &[String]) -> Result<Vec<Value>, ApiError> {
    let mut models = models.to_vec();
    if models.is_empty() {
        models = server.deployments().await?.value.deployments.into_iter().map(|d| d.model).collect();
    }
    let mut all = Vec::new();
    for model in &models {
        let history = server.get(&["api", "v2", "revisions", model]).await?;
        for mut revision in history.get("revisions").and_then(Value::as_array).cloned().unwrap_or_default() {
            if let Some(fields) = revision.as_object_mut() {
                fields.insert("model".into(), model.as_str().into());
            }
            all.push(revision);
        }
    }
    Ok(all)
}

fn read<T: DeserializeOwned>(items: &[Value]) -> Vec<T> {
    items.iter().filter_map(|item| T::deserialize(item).ok()).collect()
}

fn text(kind: Things, items: &[Value]) -> String {
    match kind {
        Things::Deployments => views::deployment_table(&read(items)),
        Things::Models => {
            let models: Vec<Model> = read(items);
            let rows = models.into_iter().map(|m| [m.model, m.ready.to_string(), m.replicas.to_string()]);
            table(["MODEL", "READY", "WANTED"], rows)
        }
        Things::Nodes => views::node_table(&read(items)),
        Things::Endpoints => views::endpoint_table(&read(items)),
        Things::Routes => routes::route_table(&read(items)),
        Things::Proxies => views::proxy_table(items),
        Things::Tokens => token_table(items),
        Things::Audit => audit_table(items),
        Things::Placements => placements(items),
        Things::Revisions => {
            let rows = items.iter().map(|revision| {
                let changes = revision.get("changes").and_then(Value::as_array).into_iter().flatten();
                let fields: Vec<String> = changes.map(|change| cell(change, "field")).collect();
                [
                    cell(revision, "model"),
                    cell(revision, "number"),
                    cell(revision, "unix_s"),
                    fields.join(", "),
                ]
            });
            table(["MODEL", "REVISION", "AT (UNIX S)", "CHANGED"], rows)
        }
    }
}

fn placements(items: &[Value]) -> String {
    let rows = items.iter().flat_map(|placement| {
        let assignments = placement.get("assignments").and_then(Value::as_array).into_iter().flatten();
        assignments.map(|a| {
            let gpus = a.get("gpu_uuids").and_then(Value::as_array).into_iter().flatten();
            let gpus: Vec<&str> = gpus.filter_map(Value::as_str).collect();
            [
                cell(placement, "model"),
                cell(a, "replica_id"),
                cell(a, "node_id"),
                gpus.join(" "),
                cell(a, "generation"),
                cell(a, "phase"),
            ]
        })
    });
    table(["MODEL", "REPLICA", "NODE", "GPUS", "GENERATION", "PHASE"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_choose_and_one_that_is_not_there_is_told() {
        let items = vec![json!({"id": "m-0", "model": "m"}), json!({"id": "n-0", "model": "n"})];
        let choose = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            chosen(items.clone(), &["id", "model"], &names, "endpoints")
        };
        assert_eq!(choose(&[]).unwrap().len(), 2);
        assert_eq!(choose(&["n"]).unwrap(), [items[1].clone()], "an endpoint is found by its model as well");
        let error = choose(&["m-0", "x"]).unwrap_err().to_string();
        assert_eq!(error, "there is no \"x\" among the 2 endpoints");
    }

    #[test]
    fn a_placement_has_a_line_for_each_replica() {
        let text = placements(&[json!({"model": "m", "assignments": [{"replica_id": "m-0", "node_id": "n",
            "gpu_uuids": ["a", "b"], "generation": 4, "phase": "active"}]})]);
        assert!(text.contains("m      m-0      n     a b   4           active"), "{text}");
    }
}
