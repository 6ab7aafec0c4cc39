//! Control planes as processes, each with its own way to etcd.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::time::Instant;

use super::{Cluster, gate::Gate};

/// Until a process must be up, or a cluster have settled.
const PATIENCE: Duration = Duration::from_secs(40);

/// See the module's text.
pub struct Planes {
    pub all: Vec<Plane>,
    /// Sent with every request; empty: none.
    pub token: String,
    client: reqwest::Client,
}

pub struct Plane {
    pub id: String,
    pub http: String,
    pub grpc: String,
    child: Option<Child>,
    /// One before each member of etcd.
    pub gates: Vec<Gate>,
    announce: std::path::PathBuf,
    env: Vec<(String, String)>,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Plane {
    fn launch(&mut self) {
        drop(std::fs::remove_file(&self.announce));
        let endpoints: Vec<String> =
            self.gates.iter().map(|gate| format!("http://{}", gate.address)).collect();
        let child = Command::new(env!("CARGO_BIN_EXE_penstock-controlplane"))
            .args(["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--log-level", "warn"])
            .args(["--etcd-endpoints", &endpoints.join(",")])
            .arg("--announce")
            .arg(&self.announce)
            .env("PENSTOCK_CONTROLPLANE__ELECTION__ID", &self.id)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    async fn announced(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = std::fs::read_to_string(&self.announce) {
                let addresses: Value = serde_json::from_str(&text).unwrap();
                self.http = addresses["http"].as_str().unwrap().into();
                self.grpc = addresses["grpc"].as_str().unwrap().into();
                return;
            }
            assert!(Instant::now() < deadline, "{} announced nothing", self.id);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Waits for its end; the exit code.
    pub fn wait_end(&mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }

    pub fn cut_off(&self) {
        self.gates.iter().for_each(Gate::close);
    }

    pub fn reconnect(&self) {
        self.gates.iter().for_each(Gate::open);
    }
}

impl Planes {
    /// `count` control planes on `cluster`; `env` gives further settings to each.
    pub async fn start(
        cluster: &Cluster,
        count: usize,
        env: impl Fn(usize) -> Vec<(String, String)>,
    ) -> Self {
        let mut all = Vec::new();
        for index in 0..count {
            let mut gates = Vec::new();
            for member in &cluster.members {
                gates.push(Gate::before(member.client_port).await);
            }
            let id = format!("cp{index}");
            let announce = cluster.dir.path().join(format!("{id}.json"));
            let (http, grpc) = (String::new(), String::new());
            let mut plane = Plane { id, http, grpc, child: None, gates, announce, env: env(index) };
            plane.launch();
            all.push(plane);
        }
        for plane in &mut all {
            plane.announced().await;
        }
        let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).build().unwrap();
        Self { all, token: String::new(), client }
    }

    pub async fn restart(&mut self, index: usize) {
        self.all[index].kill();
        self.all[index].launch();
        self.all[index].announced().await;
    }

    pub async fn call(
        &self,
        index: usize,
        method: &str,
        path: &str,
        body: Option<&str>,
    ) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("http://{}{path}", self.all[index].http));
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        Some((status, serde_json::from_str(&response.text().await.ok()?).unwrap_or(Value::Null)))
    }

    pub async fn status(&self, index: usize) -> Option<Value> {
        self.call(index, "GET", "/api/v2/cluster/status", None).await.map(|(_, body)| body)
    }

    /// The one that leads, among `from`.
    pub async fn leader(&self, from: &[usize]) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for index in from {
                if self.status(*index).await.is_some_and(|status| status["leader"] == true) {
                    return *index;
                }
            }
            assert!(Instant::now() < deadline, "nobody leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes through `index` until it is done; how long that took.
    pub async fn write(&self, index: usize, model: &str) -> Duration {
        let began = Instant::now();
        loop {
            let path = format!("/api/v2/deployments/{model}");
            let answer = self.call(index, "PUT", &path, Some("{\"replicas\":0}")).await;
            match answer {
                Some((200 | 201, _)) => return began.elapsed(),
                Some((503, body)) => assert!(body["error"]["message"].is_string(), "{body}"),
                Some((status, body)) => panic!("{status}: {body}"),
                None => {}
            }
            assert!(began.elapsed() < PATIENCE, "nothing could be written");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Until all of `of` publish the same version, which it returns.
    pub async fn same_version(&self, of: &[usize]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut versions = Vec::new();
            for index in of {
                let shown = self.call(*index, "GET", "/api/v2/cluster/status", None).await;
                versions
                    .push(shown.map(|(_, body)| body["published"].as_str().unwrap_or_default().to_owned()));
            }
            if let Some(Some(first)) = versions.first()
                && versions.iter().all(|version| version.as_ref() == Some(first))
            {
                return first.clone();
            }
            assert!(Instant::now() < deadline, "versions differ: {versions:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
