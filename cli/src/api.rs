//! The control plane's REST API as a client sees it: one struct per resource, one method per call.
//!
//! Every field has a default and unknown ones are ignored, so that this program works with a control plane that is
//! somewhat older or newer. A reply is kept beside its typed reading, so that `--output json` prints what the server
//! said and not what this program understood of it.

use std::{collections::BTreeMap, io, time::Duration};

use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Why a call came to nothing. The text says what was tried and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// An argument cannot be used.
    #[error("{0}")]
    Usage(String),
    /// Nothing answered.
    #[error(
        "cannot reach the control plane at {url} (from {origin}): {reason}\n\
         Is it running? `penstock up` starts one; --controlplane URL names another."
    )]
    Unreachable { url: String, origin: String, reason: String },
    /// 404.
    #[error("{0}")]
    NotFound(String),
    /// Any other status that is no success.
    #[error("the control plane refused {call}: {message} ({status})")]
    Refused { call: String, status: StatusCode, message: String },
    /// An answer that is not the API's.
    #[error("unexpected answer to {call}: {message}\nDoes the address belong to a Penstock control plane?")]
    Malformed { call: String, message: String },
    /// What was waited for did not happen.
    #[error("{0}")]
    NotInTime(String),
    /// stdout could not be written.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

/// A reply: as it came, and as it reads.
#[derive(Debug, Clone)]
pub(crate) struct Reply<T> {
    pub(crate) json: Value,
    pub(crate) value: T,
}

/// What a deployment should be: the body of its PUT. `None` leaves the choice to the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct DeploymentSpec {
    pub(crate) replicas: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) engine: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model_path: Option<String>,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gpus_per_replica: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) lora: Vec<LoraAdapter>,
}

/// A LoRA adapter of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LoraAdapter {
    pub(crate) name: String,
    pub(crate) path: String,
}

/// What a route should be: the body of its PUT.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct RouteSpec {
    pub(crate) targets: Vec<RouteTarget>,
    pub(crate) fallbacks: Vec<String>,
}

