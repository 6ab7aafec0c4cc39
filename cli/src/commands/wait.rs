//! `--wait`: asks the control plane again until the engines are as wanted.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::api::{ApiError, ControlPlane, Deployment, Reply};

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

fn settled(deployment: &Deployment) -> bool {
    let status = &deployment.status;
    status.ready == deployment.replicas && status.starting + status.draining + status.failed == 0
}

fn unfinished(deployment: &Deployment, longest: Duration) -> String {
    let status = &deployment.status;
    let mut text = format!(
        "after {} s {} has {} of {} engines ready ({} starting, {} draining, {} failed)",
        longest.as_secs(),
        deployment.model,
        status.ready,
        deployment.replicas,
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
