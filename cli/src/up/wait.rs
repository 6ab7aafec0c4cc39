//! Until all is ready: the engines in the control plane's eyes, then a real completion through the proxy.

use std::{future::Future, time::Duration};

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::error::UpError;
use crate::api::{ApiError, ControlPlane, Endpoint, root_cause};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// Asks until the answer is `Ok`. A control plane that has just announced itself may still refuse to be written.
pub(crate) async fn answered<T, F>(deadline: Instant, mut ask: impl FnMut() -> F) -> Result<T, UpError>
where
    F: Future<Output = Result<T, ApiError>>,
{
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                let again = match &error {
                    ApiError::Unreachable { .. } => true,
                    ApiError::Refused { status, .. } => status.is_server_error(),
                    _ => false,
                };
                if !again || Instant::now() >= deadline {
                    return Err(UpError::Failed(error.to_string()));
                }
            }
        }
        sleep(PAUSE).await;
    }
}

/// Waits for `wanted` ready engines of `model`; gives back every ready engine, of other models too. `tell` is called
/// with a line whenever the picture changes.
pub(crate) async fn engines_ready(
    server: &ControlPlane,
    model: &str,
    wanted: u32,
    deadline: Instant,
    mut tell: impl FnMut(&str),
) -> Result<Vec<Endpoint>, UpError> {
    let mut told = String::new();
    loop {
        let mut endpoints = answered(deadline, || server.endpoints()).await?.value.endpoints;
        let progress = progress(&endpoints, model, wanted);
        if progress.done {
            endpoints.retain(is_ready);
            return Ok(endpoints);
        }
        if progress.line != told {
            tell(&progress.line);
            told = progress.line;
        }
        if Instant::now() >= deadline {
            let waiting = server.deployment(model).await.map(|d| d.value.status.waiting).unwrap_or_default();
            let waiting: String = waiting.iter().map(|reason| format!("\n  {reason}")).collect();
            return Err(UpError::Failed(format!(
                "not ready in time: {told}{waiting}\nA longer wait: --ready-timeout-s SECONDS."
            )));
        }
        sleep(PAUSE).await;
    }
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.state == "ready"
}

struct Progress {
    done: bool,
    line: String,
}

fn progress(endpoints: &[Endpoint], model: &str, wanted: u32) -> Progress {
    let (ready, rest): (Vec<_>, Vec<_>) =
        endpoints.iter().filter(|e| e.model == model).partition(|e| is_ready(e));
    let rest: Vec<String> = rest
        .iter()
        .map(|e| {
            // Why an engine is not ready yet is of interest once something went wrong.
            let troubled = (e.state == "failed" || e.restarts > 0) && !e.reason.is_empty();
            let why = if troubled { format!(" ({})", e.reason) } else { String::new() };
            format!("{} {}{why}", e.id, e.state)
        })
        .collect();
    let list = if rest.is_empty() { String::new() } else { format!("; {}", rest.join(", ")) };
    let enough = u32::try_from(ready.len()).is_ok_and(|ready| ready >= wanted);
    Progress { done: enough, line: format!("{} of {wanted} engines of {model} are ready{list}", ready.len()) }
}

/// The proxy of this `up`.
pub(crate) struct Proxy<'a> {
    /// host:port for clients.
    pub(crate) public: &'a str,
    /// host:port for probes.
    pub(crate) private: &'a str,
}

impl Proxy<'_> {
    /// Waits until the proxy says it is ready and, given a model, until a completion of it came through.
    pub(crate) async fn serves(&self, model: Option<&str>, deadline: Instant) -> Result<(), UpError> {
        let client = client()?;
        loop {
            let why = match timeout_at(deadline, self.try_once(&client, model)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) => why,
                Err(_) => "no answer".into(),
            };
            if Instant::now() >= deadline {
                return Err(UpError::Failed(format!(
                    "the engines are ready, but the proxy at {} does not serve them in time: {why}",
                    self.public
                )));
            }
            sleep(PAUSE).await;
        }
    }

    async fn try_once(&self, client: &Client, model: Option<&str>) -> Result<(), String> {
        let response = client.get(format!("http://{}/readyz", self.private)).send().await;
        let response = response.map_err(|e| format!("/readyz: {}", root_cause(&e)))?;
        if response.status() != StatusCode::OK {
            let status = response.status();
            return Err(format!("/readyz says {status}: {}", response.text().await.unwrap_or_default()));
        }
        let Some(model) = model else { return Ok(()) };
        let body = json!({ "model": model, "prompt": "Hello", "max_tokens": 1 });
        let response = client.post(format!("http://{}/v1/completions", self.public)).json(&body).send().await;
        let response = response.map_err(|e| format!("/v1/completions: {}", root_cause(&e)))?;
        match response.status() {
            StatusCode::OK => Ok(()),
            // Keys were set through the environment, and we have none: it stands where it should.
            StatusCode::UNAUTHORIZED => Ok(()),
            status => {
                Err(format!("/v1/completions says {status}: {}", response.text().await.unwrap_or_default()))
            }
        }
    }

    /// The models it lists to clients; none when it asks for a key.
    pub(crate) async fn models(&self) -> Result<Vec<String>, UpError> {
        let failed = |e: reqwest::Error| UpError::Failed(format!("GET /v1/models: {}", root_cause(&e)));
        let response =
            client()?.get(format!("http://{}/v1/models", self.public)).send().await.map_err(failed)?;
        let list: Value = response.json().await.map_err(failed)?;
        let models = list.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        Ok(models.iter().filter_map(|m| m.get("id")?.as_str().map(String::from)).collect())
    }
}

fn client() -> Result<Client, UpError> {
    Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(120))
        .build()
        .map_err(|e| UpError::Failed(format!("cannot set up HTTP: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_the_models_own_engines_and_names_the_others_state() {
        let endpoint = |id: &str, model: &str, state: &str, reason: &str| Endpoint {
            id: id.into(),
            model: model.into(),
            state: state.into(),
            reason: reason.into(),
            ..Default::default()
        };
        let endpoints = [
            endpoint("m-0", "m", "ready", ""),
            endpoint("m-1", "m", "failed", "exit code 1"),
            endpoint("m-2", "m", "loading", ""),
            endpoint("n-0", "n", "ready", ""),
        ];
        let p = progress(&endpoints, "m", 2);
        assert!(!p.done);
        assert_eq!(p.line, "1 of 2 engines of m are ready; m-1 failed (exit code 1), m-2 loading");
        assert!(progress(&endpoints, "m", 1).done);
        assert!(progress(&[], "m", 0).done);
    }
}
