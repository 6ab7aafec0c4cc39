//! Commands that only look.

use serde_json::{Value, json};

use super::connect;
use crate::{
    api::{ApiError, Deployment, Endpoint, Node},
    args::{ClusterCommand, EndpointsArgs, Format, Remote},
    output::{say, show, table},
};

pub(crate) async fn status(remote: &Remote) -> Result<(), ApiError> {
    let server = connect(remote)?;
    let cluster = server.status().await?;
    let deployments = server.deployments().await?;
    let nodes = server.nodes().await?;
    let proxies = server.proxies().await?;
    let mut json = cluster.json.clone();
    if let Value::Object(fields) = &mut json {
        fields.insert("deployments".into(), deployments.json.get("deployments").cloned().unwrap_or_default());
    }
    show(remote.output, &json, || {
        let c = &cluster.value;
        let role = if c.leader { "leader" } else { "follower" };
        let mut text = format!(
            "control plane {} ({role}), up {}, {} store at revision {}, term {}\n",
            c.version,
            duration(c.uptime_s),
            c.store,
            c.revision,
            c.term
        );
        let ready = nodes.value.nodes.iter().filter(|n| n.state == "ready").count();
        text += &format!("nodes {ready} ready of {}, ", nodes.value.nodes.len());
        text += &format!("proxies {}\n", proxies.value.proxies.len());
        let held = json.get("publish_held").and_then(Value::as_array).into_iter().flatten();
        text.extend(held.filter_map(Value::as_str).map(|sentence| format!("HELD BACK: {sentence}\n")));
        text.push('\n');
        text + &deployment_table(&deployments.value.deployments)
    })?;
    Ok(())
}

/// `penstock cluster status`
pub(crate) async fn cluster(command: &ClusterCommand) -> Result<(), ApiError> {
    let ClusterCommand::Status(remote) = command;
    let json = connect(remote)?.get(&["api", "v2", "cluster", "status"]).await?;
    show(remote.output, &json, || {
        let rows = json.as_object().into_iter().flatten().map(|(field, value)| {
            let value = match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            [field.clone(), value]
        });
        table(["", ""], rows).trim_start().to_owned()
    })?;
    Ok(())
}

pub(crate) fn deployment_table(deployments: &[Deployment]) -> String {
    if deployments.is_empty() {
        return "no deployments; make one with `penstock deploy MODEL --replicas N`\n".into();
    }
    let rows = deployments.iter().map(|d| {
        [
            d.model.clone(),
            d.engine.clone(),
            format!("{}/{}", d.status.ready, d.replicas),
            d.status.starting.to_string(),
            d.status.draining.to_string(),
            d.status.failed.to_string(),
            d.status.waiting.join("; "),
        ]
    });
    table(["MODEL", "ENGINE", "READY", "STARTING", "DRAINING", "FAILED", "WAITS FOR"], rows)
}

pub(crate) async fn models(remote: &Remote) -> Result<(), ApiError> {
    let reply = connect(remote)?.models().await?;
    show(remote.output, &reply.json, || {
        let rows =
            reply.value.models.iter().map(|m| [m.model.clone(), m.ready.to_string(), m.replicas.to_string()]);
        table(["MODEL", "READY", "WANTED"], rows)
    })?;
    Ok(())
}

pub(crate) async fn endpoints(args: &EndpointsArgs) -> Result<(), ApiError> {
    let mut reply = connect(&args.remote)?.endpoints().await?;
    if let Some(model) = &args.model {
        reply.value.endpoints.retain(|e| e.model == *model);
        if let Some(list) = reply.json.get_mut("endpoints").and_then(Value::as_array_mut) {
            list.retain(|e| e.get("model").and_then(Value::as_str) == Some(model));
        }
    }
    show(args.remote.output, &reply.json, || endpoint_table(&reply.value.endpoints))?;
    Ok(())
}

