//! `penstock place`: a model on one node, in the words of the operations guide.
//!
//! The guide's scheduler writes a placement by hand. Here a placement is a decision of the control plane, so the command
//! makes a deployment of one replica that only that node can take, and waits until it has its place, which is at the same
//! key. A port cannot be given: the node's agent takes the next free one, and the endpoint says which.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::connect;
use crate::{
    api::{ApiError, Ask, Endpoint},
    args::PlaceArgs,
    output::{say, show},
};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn run(args: &PlaceArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    // A misspelt node is told now, and not as something that waits for ever.
    server.node(&args.node_id).await?;
    if let Some(port) = args.port {
        say(&format!(
            "port {port} is not passed on: the agent of {} takes the next free port from its engines.port_base up",
            args.node_id
        ));
    }
    let body = json!({
        "replicas": 1,
        "engine": args.engine,
        "model_path": args.model_name,
        "placement": { "node_selector": { "node_id": args.node_id } },
    });
    let path = ["api", "v2", "deployments", args.model_uid.as_str()];
    let there = match server.get(&path).await {
        Ok(there) => Some(there),
        Err(ApiError::NotFound(_)) => None,
        Err(error) => return Err(error),
    };
    let selected =
        |there: &Value| there.pointer("/placement/node_selector/node_id") == Some(&json!(args.node_id));
    if there.is_some_and(|there| !selected(&there)) {
        return Err(ApiError::Found(format!(
            "{} is deployed already, and not for {} alone: `penstock apply` or `penstock deploy` changes it",
            args.model_uid, args.node_id
        )));
    }
    let ask = Ask { body: Some(&body), ..Ask::default() };
    let deployment = server.ask(Method::PUT, &path, &ask).await?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout_s);
    loop {
        let endpoints = server.endpoints().await?.value.endpoints;
        let placed = endpoints.into_iter().find(|e| e.model == args.model_uid && e.node == args.node_id);
        if let Some(endpoint) = placed {
            let shown = json!({ "deployment": deployment, "endpoint": endpoint.id, "node": endpoint.node });
            show(args.remote.output, &shown, || line(&args.model_uid, &endpoint))?;
            return Ok(());
        }
        if Instant::now() >= deadline {
            let now = server.get(&path).await?;
            let waiting =
                now.pointer("/status/waiting").and_then(Value::as_array).cloned().unwrap_or_default();
            let why: Vec<&str> = waiting.iter().filter_map(Value::as_str).collect();
            let reasons = if why.is_empty() { "no reason is known yet".to_owned() } else { why.join("; ") };
            return Err(ApiError::NotInTime(format!(
                "{} is deployed and has no place yet: {reasons}",
                args.model_uid
            )));
        }
        sleep(PAUSE).await;
    }
}

/// As the guide has it.
fn line(uid: &str, endpoint: &Endpoint) -> String {
    format!(
        "placed: key=/placements/{uid} replica={} node={} generation={}\n",
        endpoint.id, endpoint.node, endpoint.generation
    )
}
