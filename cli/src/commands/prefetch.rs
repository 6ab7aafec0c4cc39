//! `penstock prefetch`: a model onto nodes' disks before any engine there needs it.

use serde_json::{Value, json};

use super::{connect, tokens::cell};
use crate::{
    api::ApiError,
    args::PrefetchArgs,
    output::{show, table},
};

pub(super) async fn run(args: &PrefetchArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let nodes = match args.nodes.is_empty() {
        false => args.nodes.clone(),
        true => workers(&server.list("nodes").await?, &args.model, args.remove),
    };
    if nodes.is_empty() {
        let none = if args.remove { "no node is told to have it" } else { "no worker node is there" };
        return Err(ApiError::NotFound(none.into()));
    }
    let mut shown = Vec::with_capacity(nodes.len());
    for node in &nodes {
        shown.push(server.prefetch(node, &args.model, args.remove).await?.value);
    }
    let page = json!({ "model": args.model, "nodes": shown });
    show(args.remote.output, &page, || text(&shown, &args.model, args.remove))?;
    Ok(())
}

/// The nodes that are meant where none is named: those that could run it, or those that are told to have it.
fn workers(nodes: &[Value], model: &str, remove: bool) -> Vec<String> {
    let told = |node: &Value| {
        let models = node.pointer("/policy/prefetch").and_then(Value::as_array).into_iter().flatten();
        models.filter_map(Value::as_str).any(|name| name == model)
    };
    let works = |node: &Value| cell(node, "state") == "ready" && cell(node, "role") == "worker";
    let meant = nodes.iter().filter(|node| if remove { told(node) } else { works(node) });
    meant.map(|node| cell(node, "node_id")).collect()
}

fn text(nodes: &[Value], model: &str, remove: bool) -> String {
    let rows = nodes.iter().map(|node| {
        let statuses = node.get("prefetches").and_then(Value::as_array).into_iter().flatten();
        let status = statuses.into_iter().find(|status| cell(status, "model") == model);
        let (state, why) = match status {
            _ if remove => ("not wanted ahead".to_owned(), String::new()),
            Some(status) => (cell(status, "state"), cell(status, "reason")),
            None => ("told".to_owned(), "`penstock get nodes` says how far it is".to_owned()),
        };
        [cell(node, "node_id"), state, why]
    });
    table(["NODE", "STATE", "WHY"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_is_meant_unless_one_is_named_and_only_the_told_are_untold() {
        let nodes = [
            json!({"node_id": "a", "state": "ready", "role": "worker", "policy": {"prefetch": ["m"]}}),
            json!({"node_id": "b", "state": "ready", "role": "worker", "policy": null}),
            json!({"node_id": "c", "state": "lost", "role": "worker", "policy": {"prefetch": ["m", "n"]}}),
            json!({"node_id": "d", "state": "ready", "role": "arbitration"}),
        ];
        assert_eq!(workers(&nodes, "m", false), ["a", "b"]);
        assert_eq!(workers(&nodes, "m", true), ["a", "c"]);
        let done =
            json!({"node_id": "a", "prefetches": [{"model": "m", "state": "failed", "reason": "no room"}]});
        let told = text(&[done], "m", false);
        assert!(told.contains("failed") && told.contains("no room"), "{told}");
    }
}