/// One of a route's targets. `None` leaves the weight to the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RouteTarget {
    pub(crate) model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) weight: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Route {
    pub(crate) name: String,
    pub(crate) targets: Vec<RouteTarget>,
    pub(crate) fallbacks: Vec<String>,
    pub(crate) missing: Vec<String>,
    pub(crate) implicit: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Routes {
    pub(crate) routes: Vec<Route>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Deployment {
    pub(crate) model: String,
    pub(crate) replicas: u32,
    pub(crate) engine: String,
    pub(crate) model_path: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) gpus_per_replica: u32,
    pub(crate) status: DeploymentStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct DeploymentStatus {
    pub(crate) ready: u32,
    pub(crate) starting: u32,
    pub(crate) draining: u32,
    pub(crate) failed: u32,
    pub(crate) waiting: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Deployments {
    pub(crate) deployments: Vec<Deployment>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Model {
    pub(crate) model: String,
    pub(crate) replicas: u32,
    pub(crate) ready: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Models {
    pub(crate) models: Vec<Model>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Endpoint {
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) node: String,
    pub(crate) address: String,
    pub(crate) state: String,
    pub(crate) generation: u64,
    pub(crate) pid: u32,
    pub(crate) restarts: u32,
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    pub(crate) kv_used_ratio: f64,
    pub(crate) reason: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Endpoints {
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    pub(crate) node_id: String,
    pub(crate) state: String,
    pub(crate) zone: String,
    pub(crate) gpus: Vec<Value>,
    pub(crate) agent_version: String,
    pub(crate) engines: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Nodes {
    pub(crate) nodes: Vec<Node>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Proxies {
    pub(crate) proxies: Vec<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ClusterStatus {
    pub(crate) version: String,
    pub(crate) term: u64,
    pub(crate) revision: u64,
    pub(crate) store: String,
    pub(crate) leader: bool,
    pub(crate) uptime_s: u64,
}

/// A control plane at an address.
#[derive(Debug, Clone)]
pub(crate) struct ControlPlane {
    base: Url,
    /// Where the address came from, for the error that nobody answers there.
    origin: String,
    client: Client,
}

impl ControlPlane {
    /// `address` is `http://HOST:PORT`; `origin` says where it came from ("--controlplane", "the default").
    pub(crate) fn new(address: &str, origin: &str) -> Result<Self, ApiError> {
        let wrong = |why: String| {
            ApiError::Usage(format!(
                "{origin}: {address:?} is no address of a control plane: {why}; accepted: http://HOST:PORT"
            ))
        };
        let base = Url::parse(address).map_err(|e| wrong(e.to_string()))?;
        if base.scheme() != "http" || base.host_str().is_none() {
            return Err(wrong("not http".into()));
        }
        // No proxy of the environment: control planes are neighbours, and often on the loopback address.
        let client = Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(30))
            .build()
            .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
        Ok(Self { base, origin: origin.into(), client })
    }

    pub(crate) async fn status(&self) -> Result<Reply<ClusterStatus>, ApiError> {
        self.call(Method::GET, &["api", "v2", "cluster", "status"], None::<&()>).await
    }

    pub(crate) async fn models(&self) -> Result<Reply<Models>, ApiError> {
        self.call(Method::GET, &["api", "v2", "models"], None::<&()>).await
    }

    pub(crate) async fn endpoints(&self) -> Result<Reply<Endpoints>, ApiError> {
        self.call(Method::GET, &["api", "v2", "endpoints"], None::<&()>).await
    }

    pub(crate) async fn nodes(&self) -> Result<Reply<Nodes>, ApiError> {
        self.call(Method::GET, &["api", "v2", "nodes"], None::<&()>).await
    }

    pub(crate) async fn proxies(&self) -> Result<Reply<Proxies>, ApiError> {
        self.call(Method::GET, &["api", "v2", "proxies"], None::<&()>).await
    }

    pub(crate) async fn deployments(&self) -> Result<Reply<Deployments>, ApiError> {
        self.call(Method::GET, &["api", "v2", "deployments"], None::<&()>).await
    }

    pub(crate) async fn deployment(&self, model: &str) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::GET, &["api", "v2", "deployments", model], None::<&()>).await
    }

    pub(crate) async fn deploy(
        &self,
        model: &str,
        spec: &DeploymentSpec,
    ) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::PUT, &["api", "v2", "deployments", model], Some(spec)).await
    }

    pub(crate) async fn scale(&self, model: &str, replicas: u32) -> Result<Reply<Deployment>, ApiError> {
        let body = serde_json::json!({ "replicas": replicas });
        self.call(Method::PATCH, &["api", "v2", "deployments", model], Some(&body)).await
    }

    pub(crate) async fn delete(&self, model: &str) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::DELETE, &["api", "v2", "deployments", model], None::<&()>).await
    }

    pub(crate) async fn routes(&self) -> Result<Reply<Routes>, ApiError> {
        self.call(Method::GET, &["api", "v2", "routes"], None::<&()>).await
    }

    pub(crate) async fn set_route(&self, name: &str, spec: &RouteSpec) -> Result<Reply<Route>, ApiError> {
        self.call(Method::PUT, &["api", "v2", "routes", name], Some(spec)).await
    }

    pub(crate) async fn delete_route(&self, name: &str) -> Result<Reply<Route>, ApiError> {
        self.call(Method::DELETE, &["api", "v2", "routes", name], None::<&()>).await
    }

    pub(crate) async fn drain(&self, endpoint: &str) -> Result<Reply<Endpoint>, ApiError> {
        self.call(Method::POST, &["api", "v2", "endpoints", endpoint, "drain"], None::<&()>).await
    }

    pub(crate) async fn undrain(&self, endpoint: &str) -> Result<Reply<Endpoint>, ApiError> {
        self.call(Method::POST, &["api", "v2", "endpoints", endpoint, "undrain"], None::<&()>).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<Reply<T>, ApiError> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path); // percent-encodes each: a model's name may hold '/'
        }
        let call = format!("{method} {url}");
        let request = self.client.request(method, url);
        let request = match body {
            Some(body) => request.json(body),
            None => request,
        };
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        self.read(call, response).await
    }

    async fn read<T: DeserializeOwned>(
        &self,
        call: String,
        response: Response,
    ) -> Result<Reply<T>, ApiError> {
        let status = response.status();
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let json = serde_json::from_slice::<Value>(&body);
        if !status.is_success() {
            return Err(refusal(call, status, json.ok()));
        }
        let json =
            json.map_err(|e| ApiError::Malformed { call: call.clone(), message: format!("not JSON: {e}") })?;
        let value =
            T::deserialize(&json).map_err(|e| ApiError::Malformed { call, message: e.to_string() })?;
        Ok(Reply { json, value })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ApiError {
        let url = self.base.as_str().trim_end_matches('/').to_string();
        ApiError::Unreachable { url, origin: self.origin.clone(), reason: root_cause(error) }
    }
}

/// The innermost error: "connection refused" rather than three layers of "error sending request".
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn refusal(call: String, status: StatusCode, json: Option<Value>) -> ApiError {
    let said = |key: &str| json.as_ref()?.get("error")?.get(key)?.as_str().filter(|s| !s.is_empty());
    let Some(message) = said("message") else {
        return ApiError::Malformed { call, message: format!("status {status} without a reason") };
    };
    match (status, said("field")) {
        (StatusCode::NOT_FOUND, _) => ApiError::NotFound(message.into()),
        (_, Some(field)) => ApiError::Refused { call, status, message: format!("{field}: {message}") },
        (_, None) => ApiError::Refused { call, status, message: message.into() },
    }
}
