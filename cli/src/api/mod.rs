//! The control plane's REST API as a client sees it: one struct per resource here, one method per call in [`ControlPlane`].
//!
//! Every field has a default and unknown ones are ignored, so that this program works with a control plane that is
//! somewhat older or newer. A reply is kept beside its typed reading, so that `--output json` prints what the server
//! said and not what this program understood of it.

mod client;

use std::{collections::BTreeMap, io};

use reqwest::StatusCode;
use serde::{Deserialize, Serialize};

use serde_json::Value;

pub(crate) use client::{Ask, ControlPlane, root_cause};

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
    /// A proxy's private port did not answer.
    #[error(
        "cannot reach the proxy at {url} (from {origin}): {reason}\nIs it running? --proxy URL names its private port."
    )]
    ProxyUnreachable { url: String, origin: String, reason: String },
    /// An agent's private port did not answer.
    #[error(
        "cannot reach the agent at {url} (from {origin}): {reason}\nIs it running? --agent URL names its private port."
    )]
    AgentUnreachable { url: String, origin: String, reason: String },
    /// 404.
    #[error("{0}")]
    NotFound(String),
    /// Any other status that is no success.
    #[error("the control plane refused {call}: {message} ({status})")]
    Refused { call: String, status: StatusCode, message: String },
    /// An answer that is not the API's.
    #[error("unexpected answer to {call}: {message}\nDoes the address belong to a Penstock control plane?")]
    Malformed { call: String, message: String },
    /// Something was looked at, and it is not as it should be; what is wrong has been printed.
    #[error("{0}")]
    Found(String),
    /// Two things that were compared differ; how has been printed.
    #[error("{0}")]
    Differs(String),
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
    /// Typed fields.
    #[serde(flatten)]
    pub(crate) fields: serde_json::Map<String, Value>,
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
    /// Absent from older control planes.
    pub(crate) wanted: Option<u32>,
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
    pub(crate) programs: Vec<Value>,
    pub(crate) agent_version: String,
    pub(crate) engines: u32,
    pub(crate) role: String,
    pub(crate) cordoned: bool,
    pub(crate) maintenance: bool,
}

/// One state that a deployment had.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Revision {
    pub(crate) number: u64,
    pub(crate) unix_s: u64,
    pub(crate) rolled_back_to: Option<u64>,
    pub(crate) changes: Vec<Difference>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Revisions {
    pub(crate) revisions: Vec<Revision>,
}

/// A field that differs between two revisions; null: it was, or is, not there.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Difference {
    pub(crate) field: String,
    pub(crate) before: Value,
    pub(crate) after: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Differences {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) changes: Vec<Difference>,
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
