//! Commands about single nodes, and drains of nodes and endpoints.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{connect, views};
use crate::{
    api::{ApiError, ControlPlane},
    args::{DrainArgs, EndpointArgs, NodeArgs},
    output::{say, show},
};

/// Between two looks at what drains.
const PAUSE: Duration = Duration::from_millis(200);
/// After which what an agent reported is news: requests that came just before a drain are not in what it had reported by then.
const REPORTED: Duration = Duration::from_secs(2);

/// Says `word` ("cordon", "maintenance", "uncordon") of a node and shows how it stands then.
pub(crate) async fn speak(args: &NodeArgs, word: &str) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let reply = server.speak_of_node(&args.node, word, args.reason.as_deref()).await?;
    show(args.remote.output, &reply.json, || views::node_table(&[reply.value]))?;
    Ok(())
}

/// The node that a drain names; None: it names an endpoint.
fn node(target: &str) -> Option<&str> {
    ["node/", "nodes/"].into_iter().find_map(|prefix| target.strip_prefix(prefix))
}

/// `penstock drain`
pub(crate) async fn drain(args: &DrainArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout_s);
    if let Some(node) = node(&args.target) {
        if args.move_streams {
            return Err(ApiError::Usage(
                "--move-streams is for endpoints: what happens to streams when engines leave a node, rollout.move_streams of \
                 their deployments says"
                    .into(),
            ));
        }
        let mut reply = server.speak_of_node(node, "maintenance", args.reason.as_deref()).await?;
        while args.wait && reply.value.engines > 0 {
            in_time(deadline, &server, node).await?;
            reply = server.node(node).await?;
        }
        show(args.remote.output, &reply.json, || views::node_table(&[reply.value]))?;
        return Ok(());
    }
    if args.reason.is_some() {
        return Err(ApiError::Usage("--reason is for nodes: penstock drain node/NAME --reason TEXT".into()));
    }
    let mut reply = server.drain(&args.target, args.move_streams).await?;
    if args.wait && reply.value.running + reply.value.waiting == 0 {
        sleep(REPORTED).await;
        reply = server.endpoint(&args.target).await?;
    }
    let mut said = None;
    loop {
        let left = reply.value.running + reply.value.waiting;
        if !args.wait || left == 0 {
            break;
        }
        if said.replace(left) != Some(left) {
            let s = if left == 1 { "" } else { "s" };
            say(&format!("{}: {left} request{s} left", args.target));
        }
        in_time(deadline, &server, &args.target).await?;
        reply = server.endpoint(&args.target).await?;
    }
    show(args.remote.output, &reply.json, || views::endpoint_table(&[reply.value]))?;
    Ok(())
}

/// Pauses, or says what is left once the time is up.
async fn in_time(deadline: Instant, server: &ControlPlane, target: &str) -> Result<(), ApiError> {
    if Instant::now() < deadline {
        sleep(PAUSE).await;
        return Ok(());
    }
    let endpoints = server.endpoints().await?.value.endpoints;
    let left = endpoints.iter().filter(|e| e.node == target || e.id == target);
    let left: Vec<String> =
        left.map(|e| format!("{} ({}, {} requests)", e.id, e.state, e.running + e.waiting)).collect();
    Err(ApiError::NotInTime(format!(
        "{target} is drained and stays so, but this is left: {}\n`penstock describe` says what it waits for",
        left.join(", ")
    )))
}

/// `penstock undrain`
pub(crate) async fn undrain(args: &EndpointArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    if let Some(node) = node(&args.endpoint_id) {
        let reply = server.speak_of_node(node, "uncordon", None).await?;
        show(args.remote.output, &reply.json, || views::node_table(&[reply.value]))?;
        return Ok(());
    }
    let reply = server.undrain(&args.endpoint_id).await?;
    show(args.remote.output, &reply.json, || views::endpoint_table(&[reply.value]))?;
    Ok(())
}
