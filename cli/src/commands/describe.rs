//! `penstock describe`: everything about one thing on one page, with what it waits for and why.

use serde_json::{Value, json};

use super::{connect, tokens::cell, views};
use crate::{
    api::{ApiError, ControlPlane, Endpoint},
    args::{DescribeArgs, Thing},
    manifest::emit::yaml,
    output::show,
};

/// Revisions of a deployment that are shown.
const REVISIONS: usize = 5;

pub(super) async fn run(args: &DescribeArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let page = match args.kind {
        Thing::Deployment => deployment(&server, &args.name).await?,
        Thing::Node => node(&server, &args.name).await?,
        Thing::Endpoint => endpoint(&server, &args.name).await?,
        Thing::Route => json!({ "route": server.get(&["api", "v2", "routes", &args.name]).await? }),
        Thing::Proxy => {
            let proxies = server.list("proxies").await?;
            let found = proxies.into_iter().find(|proxy| cell(proxy, "node_id") == args.name);
            let unknown = || ApiError::NotFound(format!("no proxy {:?} is connected", args.name));
            json!({ "proxy": found.ok_or_else(unknown)? })
        }
    };
    show(args.remote.output, &page, || text(&page))?;
    Ok(())
}

async fn deployment(server: &ControlPlane, name: &str) -> Result<Value, ApiError> {
    let deployment = server.get(&["api", "v2", "deployments", name]).await?;
    let endpoints = server.list("endpoints").await?;
    let endpoints: Vec<Value> = endpoints.into_iter().filter(|e| cell(e, "model") == name).collect();
    let routes = server.list("routes").await?;
    let leads = |route: &Value| {
        let targets = route.get("targets").and_then(Value::as_array).into_iter().flatten();
        let fallbacks = route.get("fallbacks").and_then(Value::as_array).into_iter().flatten();
        targets.map(|target| cell(target, "model")).any(|model| model == name)
            || fallbacks.filter_map(Value::as_str).any(|fallback| fallback == name)
    };
    let routes: Vec<Value> = routes.into_iter().filter(leads).collect();
    let history = server.get(&["api", "v2", "revisions", name]).await?;
    let mut revisions = history.get("revisions").and_then(Value::as_array).cloned().unwrap_or_default();
    revisions.truncate(REVISIONS);
    Ok(json!({
        "waits_for": deployment.pointer("/status/waiting"),
        "deployment": deployment,
        "endpoints": endpoints,
        "routes": routes,
        "last_revisions": revisions,
    }))
}

async fn node(server: &ControlPlane, name: &str) -> Result<Value, ApiError> {
    let node = server.get(&["api", "v2", "nodes", name]).await?;
    let endpoints = server.list("endpoints").await?;
    let endpoints: Vec<Value> = endpoints.into_iter().filter(|e| cell(e, "node") == name).collect();
    let models: Vec<String> = endpoints.iter().map(|e| cell(e, "model")).collect();
    let mut waits = Vec::new();
    for deployment in server.list("deployments").await? {
        let sentences =
            deployment.pointer("/status/waiting").and_then(Value::as_array).cloned().unwrap_or_default();
        let here = models.contains(&cell(&deployment, "model"));
        let sentences = sentences.iter().filter_map(Value::as_str);
        waits.extend(
            sentences
                .filter(|s| here || s.contains(name))
                .map(|s| format!("{}: {s}", cell(&deployment, "model"))),
        );
    }
    Ok(json!({ "waits_for": waits, "node": node, "endpoints": endpoints }))
}

async fn endpoint(server: &ControlPlane, name: &str) -> Result<Value, ApiError> {
    let endpoint = server.get(&["api", "v2", "endpoints", name]).await?;
    let about = |kind: &'static str, name: String| async move {
        match server.get(&["api", "v2", kind, &name]).await {
            Ok(shown) => Ok(shown),
            // A node that was taken away, a deployment that was deleted: the endpoint is on its way out.
            Err(ApiError::NotFound(_)) => Ok(Value::Null),
            Err(error) => Err(error),
        }
    };
    let node = about("nodes", cell(&endpoint, "node")).await?;
    let deployment = about("deployments", cell(&endpoint, "model")).await?;
    Ok(json!({
        "waits_for": deployment.pointer("/status/waiting"),
        "endpoint": endpoint,
        "node": node,
        "deployment": deployment,
    }))
}

/// First what it waits for, then a heading for each part.
fn text(page: &Value) -> String {
    let mut out = String::new();
    for (name, part) in page.as_object().into_iter().flatten() {
        let heading = name.replace('_', " ");
        match (name.as_str(), part) {
            ("waits_for", Value::Array(sentences)) => {
                let sentences: Vec<&str> = sentences.iter().filter_map(Value::as_str).collect();
                match sentences.is_empty() {
                    true => out += "waits for nothing\n\n",
                    false => out += &format!("waits for\n  {}\n\n", sentences.join("\n  ")),
                }
            }
            ("waits_for", _) => {}
            ("endpoints", Value::Array(items)) => {
                let endpoints: Vec<Endpoint> =
                    items.iter().filter_map(|item| serde_json::from_value(item.clone()).ok()).collect();
                out += &format!(
                    "endpoints ({})\n{}\n",
                    items.len(),
                    indented(&views::endpoint_table(&endpoints))
                );
            }
            (_, Value::Array(items)) if items.is_empty() => out += &format!("{heading}: none\n\n"),
            (_, Value::Null) => out += &format!("{heading}: gone\n\n"),
            (_, part) => out += &format!("{heading}\n{}\n", indented(&yaml(part))),
        }
    }
    out.trim_end().to_owned() + "\n"
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_begins_with_what_is_waited_for() {
        let page = json!({
            "waits_for": ["no node has a free GPU"], "deployment": {"model": "m", "replicas": 2},
            "endpoints": [{"id": "m-0", "state": "ready"}], "routes": [], "node": null,
        });
        let text = text(&page);
        assert!(
            text.starts_with("waits for\n  no node has a free GPU\n\ndeployment\n  model: m\n"),
            "{text}"
        );
        for part in ["endpoints (1)\n  ID", "m-0", "routes: none", "node: gone"] {
            assert!(text.contains(part), "{part} missing in\n{text}");
        }
        assert!(super::text(&json!({"waits_for": []})).contains("waits for nothing"));
    }
}
