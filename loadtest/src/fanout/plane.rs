//! The control plane under test: a process of its own, looked at through /proc and its REST API.

use std::{path::Path, process::Stdio, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use super::Options;
use crate::usage;

/// How long it may take to start, to answer, and to stop.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) type Rest = Client<HttpConnector, Full<Bytes>>;

pub(super) struct Plane {
    pub(super) http: String,
    pub(super) grpc: String,
    pub(super) client: Rest,
    pid: u32,
    child: Child,
    /// Where it keeps its state.
    _folder: TempDir,
}

#[derive(Debug, Deserialize)]
struct Announced {
    http: String,
    grpc: String,
}

impl Plane {
    pub(super) async fn start(program: &Path, options: &Options) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| format!("cannot make a folder: {e}"))?;
        let announce = folder.path().join("announce.json");
        let set = |key: &str| format!("PENSTOCK_CONTROLPLANE__{key}");
        let mut child = Command::new(program)
            .args(["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(folder.path())
            .arg("--announce")
            .arg(&announce)
            .env(set("LIMITS__MAX_REPLICAS"), options.endpoints.to_string())
            .env(set("RECONCILE__MAX_STARTS"), "100000")
            // All endpoints register at once, each with a write to disk: agents that wait for that are not lost.
            .env(set("FLEET__LEASE_TTL_MS"), "600000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", program.display()))?;
        let pid = child.id().ok_or("the control plane has ended at once")?;
        let deadline = Instant::now() + PATIENCE;
        let Announced { http, grpc } = loop {
            let text = std::fs::read(&announce).ok();
            if let Some(found) = text.and_then(|text| serde_json::from_slice(&text).ok()) {
                break found;
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the control plane has ended: {status}"));
            }
            if Instant::now() > deadline {
                return Err("the control plane did not start".into());
            }
            sleep(Duration::from_millis(20)).await;
        };
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self { http, grpc, client, pid, child, _folder: folder })
    }

    /// CPU time it has used.
    pub(super) fn cpu(&self) -> Result<Duration, String> {
        usage::cpu(self.pid)
    }

    /// Memory that is in RAM.
    pub(super) fn memory(&self) -> Result<u64, String> {
        usage::memory(self.pid)
    }

    /// Snapshots it has published.
    pub(super) async fn snapshots(&self) -> Result<u64, String> {
        let text = call(&self.client, Method::GET, &self.http, "/metrics", "").await?;
        let line = text.lines().find_map(|l| l.strip_prefix("penstock_controlplane_xds_snapshots_total "));
        line.and_then(|count| count.trim().parse().ok()).ok_or_else(|| "/metrics: no snapshots".into())
    }

    /// Makes a deployment.
    pub(super) async fn deploy(&self, model: &str, replicas: u32) -> Result<(), String> {
        let body = format!(r#"{{"engine":"sim","replicas":{replicas}}}"#);
        let path = format!("/api/v2/deployments/{model}");
        call(&self.client, Method::PUT, &self.http, &path, &body).await.map(drop)
    }

    /// Ends it.
    pub(super) async fn stop(mut self) -> Result<(), String> {
        self.child.start_kill().map_err(|e| format!("cannot end the control plane: {e}"))?;
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended.map_err(|_| "the control plane does not end")?.map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// Lets an endpoint begin to drain, or end to.
pub(super) async fn drain(client: Rest, http: String, id: String, begin: bool) -> Result<(), String> {
    let verb = if begin { "drain" } else { "undrain" };
    call(&client, Method::POST, &http, &format!("/api/v2/endpoints/{id}/{verb}"), "").await.map(drop)
}

async fn call(client: &Rest, method: Method, http: &str, path: &str, body: &str) -> Result<String, String> {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{http}{path}"))
        .header("content-type", "application/json")
        .body(Full::from(body.to_owned()))
        .map_err(|e| format!("{path}: {e}"))?;
    let answered = async {
        let answer = client.request(request).await.map_err(|e| format!("{path}: {e}"))?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|e| format!("{path}: {e}"))?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        if status.is_success() { Ok(text) } else { Err(format!("{path}: {status}: {text}")) }
    };
    timeout(PATIENCE, answered).await.map_err(|_| format!("{path}: no answer"))?
}
