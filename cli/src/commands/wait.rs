//! `--wait` and `wait-ready`: asks the control plane again until the engines are as wanted.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{connect, views};
use crate::{
    api::{ApiError, ControlPlane, Deployment, Reply},
    args::WaitReadyArgs,
    output::show,
};

/// Between two questions. Engines take seconds to minutes to start.
const PAUSE: Duration = Duration::from_millis(200);

/// Waits until every wanted engine of `model` is ready and none is leaving.
pub(crate) async fn as_wanted(
    server: &ControlPlane,
    model: &str,
    longest: Duration,
) -> Result<Reply<Deployment>, ApiError> {
    let deadline = Instant::now() + longest;
    loop {
        let reply = server.deployment(model).await?;
        if settled(&reply.value) {
            return Ok(reply);
        }
        if Instant::now() >= deadline {
            return Err(ApiError::NotInTime(unfinished(&reply.value, longest)));
        }
        sleep(PAUSE).await;
    }
}

/// Waits until no engine of `model` is left.
pub(crate) async fn gone(server: &ControlPlane, model: &str, longest: Duration) -> Result<(), ApiError> {
    let deadline = Instant::now() + longest;
    loop {
        let endpoints = server.endpoints().await?.value.endpoints;
        let left: Vec<_> = endpoints.iter().filter(|e| e.model == model).map(|e| e.id.as_str()).collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(ApiError::NotInTime(format!(
                "{model} is deleted, but after {} s these engines still run: {}",
                longest.as_secs(),
                left.join(", ")
            )));
        }
        sleep(PAUSE).await;
    }
}

/// `penstock wait-ready`
pub(crate) async fn ready(args: &WaitReadyArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let mut models = args.models.clone();
    if models.is_empty() {
        models = server.deployments().await?.value.deployments.into_iter().map(|d| d.model).collect();
    }
    let deadline = Instant::now() + Duration::from_secs(args.timeout_s);
    let mut done = Vec::new();
    for model in &models {
        let left = deadline.saturating_duration_since(Instant::now());
        done.push(as_wanted(&server, model, left).await?);
    }
    let json = serde_json::json!({ "deployments": done.iter().map(|d| &d.json).collect::<Vec<_>>() });
    let deployments: Vec<Deployment> = done.into_iter().map(|reply| reply.value).collect();
    show(args.remote.output, &json, || views::deployment_table(&deployments))?;
    Ok(())
}

fn settled(deployment: &Deployment) -> bool {
    let status = &deployment.status;
    // Autoscaling may want another number than the operator's.
    let wanted = status.wanted.unwrap_or(deployment.replicas);
    status.ready == wanted && status.starting + status.draining + status.failed == 0
}

fn unfinished(deployment: &Deployment, longest: Duration) -> String {
    let status = &deployment.status;
    let mut text = format!(
        "after {} s {} has {} of {} engines ready ({} starting, {} draining, {} failed)",
        longest.as_secs(),
        deployment.model,
        status.ready,
        status.wanted.unwrap_or(deployment.replicas),
        status.starting,
        status.draining,
        status.failed
    );
    for reason in &status.waiting {
        text += &format!("\n  {reason}");
    }
    text + "\nThe change stays in force; `penstock endpoints` shows each engine."
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DeploymentStatus;

    #[test]
    fn settled_means_all_ready_and_none_on_its_way() {
        let with = |ready, draining| {
            let status = DeploymentStatus { ready, draining, ..Default::default() };
            settled(&Deployment { replicas: 2, status, ..Default::default() })
        };
        assert!(with(2, 0));
        assert!(!with(1, 0));
        assert!(!with(2, 1));
        assert!(!with(3, 0));
    }
}
