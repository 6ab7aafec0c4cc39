//! Commands about single nodes.

use super::{connect, views};
use crate::{api::ApiError, args::NodeArgs, output::show};

/// Says `word` ("cordon", "maintenance", "uncordon") of a node and shows how it stands then.
pub(crate) async fn speak(args: &NodeArgs, word: &str) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let reply = server.speak_of_node(&args.node, word, args.reason.as_deref()).await?;
    show(args.remote.output, &reply.json, || views::node_table(&[reply.value]))?;
    Ok(())
}