pub(crate) fn endpoint_table(endpoints: &[Endpoint]) -> String {
    let rows = endpoints.iter().map(|e| {
        [
            e.id.clone(),
            e.state.clone(),
            e.address.clone(),
            e.node.clone(),
            e.generation.to_string(),
            e.pid.to_string(),
            e.restarts.to_string(),
            format!("{}+{}", e.running, e.waiting),
            format!("{:.0}%", e.kv_used_ratio * 100.0),
            e.reason.clone(),
        ]
    });
    table(["ID", "STATE", "ADDRESS", "NODE", "GENERATION", "PID", "RESTARTS", "LOAD", "KV", "REASON"], rows)
}

pub(crate) async fn nodes(remote: &Remote) -> Result<(), ApiError> {
    let reply = connect(remote)?.nodes().await?;
    show(remote.output, &reply.json, || node_table(&reply.value.nodes))?;
    Ok(())
}

pub(super) fn node_table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|n| {
        [
            n.node_id.clone(),
            node_state(n),
            n.zone.clone(),
            n.gpus.len().to_string(),
            n.engines.to_string(),
            n.agent_version.clone(),
            programs(n),
        ]
    });
    table(["NODE", "STATE", "ZONE", "GPUS", "ENGINES", "AGENT", "PROGRAMS"], rows)
}

/// The programs that said their version: "sim 0.32.0, vllm 0.32.0". Why others did not is in `penstock describe node`.
fn programs(node: &Node) -> String {
    let text =
        |program: &Value, key: &str| program.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let known = node.programs.iter().filter(|program| !text(program, "version").is_empty());
    let known: Vec<String> = known.map(|p| format!("{} {}", text(p, "name"), text(p, "version"))).collect();
    known.join(", ")
}

/// "ready", and what keeps new engines away.
fn node_state(node: &Node) -> String {
    let mut state = node.state.clone();
    if !node.role.is_empty() && node.role != "worker" {
        state.push_str(&format!(", {}", node.role));
    }
    if node.maintenance {
        state.push_str(", maintenance");
    } else if node.cordoned {
        state.push_str(", cordoned");
    }
    state
}

pub(crate) async fn proxies(remote: &Remote) -> Result<(), ApiError> {
    let reply = connect(remote)?.proxies().await?;
    show(remote.output, &reply.json, || proxy_table(&reply.value.proxies))?;
    Ok(())
}

pub(super) fn proxy_table(proxies: &[Value]) -> String {
    let rows = proxies.iter().map(|p| {
        ["node_id", "agent", "controlplane", "version_acked", "nacks", "last_nack"].map(|key| {
            match p.get(key) {
                None | Some(Value::Null) => String::new(),
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            }
        })
    });
    table(["PROXY", "AGENT", "TOLD BY", "VERSION", "REFUSALS", "LAST REFUSAL"], rows)
}

/// Says both versions, or ours alone when the control plane cannot be asked: which is no failure of this command.
pub(crate) async fn version(remote: &Remote) -> Result<(), ApiError> {
    let client = env!("CARGO_PKG_VERSION");
    let server = match connect(remote)?.status().await {
        Ok(reply) => Ok(reply.value.version),
        Err(error @ ApiError::Unreachable { .. }) => Err(error),
        Err(other) => return Err(other),
    };
    if let (Err(error), Format::Table) = (&server, remote.output) {
        say(&error.to_string());
    }
    let server = server.ok();
    show(remote.output, &json!({ "client": client, "controlplane": server }), || {
        format!("penstock       {client}\ncontrol plane  {}\n", server.as_deref().unwrap_or("not reached"))
    })?;
    Ok(())
}

fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DeploymentStatus;

    #[test]
    fn durations_show_their_two_largest_units() {
        let shown = [7, 67, 3_667, 90_000].map(duration);
        assert_eq!(shown, ["7 s", "1 min 7 s", "1 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn a_deployment_shows_what_it_waits_for() {
        let status = DeploymentStatus { ready: 1, waiting: vec!["no free GPU".into()], ..Default::default() };
        let text =
            deployment_table(&[Deployment { model: "m".into(), replicas: 2, status, ..Default::default() }]);
        assert!(text.contains("1/2") && text.ends_with("no free GPU\n"), "{text}");
        assert!(deployment_table(&[]).contains("penstock deploy"));
    }
}
