//! `penstock gpus`: GPUs of all nodes, out of the control plane. `penstock gpu clear` talks to the agent of the node, on its
//! private port: whoever clears a fault has just reset or replaced the GPU on that machine.

use std::time::Duration;

use reqwest::{Client, StatusCode, Url};
use serde_json::{Value, json};

use super::{connect, tokens::cell};
use crate::{
    api::{ApiError, root_cause},
    args::{ClearGpuArgs, GpuCommand, Remote},
    output::{show, table},
    up::last_agent,
};

/// Longer than an agent waits for its driver.
const PATIENCE: Duration = Duration::from_secs(15);

/// `penstock gpus`
pub(super) async fn list(remote: &Remote) -> Result<(), ApiError> {
    let nodes = connect(remote)?.list("nodes").await?;
    let mut gpus = Vec::new();
    for node in &nodes {
        for gpu in node.get("gpus").and_then(Value::as_array).into_iter().flatten() {
            let mut gpu = gpu.clone();
            if let Value::Object(fields) = &mut gpu {
                fields.insert("node".into(), json!(cell(node, "node_id")));
            }
            gpus.push(gpu);
        }
    }
    show(remote.output, &json!({ "gpus": gpus }), || as_table(&gpus))?;
    Ok(())
}

fn as_table(gpus: &[Value]) -> String {
    if gpus.is_empty() {
        return "no GPUs: no node has told of one\n".into();
    }
    let figure = |gpu: &Value, name: &str, unit: &str| match gpu.get(name) {
        Some(Value::Number(number)) => format!("{number}{unit}"),
        _ => "-".to_owned(),
    };
    let rows = gpus.iter().map(|gpu| {
        let used = figure(gpu, "memory_used_mib", "");
        let fault = cell(gpu, "fault");
        let why = if fault.is_empty() { cell(gpu, "reason") } else { format!("not used: {fault}") };
        [
            cell(gpu, "node"),
            cell(gpu, "uuid"),
            cell(gpu, "name"),
            Some(cell(gpu, "health")).filter(|health| !health.is_empty()).unwrap_or_else(|| "unknown".into()),
            format!("{used}/{} MiB", figure(gpu, "memory_total_mib", "")),
            figure(gpu, "utilization_percent", "%"),
            figure(gpu, "temperature_c", "°C"),
            figure(gpu, "power_w", " W"),
            why,
        ]
    });
    table(["NODE", "GPU", "NAME", "HEALTH", "MEMORY", "BUSY", "TEMP", "POWER", "REASON"], rows)
}

/// `penstock gpu`
pub(super) async fn run(command: &GpuCommand) -> Result<(), ApiError> {
    let GpuCommand::Clear(args) = command;
    let gpu = clear(args).await?;
    show(args.output, &gpu, || {
        let health = cell(&gpu, "health");
        let reason = cell(&gpu, "reason");
        match (health.as_str(), cell(&gpu, "message")) {
            (_, message) if !message.is_empty() => format!("{}: {message}\n", args.uuid),
            ("healthy", _) => format!("{} is healthy and in use again\n", args.uuid),
            _ => format!("{} is {health} all the same, by its present reading: {reason}\n", args.uuid),
        }
    })?;
    Ok(())
}

async fn clear(args: &ClearGpuArgs) -> Result<Value, ApiError> {
    let default = || ("http://127.0.0.1:18092".to_owned(), "the default".to_owned());
    let (address, origin) = match &args.agent {
        Some(address) => (address.clone(), "--agent".to_owned()),
        None => last_agent(args.data_dir.as_deref()).unwrap_or_else(default),
    };
    let wrong = |why: &str| {
        ApiError::Usage(format!(
            "{origin}: {address:?} is no address of an agent's private port: {why}; accepted: http://HOST:PORT"
        ))
    };
    let mut url = Url::parse(&address).map_err(|e| wrong(&e.to_string()))?;
    if url.scheme() != "http" || url.host_str().is_none() {
        return Err(wrong("not http"));
    }
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.clear().extend(["gpus", &args.uuid, "clear"]);
    }
    let client = Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .timeout(PATIENCE)
        .build()
        .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
    let unreachable = |error: &reqwest::Error| ApiError::AgentUnreachable {
        url: address.clone(),
        origin: origin.clone(),
        reason: root_cause(error),
    };
    let call = format!("POST {url}");
    let response = client.post(url).send().await.map_err(|e| unreachable(&e))?;
    let status = response.status();
    let body = response.bytes().await.map_err(|e| unreachable(&e))?;
    let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = answer.pointer("/error/message").and_then(Value::as_str);
    match (status, message) {
        (StatusCode::NOT_FOUND, Some(message)) => Err(ApiError::NotFound(message.to_owned())),
        (status, None) if status.is_success() && answer.is_object() => Ok(answer),
        (status, _) => Err(ApiError::Malformed {
            call,
            message: format!("{status}: {}", message.unwrap_or("no answer of a Penstock agent")),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_gpu_does_not_say_is_a_dash() {
        let gpus = [
            json!({"node": "n", "uuid": "g", "name": "X", "health": "faulty", "reason": "XID 79", "fault": "XID 79",
                "memory_total_mib": 10, "memory_used_mib": 0, "utilization_percent": 0}),
            json!({"node": "n", "uuid": "h", "fault": "", "memory_total_mib": 10}),
        ];
        let text = as_table(&gpus);
        let line = |uuid: &str| text.lines().find(|line| line.contains(uuid)).expect("a line").to_owned();
        assert!(line(" g ").contains("faulty") && line(" g ").contains("0/10 MiB"), "{text}");
        assert!(line(" g ").contains("0%") && line(" g ").ends_with("not used: XID 79"), "{text}");
        assert!(line(" h ").contains("unknown") && line(" h ").contains("-/10 MiB"), "{text}");
        assert!(as_table(&[]).contains("no GPUs"));
    }
}
